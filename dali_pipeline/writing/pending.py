"""Pending: a shard under way, and the arrays that a record becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dali_pipeline.errors import DataError
from dali_pipeline.format.digest import EpochDigest
from dali_pipeline.format.record import Record, graph_rows, masked_values, sequence_rows
from dali_pipeline.format.schema import Schema
from dali_pipeline.format.shard import ShardInfo
from dali_pipeline.format.shardfile import ShardFile
from dali_pipeline.types import Array, Kind

STREAMED: dict[Kind, str] = {"sequences": "sequence", "graphs": "x"}  # goes to the disk as it comes; the rest is small


class Stack(NamedTuple):
    """Several records with sequences (N, T, *row) of one length, as they often lie in a file; the texts' UTF-8 is sound."""

    ids: list[str]
    groups: list[str]
    labels: list[int]
    sequences: Array

    def rows(self, schema: Schema) -> Array:
        """The sequences in the schema's type; raises DataError, as `sequence_rows` does, naming the first that does not fit."""
        if schema.sequence is None:
            raise DataError(f"record {self.ids[0]!r} has a sequence, and the schema none; expected {' or '.join(schema.kinds)}")
        head = Record(id=self.ids[0], label=self.labels[0], sequence=self.sequences[0])
        if sequence_rows(head, schema.sequence) is head.sequence:
            return self.sequences  # of the schema's type and shape, all of them
        return np.stack(
            [
                sequence_rows(Record(id=name, label=label, sequence=sequence), schema.sequence)
                for name, label, sequence in zip(self.ids, self.labels, self.sequences, strict=True)
            ]
        )


class _Joined:
    """Small arrays one after the other, joined now and then, as each costs a hundred bytes of its own."""

    def __init__(self) -> None:
        self._joined: list[Array] = []
        self._loose: list[Array] = []

    def add(self, array: Array) -> None:
        """A copy goes behind the others."""
        self._loose.append(array.copy())
        if len(self._loose) == 1024:
            self._joined, self._loose = [*self._joined, np.concatenate(self._loose)], []

    @property
    def whole(self) -> Array:
        """All of them, in the widest of their types."""
        return np.concatenate(self._joined + self._loose)


class Pending:
    """The shard of one split and kind that records go to now. nbytes: of their arrays so far, names and labels apart."""

    def __init__(
        self, path: Path, kind: Kind, schema: Schema, expected_bytes: int, see: Callable[[Array], None] | None = None
    ) -> None:
        streamed = schema.sequence if kind == "sequences" else schema.x
        assert streamed is not None
        self._layers, self._see = streamed.layout, see
        self._waiting: list[Array] = []  # records to be stored together, layer by layer
        self._file = ShardFile(
            path,
            kind,
            STREAMED[kind],
            streamed.dtype,
            streamed.shape,
            expected_bytes=expected_bytes,
            see=None if self._layers else see,
        )
        self._ids: list[bytes] = []
        self._groups: list[bytes] = []
        self._labels: list[int] = []
        self._parts: dict[str, _Joined] = {}
        self.nbytes = 0

    def add(
        self,
        ids: Sequence[bytes],
        groups: Sequence[bytes],
        labels: Sequence[int],
        values: Sequence[Array],
        arrays: Mapping[str, Array],
    ) -> None:
        """Takes in records: their values, and their other arrays together. Copies, for the caller may use its own again."""
        self._ids += ids
        self._groups += groups
        self._labels += labels
        for rows in values:
            self.nbytes += rows.nbytes
            if self._layers is None:
                self._file.append(rows)
                continue
            self._waiting.append(rows.copy())
            if len(self._waiting) == self._layers.records:
                self._append_by_layer()
        for name, array in arrays.items():
            self._parts.setdefault(name, _Joined()).add(array)
            self.nbytes += array.nbytes

    def _append_by_layer(self) -> None:
        stacked = np.stack(self._waiting)  # (N, T, *row)
        self._waiting = []
        if self._see is not None:
            self._see(stacked.reshape(-1, *stacked.shape[2:]))
        for layer in range(stacked.shape[1]):
            self._file.append(stacked[:, layer])

    def close(self) -> ShardInfo:
        """Writes what waits, and the shard is there."""
        if self._waiting:
            self._append_by_layer()
        arrays: dict[str, Array] = {"labels": np.array(self._labels, np.int64)}
        for name, texts in (("ids", self._ids), ("groups", self._groups)):
            arrays[name] = np.frombuffer(b"".join(texts), np.uint8)
            arrays[f"{name}.offsets"] = _offsets(np.array([len(text) for text in texts]))
        for name, parts in self._parts.items():
            if name.endswith(".counts"):
                arrays[name.removesuffix("counts") + "offsets"] = _offsets(parts.whole)
            else:
                arrays[name] = parts.whole  # edge_index: the widest of its records' types
        return self._file.close(len(self._labels), arrays, EpochDigest.of(self._ids).total)

    def discard(self) -> None:
        """Takes away what was written."""
        self._file.discard()


def record_arrays(record: Record, schema: Schema, kind: Kind) -> tuple[dict[str, Array], dict[str, int]]:
    """The record's rows of each field and `.counts` of each ragged axis; and its rows by axis, for the manifest."""
    if kind == "sequences":
        assert schema.sequence is not None
        rows = sequence_rows(record, schema.sequence)
        return {"sequence": rows, "sequence.counts": np.array([len(rows)])}, {"step": len(rows)}
    graphs = graph_rows(record, schema)
    narrow = np.min_scalar_type(int(graphs.edge_index.max(initial=0)))
    arrays = {
        "x": graphs.x,
        "x.counts": graphs.node_counts,
        "edge_index": graphs.edge_index.T.astype(narrow),  # (2, E) -> (E, 2): a record's edges lie together
        "edge_index.counts": graphs.edge_counts,
        "graphs.counts": np.array([len(graphs.node_counts)]),
    }
    if graphs.edge_attr is not None:
        arrays["edge_attr"] = graphs.edge_attr
    arrays |= graphs.fields
    return arrays, {"graph": len(graphs.node_counts), "node": len(graphs.x), "edge": graphs.edge_index.shape[1]}


def whole_label(record: Record) -> int:
    """The label as an int, whatever number it came as; raises DataError for one that is not whole, or below 0."""
    try:
        label = int(record.label)
        whole = not masked_values(record.label) and label == record.label and 0 <= label < 2**63
    except (TypeError, ValueError, OverflowError, RuntimeError, np.ma.MaskError):  # of a meta tensor, RuntimeError
        whole = False
    if not whole:
        found = " ".join(repr(record.label).split())  # an array's has several lines
        raise DataError(f"record {record.id!r} has the label {found}; expected a whole number of 0 or more")
    return label


def _offsets(counts: Array) -> Array:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def as_bytes(record: Record, name: str, text: str) -> bytes:
    """The id or group in UTF-8; raises DataError for a text that cannot be written in it."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"record {record.id!r} has a {name} that UTF-8 cannot hold ({error.reason})") from None
