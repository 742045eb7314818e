"""What every benchmark needs: repeats, cold files, the memory of a process tree, and a CSV that says where it was measured."""

from __future__ import annotations

import csv
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path

import psutil

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "scenario", "measured", "unit", "median", "lowest", "highest", "repeats", "reference", "reference_median", "ratio",
    "why", "machine", "versions", "commit", "command", "date",
)  # fmt: skip


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def rate(epoch: Callable[[], int], least_seconds: float) -> float:
    """Records a second of whole epochs, as many as take so long; an epoch returns its records."""
    records, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < least_seconds or not records:
        records += epoch()
    return records / passed


def alternately(ways: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What every way measures, `repeats` times in turn, as the machine wanders, after one turn that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            measured = way()
            found[name] += [measured] if turn else []
    return found


def evict(paths: Iterable[Path]) -> None:
    """Takes files out of the page cache, so that the next read comes from the disk."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def peak_memory(command: list[str]) -> tuple[float, float]:
    """Runs a command; its seconds, and the greatest memory of it and its children in bytes, shared pages counted once (PSS)."""
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    root = psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        try:
            for one in (root, *root.children(recursive=True)):
                total += one.memory_full_info().pss
        except psutil.Error:
            pass
        peak = max(peak, total)
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{shlex.join(command)} ended with {process.returncode}")
    return time.perf_counter() - started, peak


def _told(arguments: list[str]) -> list[str]:
    """Without the scratch folder: a path of one machine."""
    if "--folder" not in arguments:
        return arguments
    at = arguments.index("--folder")
    return arguments[:at] + arguments[at + 2 :]


class Results:
    """Rows of one benchmark, printed as they come and written whole to `results/<name>.csv`."""

    def __init__(self, name: str, packages: Iterable[str]) -> None:
        self._path = RESULTS / f"{name}.csv"
        self._rows: list[dict[str, object]] = []
        with Path("/proc/cpuinfo").open() as file:
            model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
        memory = psutil.virtual_memory().total / 2**30
        self._common = {
            "machine": f"{len(os.sched_getaffinity(0))} cores of {model}, {memory:.0f} GiB, no GPU",
            "versions": ", ".join([f"Python {platform.python_version()}", *(f"{one} {version(one)}" for one in packages)]),
            "commit": _commit(),
            "command": shlex.join(["python", "-m", f"benchmarks.{name}", *_told(sys.argv[1:])]),
            "date": date.today().isoformat(),
        }

    def add(
        self,
        scenario: str,
        measured: str,
        unit: str,
        values: list[float],
        reference: str = "",
        against: list[float] | None = None,
    ) -> None:
        """One row: median and spread of `values`, and their ratio to the median of `against`."""
        median, other = statistics.median(values), statistics.median(against) if against else None
        ratio = "" if other is None else f"{median / other:.3f}"
        self._rows.append(
            {
                "scenario": scenario,
                "measured": measured,
                "unit": unit,
                "median": f"{median:.4g}",
                "lowest": f"{min(values):.4g}",
                "highest": f"{max(values):.4g}",
                "repeats": len(values),
                "reference": reference,
                "reference_median": "" if other is None else f"{other:.4g}",
                "ratio": ratio,
                **self._common,
            }
        )
        against_text = f", {ratio} of {reference} ({other:.4g})" if other is not None else ""
        print(f"{scenario}: {measured} {median:.4g} {unit} ({min(values):.4g} to {max(values):.4g}){against_text}", flush=True)
        self._write()

    def missing(self, scenario: str, measured: str, why: str) -> None:
        """A row for what could not be measured."""
        self._rows.append({"scenario": scenario, "measured": measured, "why": why, **self._common})
        print(f"{scenario}: {measured} cannot run: {why}", flush=True)
        self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self._rows)


def _commit() -> str:
    """Of the checkout, and whether anything was changed since; nothing where this is no checkout."""
    with suppress(FileNotFoundError):
        command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return ""
