"""StepTimer: how long a training loop waited for data and how long it computed; replay: how fast it could be."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import TypeVar

from dali_pipeline import trace

T = TypeVar("T")


class StepTimer:
    """Splits a loop's time into waiting for the next batch and everything else.

        timer = StepTimer()
        for batch in timer(loader):
            train(batch)
        print(timer.wait_seconds, timer.compute_seconds)

    Costs two clock readings a step. On a GPU the two are the host's seconds: what runs asynchronously counts where
    the host waits for it. A `Trace` shows both, as `load` and `step`.
    """

    def __init__(self) -> None:
        self.wait_seconds = 0.0
        self.start_seconds = 0.0  # of them, waiting for the very first batch: libraries, files, the first hashes
        self.compute_seconds = 0.0
        self.records = 0
        self.bytes = 0
        self.steps = 0

    def __call__(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields the batches; a batch's `len()` counts as records, its `nbytes` as bytes, where it has them."""
        mark = time.perf_counter()
        for batch in batches:
            now = self._waited(mark)
            if not self.steps:
                self.start_seconds = self.wait_seconds
            self.steps += 1
            self.records += len(batch) if hasattr(batch, "__len__") else 0
            self.bytes += int(getattr(batch, "nbytes", 0))
            mark = now
            try:
                yield batch
            finally:  # also where the loop is left by a break
                now = time.perf_counter()
                self.compute_seconds += now - mark
                trace.add("step", mark, now)
                mark = now
        self._waited(mark)

    def _waited(self, since: float) -> float:
        now = time.perf_counter()
        self.wait_seconds += now - since
        trace.add("load", since, now)
        return now

    @property
    def seconds(self) -> float:
        """Wait and compute together."""
        return self.wait_seconds + self.compute_seconds

    @property
    def wait_share(self) -> float:
        """Share of the time spent waiting for data, 0 to 1."""
        return self.wait_seconds / self.seconds if self.seconds else 0.0

    @property
    def steady_wait_share(self) -> float:
        """The same without the wait for the very first batch, which a long run does not notice."""
        rest = self.seconds - self.start_seconds
        return (self.wait_seconds - self.start_seconds) / rest if rest > 0 else 0.0

    @property
    def records_per_second(self) -> float:
        """Records through the loop a second, padding rows included."""
        return self.records / self.seconds if self.seconds else 0.0

    @property
    def bytes_per_second(self) -> float:
        """Bytes of batches through the loop a second."""
        return self.bytes / self.seconds if self.seconds else 0.0


def replay(batches: Iterable[T], count: int) -> Iterator[T]:
    """The first batch `count` times: a loop over it waits for no data, so its speed is the most that any loader can give it."""
    for first in batches:
        yield from repeat(first, count)
        return


def peak_rss_bytes() -> int:
    """The most resident memory this process has had so far, in bytes (Linux counts it in KiB, macOS in bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
