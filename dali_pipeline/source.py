"""Sources: positions in a split to one gathered batch of rows, read straight from the shards."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

from dali_pipeline.gather import gather
from dali_pipeline.memory import Buffers
from dali_pipeline.order import WINDOW_BYTES, Ints
from dali_pipeline.records import IndexPart, RecordIndex
from dali_pipeline.schema import Array, DataError, Field, Kind, Schema, UsageError
from dali_pipeline.selection import Selection

Layers: TypeAlias = "slice | Sequence[int] | None"
Padded: TypeAlias = Literal["batch", "all"] | None


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

    def __init__(self, selection: Selection, schema: Schema, layers: Layers = None, window_bytes: int = WINDOW_BYTES) -> None:
        super().__init__(selection, schema, layers, window_bytes)
        self._buffers = Buffers()

    def gather(self, positions: Ints, batch_size: int, padded: Padded) -> SequenceRows:
        """The records at `positions` (N,), any order, repeats allowed; batches of `batch_size`.

        padded: each record to the longest of its "batch", or of "all"; None for no padding. Costs one read a record and run of
        layers that does not go on where the one before ends.
        """
        field = self._schema.sequence
        assert field is not None
        found = self._index.locate(positions)
        pairs = found.pairs()
        begins = np.array([part.rows[row] for part, row in pairs], np.int64)
        lengths = np.array([part.rows[row + 1] for part, row in pairs], np.int64) - begins
        records, ends = np.arange(len(pairs)), begins + lengths
        if self._layers is not None:  # every record several times, once for each run of its layers
            runs = [self._selected(length) for length in lengths.tolist()]
            records = np.repeat(records, [len(each) for each in runs])
            spans = np.array([span for each in runs for span in each], np.int64)  # (reads, 2)
            begins, ends = begins[records] + spans[:, 0], begins[records] + spans[:, 1]
            lengths = np.bincount(records, ends - begins, len(pairs)).astype(np.int64)
        sizes = lengths  # rows that each record takes in `values`
        if padded is not None:
            longest = np.maximum.reduceat(lengths, np.arange(0, len(lengths), batch_size))  # of each batch
            every = longest if padded == "batch" else np.full_like(longest, longest.max())
            sizes = np.repeat(every, batch_size)
        starts = np.cumsum(sizes) - sizes
        at = starts[records] + (np.cumsum(ends - begins) - (ends - begins)) - (np.cumsum(lengths) - lengths)[records]
        values = self._room(int(sizes.sum()), field, pairs[0], int(begins[0]))
        for short in np.flatnonzero(lengths < sizes).tolist():
            values[starts[short] + lengths[short] : starts[short] + sizes[short]] = 0
        gather(found, "sequence", records, begins, ends, values, at)
        return SequenceRows(
            values=values,
            starts=starts,
            lengths=lengths,
            positions=self._selection.told(positions),
            **_labels_and_ids(pairs),
        )

    def _room(self, rows: int, field: Field, first: tuple[IndexPart, int], begin: int) -> Array:
        """Memory for so many rows.

        It lies in its cache line as the first row does in the file: where memory stands 1 to 31 bytes beyond the file's place
        in a page, processors that copy by `rep movsb` (AMD Zen 3 and later) take five times as long.
        """
        phase = (first[0].shard.array("sequence").begin + begin * field.row_bytes) % 64
        if phase % np.dtype(field.dtype).itemsize:
            phase = 0
        return self._buffers.take(rows * field.row_bytes, phase).view(field.dtype).reshape(rows, *field.shape)


class GraphSource(BatchSource):
    """Gathers graphs."""

    kind = "graphs"
    ragged = ("graphs", "x", "edge_index")
    axis = "graph"

    def gather(self, positions: Ints) -> GraphRows:
        """The records at `positions` (B,), any order, repeats allowed. Costs three reads a record and run of layers."""
        schema = self._schema
        assert schema.x is not None
        found = self._index.locate(positions)
        pairs = found.pairs()
        records, nodes_spans, edges_spans = [], [], []  # of each run of graphs: its record, its nodes, its edges
        node_counts, edge_counts, layer_index, graphs_per_record = [], [], [], []
        for record, (part, row) in enumerate(pairs):
            begin, end = part.rows[row] - part.rows[0], part.rows[row + 1] - part.rows[0]
            nodes, edges = part.offsets["x"][begin : end + 1], part.offsets["edge_index"][begin : end + 1]
            selected = self._selected(end - begin)
            for a, b in selected:
                records.append(record)
                nodes_spans.append((nodes[a], nodes[b]))
                edges_spans.append((edges[a], edges[b]))
                node_counts.append(np.diff(nodes[a : b + 1]))
                edge_counts.append(np.diff(edges[a : b + 1]))
                layer_index.append(np.arange(a, b))
            graphs_per_record.append(sum(b - a for a, b in selected))
        record_of_run, nodes_of_run, edges_of_run = np.array(records), np.array(nodes_spans), np.array(edges_spans)

        def rows(name: str, dtype: npt.DTypeLike, shape: tuple[int, ...], spans: Ints) -> Array:
            counts = spans[:, 1] - spans[:, 0]
            out = np.empty((int(counts.sum()), *shape), dtype)
            gather(found, name, record_of_run, spans[:, 0], spans[:, 1], out, np.cumsum(counts) - counts)
            return out

        widest = np.result_type(*{part.shard.array("edge_index").dtype for part in found.parts})
        attr = schema.edge_attr
        return GraphRows(
            x=rows("x", schema.x.dtype, schema.x.shape, nodes_of_run),
            edge_index=rows("edge_index", widest, (2,), edges_of_run),
            edge_attr=None if attr is None else rows("edge_attr", attr.dtype, attr.shape, edges_of_run),
            node_counts=np.concatenate(node_counts),
            edge_counts=np.concatenate(edge_counts),
            layer_index=np.concatenate(layer_index),
            graphs_per_record=np.array(graphs_per_record, np.int64),
            positions=self._selection.told(positions),
            **_labels_and_ids(pairs),
        )


class _LabelsAndIds(TypedDict):
    labels: Ints
    ids: list[str]


def _labels_and_ids(pairs: list[tuple[IndexPart, int]]) -> _LabelsAndIds:
    return {
        "labels": np.array([part.labels[row] for part, row in pairs], np.int64),
        "ids": [part.ids[row] for part, row in pairs],
    }
