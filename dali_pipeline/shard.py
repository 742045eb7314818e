"""One shard: a safetensors file of concatenated arrays, their offsets, and a hash of every block. docs/format.md has the bytes.

Read by `pread`, each block checked against its hash the first time this process reads it.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from dali_pipeline.encoding import BFLOAT16, storage
from dali_pipeline.files import Files, OpenFile
from dali_pipeline.reads import bring
from dali_pipeline.schema import Array, FormatError, PipelineError

VERSION = 1
BLOCK_BYTES = 1 << 20
METADATA_KEY = "dali_pipeline"
DTYPES = {
    "F16": "float16", "BF16": BFLOAT16, "F32": "float32", "F64": "float64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "U8": "uint8", "U16": "uint16", "U32": "uint32",
}  # fmt: skip
_MAX_HEADER_BYTES = 100 << 20  # as the safetensors library
SoundMap: TypeAlias = "memoryview | bytearray"
Hashes: TypeAlias = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """What the manifest keeps of a shard. bytes: the file's size · blocks: hashes in it · digest: of the header · ids: sum of
    the XXH3-64 of its ids modulo 2**64."""

    records: int
    bytes: int
    blocks: int
    digest: str
    ids: int


def hash_texts(texts: Iterable[bytes], seed: int = 0) -> Hashes:
    """XXH3-64 of each text."""
    return np.fromiter((xxhash.xxh3_64_intdigest(one, seed=seed) for one in texts), np.uint64)


def write_whole(path: Path, data: bytes) -> None:
    """A small file, whole or not at all, and on the disk before this returns."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise PipelineError(f"{path} could not be written ({error.strerror}); expected free space and permission") from error
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` outlast a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where an array lies: its first byte in the file, and its first block among the shard's blocks; dtype: NumPy's, so
    uint16 for bfloat16."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    nbytes: int
    first_block: int


class Shard:
    """One shard, checked as far as its header; several threads may read at once.

    nbytes, digest: what the manifest says of the file. sound: a byte a block, 1 once the block's hash was right; workers
    share it where it is shared memory, so that no block is hashed twice.
    """

    def __init__(self, path: Path, *, nbytes: int, digest: str, sound: SoundMap, files: Files) -> None:
        self.path = path
        self._files = files
        self._sound = sound
        file = files.get(path)
        self._identity = file.identity
        if file.size != nbytes:
            raise FormatError(f"{path} has {file.size} bytes; expected {nbytes} as in the manifest: truncated or replaced")
        header = _read_header(file.fd, path, file.size)
        if xxhash.xxh3_128_hexdigest(header) != digest:
            raise FormatError(f"{path}: the header does not have the digest that the manifest names: damaged or replaced")
        self.kind, self.records, self.arrays, self._hashes = parse_header(path, header, file.size)
        if len(self._hashes) != len(sound):
            raise FormatError(f"{path} has {len(self._hashes)} block hashes; expected {len(sound)} as in the manifest")

    def array(self, name: str) -> Layout:
        """Where an array lies; raises FormatError where the shard has none of that name."""
        if name not in self.arrays:
            raise FormatError(f"{self.path} has no array {name!r}; docs/format.md lists what a shard must hold")
        return self.arrays[name]

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Bytes `start` to `start + len(out)` of array `name` into `out`; raises FormatError on damage or a short file."""
        layout, sound, stop = self.array(name), self._sound, start + len(out)
        if not 0 <= start <= stop <= layout.nbytes:
            raise FormatError(f"{self.path}, {name}: bytes {start} to {stop} asked of {layout.nbytes}; offsets do not fit")
        if start == stop:
            return
        first, last = layout.first_block + start // BLOCK_BYTES, layout.first_block + (stop - 1) // BLOCK_BYTES
        if sound[first] and sound[last] and (last < first + 2 or all(sound[first + 1 : last])):
            self._pread(name, layout.begin + start, out)
            return
        blocks = range(first - layout.first_block, last - layout.first_block + 1)
        for block in blocks:  # the part of `out` that lies in each
            begin, end = max(start, block * BLOCK_BYTES), min(stop, (block + 1) * BLOCK_BYTES)
            part = out[begin - start : end - start]
            if self._sound[layout.first_block + block]:
                self._pread(name, layout.begin + begin, part)
            else:
                data = self._checked_block(name, layout, block)
                part[:] = data[begin - block * BLOCK_BYTES : end - block * BLOCK_BYTES]

    def bring(self, name: str, begin: int, end: int) -> bool:
        """Has the system read bytes `begin` to `end` of an array into its cache; whether they were not there.

        Blocks not met before are read here, and hashed. Raises FormatError for damage.
        """
        layout = self.array(name)
        if not 0 <= begin < end <= layout.nbytes:
            return False
        blocks = range(begin // BLOCK_BYTES, (end - 1) // BLOCK_BYTES + 1)
        new = [block for block in blocks if not self._sound[layout.first_block + block]]
        for block in new:
            self._checked_block(name, layout, block)
        return bool(new) or bring(self.opened().fd, layout.begin + begin, end - begin)

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Array:
        """Rows begin to end of an array, all by default, checked."""
        layout = self.array(name)
        end = layout.shape[0] if end is None else end
        if not 0 <= begin <= end <= layout.shape[0]:
            raise FormatError(f"{self.path}, {name}: rows {begin} to {end} asked of {layout.shape[0]}; offsets do not fit")
        row_bytes = layout.dtype.itemsize * math.prod(layout.shape[1:])
        array = np.empty((end - begin, *layout.shape[1:]), layout.dtype)
        self.read_into(name, begin * row_bytes, array.reshape(-1).view(np.uint8).data)
        return array

    def blocks(self, name: str) -> Iterator[tuple[int, Array, bool]]:
        """Each block of an array: its first byte, its bytes, which the next one overwrites, and whether they are sound."""
        layout, buffer = self.array(name), np.empty(BLOCK_BYTES, np.uint8)
        for number, start in enumerate(range(0, layout.nbytes, BLOCK_BYTES)):
            data = buffer[: min(BLOCK_BYTES, layout.nbytes - start)]
            self._pread(name, layout.begin + start, data.data)
            yield start, data, xxhash.xxh3_64_intdigest(data.data) == self._hashes[layout.first_block + number]

    def texts(self, name: str) -> list[bytes]:
        """The texts of `ids` or `groups`, in UTF-8."""
        blob, offsets = self.read(name).tobytes(), self.read(f"{name}.offsets").tolist()
        return [blob[a:b] for a, b in itertools.pairwise(offsets)]

    def _checked_block(self, name: str, layout: Layout, block: int) -> memoryview:
        start = block * BLOCK_BYTES
        data = np.empty(min(BLOCK_BYTES, layout.nbytes - start), np.uint8).data
        self._pread(name, layout.begin + start, data)
        if xxhash.xxh3_64_intdigest(data) != self._hashes[layout.first_block + block]:
            raise FormatError(
                f"{self.path}, {name}: bytes {start} to {start + len(data)} are damaged (wrong hash); "
                "restore the file or convert again"
            )
        self._sound[layout.first_block + block] = 1
        return data

    def opened(self) -> OpenFile:
        """The shard's file, open while the caller holds it; raises FormatError where it is gone or another."""
        file = self._files.get(self.path)
        if file.identity != self._identity:
            raise FormatError(f"{self.path} was replaced while in use; open the data set again")
        return file

    def _pread(self, name: str, offset: int, out: memoryview) -> None:
        file = self.opened()
        done = 0
        while done < len(out):
            try:
                got = os.preadv(file.fd, [out[done:] if done else out], offset + done)
            except OSError as error:
                raise FormatError(f"{self.path}, {name}: byte {offset + done} cannot be read ({error.strerror})") from error
            if got == 0:
                raise FormatError(f"{self.path}, {name}: the file ends at byte {offset + done}; it was cut while in use")
            done += got


def _read_header(fd: int, path: Path, size: int) -> bytes:
    """The 8-byte length and the JSON behind it; raises FormatError where they cannot be."""
    prefix = os.pread(fd, 8, 0)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise FormatError(f"{path}: a header of {length} bytes does not fit a file of {size}; not a safetensors file")
    return prefix + os.pread(fd, length, 8)


def parse_header(path: Path, header: bytes, size: int) -> tuple[str, int, dict[str, Layout], Array]:
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
