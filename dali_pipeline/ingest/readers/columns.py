"""Reader of tables with list columns: Parquet, Arrow, and the folders that Hugging Face `datasets` saves.

Columns: `label` (or `labels`, `y`); `sequence` (or `sequences`, `values`, `hidden_states`), a list of rows;
`x` (or `node_feat`), a list of rows, with `edge_index`, two lists, and optionally `edge_attr`: one graph per record;
optionally `id`, and `group` (or `question_id`). Padded sequences are cut to their `lengths` or `attention_mask`. `adj`, lists
of numbers, may replace edge_index, and `edge_weight` may replace edge_attr.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute, parquet

from dali_pipeline.errors import FormatError
from dali_pipeline.format.record import Graphs
from dali_pipeline.ingest.foreign import (
    LENGTHS,
    MASKS,
    ForeignFile,
    Values,
    as_text,
    edges_of,
    real_steps,
    whole_numbers,
    without_padding,
)
from dali_pipeline.types import Array, Kind

NAMES = {
    "label": ("label", "labels", "y"),
    "sequence": ("sequence", "sequences", "values", "hidden_states"),
    "x": ("x", "node_feat"),
    "edge_index": ("edge_index",),
    "edge_attr": ("edge_attr", "edge_weight"),
    "adj": ("adj",),
    "lengths": LENGTHS,
    "mask": MASKS,
    "id": ("id",),
    "group": ("group", "question_id"),
}
INDEX_COLUMN = r"__index_level_\d+__$"  # written by pandas
BATCH_ROWS = 256  # rows of a Parquet file that are decoded at a time


def open_file(path: Path, name: str) -> ForeignFile:
    """Read the columns of labels and names, but not the lists; raise FormatError if columns are missing."""
    columns = _columns(path)
    kinds: list[Kind] = [kind for kind, name in (("sequences", "sequence"), ("graphs", "x")) if name in columns]  # type: ignore[misc]
    if "label" not in columns or not kinds or ("x" in columns and not {"edge_index", "adj"} & columns.keys()):
        raise FormatError(
            f"{path} has the columns {', '.join(_schema(path).names)}; expected label, and sequence, or x and edge_index"
        )
    parts: dict[str, list[Any]] = {ours: [] for ours in ("label", "id", "group", "lengths", "mask") if ours in columns}
    for batch in _batches(path, [columns[ours] for ours in parts]):
        for ours, part in parts.items():
            part += batch.column(columns[ours]).to_pylist()
    labels = [label[0] if isinstance(label, list) and len(label) == 1 else label for label in parts["label"]]
    ids = [as_text(path, columns["id"], value) for value in parts["id"]] if "id" in parts else None
    if ids is None and "group" not in parts:
        ids = [f"{name}-{row}" for row in range(len(labels))]
    groups = [as_text(path, columns["group"], value) for value in parts["group"]] if "group" in parts else ids or []
    real = real_steps(path, len(labels), parts.get("lengths"), parts.get("mask")) if "sequence" in columns else None
    unused = {"adj"} if "edge_index" in columns else set[str]()
    unused |= set() if "x" in columns else {"edge_index", "edge_attr", "adj"}
    unused |= set() if "sequence" in columns else {"lengths", "mask"}
    taken = {theirs for ours, theirs in columns.items() if ours not in unused}
    return ForeignFile(
        path=path,
        kinds=tuple(kinds),
        ids=ids,
        groups=groups,
        labels=whole_numbers(path, columns["label"], labels),
        values=lambda: without_padding(path, _values(path, columns), real),
        not_taken=tuple(name for name in _schema(path).names if name not in taken and not re.match(INDEX_COLUMN, name)),
    )


def _columns(path: Path) -> dict[str, str]:
    """Return the file's column for each of our names that it has."""
    file_columns = _schema(path).names
    columns = {ours: next((name for name in names if name in file_columns), None) for ours, names in NAMES.items()}
    return {ours: name for ours, name in columns.items() if name is not None}


def _schema(path: Path) -> pa.Schema:
    try:
        if path.suffix == ".parquet":
            return parquet.read_schema(path)
        with _arrow(path) as reader:
            return reader.schema
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None


def _arrow(path: Path) -> Any:
    """Open either format of Arrow: the stream that `datasets` writes, or the file format of Feather."""
    file = pa.OSFile(str(path))
    if file.read(6) == b"ARROW1":
        return pa.ipc.open_file(file)
    file.seek(0)
    return pa.ipc.open_stream(file)


def _batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    try:
        if path.suffix == ".parquet":
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
                    batch.validate(full=True)
                    yield batch
            return
        with _arrow(path) as reader:
            batches = (
                (reader.get_batch(number) for number in range(reader.num_record_batches))
                if hasattr(reader, "get_batch")
                else reader
            )
            for batch in batches:
                batch.validate(full=True)  # wrong offsets would lead to reads outside the buffer
                yield batch.select(columns)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> FormatError:
    reason = str(error).strip().split("\n")[0][:120]
    return FormatError(f"{path} cannot be read as {path.suffix[1:]} ({reason}): truncated, or something else")


def _values(path: Path, columns: dict[str, str]) -> Iterator[Values]:
    wanted: dict[str, str] = {
        ours: columns[ours] for ours in ("sequence", "x", "edge_index", "edge_attr", "adj") if ours in columns
    }
    first = 0
    for batch in _batches(path, list(wanted.values())):
        where = f"{path}, records {first} to {first + batch.num_rows - 1}"
        lists = {ours: _Lists.of(f"{where}, {theirs}", batch.column(theirs)) for ours, theirs in wanted.items()}
        for row in range(batch.num_rows):
            sequence = lists["sequence"].row(row) if "sequence" in lists else None
            yield Values(sequence, _graph(lists, row) if "x" in lists else None)
        first += batch.num_rows


def _graph(lists: dict[str, _Lists], row: int) -> Graphs:
    x = lists["x"].row(row)
    attr = lists["edge_attr"].row(row) if "edge_attr" in lists else None
    if "edge_index" in lists:
        edges = lists["edge_index"].row(row)
        if edges.ndim != 2 or len(edges) != 2:
            raise FormatError(
                f"{lists['edge_index'].what}: row {row} is {list(edges.shape)}; expected two lists, sources and targets"
            )
        edges = edges if edges.size else np.zeros((2, 0), np.int64)
    else:
        edges, values = edges_of(Path(f"{lists['adj'].what}: row {row}"), lists["adj"].row(row), len(x))
        attr = values if attr is None else attr
    return Graphs(
        x=x,
        edge_index=edges,
        edge_attr=attr,
        node_counts=np.array([len(x)]),
        edge_counts=np.array([edges.shape[1]]),
    )


@dataclass(frozen=True, kw_only=True)
class _Lists:
    """A column of lists, or of lists of lists, as one flat array.

    Attributes:
        what: Name of the column, for messages.
        values: All numbers of the column.
        outer: Offsets of the rows.
        inner: Offsets of the inner lists, or None if there is one level.
    """

    what: str
    values: Array
    outer: Array
    inner: Array | None

    @classmethod
    def of(cls, what: str, column: Any) -> _Lists:
        """Return the lists of a column; raise FormatError unless it is one or two levels of lists of numbers, none missing."""
        levels = []
        while True:
            if column.null_count:
                raise FormatError(f"{what} has missing values; expected a list of numbers in each")
            if isinstance(column, pa.FixedShapeTensorArray) and len(column.type.shape) == 2:
                if column.type.permutation not in (None, [0, 1]):
                    raise FormatError(f"{what} is stored with permuted axes; expected tensors of rows")
                steps, width = column.type.shape
                levels = [np.arange(len(column) + 1) * steps, np.arange(len(column) * steps + 1) * width]
                column = column.storage.flatten()
            elif isinstance(column, pa.ExtensionArray):
                column = column.storage
            elif isinstance(column, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
                lengths = compute.list_value_length(column).to_numpy(zero_copy_only=False)
                levels.append(np.append(0, np.cumsum(lengths.astype(np.int64))))
                column = column.flatten()
            else:
                break
        number = pa.types.is_floating(column.type) or pa.types.is_integer(column.type) or pa.types.is_boolean(column.type)
        if not number or len(levels) not in (1, 2):
            raise FormatError(f"{what} is {len(levels)} levels of lists of {column.type}; expected 1 or 2 of numbers")
        return cls(
            what=what,
            values=column.to_numpy(zero_copy_only=False),
            outer=levels[0],
            inner=levels[1] if len(levels) == 2 else None,
        )

    def row(self, number: int) -> Array:
        """Return a row, (T,) or (T, F); raise FormatError if its inner lists differ in length."""
        begin, end = self.outer[number : number + 2]
        if self.inner is None:
            return self.values[begin:end]
        widths = np.diff(self.inner[begin : end + 1])
        if len(set(widths.tolist())) > 1:
            raise FormatError(f"{self.what}: a record's lists have {sorted(set(widths.tolist()))} numbers; expected one length")
        return self.values[self.inner[begin] : self.inner[end]].reshape(end - begin, widths[0] if len(widths) else 0)
