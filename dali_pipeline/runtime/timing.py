"""StepTimer: how long a training loop waited for data and how long it computed; replay: how fast it could be."""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import TYPE_CHECKING, Any, TypeVar

from dali_pipeline.runtime import trace

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class StepTimer:
    """Splits a loop's time into waiting for the next batch and everything else.

        timer = StepTimer()
        for batch in timer(loader):
            train(batch)
        print(timer.wait_seconds, timer.compute_seconds, timer.gap_share)

    Both are the host's seconds. A GPU works behind the host: it may be busy all the time while the host waits in `next()`, and
    idle while the host launches kernels. With its `device`, two CUDA events per step tell the true gap between the end of a
    step and the begin of the next; nothing waits for them. Costs two clock readings per step, on a GPU some microseconds more.
    A `Trace` shows the host's two, as `load` and `step`.

    Args:
        device: Where the loop computes. Only a GPU makes a difference. Default: None, as for a CPU.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._gpu = _DeviceTimes() if device is not None and device.type == "cuda" else None
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
            if self._gpu is not None:
                self._gpu.begin()
            try:
                yield batch
            finally:  # also where the loop is left by a break
                if self._gpu is not None:
                    self._gpu.end()
                now = time.perf_counter()
                self.compute_seconds += now - mark
                trace.add("step", mark, now)
                mark = now
        self._waited(mark)
        if self._gpu is not None:
            self._gpu.pause()  # what comes between two loops is no gap between steps

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
    def gap_share(self) -> float:
        """Share of the time in which the device had no step to work on, 0 to 1: what training loses to the input.

        On a GPU the gaps between its steps, of those that have ended; elsewhere `steady_wait_share`. Without the wait for the
        very first batch.
        """
        return self.steady_wait_share if self._gpu is None else self._gpu.gap_share

    @property
    def records_per_second(self) -> float:
        """Records through the loop a second, padding rows included."""
        return self.records / self.seconds if self.seconds else 0.0

    @property
    def bytes_per_second(self) -> float:
        """Bytes of batches through the loop a second."""
        return self.bytes / self.seconds if self.seconds else 0.0


class _DeviceTimes:
    """Seconds of a GPU within steps and between them, by events in the caller's stream that are read once they have passed."""

    def __init__(self) -> None:
        self.gap_seconds = self.step_seconds = 0.0
        self._last_end: Any = None
        self._begin: Any = None
        self._passing: deque[tuple[Any, Any, Any]] = deque()  # end of the step before, or None; begin and end of a step

    def begin(self) -> None:
        self._begin = _event()

    def end(self) -> None:
        end = _event()
        self._passing.append((self._last_end, self._begin, end))
        self._last_end = end
        self._read()

    def pause(self) -> None:
        self._last_end = None

    @property
    def gap_share(self) -> float:
        self._read()
        whole = self.gap_seconds + self.step_seconds
        return self.gap_seconds / whole if whole else 0.0

    def _read(self) -> None:
        while self._passing and self._passing[0][2].query():
            before, begin, end = self._passing.popleft()
            self.step_seconds += begin.elapsed_time(end) / 1e3
            self.gap_seconds += before.elapsed_time(begin) / 1e3 if before is not None else 0.0


def _event() -> Any:
    import torch

    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def replay(batches: Iterable[T], count: int) -> Iterator[T]:
    """The first batch `count` times: a loop over it waits for no data, so its speed is the most that any loader can give it."""
    for first in batches:
        yield from repeat(first, count)
        return


def peak_rss_bytes() -> int:
    """The most resident memory this process has had so far, in bytes (Linux counts it in KiB, macOS in bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
