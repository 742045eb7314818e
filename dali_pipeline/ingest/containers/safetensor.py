"""Files of the safetensors library, read lazily. The header is checked before anything it says is believed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from dali_pipeline.errors import FormatError
from dali_pipeline.ingest.containers.leaf import BFLOAT16, OBJECT, Leaf, check_record, missing_key, not_taken
from dali_pipeline.ingest.containers.source import Extent, Source, Stored
from dali_pipeline.types import Array

_MAX_HEADER_BYTES = 100 << 20  # limit of the safetensors library
_FIRST_BYTES = 4096  # headers of most files fit, so that one read suffices
_MOST_AXES = 32
_DTYPES = {
    "BOOL": "?", "U8": "<u1", "I8": "<i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
    "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8",
}  # fmt: skip
_NUMPY = {name: np.dtype(code) for name, code in _DTYPES.items()}


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


_HEADER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ENTRY = msgspec.json.Decoder(_Entry)


class SafetensorsContainer:
    """A safetensors file: one mapping of keys."""

    records: Sequence[str] | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self._source = Source(path, "a safetensors file")
        self._first, self._entries = self._read_header()

    def _read_header(self) -> tuple[int, dict[str, _Entry]]:
        """Return the first byte of the data and the entries; raise FormatError unless they cover the file exactly."""
        size = self._source.size
        head = self._source.read(0, min(size, _FIRST_BYTES))
        length = int.from_bytes(head[:8], "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise FormatError(
                f"{self.path}: a header of {length} bytes does not fit a file of {size}; not a safetensors file, or truncated"
            )
        text = head[8 : 8 + length] if 8 + length <= len(head) else self._source.read(8, length)
        try:
            raw = _HEADER.decode(text)
            raw.pop("__metadata__", None)
            entries = {key: _ENTRY.decode(value) for key, value in raw.items()}
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise FormatError(f"{self.path} has a header that is none of a safetensors file ({str(error)[:120]})") from None
        first, expected = 8 + length, 0
        for key, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
            begin, end = entry.data_offsets
            if len(entry.shape) > _MOST_AXES or min(entry.shape, default=0) < 0:
                raise FormatError(
                    f"{self.path}, {key!r:.99} has the shape {str(list(entry.shape))[:99]}; expected sizes from 0"
                )
            itemsize = 2 if entry.dtype == "BF16" else _NUMPY[entry.dtype].itemsize if entry.dtype in _NUMPY else None
            if begin != expected or end < begin or first + end > size:
                raise FormatError(
                    f"{self.path}, {key!r:.99} lies at bytes {begin} to {end} of {size - first}; expected tensors one after "
                    "the other, so it is truncated or damaged"
                )
            if itemsize is not None and math.prod(entry.shape) * itemsize != end - begin:
                raise FormatError(
                    f"{self.path}, {key!r:.99} is {entry.dtype} {list(entry.shape)} in {end - begin} bytes; expected "
                    f"{math.prod(entry.shape) * itemsize}"
                )
            expected = end
        if first + expected != size:
            raise FormatError(f"{self.path} has {size - first - expected} bytes after its last tensor; expected none")
        return first, entries

    def leaves(self, record: int = 0) -> list[Leaf]:
        """Return all tensors, in the order of the header."""
        return [_leaf(key, entry) for key, entry in self._entries.items()]

    def read(self, key: str, begin: int = 0, end: int | None = None, record: int | None = None) -> Array:
        """Return rows of a tensor; bfloat16 as float32."""
        check_record(self.path, None, record)
        return self._stored(key).rows(begin, end)

    def _stored(self, key: str) -> Stored:
        entry = self._entries.get(key)
        if entry is None:
            raise missing_key(self.path, key, self._entries)
        leaf = _leaf(key, entry)
        if leaf.dtype == OBJECT:
            raise not_taken(self.path, leaf)
        dtype: np.dtype[Any] | str = BFLOAT16 if leaf.dtype == BFLOAT16 else _NUMPY[entry.dtype]
        return Stored(self._source, key, self._first + entry.data_offsets[0], entry.shape, dtype)

    def extent(self, key: str) -> Extent | None:
        """Return where a tensor lies in the file."""
        return self._stored(key).extent if key in self._entries else None

    def close(self) -> None:
        """Close the file."""
        self._source.close()


def _leaf(key: str, entry: _Entry) -> Leaf:
    if entry.dtype == "BF16":
        return Leaf(key, entry.shape, BFLOAT16)
    if entry.dtype not in _NUMPY:
        return Leaf(key, entry.shape, OBJECT, f"it is {entry.dtype[:20]}, which NumPy does not have")
    return Leaf(key, entry.shape, _NUMPY[entry.dtype].name)
