"""GraphStretch: several batches of graphs that are gathered at once, for what a gather costs whatever it carries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dali_pipeline.damage import without_damaged
from dali_pipeline.digest import Mask
from dali_pipeline.graphsource import GraphRows, GraphSource
from dali_pipeline.memory import Buffers
from dali_pipeline.order import Ints
from dali_pipeline.plan import EpochPlan, Shares
from dali_pipeline.schema import PipelineError
from dali_pipeline.world import World


@dataclass(frozen=True, kw_only=True, eq=False)
class GraphStretch:
    """rows: of all batches · valid: (B,) bool · sizes: records of each batch · left_out: why, of every record that was."""

    rows: GraphRows
    valid: Mask
    sizes: Ints
    left_out: tuple[str, ...] = ()

    def batches(self) -> Iterator[tuple[GraphRows, Mask]]:
        """Each batch, as views."""
        valid = np.split(self.valid, np.cumsum(self.sizes)[:-1])
        return zip(self.rows.cut(self.sizes), valid, strict=True)


Loaded = tuple[list[GraphStretch], PipelineError | None]


class GraphGatherer:
    """Gathers one rank's stretches; several threads may. skips: errors for which a record is left out."""

    def __init__(self, source: GraphSource, world: World, skips: tuple[type[PipelineError], ...]) -> None:
        self.source, self._world, self._skips = source, world, skips

    def gather_into(self, plan: EpochPlan, steps: range, memory: Buffers) -> Loaded:
        """`gather` in a process of its own, whose parent reads the large arrays in `memory`."""
        self.source.use(memory)
        return self.gather(plan, steps)

    def gather(self, plan: EpochPlan, steps: range) -> Loaded:
        """The batches of these steps; where one is damaged, those before it, one by one, and the error."""
        try:
            shares = plan.batches(steps, self._world.rank, self._world.world_size)
            sizes = np.full(len(steps), len(shares.positions) // len(steps))
            try:
                return [self._gather(shares, sizes)], None
            except self._skips:
                if len(steps) == 1:
                    sound, left_out = without_damaged(shares, self.source.gather, self._skips, self.source.num_records)
                    return [self._gather(sound, sizes, left_out)], None
        except PipelineError as error:
            if len(steps) == 1:
                return [], error
        loaded: list[GraphStretch] = []
        for step in steps:
            one, failure = self.gather(plan, range(step, step + 1))
            loaded += one
            if failure is not None:
                return loaded, failure
        return loaded, None

    def _gather(self, shares: Shares, sizes: Ints, left_out: tuple[str, ...] = ()) -> GraphStretch:
        return GraphStretch(rows=self.source.gather(shares.positions), valid=shares.valid, sizes=sizes, left_out=left_out)
