"""HDF5 files. Links and filters that lead outside the file or to foreign code are refused."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from dali_pipeline.errors import FormatError, needs_extra
from dali_pipeline.ingest.containers.leaf import (
    OBJECT,
    TEXT,
    Leaf,
    check_record,
    missing_key,
    not_taken,
    row_range,
    stacked,
    texts_of,
)
from dali_pipeline.ingest.containers.objects import MOST_DEPTH, MOST_LEAVES, SPLITS, joined
from dali_pipeline.ingest.containers.source import Source
from dali_pipeline.types import Array

_FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32", 32000: "lzf"}
_MOST_CHUNK_BYTES = 1 << 30
_MOST_EXPANSION = 1100  # gzip reaches 1032
_ERRORS = (OSError, KeyError, RuntimeError, ValueError, TypeError, MemoryError, OverflowError)


class Hdf5Container:
    """An HDF5 file. At least two groups on top with the same names in each are records; anything else is one mapping."""

    def __init__(self, path: Path) -> None:
        with needs_extra("hdf5", f"{path}: reading HDF5"):
            self._h5py: Any = import_module("h5py")
        self.path = path
        self._source = Source(path, "an HDF5 file")
        try:
            self._io = self._source.file() if path.name.lower().endswith(".gz") else None
            self._file = self._h5py.File(self._io or path, "r", locking=False)
        except _ERRORS as error:
            raise FormatError(f"{path} cannot be read as HDF5 ({_reason(error)}): truncated, or something else") from None
        try:
            self._keys = dict(self._walk("", self._file, MOST_DEPTH, [MOST_LEAVES]))
        except _ERRORS as error:
            raise FormatError(f"{path} cannot be read as HDF5 ({_reason(error)}): truncated, or damaged") from None
        self.records: Sequence[str] | None = None
        self._by_record: dict[str, dict[str, Any]] = {}
        self._group_records()

    def _walk(self, prefix: str, group: Any, depth: int, left: list[int]) -> Iterator[tuple[str, Any]]:
        """Yield the dotted path of each data set, and the data set itself, or why it is not taken."""
        for name in group:
            link, key = group.get(name, getlink=True), joined(prefix, name)
            left[0] -= 1
            if left[0] < 0 or depth <= 0:
                raise FormatError(f"{self.path} has more than {MOST_LEAVES} data sets, or {MOST_DEPTH} levels; expected fewer")
            if isinstance(link, self._h5py.ExternalLink):
                raise FormatError(f"{self.path} was refused: {key} is a link to another file; expected the data in this one")
            if not isinstance(link, self._h5py.HardLink):
                yield key, "it is a soft link, so name the data set that it leads to"
                continue
            value = group.get(name)
            if isinstance(value, self._h5py.Group):
                yield from self._walk(key, value, depth - 1, left)
            elif isinstance(value, self._h5py.Dataset):
                self._check(key, value)
                yield key, value
            else:
                yield key, "it is no data set"

    def _check(self, key: str, dataset: Any) -> None:
        """Raise FormatError if the values of a data set lie outside the file, or need a filter that is not on the list."""
        plan = dataset.id.get_create_plist()
        if plan.get_external_count() or dataset.is_virtual:
            raise FormatError(f"{self.path} was refused: {key} lies in another file; expected the data in this one")
        for number in range(plan.get_nfilters()):
            code, *_, name = plan.get_filter(number)
            if code not in _FILTERS:
                text = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
                allowed = ", ".join(_FILTERS.values())
                raise FormatError(f"{self.path} was refused: {key} uses the filter {code} ({text[:40]}); expected {allowed}")
        nbytes = math.prod(dataset.shape or ()) * dataset.dtype.itemsize
        chunk_bytes = math.prod(dataset.chunks or ()) * dataset.dtype.itemsize
        if chunk_bytes > _MOST_CHUNK_BYTES or nbytes > (dataset.id.get_storage_size() + 4096) * _MOST_EXPANSION:
            raise FormatError(
                f"{self.path}, {key} is {dataset.dtype} {list(dataset.shape or ())} in {dataset.id.get_storage_size()} bytes "
                f"and chunks of {chunk_bytes}; expected as many as its shape needs: truncated, or damaged"
            )

    def _group_records(self) -> None:
        """Recognise records: all top-level names are groups that hold at least half of the first one's keys."""
        tops: dict[str, dict[str, Any]] = {}
        names = list(self._file)
        for key, value in self._keys.items():
            name = next((name for name in names if key.startswith(f"{name}.")), None)
            if name is None:
                return
            tops.setdefault(name, {})[key[len(name) + 1 :]] = value
        first = next(iter(tops.values()), {})
        similar = all(2 * len(keys.keys() & first.keys()) >= max(len(keys), len(first)) for keys in tops.values())
        if len(tops) > 1 and similar and not all(name.lower() in SPLITS for name in tops):
            self.records, self._by_record = list(tops), tops

    def leaves(self, record: int = 0) -> list[Leaf]:
        """Return all data sets of the file, or of one of its records."""
        if self.records is None:
            return [self._leaf(key, value) for key, value in self._keys.items()]
        check_record(self.path, self.records, record)
        return [self._leaf(key, value) for key, value in self._by_record[self.records[record]].items()]

    def _leaf(self, key: str, value: Any) -> Leaf:
        if isinstance(value, str):
            return Leaf(key, (), OBJECT, value)
        shape = value.shape
        if shape is None:
            return Leaf(key, (), OBJECT, "it is empty")
        if self._h5py.check_string_dtype(value.dtype) is not None:
            return Leaf(key, shape, TEXT) if len(shape) <= 1 else Leaf(key, shape, OBJECT, "it is a table of texts")
        if value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
            return Leaf(key, shape, value.dtype.name)
        return Leaf(key, shape, OBJECT, f"it is {str(value.dtype)[:99]}")

    def read(self, key: str, begin: int = 0, end: int | None = None, record: int | None = None) -> Array | list[str] | str:
        """Return rows of a data set; of rows begin to end of all records, stacked, if `record` is None."""
        if self.records is not None and record is None:
            begin, end = row_range(self.path, key, (len(self.records),), begin, end)
            return stacked(self.path, key, [self.read(key, record=number) for number in range(begin, end)])
        number = check_record(self.path, self.records, record)
        keys = self._keys if self.records is None else self._by_record[self.records[number]]
        name = key.strip("/").replace("/", ".") if key not in keys else key
        if name not in keys:
            raise missing_key(self.path, key, keys, "" if self.records is None else f", {self.records[number]}")
        leaf = self._leaf(name, keys[name])
        if leaf.dtype == OBJECT:
            raise not_taken(self.path, leaf)
        begin, end = row_range(self.path, key, leaf.shape, begin, end)
        try:
            rows = keys[name][begin:end] if leaf.shape else keys[name][()]
        except _ERRORS as error:
            raise FormatError(f"{self.path}, {key} cannot be read ({_reason(error)}): truncated, or damaged") from None
        if leaf.dtype == TEXT:
            return texts_of(self.path, key, np.asarray(rows, object))
        values = np.asarray(rows)
        return values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))

    def close(self) -> None:
        """Close the file."""
        self._keys.clear()
        self._by_record.clear()
        self._file.close()
        if self._io is not None:
            self._io.close()
        self._source.close()


def _reason(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:99]
