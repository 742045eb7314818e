"""Files of numpy.save and numpy.savez. Pickled arrays are refused, and rows are read without the rest of the array."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy_format

from dali_pipeline.errors import FormatError
from dali_pipeline.ingest.containers.leaf import (
    BFLOAT16,
    OBJECT,
    TEXT,
    Leaf,
    check_record,
    missing_key,
    not_taken,
    row_range,
    texts_of,
)
from dali_pipeline.ingest.containers.source import Extent, Source, Stored
from dali_pipeline.ingest.readers.storedzip import StoredZip
from dali_pipeline.types import Array

_HEADER_BYTES = 1 << 14  # more than numpy accepts as a header
_BFLOAT16_VOID = np.dtype("V2")  # what numpy.save makes of the bfloat16 of JAX and ml_dtypes
_KEPT_BYTES = 256 << 20  # a compressed member up to this size is unpacked once, and kept
_ZIP_ERRORS = (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError, zlib.error)


class NpyContainer:
    """A file of numpy.save: one array, with the key ""."""

    records: Sequence[str] | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self._source = Source(path, "a file of numpy.save")
        head = self._source.read(0, min(self._source.size, _HEADER_BYTES))
        begin, self._shape, self._fortran, self._dtype = parse_header(path, "", head, self._source.size)
        self._leaf = array_leaf("", self._shape, self._dtype)
        self._stored = Stored(self._source, "", begin, self._shape, _stored_dtype(self._leaf, self._dtype), self._fortran)

    def leaves(self, record: int = 0) -> list[Leaf]:
        """Return the one leaf."""
        return [self._leaf]

    def read(self, key: str, begin: int = 0, end: int | None = None, record: int | None = None) -> Array | list[str] | str:
        """Return rows of the array."""
        check_record(self.path, None, record)
        if key:
            raise missing_key(self.path, key, [""])
        return _values(self.path, self._leaf, self._stored, begin, end)

    def extent(self, key: str) -> Extent | None:
        """Return where the array lies in the file."""
        return None if key or self._leaf.dtype in (OBJECT, TEXT) else self._stored.extent

    def close(self) -> None:
        """Close the file."""
        self._source.close()


class NpzContainer:
    """A file of numpy.savez: one mapping of keys.

    Stored members are read by rows. Compressed ones are unpacked: whole and once up to 256 MiB; a larger one from its start to
    the rows, which is linear as long as rows are read in order.
    """

    records: Sequence[str] | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self._source = Source(path, "a file of numpy.savez")
        self._file = self._source.file()
        self._archive = StoredZip(self._source, self._file)
        self._packed = zipfile.ZipFile(self._file) if self._archive.compressed else None
        self._members = {name.removesuffix(".npy"): name for name in self._archive.names if not name.endswith("/")}
        self._open: dict[str, tuple[Leaf, Stored | _Packed]] = {}

    def _member(self, key: str) -> tuple[Leaf, Stored | _Packed]:
        if key in self._open:
            return self._open[key]
        if key not in self._members:
            raise missing_key(self.path, key, self._members)
        name = self._members[key]
        if not name.endswith(".npy"):
            return Leaf(key, (), OBJECT, "it is no array of numpy.save"), Stored(self._source, key, 0, (), np.dtype("u1"))
        source: _Packed | None = None
        if self._packed is None:
            begin, nbytes = self._archive.place(name)
            head = self._source.read(begin, min(nbytes, _HEADER_BYTES))
        else:
            source = _Packed(self.path, key, self._packed, name)
            begin, nbytes, head = 0, source.nbytes, source.bytes(0, min(source.nbytes, _HEADER_BYTES))
        first, shape, fortran, dtype = parse_header(self.path, key, head, nbytes)
        leaf = array_leaf(key, shape, dtype)
        stored: Stored | _Packed
        if source is None:
            stored = Stored(self._source, key, begin + first, shape, _stored_dtype(leaf, dtype), fortran)
        else:
            source.describe(first, shape, _stored_dtype(leaf, dtype), fortran)
            stored = source
        self._open[key] = leaf, stored
        return self._open[key]

    def leaves(self, record: int = 0) -> list[Leaf]:
        """Return all arrays; reads their headers."""
        return [self._member(key)[0] for key in self._members]

    def read(self, key: str, begin: int = 0, end: int | None = None, record: int | None = None) -> Array | list[str] | str:
        """Return rows of an array."""
        check_record(self.path, None, record)
        leaf, stored = self._member(key)
        return _values(self.path, leaf, stored, begin, end)

    def close(self) -> None:
        """Close the file."""
        self._open.clear()
        self._file.close()
        self._source.close()


class _Packed:
    """A compressed member of a zip."""

    def __init__(self, path: Path, key: str, archive: zipfile.ZipFile, name: str) -> None:
        self._path, self._key, self._archive, self._name = path, key, archive, name
        self.nbytes = archive.getinfo(name).file_size
        self._stream: IO[bytes] | None = None
        self._position = 0
        self._whole: Source | None = None
        self._about: tuple[int, tuple[int, ...], np.dtype[Any] | str, bool] = (0, (), np.dtype("u1"), False)

    def describe(self, first: int, shape: tuple[int, ...], dtype: np.dtype[Any] | str, fortran: bool) -> None:
        """Set what the header says: first byte of the data, shape, dtype, and whether the order is Fortran's."""
        self._about = first, shape, dtype, fortran

    def bytes(self, begin: int, nbytes: int) -> bytes:
        """Return bytes of the unpacked member; linear in total if ranges are asked for in order."""
        try:
            if self._stream is None or begin < self._position:
                self._stream, self._position = self._archive.open(self._name), 0
            while self._position < begin:
                skipped = self._stream.read(min(1 << 20, begin - self._position))
                if not skipped:
                    break
                self._position += len(skipped)
            data = self._stream.read(nbytes)
            self._position += len(data)
        except _ZIP_ERRORS as error:
            raise FormatError(f"{self._path}, {self._key} cannot be unpacked ({error}): truncated, or something else") from None
        if len(data) != nbytes:
            raise FormatError(f"{self._path}, {self._key} ends within its data: truncated")
        return data

    def rows(self, begin: int = 0, end: int | None = None) -> Array:
        """Return rows of the array."""
        first, shape, dtype, fortran = self._about
        if self._whole is None and (self.nbytes <= _KEPT_BYTES or fortran or not shape):
            self._whole = Source(self._path, "a file of numpy.savez", self.bytes(0, self.nbytes))
            self._stream = None
        if self._whole is not None:
            return Stored(self._whole, self._key, first, shape, dtype, fortran).rows(begin, end)
        begin, end = row_range(self._path, self._key, shape, begin, end)
        row_bytes = math.prod(shape[1:]) * (2 if isinstance(dtype, str) else dtype.itemsize)
        part = Source(self._path, "", self.bytes(first + begin * row_bytes, (end - begin) * row_bytes))
        return Stored(part, self._key, 0, (end - begin, *shape[1:]), dtype).rows()


def parse_header(path: Path, key: str, head: bytes, nbytes: int) -> tuple[int, tuple[int, ...], bool, np.dtype[Any]]:
    """Return first byte of the data, shape, whether the order is Fortran's, and dtype.

    Args:
        path: The file, for messages.
        key: Key of the array in the file, for messages.
        head: The first bytes, at least 16 KiB or all of them.
        nbytes: Bytes of header and data.

    Raises:
        FormatError: There is no header, it does not fit the number of bytes, or it is one of a pickled array.
    """
    where = f"{path}, {key}" if key else str(path)
    length_bytes = 2 if head[6:7] == b"\x01" else 4
    end = 8 + length_bytes + int.from_bytes(head[8 : 8 + length_bytes], "little")
    if head[:6] != npy_format.MAGIC_PREFIX or end > len(head):
        raise FormatError(f"{where} does not begin like an array of numpy.save; truncated, or something else")
    try:
        shape, fortran, dtype = _parse(head[:end])
    except Exception as error:  # numpy's parser of Python literals raises many kinds
        reason = str(error).split("\n")[0][:99]
        raise FormatError(f"{where} has no header of numpy.save that can be read ({reason})") from None
    wrong = "pickled" if dtype.hasobject else ""
    if end + math.prod(shape) * dtype.itemsize != nbytes or min(shape, default=0) < 0:
        wrong = wrong or f"but has {nbytes - end} bytes: truncated or damaged"
    if wrong:
        raise FormatError(f"{where} is {str(dtype)[:99]} {list(shape)}, {wrong}; expected an array of plain values")
    return end, shape, fortran, dtype


@lru_cache(maxsize=256)
def _parse(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, order and dtype. Files with one record each mostly share a header, so parsing it is cached."""
    file = io.BytesIO(header)
    version = npy_format.read_magic(file)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"version {version}")
    read_header = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    return tuple(int(size) for size in shape), fortran, dtype


def array_leaf(key: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Leaf:
    """Return the leaf of a NumPy array."""
    if dtype.kind in "biuf" and dtype.itemsize <= 8:
        return Leaf(key, shape, dtype.name)
    if dtype == _BFLOAT16_VOID:
        return Leaf(key, shape, BFLOAT16)
    if dtype.kind in "US":
        return Leaf(key, shape, TEXT) if len(shape) <= 1 else Leaf(key, shape, OBJECT, "it is a table of texts")
    return Leaf(key, shape, OBJECT, f"it is an array of {str(dtype)[:99]}")


def _stored_dtype(leaf: Leaf, dtype: np.dtype[Any]) -> np.dtype[Any] | str:
    return BFLOAT16 if leaf.dtype == BFLOAT16 else dtype


def _values(path: Path, leaf: Leaf, stored: Stored | _Packed, begin: int, end: int | None) -> Array | list[str] | str:
    if leaf.dtype == OBJECT:
        raise not_taken(path, leaf)
    rows = stored.rows(begin, end)
    return texts_of(path, leaf.key, rows) if leaf.dtype == TEXT else rows
