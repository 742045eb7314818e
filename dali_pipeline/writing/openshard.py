"""OpenShard: a shard being written, and the arrays that a record is converted to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dali_pipeline.errors import DataError
from dali_pipeline.format.digest import EpochDigest
from dali_pipeline.format.encoding import encode
from dali_pipeline.format.record import Record, graph_rows, named_rows, sequence_rows
from dali_pipeline.format.schema import Schema
from dali_pipeline.format.shard import ShardInfo
from dali_pipeline.format.shardfile import ShardFile
from dali_pipeline.types import Array, Kind
from dali_pipeline.writing.places import PlacedRecord, Places

STREAMED: dict[Kind, str] = {"sequences": "sequence", "graphs": "x"}  # written to the disk at once; the rest is small


SEEN_BYTES = 16 << 20  # of values in place that go to the statistics at once


class Stack(NamedTuple):
    """Several records with sequences of one length, as they often lie in a file.

    Attributes:
        ids: N ids, valid UTF-8.
        groups: N groups, valid UTF-8.
        labels: N labels.
        sequences: (N, T, *row), one sequence per record.
        fields: Further fields: (N, T, *row) per step, (N, *row) or N texts per record. Default: none.
    """

    ids: list[str]
    groups: list[str]
    labels: Sequence[Any]
    sequences: Array
    fields: Mapping[str, Any] = {}

    def record(self, row: int) -> Record:
        """Return one of the records."""
        fields = {name: values[row] for name, values in self.fields.items()}
        return Record(
            id=self.ids[row], group=self.groups[row], label=self.labels[row], sequence=self.sequences[row], fields=fields
        )

    def rows(self, schema: Schema) -> Array:
        """Return the sequences in the schema's type; raise DataError that names the first record that does not fit."""
        if schema.sequence is None:
            raise DataError(f"record {self.ids[0]!r} has a sequence, and the schema none; expected {' or '.join(schema.kinds)}")
        check_layers(self.ids[0], self.sequences.shape[1], schema)
        head = Record(id=self.ids[0], label=self.labels[0], sequence=self.sequences[0])
        if sequence_rows(head, schema.sequence) is head.sequence:
            return self.sequences  # all have the schema's type and shape
        if not schema.sequence.scales:
            stored, lost = encode(self.sequences, schema.sequence.dtype, None)
            if not lost:
                return stored
        return np.stack(
            [
                sequence_rows(Record(id=name, label=label, sequence=sequence), schema.sequence)
                for name, label, sequence in zip(self.ids, self.labels, self.sequences, strict=True)
            ]
        )


class _Joined:
    """List of small arrays, concatenated from time to time because each costs a hundred bytes of its own."""

    def __init__(self) -> None:
        self._joined: list[Array] = []
        self._loose: list[Array] = []

    def add(self, array: Array) -> None:
        """Append a copy of the array."""
        self._loose.append(array.copy())
        if len(self._loose) == 1024:
            self._joined, self._loose = [*self._joined, np.concatenate(self._loose)], []

    @property
    def whole(self) -> Array:
        """All arrays as one, in the widest of their types."""
        return np.concatenate(self._joined + self._loose)


class OpenShard:
    """The open shard of one split and kind, which records are appended to.

    Args:
        path: The shard.
        kind: Kind of its records.
        schema: Fields of the data set.
        expected_bytes: Expected size of the file.
        on_rows: Called with the values, some thousand rows at a time. Default: None.
        in_place: Whether the values stay in files of others; then records are added by `add_placed`. Default: False.

    Attributes:
        nbytes: Bytes of the records' arrays so far, without names and labels.
    """

    def __init__(
        self,
        path: Path,
        kind: Kind,
        schema: Schema,
        expected_bytes: int,
        on_rows: Callable[[Array], None] | None = None,
        *,
        in_place: bool = False,
    ) -> None:
        streamed = schema.sequence if kind == "sequences" else schema.x
        assert streamed is not None
        self._layers, self._on_rows = streamed.layout, on_rows
        self._layer_axis = schema.layer_axis if kind == "sequences" else None
        self._rows_per_step = 1
        if self._layer_axis is not None:  # the layers of a record are stored one after the other
            self._rows_per_step, streamed = schema.stored_layers, schema.stored_sequence
        self._waiting: list[Array] = []  # records of the next block of a layout by layer
        self._file = ShardFile(
            path,
            kind,
            None if in_place else STREAMED[kind],
            streamed.dtype,
            streamed.shape,
            expected_bytes=expected_bytes,
            on_rows=None if self._layers or self._layer_axis is not None else on_rows,
        )
        self._ids: list[bytes] = []
        self._groups: list[bytes] = []
        self._labels: list[Array | None] = []
        self._label = schema.labels
        self._parts: dict[str, _Joined] = {}
        self._schema = schema
        self._places = Places()
        self._unseen, self._unseen_bytes = list[Array](), 0  # values for `on_rows`
        self.nbytes = 0

    def add(
        self,
        ids: Sequence[bytes],
        groups: Sequence[bytes],
        labels: Sequence[Array | None],
        values: Sequence[Array],
        arrays: Mapping[str, Array],
    ) -> None:
        """Append records: their values, and their other arrays joined. Copies, because the caller may reuse its arrays."""
        self._ids += ids
        self._groups += groups
        self._labels += labels
        for rows in values:
            self.nbytes += rows.nbytes
            if self._layer_axis is not None:
                self._append_layers(rows)
                continue
            if self._layers is None:
                self._file.append(rows)
                continue
            self._waiting.append(rows.copy())
            if len(self._waiting) == self._layers.records:
                self._append_by_layer()
        for name, array in arrays.items():
            self._parts.setdefault(name, _Joined()).add(array)
            self.nbytes += array.nbytes

    def add_placed(self, record: PlacedRecord, label: Array | None, arrays: Mapping[str, Array]) -> None:
        """Append a record whose values stay where they are, with the arrays that are copied."""
        self._ids.append(record.id.encode())
        self._groups.append(record.group.encode())
        self._labels.append(label)
        self._places.add(record.pieces)
        self.nbytes += record.nbytes
        for name, array in arrays.items():
            self._parts.setdefault(name, _Joined()).add(array)
        if self._on_rows is not None:
            self._unseen.append(record.values)
            self._unseen_bytes += record.values.nbytes
            if self._unseen_bytes >= SEEN_BYTES:
                self._see()

    def _see(self) -> None:
        """Hand the values of the last records to `on_rows`."""
        if self._on_rows is not None and self._unseen:
            self._on_rows(np.concatenate(self._unseen) if len(self._unseen) > 1 else self._unseen[0])
        self._unseen, self._unseen_bytes = [], 0

    def _append_layers(self, rows: Array) -> None:
        """Append one record (T, *row) as (layers, T, *rest)."""
        assert self._layer_axis is not None
        if self._on_rows is not None:
            self._on_rows(rows)
        for layer in range(self._rows_per_step):
            self._file.append(np.take(rows, layer, axis=1 + self._layer_axis))

    def _append_by_layer(self) -> None:
        stacked = np.stack(self._waiting)  # (N, T, *row)
        self._waiting = []
        if self._on_rows is not None:
            self._on_rows(stacked.reshape(-1, *stacked.shape[2:]))
        for layer in range(stacked.shape[1]):
            self._file.append(stacked[:, layer])

    def close(self) -> ShardInfo:
        """Write the remaining arrays, and finish the shard."""
        if self._waiting:
            self._append_by_layer()
        arrays: dict[str, Array] = {}
        if self._label.dtype is not None:
            arrays["labels"] = np.array(self._labels, self._label.dtype).reshape(-1, *self._label.shape)
        for name, texts in (("ids", self._ids), ("groups", self._groups)):
            arrays[name] = np.frombuffer(b"".join(texts), np.uint8)
            arrays[f"{name}.offsets"] = _offsets(np.array([len(text) for text in texts]))
        for name, parts in self._parts.items():
            if name.endswith(".counts"):
                arrays[name.removesuffix("counts") + "offsets"] = _offsets(parts.whole)
            else:
                arrays[name] = parts.whole  # edge_index: the widest of its records' types
        total = EpochDigest.of(self._ids).total
        if not self._places.nbytes:
            info = self._file.close(len(self._labels), arrays, total)
            return replace(info, steps=info.steps // self._rows_per_step)
        self._see()
        fields = {"sequence": self._schema.stored_sequence, **self._schema.step_fields, **self._schema.record_fields}
        referenced = {}
        for name in self._places.names:
            field = fields[name]
            referenced[name] = field.dtype, (self._places.rows(name, field.row_bytes), *field.shape)
        arrays |= self._places.arrays()
        info = self._file.close(len(self._labels), arrays, total, referenced)
        return replace(info, steps=int(arrays["sequence.offsets"][-1]), referenced=self._places.nbytes)

    def discard(self) -> None:
        """Remove what was written."""
        self._file.discard()


def record_arrays(record: Record, schema: Schema, kind: Kind) -> tuple[dict[str, Array], dict[str, int]]:
    """Return the record's rows per field and `.counts` per ragged axis, and its number of rows per axis for the manifest."""
    if kind == "sequences":
        assert schema.sequence is not None
        rows = sequence_rows(record, schema.sequence)
        check_layers(record.id, len(rows), schema)
        own = {"sequence": rows, "sequence.counts": np.array([len(rows)])}
        return own | named_rows(record, schema, kind, len(rows)), {"step": len(rows)}
    graphs = graph_rows(record, schema)
    narrow = np.min_scalar_type(int(graphs.edge_index.max(initial=0)))
    arrays = {
        "x": graphs.x,
        "x.counts": graphs.node_counts,
        "edge_index": graphs.edge_index.T.astype(narrow),  # (2, E) -> (E, 2): the edges of a record are contiguous
        "edge_index.counts": graphs.edge_counts,
        "graphs.counts": np.array([len(graphs.node_counts)]),
    }
    if graphs.edge_attr is not None:
        arrays["edge_attr"] = graphs.edge_attr
    arrays |= {**graphs.fields, **named_rows(record, schema, kind, 0)}
    return arrays, {"graph": len(graphs.node_counts), "node": len(graphs.x), "edge": graphs.edge_index.shape[1]}


def check_layers(record_id: str, steps: int, schema: Schema) -> None:
    """Raise DataError if the steps of a sequence are layers with numbers, and there are more or fewer than these."""
    if schema.steps == "layer" and schema.layers and steps != len(schema.layers):
        numbers = len(schema.layers)
        raise DataError(
            f"record {record_id!r}, sequence has {steps} steps; expected {numbers}, as layers has {numbers} numbers"
        )


def _offsets(counts: Array) -> Array:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def as_bytes(record: Record, name: str, text: str) -> bytes:
    """Encode an id or group as UTF-8; raise DataError for text that UTF-8 cannot encode."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"record {record.id!r} has a {name} that UTF-8 cannot hold ({error.reason})") from None
