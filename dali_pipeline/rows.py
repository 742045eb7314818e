"""Rows: what a source gathers, arrays as stored; of sequences, and of graphs."""

from __future__ import annotations

from dataclasses import dataclass

from dali_pipeline.order import Ints
from dali_pipeline.schema import Array


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


@dataclass(frozen=True, kw_only=True, eq=False)
class GraphRows:
    """A batch of graphs as stored, record-major, then layer; every index local to its graph, in the stored type.

    x: (N, *row) · edge_index: (E, 2) · edge_attr: (E, *row) or None · node_counts, edge_counts, layer_index: (G,) int64 ·
    graphs_per_record, labels, positions: (B,) int64 · ids: B texts.
    """

    x: Array
    edge_index: Array
    edge_attr: Array | None
    node_counts: Ints
    edge_counts: Ints
    layer_index: Ints
    graphs_per_record: Ints
    labels: Ints
    ids: list[str]
    positions: Ints
