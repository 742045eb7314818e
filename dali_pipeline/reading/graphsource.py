"""GraphSource: gather the graphs at positions in a split by arithmetic on offsets; no loop runs over graphs."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from dali_pipeline.errors import FormatError
from dali_pipeline.format.schema import LEVELS, Field, Schema, level_of
from dali_pipeline.reading.gather import gather
from dali_pipeline.reading.graphrows import GraphRows, wrong_graphs
from dali_pipeline.reading.records import Locations, spread
from dali_pipeline.reading.source import ALL, BatchSource, Wanted, chosen_fields
from dali_pipeline.types import Array, Ints

if TYPE_CHECKING:
    from dali_pipeline.dataset.selection import Selection


class GraphSource(BatchSource):
    """Gather graphs.

    Args:
        selection, schema, wanted: As in `BatchSource`.
        min_weight: Edges with a smaller edge_attr are left out. Default: None.
    """

    kind = "graphs"
    ragged = ("graphs", "x", "edge_index")
    axis = "graph"

    def __init__(
        self,
        selection: Selection,
        schema: Schema,
        wanted: Wanted = ALL,
        *,
        min_weight: float | None = None,
    ) -> None:
        super().__init__(selection, schema, wanted)
        own = {name: field for name, field in schema.of_graphs.items() if name not in schema.named}
        self.fields = own | chosen_fields(schema.named, wanted.fields)
        self.streamed = ("edge_index", *self.fields)
        self._min_weight = min_weight

    def gather(self, positions: Ints, *, merge: bool = False) -> GraphRows:
        """Read the records at `positions` (B,), any order, repeats allowed.

        Costs one read per record, array and span of layers that does not continue the one before. Raises FormatError for a
        graph without nodes and for an edge that leaves its graph. With `merge` neighbours are read as one, and an error names
        the first of them.
        """
        rows = self._read(positions, merge)
        rows = replace(rows, positions=self._selection.reported_positions(positions))
        if self._min_weight is None:
            return rows
        weights = self.fields["edge_attr"].values(rows.arrays["edge_attr"]).reshape(-1)
        return rows.without_light_edges(weights, self._min_weight)

    def _read(self, positions: Ints, merge: bool) -> GraphRows:
        locations = self._index.locate(positions)
        graphs_per_record, layer_index, record, spans = self._graphs(locations)
        counted = spans[:, 1::2] - spans[:, ::2]  # (G, 2)
        if (counted[:, 0] < 1).any():
            self._fail(locations, record, int(np.argmin(counted[:, 0])), layer_index, "has no nodes; expected at least one")
        # first and last graph of each span that is contiguous in the file
        heads = np.flatnonzero(np.append(True, (record[1:] != record[:-1]) | (spans[1:, ::2] != spans[:-1, 1::2]).any(axis=1)))
        lasts = np.append(heads[1:], len(record)) - 1
        # (3, spans): where the nodes, edges and graphs of each span begin, and end
        first = locations.begins[record] + layer_index  # (G,) number of the graph in its shard
        begins = np.stack([*spans[heads].T[::2], first[heads]])
        ends = np.stack([*spans[lasts].T[1::2], first[lasts] + 1])

        def rows(name: str, field: Field, level: str) -> Array:
            axis = LEVELS.index(level)
            records, begin, end = record[heads], begins[axis], ends[axis]
            starts = np.cumsum(end - begin) - (end - begin)
            out = self._allocate(name, int((end - begin).sum()), field, locations, int(begin[0]))
            gather(locations, name, records, begin, end, out, starts, merge=merge, past_cache=merge and self.past_cache)
            if self._finite and name != "edge_index":
                self._check_finite(name, field, out, starts, locations, records)
            return out

        widest = np.result_type(*{part.shard.array("edge_index").dtype for part in locations.parts})
        edge_index = rows("edge_index", Field(dtype=widest.name, shape=(2,)), "edge")
        self._check_edges(edge_index, counted, locations, record, layer_index)
        return GraphRows(
            arrays={name: rows(name, field, level_of(name)) for name, field in self.fields.items()},
            edge_index=edge_index,
            node_counts=counted[:, 0],
            edge_counts=counted[:, 1],
            layer_index=layer_index,
            graphs_per_record=graphs_per_record,
            labels=locations.labels,
            ids=locations.ids,
            hashes=locations.hashes,
            positions=positions,
            fields=self._read_record_fields(locations),
        )

    def sizes(self, positions: Ints) -> Ints:
        """Return nodes and edges of each record's selected graphs, as stored, (N, 2) int64.

        Reads only what reading their values needs anyway.
        """
        graphs_per_record, _, _, spans = self._graphs(self._index.locate(positions))
        totals = np.concatenate([np.zeros((1, 2), np.int64), np.cumsum(spans[:, 1::2] - spans[:, ::2], axis=0)])
        ends = np.cumsum(graphs_per_record)
        sizes: Ints = totals[ends] - totals[ends - graphs_per_record]
        return sizes

    def _value_spans(self, start: int, count: int) -> Iterator[tuple[str, Iterable[tuple[int, int]]]]:
        if self._layers is None:
            yield from super()._value_spans(start, count)
            return
        locations = self._index.locate(np.arange(start, start + count))
        _, layer_index, record, spans = self._graphs(locations)
        graphs = locations.begins[record] + layer_index
        rows = {"node": spans[:, :2], "edge": spans[:, 2:], "graph": np.stack([graphs, graphs + 1], axis=1)}
        for name in self.streamed:
            if name in (arrays := locations.shard(0).arrays):
                width = arrays[name].nbytes // max(1, arrays[name].shape[0])
                yield name, _joined(rows[level_of(name)] * width)

    def _graphs(self, locations: Locations) -> tuple[Ints, Ints, Ints, Ints]:
        """Return the selected graphs of the records.

        Returns:
            (N,) number of graphs per record, and per graph (G,) its layer, (G,) its record, and (G, 4) where its nodes, and its
            edges, begin and end.
        """
        graphs_per_record, layer_index = self._layers_of(locations.ends - locations.begins)
        record = np.repeat(np.arange(len(locations.ids)), graphs_per_record)
        first = np.array([part.table[0, 1] for part in locations.parts])[
            locations.which
        ]  # first graph of each record's index part
        return (
            graphs_per_record,
            layer_index,
            record,
            _spans(locations, record, (locations.begins - first)[record] + layer_index),
        )

    def _layers_of(self, counts: Ints) -> tuple[Ints, Ints]:
        """Return for records with `counts` graphs (B,): the number selected (B,), and their layers (G,), concatenated."""
        if self._layers is None:
            return counts, spread(np.zeros_like(counts), counts)
        chosen = {count: np.array(self._chosen(count)) for count in np.unique(counts).tolist()}
        layers = [chosen[count] for count in counts.tolist()]
        return np.array([len(record_layers) for record_layers in layers], np.int64), np.concatenate(layers)

    def _check_edges(self, edge_index: Array, counted: Ints, locations: Locations, record: Ints, layers: Ints) -> None:
        """Raise FormatError for an edge beyond the nodes of its graph; `counted` is (G, 2) nodes and edges."""
        for graph in wrong_graphs(edge_index, counted)[:1].tolist():
            nodes, begin = int(counted[graph, 0]), int(counted[:graph, 1].sum())
            edges = edge_index[begin : begin + counted[graph, 1]]
            pair = tuple(edges[np.argmax((edges >= nodes).any(axis=1))].tolist())
            words = f"has {nodes} nodes and the edge {pair}; expected indices below {nodes}"
            self._fail(locations, record, graph, layers, words)

    def _fail(self, locations: Locations, record: Ints, graph: int, layers: Ints, words: str) -> None:
        index = int(record[graph])
        raise FormatError(f"{locations.shard(index).path}: graph {layers[graph]} of record {locations.ids[index]!r} {words}")


def _spans(locations: Locations, record: Ints, graph: Ints) -> Ints:
    """Return the spans of graphs, (G, 4), by each one's record and its number in that record's part of the index."""
    if len(locations.parts) == 1:
        spans: Ints = locations.parts[0].spans[graph]
        return spans
    which = locations.which[record]
    order = np.argsort(which, kind="stable")
    cuts = np.searchsorted(which[order], np.arange(len(locations.parts) + 1)).tolist()
    spans = np.empty((len(graph), 4), np.int64)
    for part, begin, end in zip(locations.parts, cuts, cuts[1:], strict=False):
        members = order[begin:end]
        spans[members] = part.spans[graph[members]]
    return spans


def _joined(spans: Ints) -> list[tuple[int, int]]:
    """Sort spans (n, 2) of bytes by their begins, and join those with less than a page between them."""
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    heads = np.flatnonzero(np.append(True, spans[1:, 0] - spans[:-1, 1] >= mmap.PAGESIZE))
    ends = np.append(heads[1:], len(spans)) - 1
    return list(zip(spans[heads, 0].tolist(), spans[ends, 1].tolist(), strict=True))
