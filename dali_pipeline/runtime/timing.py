"""StepTimer: how long a training loop waited for data and computed; replay: how fast the loop could be."""

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
    """Split the time of a training loop into waiting for the next batch and everything else.

    Both are seconds of the host. A GPU works behind the host: it may be busy all the time while the host waits in `next()`, and
    idle while the host launches kernels. With a GPU as `device`, two CUDA events per step measure the true gap between the end
    of a step and the begin of the next; nothing waits for them. A `Trace` shows the host's times as `load` and `step`.

    Costs two clock readings per step, on a GPU some microseconds more.

    Args:
        device: Device that the loop computes on; only a GPU makes a difference. Default: None, as for a CPU.

    Attributes:
        wait_seconds: Seconds spent waiting for batches.
        start_seconds: Seconds of these spent waiting for the very first batch: libraries, files, the first hashes.
        compute_seconds: Seconds spent in the loop's body.
        records: Number of records, padding included; the sum of the batches' `len()`.
        bytes: Bytes of the batches; the sum of their `nbytes`.
        steps: Number of steps.

    Examples:
        >>> timer = dp.StepTimer()  # doctest: +SKIP
        >>> for batch in timer(loader):  # doctest: +SKIP
        ...     train(batch)
        >>> print(timer.wait_seconds, timer.compute_seconds, timer.gap_share)  # doctest: +SKIP
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._gpu = _DeviceTimes() if device is not None and device.type == "cuda" else None
        self.wait_seconds = 0.0
        self.start_seconds = 0.0
        self.compute_seconds = 0.0
        self.records = 0
        self.bytes = 0
        self.steps = 0

    def __call__(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches, and measure the loop over them.

        Args:
            batches: Any iterable. `len()` of a batch counts as records, `nbytes` as bytes, if it has them.

        Returns:
            An iterator over the same batches.
        """
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
            finally:  # also after a break
                if self._gpu is not None:
                    self._gpu.end()
                now = time.perf_counter()
                self.compute_seconds += now - mark
                trace.add("step", mark, now)
                mark = now
        self._waited(mark)
        if self._gpu is not None:
            self._gpu.pause()  # the time between two loops is no gap between steps

    def _waited(self, since: float) -> float:
        now = time.perf_counter()
        self.wait_seconds += now - since
        trace.add("load", since, now)
        return now

    @property
    def seconds(self) -> float:
        """Seconds of waiting and computing together."""
        return self.wait_seconds + self.compute_seconds

    @property
    def wait_share(self) -> float:
        """Share of the time spent waiting for data, 0 to 1."""
        return self.wait_seconds / self.seconds if self.seconds else 0.0

    @property
    def steady_wait_share(self) -> float:
        """The wait share without the wait for the very first batch, which does not matter in a long run."""
        rest = self.seconds - self.start_seconds
        return (self.wait_seconds - self.start_seconds) / rest if rest > 0 else 0.0

    @property
    def gap_share(self) -> float:
        """Share of the time in which the device had no step to work on, 0 to 1: what training loses to the input.

        On a GPU these are the gaps between the steps that have ended; otherwise it is `steady_wait_share`. Without the wait for
        the very first batch.
        """
        return self.steady_wait_share if self._gpu is None else self._gpu.gap_share

    @property
    def records_per_second(self) -> float:
        """Records per second through the loop, padding included."""
        return self.records / self.seconds if self.seconds else 0.0

    @property
    def bytes_per_second(self) -> float:
        """Bytes of batches per second through the loop."""
        return self.bytes / self.seconds if self.seconds else 0.0


class _DeviceTimes:
    """Seconds of a GPU within and between steps, from events in the caller's stream, read once they have passed."""

    def __init__(self) -> None:
        self.gap_seconds = self.step_seconds = 0.0
        self._last_end: Any = None
        self._begin: Any = None
        self._passing: deque[tuple[Any, Any, Any]] = deque()  # end of the previous step, or None; begin and end of a step

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
    """Yield the first batch `count` times.

    A loop over it waits for no data, so its speed is the highest that any loader can give the loop.

    Args:
        batches: Any iterable.
        count: Number of batches to yield.

    Returns:
        An iterator; empty if there are no batches.
    """
    for first in batches:
        yield from repeat(first, count)
        return


def peak_rss_bytes() -> int:
    """Return the peak resident memory of this process in bytes (Linux counts it in KiB, macOS in bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
