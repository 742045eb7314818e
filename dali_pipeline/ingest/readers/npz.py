"""Reader of `.npz` files: `sequences` (N, T, F), or `values` with `offsets`; `labels`; optionally `ids` and `groups`.

Padded sequences are cut to their `lengths` (N,) or `attention_mask` (N, T), if the file has one of them.
"""

from __future__ import annotations

import io
import itertools
import math
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from dali_pipeline.errors import FormatError
from dali_pipeline.ingest.foreign import (
    LENGTHS,
    MASKS,
    Block,
    ForeignFile,
    Reader,
    Values,
    as_text,
    check_counts,
    files_named,
    real_steps,
    rows_at_a_time,
    whole_numbers,
    without_padding,
)
from dali_pipeline.ingest.readers.storedzip import Bytes, StoredZip
from dali_pipeline.types import Array

_HEADER_BYTES = 1 << 16  # more than the header of an array ever needs


class NpzFile:
    """The arrays of a `.npz` file, which can be read in part.

    A compressed file, and an array in Fortran order, are read whole. Pickled arrays are refused.

    Raises:
        FormatError: The file is no `.npz`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes: Bytes | InMemory = Bytes(path, "a file of numpy.savez")
        with path.open("rb") as file:
            archive = StoredZip(self._bytes, file)
            if archive.compressed:
                self._bytes, members = unpack(path, file)
            else:
                members = {name: archive.place(name) for name in archive.names}
        self._members = {name.removesuffix(".npy"): place for name, place in members.items()}
        self.names = set(self._members)
        self._headers: dict[str, tuple[tuple[int, ...], np.dtype[Any], int]] = {}
        self._by_column: dict[str, Array | None] = {}  # arrays in Fortran order; None until they are read

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any], int]:
        """Return shape, type and first byte of an array."""
        if name not in self._headers:
            begin, nbytes = self._members[name]
            head = io.BytesIO(self._bytes.read(begin, min(nbytes, _HEADER_BYTES)))
            try:
                version = npy.read_magic(head)
                read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                shape, by_column, dtype = read_header(head)
            except (ValueError, EOFError) as error:
                raise FormatError(f"{self.path}, {name} cannot be read as an array ({error})") from None
            wrong = "pickled" if dtype.hasobject else ""
            if head.tell() + math.prod(shape) * dtype.itemsize != nbytes or min(shape, default=0) < 0:
                wrong = wrong or "cut"
            if wrong:
                raise FormatError(f"{self.path}, {name} is {dtype} {shape}, {wrong}; expected rows of plain values")
            self._headers[name] = shape, dtype, begin + head.tell()
            if by_column:
                self._by_column[name] = None
        return self._headers[name]

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Array:
        """Return rows of an array, by default all."""
        shape, dtype, first = self.header(name)
        rows = shape[0] if shape else 1
        end = rows if end is None else end
        if name in self._by_column:  # its rows are spread over the whole array
            whole = self._by_column[name]
            if whole is None:
                data = self._bytes.read(first, math.prod(shape) * dtype.itemsize)
                whole = self._by_column[name] = np.frombuffer(data, dtype).reshape(shape, order="F")
            return whole[begin:end]
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        data = self._bytes.read(first + begin * row_bytes, (end - begin) * row_bytes)
        return np.frombuffer(data, dtype).reshape(end - begin, *shape[1:])


class InMemory:
    """Bytes that are compressed in their file, decompressed in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, begin: int, nbytes: int) -> bytes:
        """Return exactly `nbytes` bytes from byte `begin` on."""
        return self._data[begin : begin + nbytes]


def unpack(path: Path, file: IO[bytes]) -> tuple[InMemory, dict[str, tuple[int, int]]]:
    """Return all members of a compressed zip, one after the other, and the first byte and length of each."""
    try:
        with zipfile.ZipFile(file) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise FormatError(f"{path} cannot be read as a file of numpy.savez ({error}): truncated, or something else") from None
    ends = itertools.accumulate(len(part) for part in parts.values())
    return InMemory(b"".join(parts.values())), {
        name: (end - len(part), len(part)) for (name, part), end in zip(parts.items(), ends, strict=True)
    }


def open_file(path: Path, name: str) -> ForeignFile:
    """Read the labels and names, but not the values; raise FormatError for another layout."""
    file = NpzFile(path)
    ragged = "sequences" not in file.names
    if (ragged and not {"values", "offsets"} <= file.names) or "labels" not in file.names:
        raise FormatError(f"{path} holds {sorted(file.names)}; expected sequences, or values and offsets, and labels")
    labels = file.read("labels").reshape(-1)
    texts = {
        field: [as_text(path, field, value) for value in file.read(field).reshape(-1).tolist()]
        for field in ("ids", "groups")
        if field in file.names
    }
    ids = texts.get("ids")
    if ids is None and "groups" not in texts:
        ids = [f"{name}-{row}" for row in range(len(labels))]
    check_counts(path, labels=len(labels), **{field: len(values) for field, values in texts.items()})
    padding = {name: file.read(name) for name in (*LENGTHS, *MASKS) if name in file.names}
    length, mask = (next((name for name in names if name in padding), None) for names in (LENGTHS, MASKS))
    real = real_steps(path, len(labels), padding.get(length or ""), padding.get(mask or ""))
    taken = {"values", "offsets"} if ragged else {"sequences"}
    taken |= {"labels", *texts, *(name for name in (length, mask) if name)}
    values = partial(_ragged if ragged else _stacked, file, len(labels))
    return ForeignFile(
        path=path,
        kinds=("sequences",),
        ids=ids,
        groups=texts.get("groups", ids or []),
        labels=whole_numbers(path, "labels", labels.tolist()),
        values=lambda: without_padding(path, values(), real),
        not_taken=tuple(sorted(file.names - taken)),
    )


NPZ = Reader(what="*.npz", find=partial(files_named, patterns=("*.npz",)), open=open_file)


def _stacked(file: NpzFile, count: int) -> Iterator[Block]:
    shape, dtype, _ = file.header("sequences")
    check_counts(file.path, sequences=shape[0] if shape else 0, labels=count)
    step = rows_at_a_time(math.prod(shape[1:]) * dtype.itemsize)
    for begin in range(0, count, step):
        yield Block(file.read("sequences", begin, min(begin + step, count)))


def _ragged(file: NpzFile, count: int) -> Iterator[Values]:
    shape, _, _ = file.header("values")
    rows, offsets = shape[0] if shape else 0, file.read("offsets")
    sound = offsets.ndim == 1 and offsets.dtype.kind in "iu" and len(offsets) == count + 1 and offsets[0] == 0
    if not sound or (np.diff(offsets.astype(np.int64)) < 0).any() or offsets[-1] != rows:
        raise FormatError(
            f"{file.path}, offsets are {offsets.dtype} {offsets.shape}; expected {count + 1} integers from 0 up to {rows}"
        )
    for begin, end in itertools.pairwise(offsets.tolist()):
        yield Values(file.read("values", begin, end), None)
