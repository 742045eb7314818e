"""Stretch: several batches on their way together, for what gathering and DALI cost a time, whatever they carry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from dali_pipeline.digest import Mask
from dali_pipeline.schema import Array
from dali_pipeline.source import SequenceRows


@dataclass(frozen=True, kw_only=True, eq=False)
class Stretch:
    """Several batches that are gathered, and go through DALI, at once: what either costs a time is shared by them.

    rows: of all of them · valid: (N,) bool · batch_size: rows of one. A batch that looks into `rows` keeps all of them.
    """

    rows: SequenceRows
    valid: Mask
    batch_size: int

    def batches(self) -> Iterator[slice]:
        """The rows of each batch."""
        return (slice(begin, begin + self.batch_size) for begin in range(0, len(self.valid), self.batch_size))

    def longest(self, batch: slice) -> int:
        """Steps of its longest sequence."""
        return int(self.rows.lengths[batch].max())

    def samples(self, *, ragged: bool) -> Array | list[Array]:
        """What external_source takes: one (N, T, F) array, or N views (T_i, F)."""
        values, starts = self.rows.values, self.rows.starts
        if ragged:
            return [values[begin : begin + length] for begin, length in zip(starts, self.rows.lengths, strict=True)]
        return values.reshape(len(starts), -1, *values.shape[1:])


def stretches(steps: range, longest: int) -> Iterator[range]:
    """The steps in stretches of 1, 2, 4 ... up to `longest`: the first batch comes soon, and the others cheaply."""
    length = 1
    while steps:
        yield steps[:length]
        steps, length = steps[length:], min(2 * length, longest)


def signed(rows: SequenceRows) -> SequenceRows:
    """uint16 and uint32 in the next wider signed type: neither DALI nor torch does much with them."""
    wider = {"uint16": np.int32, "uint32": np.int64}.get(rows.values.dtype.name)
    return rows if wider is None else replace(rows, values=rows.values.astype(wider))
