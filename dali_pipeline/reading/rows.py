"""SequenceRows: what is gathered of sequences, as stored."""

from __future__ import annotations

from dataclasses import dataclass

from dali_pipeline.types import Array, Ints


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceRows:
    """Sequences of one or several batches, as stored.

    values: (R, *row) · starts, lengths: (N,) int64, where each record's rows begin in `values`, and how many they are; behind
    them zeros up to the next, where the batches were padded · labels, positions: (N,) int64 · ids: N texts.
    """

    values: Array
    starts: Ints
    lengths: Ints
    labels: Ints
    ids: list[str]
    positions: Ints
