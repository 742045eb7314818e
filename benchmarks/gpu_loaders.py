"""The part of benchmarks/gpu_day.py that measures loaders alone, into the device.

They deliver float32, as training takes it, decoded on the device. GB/s count the bytes as stored, which are those that cross
the bus. The page cache is warm, and every set's hashes are checked before.
"""

from __future__ import annotations

import time
from functools import cache
from itertools import zip_longest
from typing import Any, NamedTuple

import torch

import dali_pipeline as dp
from benchmarks.gpu_sets import GRAPHS, SEQUENCES, opened
from benchmarks.gpu_work import Deadline, Report, Setup, run_grid
from dali_pipeline.loaders.options import NumWorkers, WindowKind
from dali_pipeline.tools.stages import wait_for

WARM_STEPS = 10  # not counted
SAMPLES = 3


class Loading(NamedTuple):
    """One combination of the loaders' part; the engine is empty for graphs."""

    name: str
    engine: str
    batch_size: int
    num_workers: NumWorkers
    window: WindowKind = "auto"

    @property
    def labels(self) -> tuple[str, str]:
        """Scenario and measured."""
        loader = f"{self.engine} engine" if self.engine else "GraphLoader"
        gathered = ", gathered" if self.window == "gather" else ""
        return f"{self.name}, batch {self.batch_size}", f"{loader}, workers={self.num_workers}{gathered}"


def loading_grid(*, quick: bool) -> list[Loading]:
    """Return all combinations: every set and engine at one batch size and number of workers before the next of these.

    The first number of workers is measured from the resident window and gathered, the others from the window alone. Graphs are
    read by threads with "auto", and gathered by as many processes as a number says, which start anew in each epoch.
    """
    threads: tuple[NumWorkers, ...] = (1, 2) if quick else (1, 4, 8, 2)
    processes: tuple[NumWorkers, ...] = ("auto", 1) if quick else ("auto", 4, 1, 8, 2)
    found: list[Loading] = []
    for batch_size in (8,) if quick else (32, 256):
        for of_sequences, of_graphs in zip_longest(threads, processes):
            windows: tuple[WindowKind, ...] = ("auto", "gather") if of_sequences == threads[0] else ("auto",)
            for window in windows:
                if of_sequences is not None:
                    ways = [(name, engine) for name in SEQUENCES for engine in ("dali", "torch")]
                    found += [Loading(name, engine, batch_size, of_sequences, window) for name, engine in ways]
                found += [Loading(name, "", batch_size, of_graphs, window) for name in GRAPHS]
    return found


def loaders(setup: Setup, deadline: Deadline, report: Report) -> None:
    """Part: loaders alone, into the device."""
    seconds = 0.05 if setup.quick else 0.6

    def measure(loading: Loading) -> None:
        kind: Any = dp.SequenceLoader if loading.engine else dp.GraphLoader
        loader = kind(
            read(setup, loading.name),
            **({"engine": loading.engine} if loading.engine else {}),
            batch_size=loading.batch_size,
            num_workers=loading.num_workers,
            window=loading.window,
            device=setup.device,
            drop_last=True,
        )
        warm_up(loader, seconds / 2, whole=loading.name == "molecules")  # which it keeps in memory from then on
        rates = rates_of(loader, seconds, deadline)
        gigabytes = [rate * float(loader.selection.record_bytes) / 1e9 for rate in rates]
        report.add(*loading.labels, "GB/s", gigabytes, cache="warm")
        report.add(*loading.labels, "records/s", rates, cache="warm")

    run_grid(loading_grid(quick=setup.quick), measure, lambda loading: loading.labels, setup, deadline, report)


def warm_up(loader: Any, seconds: float, *, whole: bool) -> None:
    """Take batches of an epoch for so many seconds, or all of them: the first ones allocate what later ones use again."""
    begun = time.perf_counter()
    for step, _ in enumerate(loader):
        if not whole and step >= WARM_STEPS and time.perf_counter() - begun > seconds:
            return


def rates_of(loader: Any, seconds: float, deadline: Deadline) -> list[float]:
    """Return SAMPLES rates in records per second, of so many seconds together, or of those until the deadline.

    The first batch of an epoch is left out: it pays for the epoch's start, which a set of a gigabyte would show far too often.
    Waits for the device at the end of a sample and of an epoch alone.

    Raises:
        RuntimeError: If there was no time for a single batch behind the first one.
    """
    rates: list[float] = []
    records, spent = 0, 0.0
    while len(rates) < SAMPLES and not deadline.passed:
        batches = iter(loader)
        next(batches)
        wait_for(loader.device)
        begun = time.perf_counter()
        for batch in batches:
            records += len(batch)
            if spent + time.perf_counter() - begun > seconds / SAMPLES or deadline.passed:
                wait_for(loader.device)
                rates.append(records / (spent + time.perf_counter() - begun))
                if len(rates) == SAMPLES or deadline.passed:
                    break
                records, spent, begun = 0, 0.0, time.perf_counter()
        wait_for(loader.device)
        spent += time.perf_counter() - begun
        del batches  # which ends its threads and processes
    if not rates:
        raise RuntimeError("no batch came behind an epoch's first one before the deadline")
    return rates


@cache
def read(setup: Setup, name: str) -> dp.Dataset:
    """Open a set, and read all of it once, as every process hashes what it meets first. Takes a second per gigabyte or two."""
    data = opened(setup, name)
    kind: Any = dp.SequenceLoader if name in SEQUENCES else dp.GraphLoader
    for _ in kind(data, device="cpu", dtype=torch.float16, **({"engine": "torch"} if name in SEQUENCES else {})):
        pass
    return data
