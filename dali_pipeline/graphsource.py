"""GraphSource: positions in a split to gathered graphs, by arithmetic on offsets; no loop runs over graphs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dali_pipeline.gather import gather
from dali_pipeline.order import Ints
from dali_pipeline.records import Found, IndexPart
from dali_pipeline.schema import Array, Field, FormatError, PipelineError
from dali_pipeline.source import BatchSource, labels_and_ids


@dataclass(frozen=True, kw_only=True, eq=False)
class GraphRows:
    """Graphs of one or several batches as stored, record-major, then layer; every index local to its graph.

    x: (N, *row) · edge_index: (E, 2) in the stored type · edge_attr: (E, *row) or None · node_counts, edge_counts, layer_index:
    (G,) int64 · graphs_per_record, labels, positions: (B,) int64 · ids: B texts.
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

    def cut(self, sizes: Ints) -> Iterator[GraphRows]:
        """Parts of so many records each, one after the other, as views."""
        records = np.concatenate([[0], np.cumsum(sizes)])
        graphs = _ends(self.graphs_per_record)[records]
        nodes, edges = _ends(self.node_counts)[graphs], _ends(self.edge_counts)[graphs]
        cuts = np.stack([records, graphs, nodes, edges], axis=1).tolist()
        for (r, g, n, e), (r_end, g_end, n_end, e_end) in itertools.pairwise(cuts):
            yield GraphRows(
                x=self.x[n:n_end],
                edge_index=self.edge_index[e:e_end],
                edge_attr=None if self.edge_attr is None else self.edge_attr[e:e_end],
                node_counts=self.node_counts[g:g_end],
                edge_counts=self.edge_counts[g:g_end],
                layer_index=self.layer_index[g:g_end],
                graphs_per_record=self.graphs_per_record[r:r_end],
                labels=self.labels[r:r_end],
                ids=self.ids[r:r_end],
                positions=self.positions[r:r_end],
            )


class GraphSource(BatchSource):
    """Gathers graphs."""

    kind = "graphs"
    ragged = ("graphs", "x", "edge_index")
    streamed = ("x", "edge_index", "edge_attr")
    axis = "graph"

    def gather(self, positions: Ints) -> GraphRows:
        """The records at `positions` (B,), any order, repeats allowed.

        Costs a read a record, array and run of layers that does not go on where the one before ends. Raises FormatError for a
        graph without nodes and for an edge that leaves its graph.
        """
        schema = self._schema
        assert schema.x is not None
        found = self._index.locate(positions)
        pairs = found.pairs()
        graphs_per_record, layer_index, record, spans = self._graphs(found, pairs)
        counted = spans[:, 1::2] - spans[:, ::2]  # (G, 2)
        if (counted[:, 0] < 1).any():
            self._fail(pairs, record, int(np.argmin(counted[:, 0])), layer_index, "has no nodes; expected at least one")
        # runs of graphs that lie together
        heads = np.flatnonzero(np.append(True, (record[1:] != record[:-1]) | (spans[1:, ::2] != spans[:-1, 1::2]).any(axis=1)))
        lasts = np.append(heads[1:], len(record)) - 1
        runs = np.stack([record[heads], *spans[heads].T[::2], *spans[lasts].T[1::2]])  # (5, runs): record, 2 begins, 2 ends

        def rows(name: str, field: Field, axis: int) -> Array:
            records, begin, end = runs[0], runs[1 + axis], runs[3 + axis]
            starts = np.cumsum(end - begin) - (end - begin)
            out = self._room(name, int((end - begin).sum()), field, pairs[0], int(begin[0]))
            gather(found, name, records, begin, end, out, starts)
            if self._finite and name != "edge_index":
                self._check_finite(name, field, out, starts, [pairs[each] for each in records.tolist()])
            return out

        widest = np.result_type(*{part.shard.array("edge_index").dtype for part in found.parts})
        edge_index = rows("edge_index", Field(dtype=widest.name, shape=(2,)), 1)
        limits = np.repeat(counted[:, 0], counted[:, 1])  # (E,)
        wrong = (edge_index[:, 0] >= limits) | (edge_index[:, 1] >= limits)
        if wrong.any():
            edge = int(np.argmax(wrong))
            graph = int(np.searchsorted(np.cumsum(counted[:, 1]), edge, side="right"))
            ends = tuple(edge_index[edge].tolist())
            words = f"has {limits[edge]} nodes and the edge {ends}; expected indices below {limits[edge]}"
            self._fail(pairs, record, graph, layer_index, words)
        return GraphRows(
            x=rows("x", schema.x, 0),
            edge_index=edge_index,
            edge_attr=None if schema.edge_attr is None else rows("edge_attr", schema.edge_attr, 1),
            node_counts=counted[:, 0],
            edge_counts=counted[:, 1],
            layer_index=layer_index,
            graphs_per_record=graphs_per_record,
            positions=self._selection.told(positions),
            **labels_and_ids(pairs),
        )

    def sizes(self, positions: Ints, skips: tuple[type[PipelineError], ...] = ()) -> Ints:
        """(N, 2) int64, nodes and edges of each record's selected graphs, as stored; (0, 0) where reading them raises one of
        `skips`.

        Reads what is to be read of them anyway before their values.
        """
        try:
            found = self._index.locate(positions)
        except skips:
            if len(positions) == 1:
                return np.zeros((1, 2), np.int64)
            return np.concatenate([self.sizes(positions[at : at + 1], skips) for at in range(len(positions))])
        graphs_per_record, _, _, spans = self._graphs(found, found.pairs())
        spent = np.concatenate([np.zeros((1, 2), np.int64), np.cumsum(spans[:, 1::2] - spans[:, ::2], axis=0)])
        ends = np.cumsum(graphs_per_record)
        sizes: Ints = spent[ends] - spent[ends - graphs_per_record]
        return sizes

    def name(self, position: int) -> str:
        """The record there in words, for an error."""
        ((part, row),) = self._index.locate(np.array([position])).pairs()
        return f"{part.shard.path}: record {part.ids[row]!r}"

    def _graphs(self, found: Found, pairs: list[tuple[IndexPart, int]]) -> tuple[Ints, Ints, Ints, Ints]:
        """(N,) selected graphs of each record; of each of them (G,) its layer and its record, and (G, 4) where its nodes,
        and its edges, begin and end."""
        begins = np.array([part.rows[row] - part.rows[0] for part, row in pairs], np.int64)
        counts = np.array([part.rows[row + 1] - part.rows[0] for part, row in pairs], np.int64) - begins
        graphs_per_record, layer_index = self._layers_of(counts)
        record = np.repeat(np.arange(len(pairs)), graphs_per_record)
        return graphs_per_record, layer_index, record, _spans(found, record, begins[record] + layer_index)

    def _layers_of(self, counts: Ints) -> tuple[Ints, Ints]:
        """Of records with so many graphs (B,): how many are selected, and which, (G,) one record after the other."""
        if self._layers is None:
            return counts, np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        chosen = {count: np.array(self._chosen(count)) for count in np.unique(counts).tolist()}
        each = [chosen[count] for count in counts.tolist()]
        return np.array([len(one) for one in each], np.int64), np.concatenate(each)

    def _fail(self, pairs: list[tuple[IndexPart, int]], record: Ints, graph: int, layers: Ints, words: str) -> None:
        part, row = pairs[record[graph]]
        raise FormatError(f"{part.shard.path}: graph {layers[graph]} of record {part.ids[row]!r} {words}")


def _spans(found: Found, record: Ints, graph: Ints) -> Ints:
    """(G, 4) of the spans of graphs, each by its record and its number in that record's part of the index."""
    if len(found.parts) == 1:
        one: Ints = found.parts[0].spans[graph]
        return one
    which = found.which[record]
    order = np.argsort(which, kind="stable")
    cuts = np.searchsorted(which[order], np.arange(len(found.parts) + 1)).tolist()
    spans = np.empty((len(graph), 4), np.int64)
    for part, begin, end in zip(found.parts, cuts, cuts[1:], strict=False):
        mine = order[begin:end]
        spans[mine] = part.spans[graph[mine]]
    return spans


def _ends(counts: Ints) -> Ints:
    """(n + 1,) offsets, beginning with 0."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
