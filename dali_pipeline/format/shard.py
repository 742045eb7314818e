"""Shard: a safetensors file of concatenated arrays, their offsets, and a hash of every block.

docs/format.md specifies the bytes. Shards are read with `pread`. Each block is checked against its hash the first time this
process reads it.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from dali_pipeline.errors import DataError, FormatError
from dali_pipeline.format.header import Layout, parse_header
from dali_pipeline.format.references import FILES, HASHES, NUMBERS, PLACES, SIZES, Extent, ForeignNames, References
from dali_pipeline.format.schema import level_of
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
        referenced: Bytes of values that lie in files of others.
    """

    records: int
    bytes: int
    blocks: int
    digest: str
    ids: int
    steps: int = 0
    referenced: int = 0


def count_shared(sets: Iterable[Hashes]) -> int:
    """Return how many hashes are in several sets, each of which has distinct ones."""
    together = np.concatenate([np.zeros(0, np.uint64), *sets])
    return int((np.unique(together, return_counts=True)[1] > 1).sum())


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
        files_root: Folder of the files of others that hold values; None if there are none.

    Raises:
        FormatError: The file or its header is not what the manifest says.
    """

    def __init__(
        self, path: Place, *, nbytes: int, digest: str, sound: SoundMap, files: Files, files_root: Place | None = None
    ) -> None:
        self.path = path
        self._digest, self._files_root = digest, files_root
        self._references: dict[str, References] = {}
        self._identities: dict[tuple[str, int], tuple[int, ...]] = {}  # of the files of others that were opened
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
        blocks = len(self._hashes) + sum(self.arrays[name + HASHES].shape[0] for name in self.referenced)
        if blocks != len(sound):
            raise FormatError(f"{path} has {blocks} block hashes; expected {len(sound)} as in the manifest")
        if file.stamps is not None:  # names, labels and offsets are neighbours: one request
            file.prefetch(
                [
                    piece
                    for name, array in self.arrays.items()
                    if array.nbytes <= array.block_bytes and not array.referenced
                    for piece in self.pieces(name)
                ]
            )

    def array(self, name: str) -> Layout:
        """Return the position of an array; raise FormatError if the shard has none of that name."""
        if name not in self.arrays:
            raise FormatError(f"{self.path} has no array {name!r}; docs/format.md lists what a shard must hold")
        return self.arrays[name]

    @property
    def referenced(self) -> list[str]:
        """Names of the arrays that lie in files of others."""
        return [name for name, layout in self.arrays.items() if layout.referenced]

    def references(self, name: str) -> References:
        """Return where an array lies in files of others; reads the index of it, once."""
        if name in self._references:
            return self._references[name]
        layout = self.array(name)
        if level_of(name) == "record":
            begins = np.arange(self.records + 1, dtype=np.int64)
        else:
            begins = self.read("sequence.offsets").astype(np.int64)
        per_row = layout.nbytes // max(1, int(begins[-1]))
        references = References(
            begins=begins * per_row,
            places=self.read(name + PLACES),
            numbers=self.read(name + NUMBERS).astype(np.int64),
            hashes=self.read(name + HASHES).view(np.uint64),
            names=ForeignNames(str(self.path), self.read(FILES).tobytes(), self.read(f"{FILES}.offsets")),
            sizes=self.read(SIZES),
        )
        self._check(name, layout, references)
        self._references[name] = references
        return references

    def _check(self, name: str, layout: Layout, references: References) -> None:
        """Raise FormatError unless the pieces of an array fit it, its hashes and the files."""
        files, ends = len(references.names), references.places + np.diff(references.begins)
        fits = len(references.begins) == self.records + 1 and references.begins[-1] == layout.nbytes
        fits = fits and len(references.sizes) == files and int(references.numbers.max(initial=-1)) < files
        fits = fits and bool((np.diff(references.begins) >= 0).all()) and int(references.places.min(initial=0)) >= 0
        if not fits or (ends > references.sizes[references.numbers]).any() or references.blocks[-1] != len(references.hashes):
            raise FormatError(f"{self.path}, {name}: the pieces in other files do not fit its {self.records} records")

    def extents(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """Yield the spans of bytes that lie together in one file, of bytes `start` to `stop` of an array, by default all."""
        layout = self.array(name)
        if layout.referenced:
            stop = layout.nbytes if stop is None else stop
            yield from self.references(name).extents(start, stop, layout.first_block)
        else:
            yield Extent(-1, layout.begin, 0, layout.nbytes, layout.first_block, layout.first_block)

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Read bytes `start` to `start + len(out)` of an array into `out`; raise FormatError for damage or a short file."""
        layout, stop = self.array(name), start + len(out)
        if not 0 <= start <= stop <= layout.nbytes:
            raise FormatError(f"{self.path}, {name}: bytes {start} to {stop} asked of {layout.nbytes}; offsets do not fit")
        if start == stop:
            return
        for extent in self.extents(name, start, stop):
            begin, end = max(start, extent.start), min(stop, extent.stop)
            self._read_extent(name, extent, begin, out[begin - start : end - start])

    def _read_extent(self, name: str, extent: Extent, start: int, out: memoryview) -> None:
        """Read bytes of an array that lie in one extent."""
        size, sound, stop = self.array(name).block_bytes, self._sound, start + len(out)
        blocks = extent.blocks(start, stop, size)
        first, last = extent.block + blocks.start, extent.block + blocks.stop - 1
        if sound[first] and sound[last] and (last < first + 2 or all(sound[first + 1 : last])):
            self._pread(name, extent, start, out)
            return
        for block in blocks:  # copy the part of `out` that lies in each
            block_begin, block_end = extent.block_span(block, size)
            begin, end = max(start, block_begin), min(stop, block_end)
            part = out[begin - start : end - start]
            if sound[extent.block + block]:
                self._pread(name, extent, begin, part)
            else:
                data = self._checked_block(name, extent, block)
                part[:] = data[begin - block_begin : end - block_begin]

    def prefetch(self, name: str, begin: int, end: int) -> bool:
        """Prefetch bytes `begin` to `end` of an array; return whether any were absent.

        They go to the system's page cache, and blocks never read before are read and hashed here. Blocks of a shard in a store
        are downloaded to the local cache. Raises FormatError for damage.
        """
        layout = self.array(name)
        if not 0 <= begin < end <= layout.nbytes:
            return False
        absent, file, number = False, None, -1
        for extent in self.extents(name, begin, end):
            if file is None or number != extent.file:  # neighbours mostly lie in one file
                file, number = self.open_reference(name, extent.file) if layout.referenced else self.opened(), extent.file
            absent |= self._prefetch(name, extent, begin, end, file)
        return absent

    def _prefetch(self, name: str, extent: Extent, begin: int, end: int, file: OpenFile) -> bool:
        if file.stamps is not None:
            return file.prefetch(self._pieces(name, extent, begin, end), wait=False)
        # a record that lies elsewhere is mostly read whole, and hashed where it is gathered
        blocks = extent.blocks(begin, end, self.array(name).block_bytes) if extent.file < 0 else range(0)
        unchecked = [block for block in blocks if not self._sound[extent.block + block]]
        for block in unchecked:
            self._checked_block(name, extent, block)
        begin, end = max(begin, extent.start), min(end, extent.stop)
        return bool(unchecked) or prefetch(file.fd, extent.begin + begin - extent.start, end - begin)

    def check(self, name: str, block: int, data: memoryview) -> bool:
        """Hash the bytes of a block of an array of this file, which the caller has read; return whether they are right."""
        number = self.array(name).first_block + block
        sound = xxhash.xxh3_64_intdigest(data) == int(self._hashes[number])
        if sound:
            self._sound[number] = 1
        return sound

    def pieces(self, name: str) -> Iterator[Piece]:
        """Yield the blocks of an array in the form that a cache takes."""
        for extent in self.extents(name):
            yield from self._pieces(name, extent, extent.start, extent.stop)

    def _pieces(self, name: str, extent: Extent, start: int, stop: int) -> list[Piece]:
        """Return the blocks of an extent that bytes `start` to `stop` of the array lie in."""
        return [self._piece(name, extent, block) for block in extent.blocks(start, stop, self.array(name).block_bytes)]

    def _piece(self, name: str, extent: Extent, block: int) -> Piece:
        layout = self.array(name)
        begin, end = extent.block_span(block, layout.block_bytes)
        number = extent.block + block
        if layout.referenced:
            hashed = int(self.references(name).hashes[number - layout.first_block])
        else:
            hashed = int(self._hashes[number])
        return Piece(1 + extent.slot + block, extent.begin + begin - extent.start, end - begin, hashed)

    def note_need(self, name: str, begin: int, end: int, need: float) -> None:
        """Tell the cache when bytes `begin` to `end` of an array are needed next.

        The time is the epoch plus the fraction of it that is over.
        """
        if begin < end:
            for extent in self.extents(name, begin, end):
                self.opened(name, extent).note_need(self._pieces(name, extent, begin, end), need)

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

    def blocks(self, name: str) -> Iterator[tuple[int, Array, str]]:
        """Yield each block of an array: first byte, bytes (valid until the next block), and what is wrong, "" if nothing is."""
        layout = self.array(name)
        buffer = np.empty(layout.block_bytes, np.uint8)
        for extent in self.extents(name):
            for block in extent.blocks(extent.start, extent.stop, layout.block_bytes):
                start, end = extent.block_span(block, layout.block_bytes)
                data = buffer[: end - start]
                try:
                    self._pread(name, extent, start, data.data)
                    sound = xxhash.xxh3_64_intdigest(data.data) == self._piece(name, extent, block).hash
                    wrong = "" if sound else self._changed(name, extent, block)
                except FormatError as error:
                    if extent.file < 0 and self.opened(name, extent).stamps is None:
                        raise
                    wrong = str(error)  # a file of others, or the block is damaged in the store
                yield start, data, wrong

    def texts(self, name: str) -> list[bytes]:
        """Return the texts of `ids` or `groups`, in UTF-8."""
        data, offsets = self.read(name).tobytes(), self.read(f"{name}.offsets").tolist()
        return [data[begin:end] for begin, end in itertools.pairwise(offsets)]

    def _checked_block(self, name: str, extent: Extent, block: int) -> memoryview:
        piece, start = self._piece(name, extent, block), extent.block_span(block, self.array(name).block_bytes)[0]
        data = np.empty(piece.nbytes, np.uint8).data
        self._pread(name, extent, start, data)
        sound = xxhash.xxh3_64_intdigest(data) == piece.hash
        if not sound and self.opened(name, extent).forget(piece):  # the copy in the local cache was damaged
            self._pread(name, extent, start, data)
            sound = xxhash.xxh3_64_intdigest(data) == piece.hash
        if not sound:
            raise FormatError(self._changed(name, extent, block))
        self._sound[extent.block + block] = 1
        return data

    def _changed(self, name: str, extent: Extent, block: int) -> str:
        """Return a sentence about a block whose hash is wrong."""
        piece = self._piece(name, extent, block)
        start, end = extent.block_span(block, self.array(name).block_bytes)
        if extent.file < 0:
            where = f"{self.path}, {name}: bytes {start} to {end} are damaged (wrong hash)"
            return f"{where}; restore the file or convert again"
        return (
            f"{self._reference(name, extent.file)}: bytes {piece.begin} to {piece.begin + piece.nbytes} are not those that "
            f"{self.path} refers to (wrong hash): the file changed since; restore it or convert again"
        )

    def _reference(self, name: str, number: int) -> Place:
        """Return a file of others by its number."""
        references = self.references(name)
        if self._files_root is None:
            raise FormatError(f"{self.path} refers to other files; expected the folder they lie in, by files_root")
        place = self._files_root / references.names[number]
        if isinstance(place, Path):
            return place
        digest = xxhash.xxh3_128_hexdigest(f"{self._digest}\n{name}\n{number}".encode())
        blocks = int(references.blocks_per_file[number])
        return replace(place, digest=digest, nbytes=int(references.sizes[number]), blocks=blocks)

    def opened(self, name: str = "", extent: Extent | None = None) -> OpenFile:
        """Return the file of an extent, by default the shard's, open while the caller holds it.

        Raises FormatError if it is gone, was replaced, or has another size than it had.
        """
        if extent is not None and extent.file >= 0:
            return self._opened_reference(name, extent.file)
        file = self._files.get(self.path)
        if file.identity != self._identity:
            raise FormatError(f"{self.path} was replaced while in use; open the data set again")
        return file

    def _opened_reference(self, name: str, number: int) -> OpenFile:
        path = self._reference(name, number)
        try:
            file = self._files.get(path)
        except FormatError:
            raise self._gone(path) from None
        self._check_reference(name, number, file)
        return file

    def open_reference(self, name: str, number: int) -> OpenFile:
        """Return a file of others by its number, newly opened unless it is in a store: a set may have a million.

        Raises FormatError like `opened`.
        """
        if not isinstance(self._files_root, Path):
            return self._opened_reference(name, number)
        text = f"{self._files_root}/{self.references(name).names[number]}"  # a path object costs as much as opening it
        try:
            file = OpenFile(text)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise self._gone(text) from None
            raise kind_of(error)(f"{text} cannot be opened ({error.strerror})") from error
        self._check_reference(name, number, file)
        return file

    def _gone(self, path: Place | str) -> FormatError:
        return FormatError(
            f"{path} is gone, and {self.path} refers to it; restore it, or name the folder of the files by files_root "
            "(--files-root)"
        )

    def _check_reference(self, name: str, number: int, file: OpenFile) -> None:
        """Raise FormatError if a file of others has another size than it had, or was replaced since it was opened first."""
        expected = self.references(name).sizes[number]
        if file.size != expected:
            raise FormatError(
                f"{file.path} has {file.size} bytes; expected {expected} as when {self.path} was made: it changed since"
            )
        if self._identities.setdefault((name, number), file.identity) != file.identity:
            raise FormatError(f"{file.path} was replaced while in use; open the data set again")

    def _pread(self, name: str, extent: Extent, start: int, out: memoryview) -> None:
        """Read bytes of an array from `start` on, unchecked.

        For a file in a store, retry until no block was evicted from the cache during the read.
        """
        file, layout = self.opened(name, extent), self.array(name)
        offset = extent.begin + start - extent.start
        if file.stamps is None:
            return self._pread_file(file, name, extent, offset, out)
        blocks = extent.blocks(start, start + len(out), layout.block_bytes)
        stamps = file.stamps[extent.slot + blocks.start : extent.slot + blocks.stop]
        pieces = self._pieces(name, extent, start, start + len(out))
        for _ in range(TRIES):
            file.prefetch(pieces)
            before = stamps.copy()
            self._pread_file(file, name, extent, offset, out)
            if (before >= FIRST_STAMP).all() and (before == stamps).all():
                return None
        raise DataError(f"{self.path}, {name}: the cache is too small for what is read at once; give more cache_bytes")

    def _pread_file(self, file: OpenFile, name: str, extent: Extent, offset: int, out: memoryview) -> None:
        done = 0
        while done < len(out):
            try:
                nbytes = os.preadv(file.fd, [out[done:] if done else out], offset + done)
            except OSError as error:
                why = f"byte {offset + done} cannot be read ({error.strerror})"
                raise kind_of(error)(f"{self._where(name, extent)}: {why}") from error
            if nbytes == 0:
                raise FormatError(
                    f"{self._where(name, extent)}: the file ends at byte {offset + done}; it was cut while in use"
                )
            done += nbytes

    def _where(self, name: str, extent: Extent) -> str:
        return f"{self.path}, {name}" if extent.file < 0 else str(self._reference(name, extent.file))

    @property
    def index_bytes(self) -> int:
        """Bytes of memory, approximately, that the places of values in other files take once they are read."""
        names = self.referenced
        files = self.arrays[FILES].nbytes + 20 * self.arrays[SIZES].shape[0] if names else 0
        return sum(files + 60 * self.records + self.arrays[name + HASHES].nbytes for name in names)
