"""Limits of containers are found wherever the system keeps them, and none is made up."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from dali_pipeline.runtime.container import allowed_cores, allowed_memory

GB = 1 << 30


@pytest.fixture(autouse=True)
def _a_large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    memory = psutil.virtual_memory()._replace(total=256 * GB, available=200 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def machine(root: Path, groups: str, **files: str) -> Path:
    """A file system with what /proc/self/cgroup says and these files, `__` for a slash, under /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        folder, _, file = name.rpartition("__")
        path = root / "sys/fs/cgroup" / folder.replace("__", "/") / file.replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V1 = "4:memory:/box\n3:cpu,cpuacct:/box\n0::/\n"
STAT = "anon 5\nactive_file 1073741824\ninactive_file 2147483648\n"
STAT_1 = "active_file 7\ntotal_active_file 1073741824\ntotal_inactive_file 2147483648\n"


@pytest.mark.parametrize(
    ("groups", "files", "cores", "total", "available"),
    [
        ("", {}, 64, 256, 200),
        ("0::/\n", {"cpu_dot_max": "max 100000\n", "memory_dot_max": "max\n", "memory_dot_current": "5"}, 64, 256, 200),
        ("0::/\n", {"cpu_dot_max": "150000 100000\n"}, 1.5, 256, 200),
        # its own cache gives way
        ("0::/\n", {"memory_dot_max": str(8 * GB), "memory_dot_current": str(6 * GB), "memory_dot_stat": STAT}, 64, 8, 5),
        ("0::/\n", {"memory_dot_max": str(8 * GB), "memory_dot_current": str(9 * GB)}, 64, 8, 0),
        ("0::/\n", {"memory_dot_max": str(220 * GB), "memory_dot_current": "0"}, 64, 220, 200),  # others use the machine
        # a group and one above it: the tighter one counts
        ("0::/user/job\n", {"user__cpu_dot_max": "400000 100000", "user__job__cpu_dot_max": "800000 100000"}, 4, 256, 200),
        ("0::/user/job\n", {"memory_dot_max": str(9 * GB), "memory_dot_current": "0"}, 64, 9, 9),
        (V1, {"cpu__box__cpu_dot_cfs_quota_us": "200000", "cpu__box__cpu_dot_cfs_period_us": "100000"}, 2, 256, 200),
        (V1, {"cpu__cpu_dot_cfs_quota_us": "-1", "cpu__cpu_dot_cfs_period_us": "100000"}, 64, 256, 200),
        (
            V1,
            {
                "memory__box__memory_dot_limit_in_bytes": str(8 * GB),
                "memory__box__memory_dot_usage_in_bytes": str(4 * GB),
                "memory__box__memory_dot_stat": STAT_1,
                "memory__memory_dot_limit_in_bytes": "9223372036854771712",
                "memory__memory_dot_usage_in_bytes": "1",
            },
            64, 8, 7,
        ),
        (V1, {"cpu__cpu_dot_cfs_quota_us": "none", "memory__memory_dot_limit_in_bytes": ""}, 64, 256, 200),
    ],
)  # fmt: skip
def test_limits(tmp_path: Path, groups: str, files: dict[str, str], cores: float, total: int, available: int) -> None:
    root = machine(tmp_path, groups, **files)
    assert allowed_cores(root) == cores
    assert allowed_memory(root) == (total * GB, available * GB)


def test_this_machine() -> None:
    assert 0 < allowed_cores() <= 64
    total, available = allowed_memory()
    assert 0 < available <= total <= 256 * GB
