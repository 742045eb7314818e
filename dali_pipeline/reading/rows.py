"""SequenceRows: gathered sequences, as stored."""

from __future__ import annotations

from dataclasses import dataclass

from dali_pipeline.types import Array, Ints


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceRows:
    """Sequences of one or several batches, as stored.

    Attributes:
        values: (R, *row) rows of all records; zeros after a record if its batch was padded.
        starts: (N,) int64, first row of each record in `values`.
        lengths: (N,) int64, number of its rows.
        labels: (N,) int64.
        ids: N texts.
        positions: (N,) int64.
    """

    values: Array
    starts: Ints
    lengths: Ints
    labels: Ints
    ids: list[str]
    positions: Ints
