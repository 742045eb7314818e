"""Sources: positions in a split to one gathered batch of rows, read straight from the shards into fresh buffers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypedDict

import numpy as np

from dali_pipeline.order import WINDOW_BYTES, Ints
from dali_pipeline.records import IndexPart, RecordIndex
from dali_pipeline.schema import Array, DataError, FormatError, Kind, Schema, UsageError
from dali_pipeline.selection import Selection
from dali_pipeline.shard import Shard

Layers: TypeAlias = "slice | Sequence[int] | None"


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceRows:
    """A batch of sequences as stored.

    values: (sum of lengths, *row) · lengths, labels, positions: (B,) int64 · ids: B texts.
    """

    values: Array
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


class BatchSource:
    """What both sources share. layers: which steps, or graphs, of each record; the others' bytes are not read.

    Raises DataError for layers that a record does not have; `gather` raises FormatError for damage. Several threads may gather.
    """

    kind: Kind
    ragged: tuple[str, ...]
    axis: str  # what `layers` chooses among, by its name in the manifest

    def __init__(self, selection: Selection, schema: Schema, layers: Layers = None, window_bytes: int = WINDOW_BYTES) -> None:
        self._selection, self._schema, self._layers = selection, schema, layers
        self._index = RecordIndex(selection, self.ragged, window_bytes)
        self._runs: dict[int, list[tuple[int, int]]] = {}
        if rows := selection.bounds(self.axis):
            self._selected(rows[0])  # what the shortest record has, all have

    def _selected(self, count: int) -> list[tuple[int, int]]:
        """Runs (begin, end) of the selected ones among `count` steps or graphs, in the order asked for."""
        if self._layers is None:
            return [(0, count)]
        if count not in self._runs:
            self._runs[count] = self._select(count)
        return self._runs[count]

    def _select(self, count: int) -> list[tuple[int, int]]:
        try:
            chosen = select(self._layers, count)
        except DataError as error:
            shards = self._selection.shards[0]
            raise DataError(f"{error} in split {shards.split!r} of {shards.root}") from None
        cuts = [0, *(at for at in range(1, len(chosen)) if chosen[at] != chosen[at - 1] + 1), len(chosen)]
        return [(chosen[a], chosen[b - 1] + 1) for a, b in itertools.pairwise(cuts)]


def select(layers: Layers, count: int) -> list[int]:
    """The numbers of the chosen ones among `count` steps or graphs, in the order asked for; raises DataError for none."""
    chosen: list[int] = []
    if layers is None or isinstance(layers, slice):
        chosen = list(range(count))[layers or slice(None)]
    elif all(-count <= layer < count for layer in layers):
        chosen = [layer % count for layer in layers]
    if not chosen:
        asked = f"{layers.start or 0}:{'' if layers.stop is None else layers.stop}" if isinstance(layers, slice) else layers
        raise DataError(f"layers {asked} asked of a record with {count}")
    return chosen


def parse_layers(text: str | None) -> Layers:
    """`12:20` or `8,16,24`, counted from 0 among the steps (or graphs) as stored; None for all."""
    if text is None:
        return None
    try:
        if ":" in text:
            begin, end = (int(part) if part else None for part in text.split(":"))
            return slice(begin, end)
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"layers are {text!r}; expected a range such as 12:20 or a list such as 8,16,24") from None


class SequenceSource(BatchSource):
    """Gathers sequences."""

    kind = "sequences"
    ragged = ("sequence",)
    axis = "step"

    def gather(self, positions: Ints) -> SequenceRows:
        """The records at `positions` (B,), any order, repeats allowed. Costs one `pread` a record and run of layers."""
        field = self._schema.sequence
        assert field is not None
        found = self._index.locate(positions)
        ends = [(part.rows[row], part.rows[row + 1]) for part, row in found]
        spans: list[tuple[tuple[int, int], ...]]  # of each record, runs of rows in the shard's array
        if self._layers is None:
            spans = [(span,) for span in ends]
        else:
            spans = [tuple((begin + a, begin + b) for a, b in self._selected(end - begin)) for begin, end in ends]
        lengths = np.array([sum([b - a for a, b in runs]) for runs in spans], np.int64)
        values = np.empty((int(lengths.sum()), *field.shape), field.dtype)
        out = _Cursor(values)
        for record, runs in zip(found, spans, strict=True):
            for begin, end in runs:
                out.read(record, "sequence", begin, end)
        return SequenceRows(values=values, lengths=lengths, positions=self._selection.told(positions), **_labels_and_ids(found))


class GraphSource(BatchSource):
    """Gathers graphs."""

    kind = "graphs"
    ragged = ("graphs", "x", "edge_index")
    axis = "graph"

    def gather(self, positions: Ints) -> GraphRows:
        """The records at `positions` (B,), any order, repeats allowed. Costs three `pread`s a record and run of layers."""
        schema = self._schema
        assert schema.x is not None
        found = self._index.locate(positions)
        runs: list[tuple[tuple[IndexPart, int], tuple[int, int], tuple[int, int]]] = []  # record, its nodes, its edges
        node_counts, edge_counts, layer_index, graphs_per_record = [], [], [], []
        for index, row in found:
            begin, end = index.rows[row] - index.rows[0], index.rows[row + 1] - index.rows[0]
            nodes, edges = index.offsets["x"][begin : end + 1], index.offsets["edge_index"][begin : end + 1]
            selected = self._selected(end - begin)
            for a, b in selected:
                runs.append(((index, row), (int(nodes[a]), int(nodes[b])), (int(edges[a]), int(edges[b]))))
                node_counts.append(np.diff(nodes[a : b + 1]))
                edge_counts.append(np.diff(edges[a : b + 1]))
                layer_index.append(np.arange(a, b))
            graphs_per_record.append(sum(b - a for a, b in selected))
        num_nodes = sum(end - begin for _, (begin, end), _ in runs)
        num_edges = sum(end - begin for _, _, (begin, end) in runs)
        x = np.empty((num_nodes, *schema.x.shape), schema.x.dtype)
        edge_index = np.empty((num_edges, 2), np.result_type(*{part.shard.array("edge_index").dtype for part, _ in found}))
        edge_attr = None
        outs = {"x": _Cursor(x), "edge_index": _Cursor(edge_index)}
        if schema.edge_attr is not None:
            edge_attr = np.empty((num_edges, *schema.edge_attr.shape), schema.edge_attr.dtype)
            outs["edge_attr"] = _Cursor(edge_attr)
        for record, nodes_span, edges_span in runs:
            for name, out in outs.items():
                out.read(record, name, *(nodes_span if name == "x" else edges_span))
        return GraphRows(
            x=x,
            edge_index=edge_index,
            edge_attr=edge_attr,
            node_counts=np.concatenate(node_counts),
            edge_counts=np.concatenate(edge_counts),
            layer_index=np.concatenate(layer_index),
            graphs_per_record=np.array(graphs_per_record, np.int64),
            positions=self._selection.told(positions),
            **_labels_and_ids(found),
        )


class _Cursor:
    """Fills an array from the front, shard rows after shard rows."""

    def __init__(self, array: Array) -> None:
        self._array = array
        self._bytes = array.reshape(-1).view(np.uint8).data
        self._row_bytes = array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
        self._at = 0  # rows filled
        self._alike: set[Shard] = set()  # those that store the array's very type, so that bytes can be read into it

    def read(self, record: tuple[IndexPart, int], name: str, begin: int, end: int) -> None:
        """Rows begin to end of an array of the record's shard. Raises FormatError with the record's id."""
        part, row = record
        shard, at, width = part.shard, self._at, self._row_bytes
        self._at = stop = at + end - begin
        try:
            if shard in self._alike or self._agrees(shard, name):
                shard.read_into(name, begin * width, self._bytes[at * width : stop * width])
            else:
                self._array[at:stop] = shard.read(name, begin, end)
        except FormatError as error:
            raise FormatError(f"{error} (met in record {part.id_of(row)!r})") from error

    def _agrees(self, shard: Shard, name: str) -> bool:
        """Whether the shard has the array's very type, or, False, one that widens to it; raises FormatError for another."""
        stored, wanted = shard.array(name), self._array
        if stored.shape[1:] != wanted.shape[1:]:
            raise FormatError(
                f"{shard.path}, {name} has rows of shape {stored.shape[1:]}; expected {wanted.shape[1:]} as in the schema"
            )
        if stored.dtype == wanted.dtype:
            self._alike.add(shard)
            return True
        if not np.can_cast(stored.dtype, wanted.dtype):
            raise FormatError(f"{shard.path}, {name} is {stored.dtype}; expected {wanted.dtype} as in the schema")
        return False


class _LabelsAndIds(TypedDict):
    labels: Ints
    ids: list[str]


def _labels_and_ids(found: list[tuple[IndexPart, int]]) -> _LabelsAndIds:
    return {
        "labels": np.array([index.labels[row] for index, row in found], np.int64),
        "ids": [index.id_of(row) for index, row in found],
    }
