"""ReadAhead: brings what an epoch needs next from the disk into memory, several reads in flight, before it is gathered."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from dali_pipeline.errors import PipelineError
from dali_pipeline.runtime.trace import span
from dali_pipeline.runtime.world import World
from dali_pipeline.sampling.plan import EpochPlan

if TYPE_CHECKING:
    from dali_pipeline.reading.source import BatchSource

READS_IN_FLIGHT = 4  # threads; each asks for a run of some MiB
REQUESTS_IN_FLIGHT = 16  # to a store: 20 ms of waiting each are hidden up to some GB/s
GATHERED_BYTES = 64 << 20  # that are gathered and not delivered yet, at most: four superbatches
MOST_GROUPS = 64  # ahead, where windows are tiny
SAMPLED = 16  # of so many runs one is looked at, where all that were lately lay in the cache


class ReadAhead:
    """Half a window ahead of where an epoch stands, into the page cache: no memory of this process.

    Blocks that were never met are read and hashed, so that a first epoch goes as fast as the others. What is in the cache
    already costs a look at a run in sixteen, in later epochs too; once one is not there, all are looked at. Damage is left for
    the gather to meet and name.

    From a store a whole window is brought ahead of what is gathered, from before the first batch on, so that its link is never
    idle; and its cache is told when the next epoch wants what this one has done with.
    """

    def __init__(self, source: BatchSource, plan: EpochPlan, world: World) -> None:
        self._source, self._plan, self._world = source, plan, world
        self._asked: dict[int, int] = {}  # by partition, the group behind the last one asked for
        self._pool: ThreadPoolExecutor | None = None
        self._unseen: list[tuple[int, int]] = []  # runs lately due that were not looked at
        self._process = os.getpid()
        self._remote = source.cache_bytes is not None
        self._groups = 1  # ahead
        if source.cache_bytes is not None:  # of a small cache a quarter at most
            every = plan.order.num_partitions * max(1, plan.order.window_bytes // 2)
            self._groups = max(2, min(2 + -(-GATHERED_BYTES // every), source.cache_bytes // (4 * every), MOST_GROUPS))

    def begin(self, step: int, places: Sequence[int] = ()) -> None:
        """Told where the epoch begins, before its first batch."""
        if self._remote:
            self.reached(step, places)

    def reached(self, step: int, places: Sequence[int] = ()) -> None:
        """Told of every step delivered, and `places` in the partitions where it has them; costs microseconds, but once in half
        a window."""
        due = []
        for partition, group in self._plan.groups(step, self._world.rank, self._world.world_size, places):
            begin = self._asked.get(partition, max(0, group - 1))
            due += [(partition, number) for number in range(begin, group + 1 + self._groups)]
            self._asked[partition] = max(begin, group + 1 + self._groups)
        late, self._unseen = (self._unseen, []) if self._source.cold else ([], self._unseen)
        if not (due or late):
            return
        if self._pool is None:
            threads = REQUESTS_IN_FLIGHT if self._remote else READS_IN_FLIGHT
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="readahead")
        if self._remote:
            for partition, group in due:
                self._from_store(self._pool, partition, group)
            return
        runs = [run for partition, group in due for run in self._plan.runs(partition, group)]
        if due:
            every, self._source.cold = 1 if self._source.cold else SAMPLED, False
            self._unseen = [run for number, run in enumerate(runs) if number % every]
            runs = runs[::every]
        for start, count in late + runs:
            self._pool.submit(self._bring, start, count)

    def _from_store(self, pool: ThreadPoolExecutor, partition: int, group: int) -> None:
        """Asks for a group's runs, and tells of the group that no batch needs any more when its runs come again."""
        runs = self._plan.runs(partition, group)
        for (start, count), need in zip(runs, self._plan.turns(partition, group).tolist(), strict=True):
            pool.submit(self._bring, start, count, need)
        if (done := group - self._groups - 2) >= 0:
            for (start, count), need in zip(
                self._plan.runs(partition, done), self._plan.turns(partition, done, 1).tolist(), strict=True
            ):
                pool.submit(self._tell, start, count, need)

    def _tell(self, start: int, count: int, need: float) -> None:
        with contextlib.suppress(PipelineError, OSError):
            self._source.wanted(start, count, need)

    def _bring(self, start: int, count: int, need: float | None = None) -> None:
        with contextlib.suppress(PipelineError, OSError), span("read ahead"):
            if need is not None:
                self._source.wanted(start, count, need)
            if self._source.bring(start, count):
                self._source.cold = True

    def close(self) -> None:
        """Waits for the reads in flight; leaves no thread behind."""
        if self._pool is not None and os.getpid() == self._process:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
