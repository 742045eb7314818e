"""Stretch: several batches on their way together, for what gathering and DALI cost a time, whatever they carry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from dali_pipeline.damage import without_damaged
from dali_pipeline.digest import Mask
from dali_pipeline.order import Ints
from dali_pipeline.plan import EpochPlan, Shares
from dali_pipeline.rows import SequenceRows
from dali_pipeline.schema import Array, PipelineError
from dali_pipeline.source import Padded, SequenceSource
from dali_pipeline.world import World


@dataclass(frozen=True, kw_only=True, eq=False)
class Stretch:
    """Several batches that are gathered, and go through DALI, at once: what either costs a time is shared by them.

    rows: of all of them · valid: (N,) bool · batch_size: rows of one · left_out: why, of every record that was. A batch that
    looks into `rows` keeps all of them.
    """

    rows: SequenceRows
    valid: Mask
    batch_size: int
    left_out: tuple[str, ...] = ()

    @property
    def begins(self) -> range:
        """The first row of each batch."""
        return range(0, len(self.valid), self.batch_size)

    @property
    def longest(self) -> list[int]:
        """Steps of each batch's longest sequence."""
        longest: list[int] = np.maximum.reduceat(self.rows.lengths, self.begins).tolist()
        return longest

    def samples(self, *, ragged: bool) -> Array | list[Array]:
        """What external_source takes: an array (batches, B, T, F), a sample a batch, or N views (T_i, F), where they differ.

        DALI takes about a microsecond for every sample.
        """
        values, starts = self.rows.values, self.rows.starts
        if ragged:
            return [values[begin : begin + length] for begin, length in zip(starts, self.rows.lengths, strict=True)]
        steps = len(values) // len(starts)
        return values.reshape(len(self.begins), self.batch_size, steps, *values.shape[1:])


def stretches(steps: range, longest: int) -> Iterator[range]:
    """The steps in stretches of 1, 2, 4 ... up to `longest`: the first batch comes soon, and the others cheaply."""
    length = 1
    while steps:
        yield steps[:length]
        steps, length = steps[length:], min(2 * length, longest)


class StretchGatherer:
    """Gathers one rank's stretches; several threads may. bits: whether values are those of bfloat16 · skips: errors for which a
    record is left out."""

    def __init__(
        self,
        source: SequenceSource,
        world: World,
        batch_size: int,
        padded: Padded,
        *,
        bits: bool,
        skips: tuple[type[PipelineError], ...],
    ) -> None:
        self._source, self._world, self._batch_size, self._padded = source, world, batch_size, padded
        self._bits, self._skips = bits, skips

    def gather(self, plan: EpochPlan, steps: range) -> tuple[list[Stretch], PipelineError | None]:
        """The batches of these steps; where one is damaged, those before it, one by one, and the error."""
        try:
            shares = plan.batches(steps, self._world.rank, self._world.world_size)
            try:
                return [self._gather(shares)], None
            except self._skips:
                if len(steps) == 1:
                    one_by_one = partial(self._source.gather, batch_size=1, padded=None)
                    return [self._gather(*without_damaged(shares, one_by_one, self._skips, self._source.num_records))], None
        except PipelineError as error:
            if len(steps) == 1:
                return [], error
        loaded: list[Stretch] = []
        for step in steps:
            one, failure = self.gather(plan, range(step, step + 1))
            loaded += one
            if failure is not None:
                return loaded, failure
        return loaded, None

    def _gather(self, shares: Shares, left_out: tuple[str, ...] = ()) -> Stretch:
        rows = _signed(self._source.gather(shares.positions, self._batch_size, self._padded), self._bits)
        return Stretch(rows=rows, valid=shares.valid, batch_size=self._batch_size, left_out=left_out)

    def lengths(self, positions: Ints) -> Ints:
        """Steps of records (N,), as stored."""
        return self._source.lengths(positions)


def _signed(rows: SequenceRows, bits: bool) -> SequenceRows:
    """uint16 and uint32 in the next wider signed type, or, where they are `bits`, in their own: neither DALI nor torch does
    much with them."""
    if bits:
        return replace(rows, values=rows.values.view(np.int16))
    wider = {"uint16": np.int32, "uint32": np.int64}.get(rows.values.dtype.name)
    return rows if wider is None else replace(rows, values=rows.values.astype(wider))
