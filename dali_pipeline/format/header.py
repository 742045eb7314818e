"""Header of a shard: position of each array, and the hash of each of its blocks. docs/format.md specifies the bytes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dali_pipeline.errors import FormatError
from dali_pipeline.format.encoding import BFLOAT16, storage
from dali_pipeline.format.references import FILES, HASHES, NUMBERS, PLACES, SIZES
from dali_pipeline.types import BLOCK_BYTES, Array

if TYPE_CHECKING:
    from dali_pipeline.storage.cachedfile import Place

VERSION = 2
BLOCKS_OF_VERSION = {1: 1 << 20, 2: BLOCK_BYTES}  # bytes of a block in shards of each version
METADATA_KEY = "dali_pipeline"
DTYPES = {
    "F16": "float16", "BF16": BFLOAT16, "F32": "float32", "F64": "float64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "U8": "uint8", "U16": "uint16", "U32": "uint32", "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layout:
    """Position of an array in a shard.

    Attributes:
        dtype: NumPy's type, so uint16 for bfloat16.
        shape: Shape of the array.
        begin: Its first byte in the file.
        nbytes: Its bytes.
        first_block: Number of its first block among the blocks of the shard.
        block_bytes: Bytes of one of its blocks.
        referenced: Whether the bytes lie in files of others; then `begin` means nothing, and blocks are those of each record.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    nbytes: int
    first_block: int
    block_bytes: int
    referenced: bool = False


def parse_header(path: Place, header: bytes, size: int) -> tuple[str, int, dict[str, Layout], Array]:
    """Parse the header of a shard.

    Args:
        path: The shard, for messages.
        header: The 8-byte length and the JSON after it.
        size: Bytes of the file.

    Returns:
        Kind, number of records, layouts by name, and block hashes (blocks,) uint64.

    Raises:
        FormatError: The header is not that of a shard, or its arrays do not fill the file without gaps.
    """
    try:
        table = json.loads(header[8:])
        meta = json.loads(table.pop("__metadata__")[METADATA_KEY])
        entries = sorted(
            (*map(_size, entry["data_offsets"]), name, storage(DTYPES[entry["dtype"]]), tuple(map(_size, entry["shape"])))
            for name, entry in table.items()
        )
        hash_texts = [meta["hashes"][name] for _, _, name, _, _ in entries]
        hashes = np.frombuffer(bytes.fromhex("".join(hash_texts)), ">u8").astype(np.uint64)
        records = _size(meta["records"])
        others = meta.get("referenced", {}).items()
        foreign = {name: (storage(DTYPES[dtype]), tuple(map(_size, shape))) for name, (dtype, shape) in others}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: the header is not one of a dali_pipeline shard ({type(error).__name__}: {error})") from None
    if meta.get("version") not in BLOCKS_OF_VERSION:
        raise FormatError(f"{path} has version {meta.get('version')!r}; expected 1 or {VERSION}")
    block_bytes = BLOCKS_OF_VERSION[meta["version"]]
    if meta.get("block_bytes") != block_bytes:
        raise FormatError(f"{path} has block_bytes {meta.get('block_bytes')!r}; expected {block_bytes}")
    layouts: dict[str, Layout] = {}
    array_end = next_block = 0
    for (begin, end, name, dtype, shape), hash_text in zip(entries, hash_texts, strict=True):
        if begin != array_end or end - begin != math.prod(shape) * dtype.itemsize:
            raise FormatError(
                f"{path}, {name}: bytes {begin} to {end} for {dtype} {shape}; arrays must fill the file without gaps"
            )
        if len(hash_text) != 16 * math.ceil((end - begin) / block_bytes):
            raise FormatError(f"{path}, {name}: {len(hash_text) // 16} block hashes for {end - begin} bytes")
        layouts[name] = Layout(dtype, shape, len(header) + begin, end - begin, next_block, block_bytes)
        array_end, next_block = end, next_block + len(hash_text) // 16
    if len(header) + array_end != size:
        raise FormatError(
            f"{path}: arrays end at byte {len(header) + array_end} of {size}; arrays must fill the file without gaps"
        )
    for name, (dtype, shape) in foreign.items():
        _check_referenced(path, name, layouts, records)
        layouts[name] = Layout(dtype, shape, 0, math.prod(shape) * dtype.itemsize, next_block, block_bytes, referenced=True)
        next_block += layouts[name + HASHES].shape[0]
    return str(meta.get("kind")), records, layouts, hashes


def _check_referenced(path: Place, name: str, layouts: dict[str, Layout], records: int) -> None:
    """Raise FormatError unless the arrays are there that say where an array lies in files of others."""
    needed = {FILES: "uint8", FILES + ".offsets": "int64", SIZES: "int64"}
    needed |= {name + NUMBERS: "uint32", name + PLACES: "int64", name + HASHES: "int64"}
    for key, dtype in needed.items():
        found = layouts.get(key)
        if found is None or found.dtype != dtype or len(found.shape) != 1 or found.referenced:
            raise FormatError(f"{path}: {name} lies in other files, and {key} does not say where; expected {dtype} in one axis")
        if key in (name + NUMBERS, name + PLACES) and found.shape != (records,):
            raise FormatError(f"{path}, {key}: {found.shape[0]} entries for {records} records; expected one per record")
    if name in layouts:
        raise FormatError(f"{path}, {name} lies in the shard and in other files; expected one of the two")


def _size(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a size")
    return value
