"""Shard: a safetensors file of concatenated arrays, their offsets, and a hash of every block.

docs/format.md specifies the bytes. Shards are read with `pread`. Each block is checked against its hash the first time this
process reads it.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from dali_pipeline.errors import DataError, FormatError
from dali_pipeline.format.header import Layout, parse_header
from dali_pipeline.storage.cache import FIRST_STAMP
from dali_pipeline.storage.openfile import OpenFile, Piece, kind_of
from dali_pipeline.storage.reads import prefetch
from dali_pipeline.types import Array

if TYPE_CHECKING:
    from dali_pipeline.storage.cachedfile import Place
    from dali_pipeline.storage.files import Files

SoundMap: TypeAlias = "memoryview | bytearray"
Hashes: TypeAlias = npt.NDArray[np.uint64]
TRIES = 16  # reads before giving up on blocks that other processes evict meanwhile


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """Entry of a shard in the manifest.

    Attributes:
        records: Number of records.
        bytes: Size of the file.
        blocks: Number of hash blocks.
        digest: Digest of the header.
        ids: Sum of the XXH3-64 of the shard's ids modulo 2**64.
        steps: Number of rows of all sequences, or of nodes of all graphs.
    """

    records: int
    bytes: int
    blocks: int
    digest: str
    ids: int
    steps: int = 0


def hash_texts(texts: Iterable[bytes], seed: int = 0) -> Hashes:
    """Return the XXH3-64 of each text."""
    return np.fromiter((xxhash.xxh3_64_intdigest(text, seed=seed) for text in texts), np.uint64)


class Shard:
    """One shard whose header is checked; several threads may read at once.

    Args:
        path: The shard.
        nbytes: Size of the file by the manifest.
        digest: Digest of the header by the manifest.
        sound: One byte per block, set to 1 once the block's hash was right. In shared memory, workers share it, so no block is
            hashed twice.
        files: Open files.

    Raises:
        FormatError: The file or its header is not what the manifest says.
    """

    def __init__(self, path: Place, *, nbytes: int, digest: str, sound: SoundMap, files: Files) -> None:
        self.path = path
        self._files = files
        self._sound = sound
        file = files.get(path)
        self._identity = file.identity
        if file.size != nbytes:
            raise FormatError(f"{path} has {file.size} bytes; expected {nbytes} as in the manifest: truncated or replaced")
        header = file.header()
        if xxhash.xxh3_128_hexdigest(header) != digest:
            raise FormatError(f"{path}: the header does not have the digest that the manifest names: damaged or replaced")
        self.kind, self.records, self.arrays, self._hashes = parse_header(path, header, file.size)
        if len(self._hashes) != len(sound):
            raise FormatError(f"{path} has {len(self._hashes)} block hashes; expected {len(sound)} as in the manifest")
        if file.stamps is not None:  # names, labels and offsets are neighbours: one request
            file.prefetch(
                [
                    piece
                    for name, array in self.arrays.items()
                    if array.nbytes <= array.block_bytes
                    for piece in self.pieces(name)
                ]
            )

    def array(self, name: str) -> Layout:
        """Return the position of an array; raise FormatError if the shard has none of that name."""
        if name not in self.arrays:
            raise FormatError(f"{self.path} has no array {name!r}; docs/format.md lists what a shard must hold")
        return self.arrays[name]

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Read bytes `start` to `start + len(out)` of an array into `out`; raise FormatError for damage or a short file."""
        layout, sound, stop = self.array(name), self._sound, start + len(out)
        if not 0 <= start <= stop <= layout.nbytes:
            raise FormatError(f"{self.path}, {name}: bytes {start} to {stop} asked of {layout.nbytes}; offsets do not fit")
        if start == stop:
            return
        first, last = layout.first_block + start // layout.block_bytes, layout.first_block + (stop - 1) // layout.block_bytes
        if sound[first] and sound[last] and (last < first + 2 or all(sound[first + 1 : last])):
            self._pread(name, start, out)
            return
        blocks = range(first - layout.first_block, last - layout.first_block + 1)
        for block in blocks:  # copy the part of `out` that lies in each
            begin, end = max(start, block * layout.block_bytes), min(stop, (block + 1) * layout.block_bytes)
            part = out[begin - start : end - start]
            if self._sound[layout.first_block + block]:
                self._pread(name, begin, part)
            else:
                data = self._checked_block(name, layout, block)
                part[:] = data[begin - block * layout.block_bytes : end - block * layout.block_bytes]

    def prefetch(self, name: str, begin: int, end: int) -> bool:
        """Prefetch bytes `begin` to `end` of an array; return whether any were absent.

        They go to the system's page cache, and blocks never read before are read and hashed here. Blocks of a shard in a store
        are downloaded to the local cache. Raises FormatError for damage.
        """
        layout, file = self.array(name), self.opened()
        if not 0 <= begin < end <= layout.nbytes:
            return False
        blocks = range(begin // layout.block_bytes, (end - 1) // layout.block_bytes + 1)
        if file.stamps is not None:
            return file.prefetch(self.pieces(name, blocks), wait=False)
        unchecked = [block for block in blocks if not self._sound[layout.first_block + block]]
        for block in unchecked:
            self._checked_block(name, layout, block)
        return bool(unchecked) or prefetch(file.fd, layout.begin + begin, end - begin)

    def pieces(self, name: str, blocks: Iterable[int] | None = None) -> list[Piece]:
        """Return the blocks of an array, by default all, in the form that a cache takes."""
        layout, pieces = self.array(name), []
        for block in range(-(-layout.nbytes // layout.block_bytes)) if blocks is None else blocks:
            nbytes, number = min(layout.block_bytes, layout.nbytes - block * layout.block_bytes), layout.first_block + block
            pieces.append(Piece(1 + number, layout.begin + block * layout.block_bytes, nbytes, int(self._hashes[number])))
        return pieces

    def note_need(self, name: str, begin: int, end: int, need: float) -> None:
        """Tell the cache when bytes `begin` to `end` of an array are needed next.

        The time is the epoch plus the fraction of it that is over.
        """
        if begin < end:
            block_bytes = self.array(name).block_bytes
            self.opened().note_need(self.pieces(name, range(begin // block_bytes, (end - 1) // block_bytes + 1)), need)

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Array:
        """Read rows `begin` to `end` of an array, by default all, checked."""
        layout = self.array(name)
        end = layout.shape[0] if end is None else end
        if not 0 <= begin <= end <= layout.shape[0]:
            raise FormatError(f"{self.path}, {name}: rows {begin} to {end} asked of {layout.shape[0]}; offsets do not fit")
        row_bytes = layout.dtype.itemsize * math.prod(layout.shape[1:])
        array = np.empty((end - begin, *layout.shape[1:]), layout.dtype)
        self.read_into(name, begin * row_bytes, array.reshape(-1).view(np.uint8).data)
        return array

    def blocks(self, name: str) -> Iterator[tuple[int, Array, bool]]:
        """Yield each block of an array: first byte, bytes (valid until the next block), and whether its hash is right."""
        layout = self.array(name)
        buffer = np.empty(layout.block_bytes, np.uint8)
        for number, start in enumerate(range(0, layout.nbytes, layout.block_bytes)):
            data = buffer[: min(layout.block_bytes, layout.nbytes - start)]
            try:
                self._pread(name, start, data.data)
                sound = xxhash.xxh3_64_intdigest(data.data) == self._hashes[layout.first_block + number]
            except FormatError:
                if self.opened().stamps is None:
                    raise
                sound = False  # the block is damaged in the store
            yield start, data, sound

    def texts(self, name: str) -> list[bytes]:
        """Return the texts of `ids` or `groups`, in UTF-8."""
        data, offsets = self.read(name).tobytes(), self.read(f"{name}.offsets").tolist()
        return [data[begin:end] for begin, end in itertools.pairwise(offsets)]

    def _checked_block(self, name: str, layout: Layout, block: int) -> memoryview:
        start = block * layout.block_bytes
        data = np.empty(min(layout.block_bytes, layout.nbytes - start), np.uint8).data
        self._pread(name, start, data)
        piece = self.pieces(name, [block])[0]
        sound = xxhash.xxh3_64_intdigest(data) == piece.hash
        if not sound and self.opened().forget(piece):  # the copy in the local cache was damaged
            self._pread(name, start, data)
            sound = xxhash.xxh3_64_intdigest(data) == piece.hash
        if not sound:
            raise FormatError(
                f"{self.path}, {name}: bytes {start} to {start + len(data)} are damaged (wrong hash); "
                "restore the file or convert again"
            )
        self._sound[layout.first_block + block] = 1
        return data

    def opened(self) -> OpenFile:
        """Return the shard's file, open while the caller holds it; raise FormatError if it is gone or was replaced."""
        file = self._files.get(self.path)
        if file.identity != self._identity:
            raise FormatError(f"{self.path} was replaced while in use; open the data set again")
        return file

    def _pread(self, name: str, start: int, out: memoryview) -> None:
        """Read bytes of an array from `start` on, unchecked.

        For a shard in a store, retry until no block was evicted from the cache during the read.
        """
        file, layout = self.opened(), self.array(name)
        if file.stamps is None:
            return self._pread_file(file, name, layout.begin + start, out)
        blocks = range(start // layout.block_bytes, (start + len(out) - 1) // layout.block_bytes + 1)
        stamps = file.stamps[layout.first_block + blocks.start : layout.first_block + blocks.stop]
        for _ in range(TRIES):
            file.prefetch(self.pieces(name, blocks))
            before = stamps.copy()
            self._pread_file(file, name, layout.begin + start, out)
            if (before >= FIRST_STAMP).all() and (before == stamps).all():
                return None
        raise DataError(f"{self.path}, {name}: the cache is too small for what is read at once; give more cache_bytes")

    def _pread_file(self, file: OpenFile, name: str, offset: int, out: memoryview) -> None:
        done = 0
        while done < len(out):
            try:
                nbytes = os.preadv(file.fd, [out[done:] if done else out], offset + done)
            except OSError as error:
                why = f"byte {offset + done} cannot be read ({error.strerror})"
                raise kind_of(error)(f"{self.path}, {name}: {why}") from error
            if nbytes == 0:
                raise FormatError(f"{self.path}, {name}: the file ends at byte {offset + done}; it was cut while in use")
            done += nbytes
