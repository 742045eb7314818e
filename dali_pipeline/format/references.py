"""References: where the values of a shard's records lie in files of others, for a data set that was made in place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from dali_pipeline.errors import FormatError
from dali_pipeline.types import BLOCK_BYTES, Array, Ints

FILES = "files"  # arrays of a shard: names of files, with offsets, and their sizes
SIZES = "files.bytes"
NUMBERS, PLACES, HASHES = ".files", ".begins", ".hashes"  # of an array: one entry per record, one per block


class Extent(NamedTuple):
    """Consecutive bytes of an array that lie together in one file, and the hash blocks that they are cut into.

    Attributes:
        file: Number of the file, or -1 for the shard itself.
        begin: First byte in the file.
        start: First byte in the array.
        stop: Byte of the array after the last one.
        block: Number of the first block among all blocks of the shard.
        slot: Number of the first block among the blocks that the shard has in that file.
    """

    file: int
    begin: int
    start: int
    stop: int
    block: int
    slot: int

    def blocks(self, start: int, stop: int, block_bytes: int) -> range:
        """Return the numbers, within this extent, of the blocks that bytes `start` to `stop` of the array lie in."""
        first, last = max(start, self.start) - self.start, min(stop, self.stop) - self.start
        return range(first // block_bytes, -(-last // block_bytes))

    def block_span(self, block: int, block_bytes: int) -> tuple[int, int]:
        """Return the bytes of the array, begin and end, that one of its blocks has."""
        begin = self.start + block * block_bytes
        return begin, min(begin + block_bytes, self.stop)


def blocks_of(nbytes: Ints) -> Ints:
    """Return how many hash blocks pieces of these sizes have: a block never crosses a piece."""
    return -(-nbytes // BLOCK_BYTES)


class ForeignNames:
    """Names of files below the folder of files; each is decoded, and checked, when it is asked for: there may be a million.

    Args:
        where: The shard, for messages.
        texts: Their bytes in UTF-8, one after the other.
        ends: (F + 1,) begins, and the end of the last one.
    """

    def __init__(self, where: str, texts: bytes, ends: Ints) -> None:
        self._where, self._texts, self._ends = where, texts, ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[str]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> str:
        """Return a name; raise FormatError for one that does not lie below the folder."""
        text = self._texts[int(self._ends[number]) : int(self._ends[number + 1])]
        try:
            name = text.decode()
        except UnicodeDecodeError:
            name = ""
        if not name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise FormatError(f"{self._where}, {FILES}: {text[:99]!r} is no name below the folder of files")
        return name


@dataclass(frozen=True, kw_only=True, eq=False)
class References:
    """The files of others that hold an array, one piece per record.

    Attributes:
        begins: (R + 1,) int64, first byte of each record's piece in the array, and the end of the last one.
        places: (R,) int64, first byte of the piece in its file.
        numbers: (R,) int64, number of that file.
        hashes: (blocks,) uint64, hash of each block, piece by piece.
        names: Names of the files, below the folder of files; F of them.
        sizes: (F,) int64, their sizes.
    """

    begins: Ints
    places: Ints
    numbers: Ints
    hashes: Array
    names: ForeignNames
    sizes: Ints

    @cached_property
    def blocks(self) -> Ints:
        """(R + 1,) number of the first block of each piece, and of all blocks."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(blocks_of(np.diff(self.begins)))])

    @cached_property
    def slots(self) -> Ints:
        """(R,) number of blocks that earlier records have in the same file."""
        order = np.argsort(self.numbers, kind="stable")
        counts = np.diff(self.blocks)[order]
        before = np.cumsum(counts) - counts
        heads = np.flatnonzero(np.diff(self.numbers[order], prepend=-1))
        first = np.repeat(before[heads], np.diff([*heads, len(order)]))
        slots = np.empty_like(order)
        slots[order] = before - first
        return slots

    @cached_property
    def blocks_per_file(self) -> Ints:
        """(F,) number of blocks that the records have in each file."""
        return np.bincount(self.numbers, np.diff(self.blocks), len(self.names)).astype(np.int64)

    def extents(self, start: int, stop: int, first_block: int) -> Iterator[Extent]:
        """Yield the pieces that bytes `start` to `stop` of the array lie in.

        Args:
            start: First byte.
            stop: Byte after the last one.
            first_block: Number of the array's first block among the blocks of the shard.
        """
        first = int(np.searchsorted(self.begins, start, side="right")) - 1
        last = int(np.searchsorted(self.begins, stop, side="left"))
        for record in range(max(0, first), last):
            if self.begins[record] < self.begins[record + 1]:
                yield self.extent(record, first_block)

    def extent(self, record: int, first_block: int) -> Extent:
        """Return the piece of a record. first_block: as in `extents`."""
        begin, end = self.begins[record : record + 2].tolist()
        block, place, number = first_block + int(self.blocks[record]), int(self.places[record]), int(self.numbers[record])
        return Extent(number, place, begin, end, block, int(self.slots[record]))
