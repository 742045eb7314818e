"""GraphSource: positions in a split to gathered graphs, by arithmetic on offsets; no loop runs over graphs."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from dali_pipeline.errors import FormatError
from dali_pipeline.format.encoding import all_finite
from dali_pipeline.format.layers import Layers
from dali_pipeline.format.schema import LEVELS, Field, Schema, level_of
from dali_pipeline.reading.gather import gather
from dali_pipeline.reading.graphrows import GraphRows, spread, wrong_graphs
from dali_pipeline.reading.held import HeldGraphs
from dali_pipeline.reading.records import Found
from dali_pipeline.reading.source import BatchSource
from dali_pipeline.sampling.order import WINDOW_BYTES
from dali_pipeline.types import Array, Ints

if TYPE_CHECKING:
    from dali_pipeline.dataset.selection import Selection


class GraphSource(BatchSource):
    """Gathers graphs. min_weight: edges of a smaller edge_attr are left out · may_hold: whether this process may have a window
    of its own in memory, where that makes it faster; other arguments as in `BatchSource`."""

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
        may_hold: bool = False,
    ) -> None:
        super().__init__(selection, schema, layers, window_bytes, finite=finite)
        self.fields = schema.of_graphs
        self.streamed = ("edge_index", *self.fields)
        self._min_weight = min_weight
        self._held: HeldGraphs | None = None
        nodes = selection.bounds("node")  # of a record
        if may_hold and layers is None and nodes is not None and HeldGraphs.fits(selection, window_bytes):
            indices = Field(dtype=np.min_scalar_type(max(0, nodes[1] - 1)).name, shape=(2,))
            self._held = HeldGraphs({"edge_index": indices, **self.fields}, self._index, selection)

    def gather(self, positions: Ints) -> GraphRows:
        """The records at `positions` (B,), any order, repeats allowed.

        Costs a read a record, array and run of layers that does not go on where the one before ends; none where records are
        held. Raises FormatError for a graph without nodes and for an edge that leaves its graph.
        """
        rows = None if self._held is None else self._held.take(positions, self._buffers)
        if rows is None or (self._finite and not self._all_finite(rows)):
            rows = self._read(positions)
        rows = replace(rows, positions=self._selection.reported_positions(positions))
        if self._min_weight is None:
            return rows
        weights = self.fields["edge_attr"].values(rows.arrays["edge_attr"]).reshape(-1)
        return rows.without_light_edges(weights, self._min_weight)

    def _read(self, positions: Ints) -> GraphRows:
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
        self._check_edges(edge_index, counted, found, record, layer_index)
        return GraphRows(
            arrays={name: rows(name, field, level_of(name)) for name, field in self.fields.items()},
            edge_index=edge_index,
            node_counts=counted[:, 0],
            edge_counts=counted[:, 1],
            layer_index=layer_index,
            graphs_per_record=graphs_per_record,
            labels=found.labels,
            ids=found.ids,
            positions=positions,
        )

    def sizes(self, positions: Ints) -> Ints:
        """(N, 2) int64, nodes and edges of each record's selected graphs, as stored.

        Reads what is to be read of them anyway before their values.
        """
        graphs_per_record, _, _, spans = self._graphs(self._index.locate(positions))
        spent = np.concatenate([np.zeros((1, 2), np.int64), np.cumsum(spans[:, 1::2] - spans[:, ::2], axis=0)])
        ends = np.cumsum(graphs_per_record)
        sizes: Ints = spent[ends] - spent[ends - graphs_per_record]
        return sizes

    def bring(self, start: int, count: int) -> bool:
        """As there; of what is held, nothing."""
        return not (self._held is not None and self._held.complete) and super().bring(start, count)

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
            return counts, spread(np.zeros_like(counts), counts)
        chosen = {count: np.array(self._chosen(count)) for count in np.unique(counts).tolist()}
        each = [chosen[count] for count in counts.tolist()]
        return np.array([len(one) for one in each], np.int64), np.concatenate(each)

    def _all_finite(self, rows: GraphRows) -> bool:
        return all(all_finite(rows.arrays[name], field.dtype) for name, field in self.fields.items())

    def _check_edges(self, edge_index: Array, counted: Ints, found: Found, record: Ints, layers: Ints) -> None:
        """counted: (G, 2) nodes and edges of each graph."""
        for graph in wrong_graphs(edge_index, counted)[:1].tolist():
            nodes, begin = int(counted[graph, 0]), int(counted[:graph, 1].sum())
            edges = edge_index[begin : begin + counted[graph, 1]]
            pair = tuple(edges[np.argmax((edges >= nodes).any(axis=1))].tolist())
            words = f"has {nodes} nodes and the edge {pair}; expected indices below {nodes}"
            self._fail(found, record, graph, layers, words)

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
