"""Container: the cores and the memory that this process may use, by affinity and by control groups of either version."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def allowed_cores(system: Path = ROOT) -> float:
    """Return the cores that this process may use, in fractions if its container says so. Costs microseconds."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for folder in _groups("cpu", system):
        with suppress(OSError, ValueError):  # version 2: "max 100000" without a limit
            quota, period = (folder / "cpu.max").read_text().split()
            cores = min(cores, int(quota) / int(period))
        quota_us, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota_us and period_us and quota_us > 0:  # version 1: -1 without a limit
            cores = min(cores, quota_us / period_us)
    return cores


def allowed_memory(system: Path = ROOT) -> tuple[int, int]:
    """Return the bytes of memory, and the bytes available, which include the page cache because it gives way."""
    import psutil  # not needed for cores, which every worker process of a conversion asks for

    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    names = (("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"))
    for folder in _groups("memory", system):
        for limit_name, used_name, prefix in names:
            limit, used = _number(folder / limit_name), _number(folder / used_name)
            if limit is None or used is None or limit >= memory.total:  # no limit, in any notation
                continue
            cached = sum(_statistics(folder).get(f"{prefix}{name}", 0) for name in ("active_file", "inactive_file"))
            total, available = min(total, limit), min(available, max(0, limit - used + cached))
    return total, available


def _groups(controller: str, system: Path) -> Iterator[Path]:
    """Yield the folders of this process's control group and of its parents; in a container often only the root exists."""
    with suppress(OSError):
        for line in (system / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            root = system / "sys/fs/cgroup" / (controller if controllers else "")
            inside = PurePosixPath(path.lstrip("/"))
            yield from (root / part for part in dict.fromkeys((inside, *inside.parents)))


def _number(path: Path) -> int | None:
    """Return the number in a file; None if the file does not exist or contains no number (`max`)."""
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def _statistics(folder: Path) -> dict[str, int]:
    with suppress(OSError, ValueError):
        lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return {name: int(number) for name, number in lines}
    return {}
