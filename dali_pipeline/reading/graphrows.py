"""GraphRows: gathered graphs in flat arrays, and what is done with them before delivery."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from dali_pipeline.format.schema import level_of
from dali_pipeline.reading.rows import FieldRows
from dali_pipeline.types import Array, Ints


@dataclass(frozen=True, kw_only=True, eq=False)
class GraphRows:
    """Graphs of one or several batches as stored, record-major, then by layer; every index is local to its graph.

    Attributes:
        arrays: Arrays by name as stored, `x`, perhaps `edge_attr`, and the schema's further fields, with N, E or G rows.
        edge_index: (E, 2) in the stored type.
        node_counts: (G,) int64.
        edge_counts: (G,) int64.
        layer_index: (G,) int64.
        graphs_per_record: (B,) int64.
        labels: (B, *shape) in the stored type, or None.
        ids: B texts.
        hashes: (B,) uint64, XXH3-64 of each id.
        positions: (B,) int64.
        fields: Further fields of records as stored, by the names after their dots: (B, *shape), or B texts.
    """

    arrays: Mapping[str, Array]
    edge_index: Array
    node_counts: Ints
    edge_counts: Ints
    layer_index: Ints
    graphs_per_record: Ints
    labels: Array | None
    ids: list[str]
    hashes: Array
    positions: Ints
    fields: Mapping[str, FieldRows] = field(default_factory=dict)

    def cuts(self, sizes: Ints) -> list[list[int]]:
        """Return the record, graph, node and edge at which each part of `sizes` records begins, and the last one ends."""
        records = ends_of(sizes)
        graphs = ends_of(self.graphs_per_record)[records]
        nodes, edges = ends_of(self.node_counts)[graphs], ends_of(self.edge_counts)[graphs]
        cuts: list[list[int]] = np.stack([records, graphs, nodes, edges], axis=1).tolist()
        return cuts

    def cut(self, sizes: Ints) -> Iterator[GraphRows]:
        """Yield consecutive parts of `sizes` records each, as views."""
        for begin, end in itertools.pairwise(self.cuts(sizes)):
            record, graph, node, edge = (slice(*span) for span in zip(begin, end, strict=True))
            level_rows = {"node": node, "edge": edge, "graph": graph}
            yield GraphRows(
                arrays={name: array[level_rows[level_of(name)]] for name, array in self.arrays.items()},
                edge_index=self.edge_index[edge],
                node_counts=self.node_counts[graph],
                edge_counts=self.edge_counts[graph],
                layer_index=self.layer_index[graph],
                graphs_per_record=self.graphs_per_record[record],
                labels=None if self.labels is None else self.labels[record],
                ids=self.ids[record],
                hashes=self.hashes[record],
                positions=self.positions[record],
                fields={name: rows[record] for name, rows in self.fields.items()},
            )

    def without_light_edges(self, weights: Array, least: float) -> GraphRows:
        """Return the graphs without the edges whose weight, (E,), is below `least`."""
        kept = ~(weights < np.float64(least))  # a Python float would be rounded to the weights' type
        ends = ends_of(self.edge_counts)
        before = ends_of(kept.astype(np.int64))[ends]  # edges kept before each graph
        return replace(
            self,
            arrays={name: array[kept] if level_of(name) == "edge" else array for name, array in self.arrays.items()},
            edge_index=self.edge_index[kept],
            edge_counts=np.diff(before),
        )


def wrong_graphs(edge_index: Array, counts: Ints) -> Ints:
    """Return the graphs that have no nodes, or an edge beyond them.

    Args:
        edge_index: (E, 2) edges of all graphs.
        counts: (G, 2) nodes and edges of each graph.
    """
    with_edges = np.flatnonzero(counts[:, 1])
    wrong = counts[:, 0] < 1
    if len(with_edges):
        highest = np.maximum.reduceat(edge_index.reshape(-1), 2 * ends_of(counts[:, 1])[with_edges])
        wrong[with_edges] |= highest >= counts[with_edges, 0]
    return np.flatnonzero(wrong)


def ends_of(counts: Ints) -> Ints:
    """Return the offsets of ranges with these counts, (n + 1,), beginning with 0."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
