"""ReadAhead: read what an epoch needs next from the disk before it is gathered, several reads in flight."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from dali_pipeline.errors import PipelineError
from dali_pipeline.runtime.trace import span
from dali_pipeline.runtime.world import World
from dali_pipeline.sampling.plan import EpochPlan

if TYPE_CHECKING:
    from dali_pipeline.reading.source import BatchSource

READS_IN_FLIGHT = 4  # threads; each reads a run of some MiB
FILES_IN_FLIGHT = 2  # if records lie in files of others: more threads wait for the interpreter lock, as each file is opened
REQUESTS_IN_FLIGHT = 16  # to a store: hides 20 ms of latency each up to some GB/s
GATHERED_BYTES = 64 << 20  # most bytes gathered and not yet delivered: four superbatches
MOST_GROUPS = 64  # most groups ahead if windows are tiny
SAMPLED = 16  # one run of this many is checked while all recent ones were cached


class ReadAhead:
    """Prefetch half a window ahead of an epoch into the page cache; it takes no memory of this process.

    Blocks never read before are read and hashed, so a first epoch is as fast as the others. If the data are cached, one run in
    sixteen is checked, in later epochs too; once one is not cached, all are. Damage is left for the gather to report.

    From a store, a whole window is downloaded ahead of what is gathered, from before the first batch on, so that the network is
    never idle. The cache is told when the next epoch needs what this one has finished with.

    Args:
        source: Where records are read.
        plan: Order of the epoch.
        world: This process among all.
        idle: Says whether to do nothing, because a resident window reads everything in large pieces. Default: never.
    """

    def __init__(self, source: BatchSource, plan: EpochPlan, world: World, *, idle: Callable[[], bool] = lambda: False) -> None:
        self._source, self._plan, self._world, self._idle = source, plan, world, idle
        self._requested: dict[int, int] = {}  # by partition, the group after the last one requested
        self._pool: ThreadPoolExecutor | None = None
        self._unchecked: list[tuple[int, int]] = []  # runs recently due that were not checked
        self._process = os.getpid()
        self._remote = source.cache_bytes is not None
        self._groups = 1  # groups ahead
        if source.cache_bytes is not None:  # at most a quarter of a small cache
            group_bytes = plan.order.num_partitions * max(1, plan.order.window_bytes // 2)
            self._groups = max(
                2, min(2 + -(-GATHERED_BYTES // group_bytes), source.cache_bytes // (4 * group_bytes), MOST_GROUPS)
            )

    def begin(self, step: int, cursors: Sequence[int] = ()) -> None:
        """Receive where the epoch begins, before its first batch."""
        if self._remote:
            self.reached(step, cursors)

    def reached(self, step: int, cursors: Sequence[int] = ()) -> None:
        """Receive every step delivered, and the `cursors` of the partitions if a budget is used.

        Costs microseconds, except once per half window.
        """
        if self._idle():
            return
        due = []
        for partition, group in self._plan.groups(step, self._world.rank, self._world.world_size, cursors):
            begin = self._requested.get(partition, max(0, group - 1))
            due += [(partition, number) for number in range(begin, group + 1 + self._groups)]
            self._requested[partition] = max(begin, group + 1 + self._groups)
        late, self._unchecked = (self._unchecked, []) if self._source.cold else ([], self._unchecked)
        if not (due or late):
            return
        if self._pool is None:
            local = FILES_IN_FLIGHT if self._source.in_place else READS_IN_FLIGHT
            threads = REQUESTS_IN_FLIGHT if self._remote else local
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="readahead")
        if self._remote:
            for partition, group in due:
                self._from_store(self._pool, partition, group)
            return
        runs = [run for partition, group in due for run in self._plan.runs(partition, group)]
        if due:
            stride, self._source.cold = 1 if self._source.cold else SAMPLED, False
            self._unchecked = [run for number, run in enumerate(runs) if number % stride]
            runs = runs[::stride]
        for start, count in late + runs:
            self._pool.submit(self._prefetch, start, count)

    def _from_store(self, pool: ThreadPoolExecutor, partition: int, group: int) -> None:
        """Download a group's runs, and note when the runs of the group just finished are needed again."""
        runs = self._plan.runs(partition, group)
        for (start, count), need in zip(runs, self._plan.next_needed(partition, group).tolist(), strict=True):
            pool.submit(self._prefetch, start, count, need)
        if (finished := group - self._groups - 2) >= 0:
            for (start, count), need in zip(
                self._plan.runs(partition, finished), self._plan.next_needed(partition, finished, 1).tolist(), strict=True
            ):
                pool.submit(self._note_need, start, count, need)

    def _note_need(self, start: int, count: int, need: float) -> None:
        with contextlib.suppress(PipelineError, OSError):
            self._source.note_need(start, count, need)

    def _prefetch(self, start: int, count: int, need: float | None = None) -> None:
        with contextlib.suppress(PipelineError, OSError), span("read ahead"):
            if need is not None:
                self._source.note_need(start, count, need)
            if self._source.prefetch(start, count):
                self._source.cold = True

    def close(self) -> None:
        """Wait for the reads in flight; leave no thread behind."""
        if self._pool is not None and os.getpid() == self._process:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
