"""Parquet and Arrow files, and folders that Hugging Face `datasets` saves: rows are records, columns are keys.

Nested lists become arrays of the row's shape; fields of structs are dotted paths. Files are decoded part by part.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from pyarrow import compute, parquet

from dali_pipeline.errors import FormatError
from dali_pipeline.ingest.containers.leaf import OBJECT, TEXT, Leaf, check_record, missing_key, not_taken, row_range
from dali_pipeline.ingest.containers.objects import Numbers, joined
from dali_pipeline.ingest.containers.source import Source
from dali_pipeline.ingest.foreign import natural
from dali_pipeline.types import Array

_PART_BYTES = 8 << 20  # of a column of a Parquet file that is decoded at a time
_MOST_PART_ROWS = 4096
_MOST_DEPTH = 32
_ERRORS = (OSError, ValueError, KeyError, pa.ArrowException)


class TableContainer:
    """A table: one file, or all Arrow or Parquet files of a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = [_open(file) for file in _files_of(path)]
        self._schema = self._files[0].schema
        self._names = _names_of(self._files[0].path, self._schema)
        for file in self._files[1:]:
            if not file.schema.equals(self._schema):
                raise FormatError(f"{file.path} has other columns than {self._files[0].path}; expected the same in each")
        self._first_rows = [0, *itertools.accumulate(file.num_rows for file in self._files)]
        self.records: Sequence[str] | None = Numbers(self._first_rows[-1])
        self._columns = _leaf_types(self._schema)
        self._parts: dict[str, _Part] = {}

    def leaves(self, record: int = 0) -> list[Leaf]:
        """Return the columns, with the shapes that they have in a row; decodes the part of the file that holds the row."""
        if not self.records:
            return [Leaf(key, (), OBJECT, "the table has no rows") for key in self._columns]
        check_record(self.path, self.records, record)
        return [self._leaf(key, record) for key in self._columns]

    def _leaf(self, key: str, record: int) -> Leaf:
        dtype = dtype_of(self._columns[key])
        if dtype == OBJECT:
            return Leaf(key, (), OBJECT, f"it is a column of {str(self._columns[key])[:99]}")
        try:
            part = self._part(key, record)
            shape = part.shape(record - part.first)
        except _Missing as error:
            return Leaf(key, (), OBJECT, str(error))
        if dtype == TEXT and len(shape) > 1:
            return Leaf(key, shape, OBJECT, "it is a table of texts")
        return Leaf(key, shape, dtype)

    def read(self, key: str, begin: int = 0, end: int | None = None, record: int | None = None) -> Array | list[str] | str:
        """Return rows of a cell; the cells of rows begin to end, stacked, if `record` is None."""
        if key not in self._columns:
            raise missing_key(self.path, key, self._columns)
        if dtype_of(self._columns[key]) == OBJECT:
            raise not_taken(self.path, Leaf(key, (), OBJECT, f"it is a column of {str(self._columns[key])[:99]}"))
        try:
            if record is None:
                return self._column(key, begin, end)
            check_record(self.path, self.records, record)
            part = self._part(key, record)
            return part.value(record - part.first, begin, end)
        except _Missing as error:
            raise FormatError(f"{self.path}, {key}: {error}; expected numbers or texts in each record") from None

    def _column(self, key: str, begin: int, end: int | None) -> Array | list[str]:
        begin, end = row_range(self.path, key, (self._first_rows[-1],), begin, end)
        texts, arrays = list[str](), list[Array]()
        while begin < end:
            part = self._part(key, begin)
            last = min(end, part.first + len(part))
            values = part.stacked(begin - part.first, last - part.first)
            if isinstance(values, np.ndarray):
                arrays.append(values)
            else:
                texts += values
            begin = last
        if dtype_of(self._columns[key]) == TEXT:
            return texts
        if len({array.shape[1:] for array in arrays}) > 1:
            raise _Missing("it differs in shape between rows")
        return np.concatenate(arrays) if arrays else np.zeros(0, dtype_of(self._columns[key]))

    def _part(self, key: str, record: int) -> _Part:
        """Return the decoded part of a column that holds a record."""
        part = self._parts.get(key)
        if part is None or not part.first <= record < part.first + len(part):
            number = bisect.bisect_right(self._first_rows, record) - 1
            file, first = self._files[number], self._first_rows[number]
            name = next(name for name in self._names if key == name or key.startswith(f"{name}."))
            begin, array = file.part(name, record - first)
            part = _Part.of(f"{self.path}, {key}", first + begin, array, key[len(name) + 1 :].split(".") if key != name else [])
            self._parts[key] = part
        return part

    def close(self) -> None:
        """Close the files."""
        self._parts.clear()
        for file in self._files:
            file.close()


class _Missing(Exception):
    """A cell cannot be taken; the message says why, without its place."""


class _ArrowFile:
    """A file in one of Arrow's two formats. It is mapped into memory, so only the columns that are used are read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            packed = path.name.lower().endswith(".gz")
            source = Source(path, "an Arrow file") if packed else None
            file = pa.memory_map(str(path)) if source is None else pa.BufferReader(source.read(0, source.size))
            whole = file.read(6) == b"ARROW1"
            file.seek(0)
            if whole:
                reader = pa.ipc.open_file(file)
                self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            else:
                reader = pa.ipc.open_stream(file)
                self._batches = list(reader)
            self.schema = reader.schema
        except _ERRORS as error:
            raise _unreadable(path, error) from None
        self._first_rows = [0, *itertools.accumulate(batch.num_rows for batch in self._batches)]
        self.num_rows = self._first_rows[-1]

    def part(self, column: str, row: int) -> tuple[int, Any]:
        """Return the first row of the batch that holds a row, and the column of the batch."""
        number = bisect.bisect_right(self._first_rows, row) - 1
        try:
            array = self._batches[number].column(column)
            array.validate(full=True)  # wrong offsets would lead to reads outside the buffer
        except _ERRORS as error:
            raise _unreadable(self.path, error) from None
        return self._first_rows[number], array

    def close(self) -> None:
        """Forget the batches."""
        self._batches = []


class _ParquetFile:
    """A Parquet file. Each column is decoded from the start of a row group, some rows at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            packed = path.name.lower().endswith(".gz")
            source = Source(path, "a Parquet file") if packed else None
            self._file = parquet.ParquetFile(path if source is None else pa.BufferReader(source.read(0, source.size)))
            self.schema = self._file.schema_arrow
            groups = [self._file.metadata.row_group(number) for number in range(self._file.num_row_groups)]
        except _ERRORS as error:
            raise _unreadable(path, error) from None
        self._first_rows = [0, *itertools.accumulate(group.num_rows for group in groups)]
        self._group_bytes = [group.total_byte_size for group in groups]
        self.num_rows = self._first_rows[-1]
        self._open: dict[str, tuple[int, Iterator[Any], int]] = {}  # per column: row group, its batches, row of the next one

    def part(self, column: str, row: int) -> tuple[int, Any]:
        """Return the first row of the decoded part that holds a row, and the part."""
        number = bisect.bisect_right(self._first_rows, row) - 1
        group, batches, first = self._open.get(column, (-1, iter(()), 0))
        try:
            if group != number or row < first:
                first, rows = self._first_rows[number], self._first_rows[number + 1] - self._first_rows[number]
                row_bytes = max(1, self._group_bytes[number] // max(1, rows))
                size = max(1, min(_MOST_PART_ROWS, _PART_BYTES // row_bytes))
                batches = self._file.iter_batches(size, row_groups=[number], columns=[column], use_threads=False)
            for batch in batches:
                begin, first = first, first + batch.num_rows
                self._open[column] = number, batches, first
                if row < first:
                    array = batch.column(0)
                    array.validate(full=True)
                    return begin, array
        except _ERRORS as error:
            raise _unreadable(self.path, error) from None
        raise FormatError(f"{self.path} has fewer rows than its metadata says: damaged")

    def close(self) -> None:
        """Close the file."""
        self._open.clear()
        self._file.close()


def _open(path: Path) -> _ArrowFile | _ParquetFile:
    return _ParquetFile(path) if path.name.lower().removesuffix(".gz").endswith(".parquet") else _ArrowFile(path)


def _names_of(path: Path, schema: Any) -> list[str]:
    """Return the names of the columns; raise FormatError if one is no text or stands twice."""
    try:
        names = [str(name) for name in schema.names]
    except UnicodeDecodeError as error:
        raise _unreadable(path, error) from None
    if len(set(names)) < len(names):
        raise FormatError(f"{path} has columns of one name; expected different names")
    return names


def _unreadable(path: Path, error: Exception) -> FormatError:
    reason = str(error).strip().split("\n")[0][:120]
    return FormatError(f"{path} cannot be read as a table ({reason}): truncated, or something else")


def _files_of(path: Path) -> list[Path]:
    """Return the file itself, or the data files of a folder, in the order that `datasets` gives them."""
    if not path.is_dir():
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise FormatError(f"{path} holds the splits {', '.join(splits)}; expected the folder of one")
    found = {file.name: file for suffix in ("*.arrow", "*.parquet") for file in path.glob(suffix)}
    names = sorted(found, key=natural)
    try:
        state = msgspec.json.decode((path / "state.json").read_bytes())
        listed = [entry["filename"] for entry in state["_data_files"]]
    except (OSError, msgspec.MsgspecError, KeyError, TypeError):
        listed = names
    if not listed or not set(listed) <= found.keys():
        missing = ", ".join(str(name)[:99] for name in listed if name not in found) or "*.arrow or *.parquet"
        raise FormatError(f"{path} lacks {missing}; expected the files of a data set")
    return [found[name] for name in listed]


def dtype_of(column: Any) -> str:
    """Return the dtype of the numbers or texts in a column of lists of them; "object" if it holds anything else."""
    kind = column
    for _ in range(_MOST_DEPTH):
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType | pa.DictionaryType):
            kind = kind.value_type
        else:
            break
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return TEXT
    number = pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
    return np.dtype(kind.to_pandas_dtype()).name if number else OBJECT


def _leaf_types(schema: Any) -> dict[str, Any]:
    """Return the type of each column, and of each field of a struct by its dotted path."""
    types: dict[str, Any] = {}

    def add(key: str, kind: Any, depth: int) -> None:
        inner = kind
        while isinstance(inner, pa.BaseExtensionType):
            inner = inner.storage_type
        if pa.types.is_struct(inner) and depth:
            for field in inner:
                add(joined(key, field.name), field.type, depth - 1)
        else:
            types[key] = kind

    for field in schema:
        add(field.name, field.type, _MOST_DEPTH)
    return types


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A decoded part of a column.

    Attributes:
        what: File and column, for messages.
        first: Number of its first record.
        values: All numbers, or texts.
        levels: Offsets of the lists, outermost first.
        missing: Numbers of the part's records in which a value is missing.
        inner: Shape that each innermost element has, for tensors.
        count: Number of records.
    """

    what: str
    first: int
    values: Any
    levels: list[Array]
    inner: tuple[int, ...]
    count: int
    missing: frozenset[int]

    def __len__(self) -> int:
        return self.count

    @classmethod
    def of(cls, what: str, first: int, array: Any, fields: list[str]) -> _Part:
        """Decode a column."""
        levels, count, missing, inner = list[Array](), len(array), set[int](), tuple[int, ...]()
        while True:
            missing |= _records_with_nulls(array, levels)
            if isinstance(array, pa.FixedShapeTensorArray):
                if array.type.permutation not in (None, list(range(len(array.type.shape)))):
                    raise _Missing("its tensors are stored with permuted axes")
                inner = tuple(array.type.shape)
                array = array.storage.flatten()
                break
            if isinstance(array, pa.ExtensionArray):
                array = array.storage
            elif isinstance(array, pa.DictionaryArray):
                array = array.dictionary_decode()
            elif isinstance(array, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
                lengths = compute.fill_null(compute.list_value_length(array), 0).to_numpy(zero_copy_only=False)
                levels.append(np.append(0, np.cumsum(lengths.astype(np.int64))))
                array = array.flatten()
            elif isinstance(array, pa.StructArray) and fields:
                array, fields = compute.struct_field(array, fields[0]), fields[1:]
            else:
                break
        missing |= _records_with_nulls(array, levels)
        values = array
        if dtype_of(array.type) != TEXT:
            filled = array.fill_null(False if pa.types.is_boolean(array.type) else 0) if array.null_count else array
            values = filled.to_numpy(zero_copy_only=False)
        return cls(what=what, first=first, values=values, levels=levels, inner=inner, count=count, missing=frozenset(missing))

    def _range(self, row: int) -> tuple[int, int, tuple[int, ...]]:
        """Return the first value of a row, the value after its last, and its shape."""
        if row in self.missing:
            raise _Missing(f"record {self.first + row} has a missing value")
        begin, end, shape = row, row + 1, list[int]()
        for offsets in self.levels:
            lengths = np.diff(offsets[begin : end + 1])
            if len(lengths) and (lengths != lengths[0]).any():
                raise _Missing(f"the lists of record {self.first + row} differ in length")
            shape.append(int(lengths[0]) if len(lengths) else 0)
            begin, end = int(offsets[begin]), int(offsets[end])
        size = math.prod(self.inner)
        return begin * size, end * size, (*shape, *self.inner)

    def shape(self, row: int) -> tuple[int, ...]:
        """Return the shape of a row."""
        return self._range(row)[2]

    def value(self, row: int, begin: int = 0, end: int | None = None) -> Array | list[str] | str:
        """Return rows of the value of a record."""
        first, last, shape = self._range(row)
        begin, end = row_range(self.what, "", shape, begin, end)
        if isinstance(self.values, np.ndarray):
            whole = self.values[first:last].reshape(shape)
            return whole[begin:end] if shape else whole
        texts = self.values[first:last].to_pylist()
        return texts[begin:end] if shape else str(texts[0])

    def stacked(self, begin: int, end: int) -> Array | list[str]:
        """Return the values of records begin to end, stacked."""
        bad = min((row for row in self.missing if begin <= row < end), default=None)
        if bad is not None:
            raise _Missing(f"record {self.first + bad} has a missing value")
        if not self.levels and not self.inner:
            part = self.values[begin:end]
            return part if isinstance(part, np.ndarray) else list(part.to_pylist())
        values = [self.value(row) for row in range(begin, end)]
        arrays = [value for value in values if isinstance(value, np.ndarray)]
        if len(arrays) < len(values) or len({array.shape for array in arrays}) > 1:
            raise _Missing("it differs in shape between records, or is a list of texts")
        return np.stack(arrays)


def _records_with_nulls(array: Any, levels: list[Array]) -> set[int]:
    """Return the numbers of the records in which an array, whose elements are `levels` of lists below them, has nulls."""
    if not array.null_count:
        return set()
    positions = np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))
    for offsets in reversed(levels):
        positions = np.searchsorted(offsets, positions, side="right") - 1
    return set(positions.tolist())
