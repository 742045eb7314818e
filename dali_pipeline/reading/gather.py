"""Gather: read rows of arrays in many shards into one buffer, with one system call per hundreds of records."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import xxhash

from dali_pipeline.errors import FormatError
from dali_pipeline.format.shard import Shard
from dali_pipeline.reading.records import IndexPart, Locations
from dali_pipeline.storage.cache import FIRST_STAMP
from dali_pipeline.storage.direct import read_past_cache
from dali_pipeline.storage.openfile import OpenFile
from dali_pipeline.storage.reads import read_many
from dali_pipeline.types import Array, Ints

MOST_BLOCKS = 64  # of a read that is not looked at block by block


def gather(
    locations: Locations,
    name: str,
    records: Ints,
    begins: Ints,
    ends: Ints,
    out: Array,
    out_begins: Ints,
    *,
    merge: bool = False,
    past_cache: bool = False,
) -> None:
    """Read rows begins[i] to ends[i] of an array, in the shard of record records[i], into out[out_begins[i]:].

    Blocks never read before are read whole and hashed. Rows between sound blocks are read straight into `out`, neighbours
    together. Raises FormatError for damage, with the id of the first record that met it.

    Args:
        locations: Locations of the records.
        name: Name of the array.
        records: (n,) record of each read, as index into the locations.
        begins: (n,) first row of each read in its shard.
        ends: (n,) row after the last one.
        out: Contiguous (R, *row); a narrower stored type is widened.
        out_begins: (n,) first row of each read in `out`.
        merge: Whether to read neighbours as one. An error then names the first of them. Default: False.
        past_cache: Whether to read long ones past the page cache. Default: False.
    """
    if merge:
        head = np.ones(len(records), bool)
        which = locations.which[records]
        head[1:] = (begins[1:] != ends[:-1]) | (which[1:] != which[:-1])
        head[1:] |= out_begins[1:] != out_begins[:-1] + (ends - begins)[:-1]
        heads = np.flatnonzero(head)
        records, begins, out_begins = records[heads], begins[heads], out_begins[heads]
        ends = ends[np.append(heads[1:], len(ends)) - 1]
    if len(records) and int((out_begins + (ends - begins)).max()) > len(out):  # reads go to addresses
        raise ValueError(f"{name}: rows up to {int((out_begins + (ends - begins)).max())} asked of an output of {len(out)}")
    which = locations.which[records]
    width = out.dtype.itemsize * math.prod(out.shape[1:])
    elsewhere = np.array([part.shard.array(name).referenced for part in locations.parts])
    for first in range(0, len(locations.parts), locations.files_at_once):
        parts = locations.parts[first : first + locations.files_at_once]
        chosen = np.flatnonzero((first <= which) & (which < first + len(parts)) & ~elsewhere[which])
        if len(chosen):
            table = [_own_extent(part, name, out) for part in parts]
            files, own = [file for file, _ in table], np.array([numbers for _, numbers in table], np.int64)
            extents = own[which[chosen] - first]
            reads = _Reads(name, records[chosen], begins[chosen], ends[chosen], out, out_begins[chosen], width)
            _gather(locations, files, which[chosen] - first, extents, reads, begins[chosen] * width, past_cache=past_cache)
    if elsewhere.any():
        chosen = np.flatnonzero(elsewhere[which] & (begins < ends))
        reads = _Reads(name, records[chosen], begins[chosen], ends[chosen], out, out_begins[chosen], width)
        _gather_referenced(locations, reads, which[chosen], past_cache)


class _Reads(NamedTuple):
    """Reads of rows of one array: as in `gather`, with the bytes of a row."""

    name: str
    records: Ints
    begins: Ints
    ends: Ints
    out: Array
    out_begins: Ints
    width: int

    def taken(self, chosen: Ints) -> _Reads:
        """Return some of the reads."""
        return self._replace(
            records=self.records[chosen],
            begins=self.begins[chosen],
            ends=self.ends[chosen],
            out_begins=self.out_begins[chosen],
        )


def _own_extent(part: IndexPart, name: str, out: Array) -> tuple[OpenFile, tuple[int, ...]]:
    """Return the file of a shard, and the row of `_gather`'s extents for an array that it holds itself."""
    layout, alike = part.shard.array(name), _agrees(part.shard, name, out)
    first_block = part.first_block + layout.first_block
    return part.shard.opened(), (alike, layout.begin, layout.nbytes, first_block, layout.block_bytes, layout.first_block)


def _gather_referenced(locations: Locations, reads: _Reads, which: Ints, past_cache: bool) -> None:
    """Read rows that lie in files of others, with as many of them open at a time as the limit allows."""
    name, starts = reads.name, reads.begins * reads.width
    extents, numbers = np.empty((len(which), 6), np.int64), np.empty(len(which), np.int64)
    for number, part in enumerate(locations.parts):
        chosen = np.flatnonzero(which == number)
        if not len(chosen):
            continue
        layout, references = part.shard.array(name), part.shard.references(name)
        rows = locations.rows[reads.records[chosen]]
        pieces = references.begins[rows]
        starts[chosen] -= pieces
        numbers[chosen] = references.numbers[rows]
        extents[chosen, 0] = _agrees(part.shard, name, reads.out)
        extents[chosen, 1] = references.places[rows]
        extents[chosen, 2] = references.begins[rows + 1] - pieces
        extents[chosen, 3] = part.first_block + layout.first_block + references.blocks[rows]
        extents[chosen, 4] = layout.block_bytes
        extents[chosen, 5] = references.slots[rows]
    pairs, inverse = np.unique(which * (1 + int(numbers.max(initial=0))) + numbers, return_index=True, return_inverse=True)[1:]
    for first in range(0, len(pairs), locations.files_at_once):
        files: list[OpenFile] = []
        for read in pairs[first : first + locations.files_at_once].tolist():
            try:
                files.append(locations.parts[int(which[read])].shard.open_reference(name, int(numbers[read])))
            except FormatError as error:
                raise _met(error, locations, int(reads.records[read])) from error
        chosen = np.flatnonzero((first <= inverse) & (inverse < first + len(files)))
        taken, opened = reads.taken(chosen), inverse[chosen] - first
        _gather(locations, files, opened, extents[chosen], taken, starts[chosen], hashed_here=True, past_cache=past_cache)


def _hash_whole(locations: Locations, reads: _Reads, read: int, blocks: range, block_bytes: int) -> bool:
    """Hash the blocks of a record that was read whole, and note those that are sound; return whether all are."""
    part = locations.parts[int(locations.which[reads.records[read]])]
    first, hashes = part.first_block + part.shard.array(reads.name).first_block, part.shard.references(reads.name).hashes
    begin = int(reads.out_begins[read])
    data = reads.out[begin : begin + int(reads.ends[read] - reads.begins[read])].reshape(-1).view(np.uint8).data
    for number, block in enumerate(blocks):
        at = number * block_bytes
        if xxhash.xxh3_64_intdigest(data[at : at + block_bytes]) != hashes[block - first]:
            return False
        locations.sound[block] = 1
    return True


def _gather(
    locations: Locations,
    files: list[OpenFile],
    number: Ints,
    extents: Array,
    reads: _Reads,
    starts: Ints,
    *,
    hashed_here: bool = False,
    past_cache: bool = False,
) -> None:
    """Read rows of which each lies in one extent: consecutive bytes of a file.

    Args:
        locations: Locations of the records.
        files: Open files.
        number: (n,) number of each read's file.
        extents: (n, 6): whether the stored type is that of the output; first byte in the file, size, first block among all
            blocks of the index, bytes of a block, and first block among those of the file.
        reads: The reads.
        starts: (n,) first byte of each read, counted from the begin of its extent.
        hashed_here: Whether blocks never read before are hashed here if a read has a whole extent. Default: one by one.
        past_cache: Whether to read long ones past the page cache. Default: False.
    """
    fds = np.array([file.fd for file in files], np.int64)[number]
    alike, begin, nbytes, block, block_bytes, slot = extents.T
    out, width = reads.out, reads.width
    stops, sound = starts + (reads.ends - reads.begins) * width, locations.sound
    # as in Shard.read_into: inside the array, and in sound blocks
    direct = (alike > 0) & (starts >= 0) & (starts < stops) & (stops <= nbytes)
    first_inner, last_inner = starts // block_bytes, (stops - 1) // block_bytes
    first, last = block + first_inner, block + last_inner
    cached = any(file.stamps is not None for file in files)
    fits = direct
    direct = fits & (last < first + (2 if cached else MOST_BLOCKS))
    known = direct.copy()  # reads of blocks whose hashes were right
    known[known] = (sound[first[known]] & sound[last[known]]) > 0
    for inner in range(1, int((last - first)[known].max(initial=0))):
        known[known] = sound[np.minimum(first + inner, last)[known]] > 0
    # other records that lie elsewhere are read whole, and hashed in memory
    whole = direct & ~known & (starts == 0) & (stops == nbytes) if hashed_here and not cached else np.zeros_like(direct)
    direct = known | whole
    sizes, offsets, addresses = stops - starts, begin + starts, out.ctypes.data + reads.out_begins * width
    if not cached and not hashed_here and not known[fits].all():
        candidates = np.flatnonzero(fits)
        heads = _heads(offsets[candidates], addresses[candidates], sizes[candidates], fds[candidates])
        long = np.add.reduceat(sizes[candidates], heads) >= 2 * block_bytes[candidates[heads]]
        direct[candidates[np.repeat(long, np.diff(np.append(heads, len(candidates))))]] = True
    if cached:  # Blocks of a store's cache may be evicted at any time. An unchanged stamp proves that they were not.
        own_blocks = slot + first_inner, slot + last_inner
        stamps = _stamps(files, number, *own_blocks)
        direct &= (stamps >= FIRST_STAMP).all(axis=0)
    direct_reads = np.flatnonzero(direct)
    sizes, offsets, addresses, fds = (array[direct_reads] for array in (sizes, offsets, addresses, fds))
    heads = _heads(offsets, addresses, sizes, fds)
    expected = np.add.reduceat(sizes, heads)
    if past_cache and not cached:
        opened = [files[file] for file in number[direct_reads[heads]].tolist()]
        complete = read_past_cache(opened, offsets[heads], addresses[heads], expected) == expected
    else:
        complete = read_many(fds[heads], offsets[heads], addresses[heads], expected) == expected
    unchecked = np.flatnonzero(complete & ~np.logical_and.reduceat((known | whole)[direct_reads], heads))
    for run in unchecked.tolist():
        read = int(direct_reads[heads[run]])
        file = files[number[read]] if past_cache else None
        complete[run] = _hash_run(locations, reads, read, int(starts[read]), int(expected[run]), file)
    direct[direct_reads] = np.repeat(complete, np.diff(np.append(heads, len(direct_reads))))
    if cached:
        direct &= (_stamps(files, number, *own_blocks) == stamps).all(axis=0)
    for read in np.flatnonzero(direct & whole).tolist():
        direct[read] = _hash_whole(locations, reads, read, range(int(first[read]), int(last[read]) + 1), int(block_bytes[read]))
    # The others one by one: to hash a block, to widen, to complete a short read, or to report what is wrong.
    for read in np.flatnonzero(~direct & (starts != stops)).tolist():
        _gather_one(locations, reads, read)


def _heads(offsets: Ints, addresses: Ints, sizes: Ints, fds: Ints) -> Ints:
    """Return the reads that do not continue the one before, in the file and in memory."""
    is_head = np.ones(len(offsets), bool)
    is_head[1:] = (offsets[1:] != (offsets + sizes)[:-1]) | (addresses[1:] != (addresses + sizes)[:-1]) | (fds[1:] != fds[:-1])
    return np.flatnonzero(is_head)


def _hash_run(locations: Locations, reads: _Reads, read: int, start: int, nbytes: int, past_cache: OpenFile | None) -> bool:
    """Hash the blocks of neighbouring records that were read at once, and were not hashed before; return whether all are right.

    Blocks that lie wholly in them are hashed in memory. The two at the edges are read whole once more.

    Args:
        locations: Locations of the records.
        reads: The reads.
        read: The first one of those records.
        start: Its first byte in the array.
        nbytes: Bytes of all of them.
        past_cache: The file, if blocks are to be read past the page cache.
    """
    part = locations.parts[int(locations.which[reads.records[read]])]
    shard, name = part.shard, reads.name
    layout, stop = shard.array(name), start + nbytes
    size, first_block = layout.block_bytes, part.first_block + layout.first_block
    first_byte = int(reads.out_begins[read]) * reads.width
    data = reads.out.reshape(-1).view(np.uint8).data[first_byte : first_byte + nbytes]
    for block in range(start // size, (stop - 1) // size + 1):
        begin, end = block * size, min((block + 1) * size, layout.nbytes)
        if locations.sound[first_block + block]:
            continue
        if begin >= start and end <= stop:
            if not shard.check(name, block, data[begin - start : end - start]):
                return False
        elif past_cache is not None:
            edge = np.empty(end - begin, np.uint8)
            where = (np.array([value]) for value in (layout.begin + begin, edge.ctypes.data, len(edge)))
            if read_past_cache([past_cache], *where)[0] != len(edge) or not shard.check(name, block, edge.data):
                return False
        else:
            try:
                shard.prefetch(name, begin, end)
            except FormatError:  # whose record it is shows when each is read on its own
                return False
    return True


def _stamps(files: list[OpenFile], which: Ints, first: Ints, last: Ints) -> Array:
    """Return the stamps of the blocks where each read begins and ends, (2, N); those of a local file never change."""
    stamps = np.full((2, len(which)), FIRST_STAMP, np.uint32)
    for number, file in enumerate(files):
        if file.stamps is not None:
            rows = which == number
            stamps[:, rows] = file.stamps[np.stack([first[rows], last[rows]]).clip(0, len(file.stamps) - 1)]
    return stamps


def _gather_one(locations: Locations, reads: _Reads, read: int) -> None:
    record, begin, end, out_begin = (int(array[read]) for array in (reads.records, reads.begins, reads.ends, reads.out_begins))
    try:
        read_rows(locations.shard(record), reads.name, begin, end, reads.out[out_begin : out_begin + end - begin])
    except FormatError as error:
        raise _met(error, locations, record) from error


def _met(error: FormatError, locations: Locations, record: int) -> FormatError:
    return FormatError(f"{error} (met in record {locations.ids[record]!r})")


def read_rows(shard: Shard, name: str, begin: int, end: int, out: Array) -> None:
    """Read rows `begin` to `end` of an array into `out`, widened if the stored type is narrower; raise FormatError."""
    if _agrees(shard, name, out):
        width = out.dtype.itemsize * math.prod(out.shape[1:])
        shard.read_into(name, begin * width, out.reshape(-1).view(np.uint8).data)
    else:
        out[:] = shard.read(name, begin, end)


def _agrees(shard: Shard, name: str, out: Array) -> bool:
    """Return True if the stored type is that of `out`, False if it widens to it; raise FormatError for another."""
    stored = shard.array(name)
    if stored.shape[1:] != out.shape[1:]:
        raise FormatError(
            f"{shard.path}, {name} has rows of shape {stored.shape[1:]}; expected {out.shape[1:]} as in the schema"
        )
    if stored.dtype == out.dtype:
        return True
    if not np.can_cast(stored.dtype, out.dtype):
        raise FormatError(f"{shard.path}, {name} is {stored.dtype}; expected {out.dtype} as in the schema")
    return False
