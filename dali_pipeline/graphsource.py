"""GraphSource: positions in a split to gathered graphs, by arithmetic on offsets; no loop runs over graphs."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from dali_pipeline.gather import gather
from dali_pipeline.layers import Layers
from dali_pipeline.order import WINDOW_BYTES, Ints
from dali_pipeline.records import Found
from dali_pipeline.schema import LEVELS, Array, Field, FormatError, Schema, level_of
from dali_pipeline.selection import Selection
from dali_pipeline.source import BatchSource


@dataclass(frozen=True, kw_only=True, eq=False)
class GraphRows:
    """Graphs of one or several batches as stored, record-major, then layer; every index local to its graph.

    arrays: by name as stored, `x`, perhaps `edge_attr`, and the schema's further fields, with N, E or G rows · edge_index:
    (E, 2) in the stored type · node_counts, edge_counts, layer_index: (G,) int64 · graphs_per_record, labels, positions: (B,)
    int64 · ids: B texts.
    """

    arrays: Mapping[str, Array]
    edge_index: Array
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
        for begin, end in itertools.pairwise(cuts):
            record, graph, node, edge = (slice(*span) for span in zip(begin, end, strict=True))
            rows = {"node": node, "edge": edge, "graph": graph}
            yield GraphRows(
                arrays={name: array[rows[level_of(name)]] for name, array in self.arrays.items()},
                edge_index=self.edge_index[edge],
                node_counts=self.node_counts[graph],
                edge_counts=self.edge_counts[graph],
                layer_index=self.layer_index[graph],
                graphs_per_record=self.graphs_per_record[record],
                labels=self.labels[record],
                ids=self.ids[record],
                positions=self.positions[record],
            )

    def without_light_edges(self, weights: Array, least: float) -> GraphRows:
        """Those edges alone whose weight, (E,), is not below `least`."""
        kept = ~(weights < np.float64(least))  # a float would be rounded to the weights' type
        ends = _ends(self.edge_counts)
        before = _ends(kept.astype(np.int64))[ends]  # edges kept before each graph
        return replace(
            self,
            arrays={name: array[kept] if level_of(name) == "edge" else array for name, array in self.arrays.items()},
            edge_index=self.edge_index[kept],
            edge_counts=np.diff(before),
        )


class GraphSource(BatchSource):
    """Gathers graphs. min_weight: edges of a smaller edge_attr are left out; other arguments as in `BatchSource`."""

    kind = "graphs"
    ragged = ("graphs", "x", "edge_index")
    axis = "graph"

    def __init__(
        self,
        selection: Selection,
        schema: Schema,
        layers: Layers = None,
        window_bytes: int = WINDOW_BYTES,
        *,
        finite: bool = False,
        min_weight: float | None = None,
    ) -> None:
        super().__init__(selection, schema, layers, window_bytes, finite=finite)
        self.fields = schema.of_graphs
        self.streamed = ("edge_index", *self.fields)
        self._min_weight = min_weight

    def gather(self, positions: Ints) -> GraphRows:
        """The records at `positions` (B,), any order, repeats allowed.

        Costs a read a record, array and run of layers that does not go on where the one before ends. Raises FormatError for a
        graph without nodes and for an edge that leaves its graph.
        """
        found = self._index.locate(positions)
        graphs_per_record, layer_index, record, spans = self._graphs(found)
        counted = spans[:, 1::2] - spans[:, ::2]  # (G, 2)
        if (counted[:, 0] < 1).any():
            self._fail(found, record, int(np.argmin(counted[:, 0])), layer_index, "has no nodes; expected at least one")
        # runs of graphs that lie together
        heads = np.flatnonzero(np.append(True, (record[1:] != record[:-1]) | (spans[1:, ::2] != spans[:-1, 1::2]).any(axis=1)))
        lasts = np.append(heads[1:], len(record)) - 1
        # of each run: where its nodes, edges and graphs begin, and end
        first = found.begins[record] + layer_index  # (G,) graph in its shard
        begins = np.stack([*spans[heads].T[::2], first[heads]])
        ends = np.stack([*spans[lasts].T[1::2], first[lasts] + 1])

        def rows(name: str, field: Field, level: str) -> Array:
            axis = LEVELS.index(level)
            records, begin, end = record[heads], begins[axis], ends[axis]
            starts = np.cumsum(end - begin) - (end - begin)
            out = self._room(name, int((end - begin).sum()), field, found, int(begin[0]))
            gather(found, name, records, begin, end, out, starts)
            if self._finite and name != "edge_index":
                self._check_finite(name, field, out, starts, found, records)
            return out

        widest = np.result_type(*{part.shard.array("edge_index").dtype for part in found.parts})
        edge_index = rows("edge_index", Field(dtype=widest.name, shape=(2,)), "edge")
        limits = np.repeat(counted[:, 0], counted[:, 1])  # (E,)
        wrong = (edge_index[:, 0] >= limits) | (edge_index[:, 1] >= limits)
        if wrong.any():
            edge = int(np.argmax(wrong))
            graph = int(np.searchsorted(np.cumsum(counted[:, 1]), edge, side="right"))
            pair = tuple(edge_index[edge].tolist())
            words = f"has {limits[edge]} nodes and the edge {pair}; expected indices below {limits[edge]}"
            self._fail(found, record, graph, layer_index, words)
        found_rows = GraphRows(
            arrays={name: rows(name, field, level_of(name)) for name, field in self.fields.items()},
            edge_index=edge_index,
            node_counts=counted[:, 0],
            edge_counts=counted[:, 1],
            layer_index=layer_index,
            graphs_per_record=graphs_per_record,
            labels=found.labels,
            ids=found.ids,
            positions=self._selection.told(positions),
        )
        if self._min_weight is None:
            return found_rows
        weights = self.fields["edge_attr"].values(found_rows.arrays["edge_attr"]).reshape(-1)
        return found_rows.without_light_edges(weights, self._min_weight)

    def sizes(self, positions: Ints) -> Ints:
        """(N, 2) int64, nodes and edges of each record's selected graphs, as stored.

        Reads what is to be read of them anyway before their values.
        """
        graphs_per_record, _, _, spans = self._graphs(self._index.locate(positions))
        spent = np.concatenate([np.zeros((1, 2), np.int64), np.cumsum(spans[:, 1::2] - spans[:, ::2], axis=0)])
        ends = np.cumsum(graphs_per_record)
        sizes: Ints = spent[ends] - spent[ends - graphs_per_record]
        return sizes

    def _wanted(self, start: int, count: int) -> Iterator[tuple[str, Iterable[tuple[int, int]]]]:
        if self._layers is None:
            yield from super()._wanted(start, count)
            return
        found = self._index.locate(np.arange(start, start + count))
        _, layer_index, record, spans = self._graphs(found)
        graphs = found.begins[record] + layer_index
        rows = {"node": spans[:, :2], "edge": spans[:, 2:], "graph": np.stack([graphs, graphs + 1], axis=1)}
        for name in self.streamed:
            if name in (arrays := found.shard(0).arrays):
                width = arrays[name].nbytes // max(1, arrays[name].shape[0])
                yield name, _joined(rows[level_of(name)] * width)

    def name(self, position: int) -> str:
        """The record there in words, for an error."""
        found = self._index.locate(np.array([position]))
        return f"{found.shard(0).path}: record {found.ids[0]!r}"

    def _graphs(self, found: Found) -> tuple[Ints, Ints, Ints, Ints]:
        """(N,) selected graphs of each record; of each of them (G,) its layer and its record, and (G, 4) where its nodes,
        and its edges, begin and end."""
        graphs_per_record, layer_index = self._layers_of(found.ends - found.begins)
        record = np.repeat(np.arange(len(found.ids)), graphs_per_record)
        first = np.array([part.table[0, 1] for part in found.parts])[found.which]  # graph of the part of the index
        return graphs_per_record, layer_index, record, _spans(found, record, (found.begins - first)[record] + layer_index)

    def _layers_of(self, counts: Ints) -> tuple[Ints, Ints]:
        """Of records with so many graphs (B,): how many are selected, and which, (G,) one record after the other."""
        if self._layers is None:
            return counts, np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        chosen = {count: np.array(self._chosen(count)) for count in np.unique(counts).tolist()}
        each = [chosen[count] for count in counts.tolist()]
        return np.array([len(one) for one in each], np.int64), np.concatenate(each)

    def _fail(self, found: Found, record: Ints, graph: int, layers: Ints, words: str) -> None:
        where = int(record[graph])
        raise FormatError(f"{found.shard(where).path}: graph {layers[graph]} of record {found.ids[where]!r} {words}")


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


def _joined(spans: Ints) -> list[tuple[int, int]]:
    """Spans (n, 2) of bytes in order of their begins, those with less than a page between them as one."""
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    heads = np.flatnonzero(np.append(True, spans[1:, 0] - spans[:-1, 1] >= mmap.PAGESIZE))
    ends = np.append(heads[1:], len(spans)) - 1
    return list(zip(spans[heads, 0].tolist(), spans[ends, 1].tolist(), strict=True))


def _ends(counts: Ints) -> Ints:
    """(n + 1,) offsets, beginning with 0."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
