"""Shared code of the benchmarks: repeats, cold files, memory of a process tree, and a CSV that names the machine."""

from __future__ import annotations

import csv
import mmap
import os
import platform
import re
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
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from dali_pipeline import Dataset

RESULTS = Path(os.environ.get("BENCH_RESULTS", Path(__file__).parent / "results"))
COLUMNS = (
    "scenario", "measured", "cache", "unit", "median", "lower_quartile", "upper_quartile", "lowest", "highest", "repeats",
    "reference", "reference_median", "ratio", "why", "machine", "versions", "commit", "command", "date",
)  # fmt: skip
Row = dict[str, str]


def seconds(work: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def rate(epoch: Callable[[], int], least_seconds: float) -> float:
    """Return the records per second of whole epochs, repeated for a minimum time; an epoch returns its records."""
    records, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < least_seconds or not records:
        records += epoch()
    return records / passed


def alternately(ways: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Measure every way `repeats` times in turn, because the speed of the machine varies; skip the first turn."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            measured = way()
            found[name] += [measured] if turn else []
    return found


def quartiles(values: list[float]) -> tuple[float, float]:
    """Return the quartiles; of a single value, that value twice."""
    if len(values) == 1:
        return values[0], values[0]
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, upper


def read_in_order(paths: Iterable[Path], *, direct: bool = True) -> int:
    """Read whole files, 8 MiB at a time, with or without the page cache; return their bytes. The limit of any reader."""
    buffer, total = mmap.mmap(-1, 8 << 20), 0  # aligned, as O_DIRECT wants it
    for path in paths:
        fd, at = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0)), 0
        while (got := os.preadv(fd, [buffer], at)) > 0:
            at += got
            if got < len(buffer):
                break
        os.close(fd)
        total += at
    return total


def read_rows(path: Path, begins: Iterable[int], sizes: Iterable[int], out: memoryview) -> int:
    """Read spans of a file one after the other into `out`, one `preadv` each; return their bytes.

    From the page cache, the limit of any reader that asks the system rather than mapping files.
    """
    fd, at = os.open(path, os.O_RDONLY), 0
    for begin, size in zip(begins, sizes, strict=True):
        at += os.preadv(fd, [out[at : at + size]], begin)
    os.close(fd)
    return at


def shards(data: Dataset) -> list[Path]:
    """Return the files of the training split."""
    return [
        data.shard_path("train", kind, number) for kind in data.schema.kinds for number in range(len(data.table("train", kind)))
    ]


def wait_for_gpu() -> None:
    """Wait until the GPU, if there is one, has finished its work."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def evict(paths: Iterable[Path]) -> None:
    """Drop files from the page cache, so that the next read comes from the disk."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def peak_memory(command: list[str]) -> tuple[float, float]:
    """Run a command; return its seconds, and the peak memory with its children in bytes (PSS)."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        peak = _peak(process)
    return time.perf_counter() - started, peak


def growth(command: list[str]) -> float:
    """Return the peak memory of a command and its children above that when it says it is ready, in bytes (PSS).

    It says so by a line on its standard output, and then waits for one on its standard input.
    """
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        before = _memory(process)
        process.stdin.write(b"go\n")
        process.stdin.close()
        return max(0.0, _peak(process) - before)


def _peak(process: subprocess.Popen[bytes]) -> float:
    """Wait until it ends; raise RuntimeError if it fails."""
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, _memory(process))
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
    return peak


def _memory(process: subprocess.Popen[bytes]) -> float:
    total = 0.0
    with suppress(psutil.Error):  # of a process that ends meanwhile
        root = psutil.Process(process.pid)
        for one in (root, *root.children(recursive=True)):
            total += one.memory_full_info().pss
    return total


def machine() -> tuple[str, str]:
    """Return cores, memory and GPU of the machine in words, and the part for a file name."""
    from dali_pipeline.runtime.container import (  # here, as the peers' environment lacks what it needs
        allowed_cores,
        allowed_memory,
    )

    with Path("/proc/cpuinfo").open() as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    cores, memory = f"{allowed_cores():g} cores", allowed_memory()[0] / 2**30
    gpu = ""
    if Path("/proc/driver/nvidia/version").exists():
        import torch  # some seconds, which a machine without one is spared

        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    short = re.sub(r"[^a-z0-9]+", "-", f"{cores} {model} {gpu}".lower()).strip("-")
    return f"{cores} of {model}, {memory:.0f} GiB, {gpu or 'no GPU'}", short


def results_path(theme: str) -> Path | None:
    """Return the newest file of a theme, `<theme>_<machine>_<date>.csv`, or None; of one day, the last by name."""
    paths = RESULTS.glob(f"{theme}_*_*.csv")
    return max(paths, key=lambda path: (path.stem.rsplit("_", 1)[1], path.name), default=None)


def rows_of(theme: str) -> list[Row]:
    """Return the rows of the newest file of a theme; none if it was not measured."""
    path = results_path(theme)
    if path is None:
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def without_folders(text: str) -> str:
    """Return a command with paths shortened to their last part, so that rows name no folder."""
    return re.sub(r"(?<![\w.:/-])/(?:[^/\s'\",:;()]+/)+", "", text)


def _told(arguments: list[str]) -> list[str]:
    """Return the arguments without --folder and its value."""
    kept, given = [], iter(arguments)
    for one in given:
        if one == "--folder":
            next(given, None)
        elif not one.startswith("--folder="):
            kept.append(without_folders(one))
    return kept


def _version(package: str) -> str:
    """Return a package's version; that of DALI by import, because its wheels are named by CUDA version."""
    if package != "nvidia-dali":
        return version(package)
    from dali_pipeline.loaders.dali import describe_dali  # here, as the peers' environment lacks what it needs

    return describe_dali()


class Results:
    """Rows of one theme, printed one by one and written whole to `results/<theme>_<machine>_<date>.csv`.

    Attributes:
        path: The file.
        facts: What every row says: machine, versions, commit, command and date.
    """

    def __init__(self, theme: str, packages: Iterable[str]) -> None:
        words, short = machine()
        self.path = RESULTS / f"{theme}_{short}_{date.today().isoformat()}.csv"
        self._rows: list[dict[str, object]] = []
        self.facts: dict[str, str] = {
            "machine": words,
            "versions": ", ".join(
                [f"Python {platform.python_version()}", *(f"{package} {_version(package)}" for package in packages)]
            ),
            "commit": _commit(),
            "command": shlex.join(["python", "-m", f"benchmarks.{theme}", *_told(sys.argv[1:])]),
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
        cache: str = "",
    ) -> None:
        """Add a row: median and spread of `values`, and their ratio to the median of `against`.

        cache: `warm` where files lay in the page cache, `cold` where they did not, empty where none are read.
        """
        lower, upper = quartiles(values)
        median, other = statistics.median(values), statistics.median(against) if against else None
        ratio = "" if other is None else f"{median / other:.3f}"
        self._rows.append(
            {
                "scenario": scenario,
                "measured": measured,
                "cache": cache,
                "unit": unit,
                "median": f"{median:.4g}",
                "lower_quartile": f"{lower:.4g}",
                "upper_quartile": f"{upper:.4g}",
                "lowest": f"{min(values):.4g}",
                "highest": f"{max(values):.4g}",
                "repeats": len(values),
                "reference": reference,
                "reference_median": "" if other is None else f"{other:.4g}",
                "ratio": ratio,
                **self.facts,
            }
        )
        against_text = f", {ratio} of {reference} ({other:.4g})" if other is not None else ""
        label = f"{scenario}: {measured}{f', {cache}' if cache and cache not in measured else ''}"
        print(f"{label} {median:.4g} {unit} ({lower:.4g} to {upper:.4g}){against_text}", flush=True)
        self._write()

    def missing(self, scenario: str, measured: str, why: str) -> None:
        """Add a row for something that could not be measured."""
        self._rows.append({"scenario": scenario, "measured": measured, "why": without_folders(why), **self.facts})
        print(f"{scenario}: {measured} cannot run: {why}", flush=True)
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self._rows)


def _commit() -> str:
    """Return the commit of the checkout, and whether files changed since; empty if this is no checkout."""
    with suppress(FileNotFoundError):
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return ""
