"""SequenceRows: gathered sequences, as stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from dali_pipeline.types import Array, Ints

FieldRows: TypeAlias = "Array | list[str]"  # of numbers, or texts


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceRows:
    """Sequences of one or several batches, as stored.

    Attributes:
        values: (R, *row) rows of all records; zeros after a record if its batch was padded.
        starts: (N,) int64, first row of each record in `values`.
        lengths: (N,) int64, number of its rows.
        labels: (N, *shape) in the stored type, or None.
        ids: N texts.
        hashes: (N,) uint64, XXH3-64 of each id.
        positions: (N,) int64.
        fields: Further fields as stored, by the names after their dots: of steps, rows of all records, each padded to the
            longest of its batch; of records, (N, *shape), or N texts.
        steps: (R,) int64, the step within its record of each row, if single steps are gathered; otherwise None.
    """

    values: Array
    starts: Ints
    lengths: Ints
    labels: Array | None
    ids: list[str]
    hashes: Array
    positions: Ints
    fields: Mapping[str, FieldRows] = field(default_factory=dict)
    steps: Ints | None = None
