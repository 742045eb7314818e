"""Superbatch: several batches gathered together, which shares the fixed costs of a gather and of DALI."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from dali_pipeline.errors import PipelineError
from dali_pipeline.reading.damage import without_damaged, without_padding
from dali_pipeline.reading.rows import SequenceRows
from dali_pipeline.reading.source import Located, Padded, SequenceSource
from dali_pipeline.runtime.world import World
from dali_pipeline.sampling.budget import BudgetPlan, Cursors, Packed, Portion
from dali_pipeline.sampling.plan import EpochPlan, Shares
from dali_pipeline.types import Array, Ints, Mask

SUPERBATCH_BYTES = 16 << 20


class Part(NamedTuple):
    """Neighbouring batches that are gathered at once.

    Attributes:
        steps: Their steps.
        nbytes: Bytes that they take.
        shares: Their records; None if the index could not be read, which gathering reports.
        located: Locations of the records; None likewise.
        sparse: One batch, gathered without padding because most of it would be padding.
        lone: One batch that takes more than SUPERBATCH_BYTES.
    """

    steps: range
    nbytes: int = 0
    shares: Shares | None = None
    located: Located | None = None
    sparse: bool = False
    lone: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Superbatch:
    """Several batches that are gathered, and go through DALI, at once. A view of `rows` keeps all of them in memory.

    Attributes:
        rows: Sequences of all batches.
        valid: (N,) bool, False for padding.
        sizes: (batches,) records of each batch.
        cursors: Cursors of the partitions after each batch; empty without a budget.
        left_out: The reason per record that was left out.
        sparse: As in `Part`.
        lone: As in `Part`.
    """

    rows: SequenceRows
    valid: Mask
    sizes: Ints
    cursors: tuple[Cursors, ...] = ()
    left_out: tuple[str, ...] = ()
    sparse: bool = False
    lone: bool = False

    @property
    def begins(self) -> list[int]:
        """First record of each batch."""
        begins: list[int] = (np.cumsum(self.sizes) - self.sizes).tolist()
        return begins

    @property
    def longest(self) -> list[int]:
        """Steps of the longest sequence of each batch."""
        longest: list[int] = np.maximum.reduceat(self.rows.lengths, self.begins).tolist()
        return longest

    @property
    def rows_per_batch(self) -> list[int]:
        """Steps of all sequences of each batch, without padding."""
        rows: list[int] = np.add.reduceat(self.rows.lengths, self.begins).tolist()
        return rows

    @property
    def padded_rows(self) -> list[int]:
        """Steps of all sequences of each batch, padded to its longest."""
        return [size * steps for size, steps in zip(self.sizes.tolist(), self.longest, strict=True)]

    def records(self) -> list[Array]:
        """Return a view (T_i, *row) per record; DALI takes about a microsecond per sample."""
        values, starts = self.rows.values, self.rows.starts
        return [values[begin : begin + length] for begin, length in zip(starts, self.rows.lengths, strict=True)]

    def batches(self) -> Array:
        """Return the values as (batches, B, T, *row), if all records have one length."""
        values = self.rows.values
        return values.reshape(len(self.sizes), int(self.sizes[0]), -1, *values.shape[1:])


def superbatches(steps: range, longest: int) -> Iterator[range]:
    """Yield the steps in superbatches of 1, 2, 4 ... up to `longest`: the first batch comes soon, the others at low cost."""
    length = 1
    while steps:
        yield steps[:length]
        steps, length = steps[length:], min(2 * length, longest)


def cuts(longest: Ints, most: int, *, alike: bool) -> Iterator[tuple[int, int]]:
    """Yield ranges of batches that have at most `most` steps together; a single batch may have more.

    Args:
        longest: (N,) steps of each batch.
        most: Steps of a range, at most.
        alike: Whether each batch counts with the steps of the longest one in its range.
    """
    begin = 0
    while begin < len(longest):
        remaining = longest[begin:]
        steps = np.maximum.accumulate(remaining) * np.arange(1, len(remaining) + 1) if alike else np.cumsum(remaining)
        end = begin + max(1, int(np.searchsorted(steps, most, side="right")))
        yield begin, end
        begin = end


class SequenceGatherer:
    """Gather the superbatches of one rank; several threads may.

    Args:
        source: Source of the sequences.
        world: This process among all.
        batch_size: Records per rank and batch.
        padded: "batch" pads each record to the longest of its batch; None leaves padding to DALI, to the longest of the
            superbatch.
        bits: Whether values are the bits of bfloat16.
        skips: Errors for which a record is left out.
    """

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

    def parts(self, plan: EpochPlan, steps: range) -> list[Part]:
        """Cut the batches of these steps into parts of at most SUPERBATCH_BYTES, padding included; reads the index."""
        try:
            shares = plan.batches(steps, self._world.rank, self._world.world_size)
            located = self._source.locate(shares.positions)
        except PipelineError:
            if len(steps) == 1:
                return [Part(steps)]
            return [part for step in steps for part in self.parts(plan, range(step, step + 1))]
        size, row_bytes = self._batch_size, self._source.row_bytes
        longest = np.maximum.reduceat(located.lengths, np.arange(0, len(located.lengths), size))  # (batches,)
        most_steps = SUPERBATCH_BYTES // max(1, size * row_bytes)
        parts: list[Part] = []
        for begin, end in cuts(longest, most_steps, alike=self._padded is None):
            rows = slice(begin * size, end * size)
            stored = int(located.lengths[rows].sum()) * row_bytes
            padded = int(longest[begin:end].sum()) * size * row_bytes
            lone = padded > SUPERBATCH_BYTES and self._padded is not None
            sparse = lone and 2 * stored <= padded and not self._source.layered
            part = Part(
                steps=steps[begin:end],
                nbytes=stored if sparse or self._padded is None else padded,
                shares=Shares(positions=shares.positions[rows], valid=shares.valid[rows]),
                located=located if len(longest) == end - begin else located.cut(rows.start, rows.stop),
                sparse=sparse,
                lone=lone,
            )
            parts.append(part)
        return parts

    def gather(self, plan: EpochPlan, part: Part) -> tuple[list[Superbatch], PipelineError | None]:
        """Gather the batches of a part. If one is damaged, return those before it, one by one, and the error."""
        steps = part.steps
        try:
            shares = part.shares or plan.batches(steps, self._world.rank, self._world.world_size)
            try:
                return [self._gather(shares, part)], None
            except self._skips:
                if len(steps) == 1:
                    gather_one = partial(self._source.gather, batch_size=1, padded=None)
                    sound, left_out = without_damaged(shares, gather_one, self._skips, self._source.num_records)
                    return [self._gather(sound, part._replace(located=None), left_out)], None
        except PipelineError as error:
            if len(steps) == 1:
                return [], error
        loaded: list[Superbatch] = []
        for step in steps:
            gathered, failure = self.gather(plan, Part(range(step, step + 1)))
            loaded += gathered
            if failure is not None:
                return loaded, failure
        return loaded, None

    def _gather(self, shares: Shares, part: Part, left_out: tuple[str, ...] = ()) -> Superbatch:
        located = part.located or self._source.locate(shares.positions)
        sizes = np.full(len(shares.positions) // self._batch_size, self._batch_size)
        rows = signed(self._source.read(located, sizes, None if part.sparse else self._padded), self._bits)
        return Superbatch(
            rows=rows,
            valid=shares.valid,
            sizes=sizes,
            left_out=left_out,
            sparse=part.sparse,
            lone=part.lone,
        )

    def _sound(self, shares: Shares) -> tuple[Shares, tuple[str, ...]]:
        """Return the rows of one batch with padding in place of records that are left out, and the reasons."""
        one_by_one = partial(self._source.gather, batch_size=1, padded=None)
        return without_damaged(shares, one_by_one, self._skips, self._source.num_records)

    def gather_packed(
        self, budget: BudgetPlan, batches: list[Packed] | PipelineError
    ) -> tuple[list[Superbatch], PipelineError | None]:
        """Gather batches that a budget has filled; if that failed, return its error."""
        return ([], batches) if isinstance(batches, PipelineError) else self._gather_portion(budget.portion(batches))

    def _gather_portion(self, portion: Portion) -> tuple[list[Superbatch], PipelineError | None]:
        """Gather the batches of a portion. If one is damaged, return those before it, one by one, and the error."""
        alone = len(portion.sizes) == 1
        try:
            try:
                return [self._read_portion(portion)], None
            except self._skips:
                if alone:
                    sound, left_out = self._sound(portion.shares)
                    sound = without_padding(sound)  # more records would exceed the budget
                    portion = replace(portion, shares=sound, sizes=np.array([len(sound.positions)]))
                    return [self._read_portion(portion, left_out)], None
        except PipelineError as error:
            if alone:
                return [], error
        loaded: list[Superbatch] = []
        for batch in portion.cut():
            gathered, failure = self._gather_portion(batch)
            loaded += gathered
            if failure is not None:
                return loaded, failure
        return loaded, None

    def _read_portion(self, portion: Portion, left_out: tuple[str, ...] = ()) -> Superbatch:
        rows = self._source.read(self._source.locate(portion.shares.positions), portion.sizes, self._padded)
        lone = len(portion.sizes) == 1 and rows.values.nbytes > SUPERBATCH_BYTES
        return Superbatch(
            rows=signed(rows, self._bits),
            valid=portion.shares.valid,
            sizes=portion.sizes,
            cursors=portion.cursors,
            left_out=left_out,
            lone=lone,
        )

    def lengths(self, positions: Ints) -> Ints:
        """Return the steps of records (N,), as stored."""
        return self._source.lengths(positions)


WIDER: dict[str, type[np.signedinteger[Any]]] = {"uint16": np.int32, "uint32": np.int64}


def signed(rows: SequenceRows, bits: bool) -> SequenceRows:
    """View `bits` as int16, and widen uint16 and uint32 to signed types, because DALI and torch support them little."""
    if bits:
        return replace(rows, values=rows.values.view(np.int16))
    wider = WIDER.get(rows.values.dtype.name)
    return rows if wider is None else replace(rows, values=rows.values.astype(wider))
