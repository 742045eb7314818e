"""Gather: rows of arrays in many shards into one buffer, a system call for hundreds of records."""

from __future__ import annotations

import math

import numpy as np

from dali_pipeline.errors import FormatError
from dali_pipeline.format.shard import Shard
from dali_pipeline.reading.records import Found, IndexPart
from dali_pipeline.storage.cache import FIRST_STAMP
from dali_pipeline.storage.openfile import OpenFile
from dali_pipeline.storage.reads import read_many
from dali_pipeline.types import BLOCK_BYTES, Array, Ints


def gather(found: Found, name: str, records: Ints, begins: Ints, ends: Ints, out: Array, at: Ints) -> None:
    """Rows begins[i] to ends[i] of array `name`, in the shard of record records[i], to out[at[i]:].

    out: contiguous (R, *row); a shard that stores a narrower type is widened. Blocks that this process has not met are read
    whole and hashed; rows between sound ones are read straight into `out`, neighbours together. Raises FormatError for
    damage, with the id of the first record that met it.
    """
    which = found.which[records]
    for first in range(0, len(found.parts), found.files_at_once):
        parts = found.parts[first : first + found.files_at_once]
        chosen = np.flatnonzero((first <= which) & (which < first + len(parts)))
        _gather(found, parts, which[chosen] - first, name, records[chosen], begins[chosen], ends[chosen], out, at[chosen])


def _gather(
    found: Found, parts: list[IndexPart], which: Ints, name: str, records: Ints, begins: Ints, ends: Ints, out: Array, at: Ints
) -> None:
    width = out.dtype.itemsize * math.prod(out.shape[1:])
    files: list[OpenFile] = []  # held until the reads are done
    # of each part: file descriptor, whether it stores out's type; its array's first byte, size and first block
    table = np.empty((len(parts), 5), np.int64)
    for number, part in enumerate(parts):
        layout, alike = part.shard.array(name), _agrees(part.shard, name, out)
        files.append(part.shard.opened())
        table[number] = files[-1].fd, alike, layout.begin, layout.nbytes, part.first_block + layout.first_block
    fds, alike, begin, nbytes, block = table[which].T
    starts, stops, sound = begins * width, ends * width, found.sound
    # as Shard.read_into has it: inside the array, and in one or two blocks, both sound
    direct = (alike > 0) & (starts >= 0) & (starts < stops) & (stops <= nbytes)
    first, last = block + starts // BLOCK_BYTES, block + (stops - 1) // BLOCK_BYTES
    direct &= last < first + 2
    direct[direct] = (sound[first[direct]] & sound[last[direct]]) > 0
    cached = any(file.stamps is not None for file in files)
    if cached:  # blocks of a store's cache may be let go at any time: a stamp that stayed the same tells that they were not
        own = np.array([part.first_block for part in parts])[which]  # of each shard's blocks, the first
        inner = first - own, last - own
        stamps = _stamps(files, which, *inner)
        direct &= (stamps >= FIRST_STAMP).all(axis=0)
    here = np.flatnonzero(direct)
    sizes, offsets, addresses = (stops - starts)[here], (begin + starts)[here], out.ctypes.data + at[here] * width
    fds = fds[here]
    alone = np.ones(len(here), bool)  # False where a read goes on where the one before ends, in the file and in memory
    alone[1:] = (offsets[1:] != (offsets + sizes)[:-1]) | (addresses[1:] != (addresses + sizes)[:-1]) | (fds[1:] != fds[:-1])
    heads = np.flatnonzero(alone)
    wanted = np.add.reduceat(sizes, heads)
    whole = read_many(fds[heads], offsets[heads], addresses[heads], wanted) == wanted
    direct[here] = np.repeat(whole, np.diff(np.append(heads, len(here))))
    if cached:
        direct &= (_stamps(files, which, *inner) == stamps).all(axis=0)
    # the others one by one: to hash a block, to widen, to end a read that was cut short, or to name what is wrong
    for each in np.flatnonzero(~direct & (starts != stops)).tolist():
        _gather_one(found, name, int(records[each]), int(begins[each]), int(ends[each]), out, int(at[each]))


def _stamps(files: list[OpenFile], which: Ints, first: Ints, last: Ints) -> Array:
    """(2, N) of the blocks where each read begins and ends; those of a local file never change."""
    found = np.full((2, len(which)), FIRST_STAMP, np.uint32)
    for number, file in enumerate(files):
        if file.stamps is not None:
            rows = which == number
            found[:, rows] = file.stamps[np.stack([first[rows], last[rows]]).clip(0, len(file.stamps) - 1)]
    return found


def _gather_one(found: Found, name: str, record: int, begin: int, end: int, out: Array, at: int) -> None:
    try:
        read_rows(found.shard(record), name, begin, end, out[at : at + end - begin])
    except FormatError as error:
        raise FormatError(f"{error} (met in record {found.ids[record]!r})") from error


def read_rows(shard: Shard, name: str, begin: int, end: int, out: Array) -> None:
    """Rows begin to end of an array into `out`, widened where the shard stores a narrower type; raises FormatError."""
    if _agrees(shard, name, out):
        width = out.dtype.itemsize * math.prod(out.shape[1:])
        shard.read_into(name, begin * width, out.reshape(-1).view(np.uint8).data)
    else:
        out[:] = shard.read(name, begin, end)


def _agrees(shard: Shard, name: str, out: Array) -> bool:
    """Whether the shard has the array's very type, or, False, one that widens to it; raises FormatError for another."""
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
