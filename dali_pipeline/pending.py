"""Pending: records that wait for their shard, and the arrays that they become."""

from __future__ import annotations

import numpy as np

from dali_pipeline.schema import Array, DataError, Kind, Record, Schema, graph_rows, sequence_rows


class Pending:
    """Records of one split and kind that are not yet in a shard."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.ids: list[bytes] = []
        self.groups: list[bytes] = []
        self.labels: list[int] = []
        self.parts: dict[str, list[Array]] = {}
        self.nbytes = 0

    def add(self, id_: bytes, group: bytes, label: int, arrays: dict[str, Array]) -> None:
        """Takes in one record's arrays, as `record_arrays` gives them: copies, for the caller may use its own again."""
        self.ids.append(id_)
        self.groups.append(group)
        self.labels.append(label)
        for name, array in arrays.items():
            self.parts.setdefault(name, []).append(array.copy())
            self.nbytes += array.nbytes

    def concatenated(self) -> dict[str, Array]:
        """The arrays of a shard (docs/format.md); counts become offsets here."""
        arrays: dict[str, Array] = {"labels": np.array(self.labels, np.int64)}
        for name, texts in (("ids", self.ids), ("groups", self.groups)):
            arrays[name] = np.frombuffer(b"".join(texts), np.uint8)
            arrays[f"{name}.offsets"] = _offsets(np.array([len(text) for text in texts]))
        for name, parts in self.parts.items():
            whole = np.concatenate(parts)
            if name.endswith(".counts"):
                arrays[name.removesuffix("counts") + "offsets"] = _offsets(whole)
            else:
                arrays[name] = whole  # edge_index: the widest of its records' types
        return arrays


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
    return arrays, {"graph": len(graphs.node_counts), "node": len(graphs.x), "edge": graphs.edge_index.shape[1]}


def whole_label(record: Record) -> int:
    """The label as an int, whatever number it came as; raises DataError for one that is not whole, or below 0."""
    try:
        label = int(record.label)
        whole = label == record.label and 0 <= label < 2**63
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise DataError(f"record {record.id!r} has the label {record.label!r}; expected a whole number of 0 or more")
    return label


def _offsets(counts: Array) -> Array:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def as_bytes(record: Record, name: str, text: str) -> bytes:
    """The id or group in UTF-8; raises DataError for a text that cannot be written in it."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"record {record.id!r} has a {name} that UTF-8 cannot hold ({error.reason})") from None
