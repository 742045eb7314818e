"""ReadAhead: brings what an epoch needs next from the disk into memory, several reads in flight, before it is gathered."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from dali_pipeline.plan import EpochPlan
from dali_pipeline.schema import PipelineError
from dali_pipeline.source import BatchSource
from dali_pipeline.trace import span
from dali_pipeline.world import World

READS_IN_FLIGHT = 4  # threads; each asks for a run of some MiB
SAMPLED = 16  # of so many runs one is looked at, where all that were lately lay in the cache


class ReadAhead:
    """Half a window ahead of where an epoch stands, into the page cache: no memory of this process.

    Blocks that were never met are read and hashed, so that a first epoch goes as fast as the others. What is in the cache
    already costs a look at a run in sixteen, until one is not there. Damage is left for the gather to meet and name.
    """

    def __init__(self, source: BatchSource, plan: EpochPlan, world: World) -> None:
        self._source, self._plan, self._world = source, plan, world
        self._asked: dict[int, int] = {}  # by lane, the group behind the last one asked for
        self._pool: ThreadPoolExecutor | None = None
        self._cold = True  # whether something lately was not in the cache
        self._process = os.getpid()

    def reached(self, step: int, places: Sequence[int] = ()) -> None:
        """Told of every step delivered, and `places` in the lanes where it has them; costs microseconds, but once in half
        a window."""
        due = []
        for lane, group in self._plan.groups(step, self._world.rank, self._world.world_size, places):
            begin = self._asked.get(lane, max(0, group - 1))
            due += [(lane, number) for number in range(begin, group + 2)]
            self._asked[lane] = max(begin, group + 2)
        if not due:
            return
        every, self._cold = 1 if self._cold else SAMPLED, False
        for lane, group in due:
            for start, count in self._plan.runs(lane, group)[::every]:
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(READS_IN_FLIGHT, thread_name_prefix="readahead")
                self._pool.submit(self._bring, start, count)

    def _bring(self, start: int, count: int) -> None:
        with contextlib.suppress(PipelineError, OSError), span("read ahead"):
            if self._source.bring(start, count):
                self._cold = True

    def close(self) -> None:
        """Waits for the reads in flight; leaves no thread behind."""
        if self._pool is not None and os.getpid() == self._process:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
