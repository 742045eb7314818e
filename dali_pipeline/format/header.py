"""The header of a shard: which arrays lie where, and the hash of every block of them. docs/format.md has the bytes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dali_pipeline.errors import FormatError
from dali_pipeline.format.encoding import BFLOAT16, storage
from dali_pipeline.types import BLOCK_BYTES, Array

if TYPE_CHECKING:
    from dali_pipeline.storage.cachedfile import Place

VERSION = 1
METADATA_KEY = "dali_pipeline"
DTYPES = {
    "F16": "float16", "BF16": BFLOAT16, "F32": "float32", "F64": "float64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "U8": "uint8", "U16": "uint16", "U32": "uint32",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layout:
    """Where an array lies: its first byte in the file, and its first block among the shard's blocks; dtype: NumPy's, so
    uint16 for bfloat16."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    nbytes: int
    first_block: int


def parse_header(path: Place, header: bytes, size: int) -> tuple[str, int, dict[str, Layout], Array]:
    """Kind, number of records, layouts by name, block hashes (uint64). Raises FormatError unless the arrays tile the file."""
    try:
        table = json.loads(header[8:])
        meta = json.loads(table.pop("__metadata__")[METADATA_KEY])
        entries = sorted(
            (*map(_size, entry["data_offsets"]), name, storage(DTYPES[entry["dtype"]]), tuple(map(_size, entry["shape"])))
            for name, entry in table.items()
        )
        texts = [meta["hashes"][name] for _, _, name, _, _ in entries]
        every_hash = np.frombuffer(bytes.fromhex("".join(texts)), ">u8").astype(np.uint64)
        records, expected = _size(meta["records"]), {"version": VERSION, "block_bytes": BLOCK_BYTES}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: the header is not one of a dali_pipeline shard ({type(error).__name__}: {error})") from None
    for name, value in expected.items():
        if meta.get(name) != value:
            raise FormatError(f"{path} has {name} {meta.get(name)!r}; expected {value}")
    layouts: dict[str, Layout] = {}
    at = block = 0
    for (begin, end, name, dtype, shape), text in zip(entries, texts, strict=True):
        if begin != at or end - begin != math.prod(shape) * dtype.itemsize:
            raise FormatError(
                f"{path}, {name}: bytes {begin} to {end} for {dtype} {shape}; arrays must fill the file without gaps"
            )
        if len(text) != 16 * math.ceil((end - begin) / BLOCK_BYTES):
            raise FormatError(f"{path}, {name}: {len(text) // 16} block hashes for {end - begin} bytes")
        layouts[name] = Layout(dtype, shape, len(header) + begin, end - begin, block)
        at, block = end, block + len(text) // 16
    if len(header) + at != size:
        raise FormatError(f"{path}: arrays end at byte {len(header) + at} of {size}; arrays must fill the file without gaps")
    return str(meta.get("kind")), records, layouts, every_hash


def _size(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a size")
    return value
