"""Gather: read rows of arrays in many shards into one buffer, with one system call per hundreds of records."""

from __future__ import annotations

import math

import numpy as np

from dali_pipeline.errors import FormatError
from dali_pipeline.format.shard import Shard
from dali_pipeline.reading.records import IndexPart, Locations
from dali_pipeline.storage.cache import FIRST_STAMP
from dali_pipeline.storage.openfile import OpenFile
from dali_pipeline.storage.reads import read_many
from dali_pipeline.types import Array, Ints

MOST_BLOCKS = 64  # of a read that is not looked at block by block


def gather(locations: Locations, name: str, records: Ints, begins: Ints, ends: Ints, out: Array, out_begins: Ints) -> None:
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
    """
    which = locations.which[records]
    for first in range(0, len(locations.parts), locations.files_at_once):
        parts = locations.parts[first : first + locations.files_at_once]
        chosen = np.flatnonzero((first <= which) & (which < first + len(parts)))
        _gather(
            locations,
            parts,
            which[chosen] - first,
            name,
            records[chosen],
            begins[chosen],
            ends[chosen],
            out,
            out_begins[chosen],
        )


def _gather(
    locations: Locations,
    parts: list[IndexPart],
    which: Ints,
    name: str,
    records: Ints,
    begins: Ints,
    ends: Ints,
    out: Array,
    out_begins: Ints,
) -> None:
    width = out.dtype.itemsize * math.prod(out.shape[1:])
    files: list[OpenFile] = []  # kept open until the reads are done
    # (parts, 6): file descriptor, whether the stored type is that of `out`; first byte, size, first block and bytes of a block
    # of the array
    table = np.empty((len(parts), 6), np.int64)
    for number, part in enumerate(parts):
        layout, alike = part.shard.array(name), _agrees(part.shard, name, out)
        files.append(part.shard.opened())
        first_block = part.first_block + layout.first_block
        table[number] = files[-1].fd, alike, layout.begin, layout.nbytes, first_block, layout.block_bytes
    fds, alike, begin, nbytes, block, block_bytes = table[which].T
    starts, stops, sound = begins * width, ends * width, locations.sound
    # as in Shard.read_into: inside the array, and in sound blocks
    direct = (alike > 0) & (starts >= 0) & (starts < stops) & (stops <= nbytes)
    first, last = block + starts // block_bytes, block + (stops - 1) // block_bytes
    cached = any(file.stamps is not None for file in files)
    direct &= last < first + (2 if cached else MOST_BLOCKS)
    direct[direct] = (sound[first[direct]] & sound[last[direct]]) > 0
    for inner in range(1, int((last - first)[direct].max(initial=0))):
        direct[direct] = sound[np.minimum(first + inner, last)[direct]] > 0
    if cached:  # Blocks of a store's cache may be evicted at any time. An unchanged stamp proves that they were not.
        shard_begins = np.array([part.first_block for part in parts])[which]  # first block of each shard
        own_blocks = first - shard_begins, last - shard_begins
        stamps = _stamps(files, which, *own_blocks)
        direct &= (stamps >= FIRST_STAMP).all(axis=0)
    direct_reads = np.flatnonzero(direct)
    sizes, offsets, addresses = (
        (stops - starts)[direct_reads],
        (begin + starts)[direct_reads],
        out.ctypes.data + out_begins[direct_reads] * width,
    )
    fds = fds[direct_reads]
    is_head = np.ones(len(direct_reads), bool)  # False if a read continues the one before, in the file and in memory
    is_head[1:] = (offsets[1:] != (offsets + sizes)[:-1]) | (addresses[1:] != (addresses + sizes)[:-1]) | (fds[1:] != fds[:-1])
    heads = np.flatnonzero(is_head)
    expected = np.add.reduceat(sizes, heads)
    complete = read_many(fds[heads], offsets[heads], addresses[heads], expected) == expected
    direct[direct_reads] = np.repeat(complete, np.diff(np.append(heads, len(direct_reads))))
    if cached:
        direct &= (_stamps(files, which, *own_blocks) == stamps).all(axis=0)
    # The others one by one: to hash a block, to widen, to complete a short read, or to report what is wrong.
    for read in np.flatnonzero(~direct & (starts != stops)).tolist():
        _gather_one(locations, name, int(records[read]), int(begins[read]), int(ends[read]), out, int(out_begins[read]))


def _stamps(files: list[OpenFile], which: Ints, first: Ints, last: Ints) -> Array:
    """Return the stamps of the blocks where each read begins and ends, (2, N); those of a local file never change."""
    stamps = np.full((2, len(which)), FIRST_STAMP, np.uint32)
    for number, file in enumerate(files):
        if file.stamps is not None:
            rows = which == number
            stamps[:, rows] = file.stamps[np.stack([first[rows], last[rows]]).clip(0, len(file.stamps) - 1)]
    return stamps


def _gather_one(locations: Locations, name: str, record: int, begin: int, end: int, out: Array, out_begin: int) -> None:
    try:
        read_rows(locations.shard(record), name, begin, end, out[out_begin : out_begin + end - begin])
    except FormatError as error:
        raise FormatError(f"{error} (met in record {locations.ids[record]!r})") from error


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
