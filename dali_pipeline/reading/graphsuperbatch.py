"""GraphSuperbatch: several batches of graphs that are gathered at once, which shares the fixed cost of a gather."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dali_pipeline.errors import PipelineError
from dali_pipeline.reading.damage import without_damaged, without_padding
from dali_pipeline.reading.graphrows import GraphRows
from dali_pipeline.reading.graphsource import GraphSource
from dali_pipeline.runtime.memory import Buffers
from dali_pipeline.runtime.world import World
from dali_pipeline.sampling.budget import BudgetPlan, Cursors, Packed, Portion
from dali_pipeline.sampling.plan import EpochPlan
from dali_pipeline.types import Mask


@dataclass(frozen=True, kw_only=True, eq=False)
class GraphSuperbatch:
    """Several gathered batches.

    Attributes:
        rows: Graphs of all batches.
        portion: Records of all batches.
        left_out: The reason per record that was left out.
    """

    rows: GraphRows
    portion: Portion
    left_out: tuple[str, ...] = ()

    def batches(self) -> Iterator[tuple[GraphRows, Mask, Cursors]]:
        """Yield each batch as views: its graphs, their validity, and the cursors of the partitions after it."""
        sizes, cursors = self.portion.sizes, self.portion.cursors
        valid = np.split(self.portion.shares.valid, np.cumsum(sizes)[:-1])
        return zip(self.rows.cut(sizes), valid, cursors or ((),) * len(sizes), strict=True)


Loaded = tuple[list[GraphSuperbatch], PipelineError | None]


class GraphGatherer:
    """Gather the superbatches of one rank; several threads may.

    Args:
        source: Source of the graphs.
        world: This process among all.
        skips: Errors for which a record is left out.
    """

    def __init__(self, source: GraphSource, world: World, skips: tuple[type[PipelineError], ...]) -> None:
        self.source, self._world, self._skips = source, world, skips

    def use(self, memory: Buffers) -> None:
        """Take the memory of large arrays from these buffers from now on."""
        self.source.use(memory)

    def gather(self, plan: EpochPlan, steps: range) -> Loaded:
        """Gather the batches of these steps. If one is damaged, return those before it, one by one, and the error."""
        shares = plan.batches(steps, self._world.rank, self._world.world_size)
        return self.gather_portion(Portion(shares=shares, sizes=np.full(len(steps), len(shares.positions) // len(steps))))

    def gather_packed(self, budget: BudgetPlan, batches: list[Packed] | PipelineError) -> Loaded:
        """Gather batches that are already packed; if packing failed, return that error."""
        return ([], batches) if isinstance(batches, PipelineError) else self.gather_portion(budget.portion(batches))

    def gather_portion(self, portion: Portion) -> Loaded:
        """Gather batches whose records are known."""
        alone = len(portion.sizes) == 1
        try:
            try:
                return [GraphSuperbatch(rows=self.source.gather(portion.shares.positions), portion=portion)], None
            except self._skips:
                if alone:
                    sound, left_out = without_damaged(portion.shares, self.source.gather, self._skips, self.source.num_records)
                    if portion.cursors:  # a budget, which padding would exceed
                        sound = without_padding(sound)
                    sizes = np.array([len(sound.positions)])
                    rows = self.source.gather(sound.positions)
                    return [
                        GraphSuperbatch(rows=rows, portion=replace(portion, shares=sound, sizes=sizes), left_out=left_out)
                    ], None
        except PipelineError as error:
            if alone:
                return [], error
        loaded: list[GraphSuperbatch] = []
        for batch in portion.cut():
            gathered, failure = self.gather_portion(batch)
            loaded += gathered
            if failure is not None:
                return loaded, failure
        return loaded, None


def gather_into(gatherer: GraphGatherer, work: Callable[[Any], Loaded], item: object, memory: Buffers) -> Loaded:
    """Run `work` in a worker process, whose parent reads the large arrays in `memory`."""
    gatherer.use(memory)
    return work(item)
