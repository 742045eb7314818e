"""GraphSuperbatch: several batches of graphs that are gathered at once, for what a gather costs whatever it carries."""

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
from dali_pipeline.sampling.budget import BudgetPlan, Packed, Places, Portion
from dali_pipeline.sampling.plan import EpochPlan
from dali_pipeline.types import Mask


@dataclass(frozen=True, kw_only=True, eq=False)
class GraphSuperbatch:
    """rows: of all batches of `portion` · left_out: why, of every record that was."""

    rows: GraphRows
    portion: Portion
    left_out: tuple[str, ...] = ()

    def batches(self) -> Iterator[tuple[GraphRows, Mask, Places]]:
        """Each batch, as views; what of it is valid, and where the partitions stand behind it."""
        sizes, places = self.portion.sizes, self.portion.places
        valid = np.split(self.portion.shares.valid, np.cumsum(sizes)[:-1])
        return zip(self.rows.cut(sizes), valid, places or ((),) * len(sizes), strict=True)


Loaded = tuple[list[GraphSuperbatch], PipelineError | None]


class GraphGatherer:
    """Gathers one rank's superbatches; several threads may. skips: errors for which a record is left out."""

    def __init__(self, source: GraphSource, world: World, skips: tuple[type[PipelineError], ...]) -> None:
        self.source, self._world, self._skips = source, world, skips

    def use(self, memory: Buffers) -> None:
        """Takes the large arrays' memory from there from now on."""
        self.source.use(memory)

    def gather(self, plan: EpochPlan, steps: range) -> Loaded:
        """The batches of these steps; where one is damaged, those before it, one by one, and the error."""
        shares = plan.batches(steps, self._world.rank, self._world.world_size)
        return self.gather_portion(Portion(shares=shares, sizes=np.full(len(steps), len(shares.positions) // len(steps))))

    def gather_packed(self, budget: BudgetPlan, batches: list[Packed] | PipelineError) -> Loaded:
        """`gather` of batches that are packed already; of an error, that."""
        return ([], batches) if isinstance(batches, PipelineError) else self.gather_portion(budget.portion(batches))

    def gather_portion(self, portion: Portion) -> Loaded:
        """`gather` of batches whose records are known."""
        alone = len(portion.sizes) == 1
        try:
            try:
                return [GraphSuperbatch(rows=self.source.gather(portion.shares.positions), portion=portion)], None
            except self._skips:
                if alone:
                    sound, left_out = without_damaged(portion.shares, self.source.gather, self._skips, self.source.num_records)
                    if portion.places:  # of a budget, which padding would go over
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
            one, failure = self.gather_portion(batch)
            loaded += one
            if failure is not None:
                return loaded, failure
        return loaded, None


def gather_into(gatherer: GraphGatherer, work: Callable[[Any], Loaded], item: object, memory: Buffers) -> Loaded:
    """`work` in a process of its own, whose parent reads the large arrays in `memory`."""
    gatherer.use(memory)
    return work(item)
