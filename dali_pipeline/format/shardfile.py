"""ShardFile: one shard being written, its values streamed to the disk as they come. docs/format.md has the bytes."""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import xxhash

from dali_pipeline.errors import PipelineError
from dali_pipeline.format.encoding import storage
from dali_pipeline.format.header import DTYPES, METADATA_KEY, VERSION
from dali_pipeline.format.shard import ShardInfo
from dali_pipeline.storage.whole import sync_folder
from dali_pipeline.types import BLOCK_BYTES, Array, Kind

BUFFER_BYTES = 2 << 20  # of values on their way to the disk: within a core's cache
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ROOM_BYTES = 2048  # of a header, beside its hashes
_EXPECTED_BYTES = 16 << 30  # of a shard at most, when room is left for hashes: 256 KiB of it
# lets the disk begin, so that the fsync at the end waits less; a system without it waits
_START_WRITING, _SYNC_FILE_RANGE_WRITE = getattr(ctypes.CDLL(None), "sync_file_range", None), 2


class ShardFile:
    """Writes `path`, whole or not at all: temporary name, fsync, rename.

    The rows of one array, `name`, are appended and go to the disk while they are in the cache: hashed there, and shown to
    `see` (some thousand rows at a time, in order); all other arrays are given to `close`. The header stands before them, in
    room left for it and filled with spaces; `expected_bytes`, of the whole file, says how much. Memory: BUFFER_BYTES. Raises
    PipelineError where the disk is full or the folder cannot be written to.
    """

    def __init__(
        self,
        path: Path,
        kind: Kind,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        *,
        expected_bytes: int,
        see: Callable[[Array], None] | None = None,
    ) -> None:
        self.path, self._kind, self._name, self._see = path, kind, name, see
        row_bytes = storage(dtype).itemsize * math.prod(shape)
        self._dtype, self._buffer = dtype, np.empty((max(1, BUFFER_BYTES // row_bytes), *shape), storage(dtype))
        self._filled = 0
        self._rows = 0  # that are written
        self._hashes: list[str] = []
        self._hash, self._hashed = xxhash.xxh3_64(), 0  # of the block under way, and its bytes so far
        self._room = _ROOM_BYTES + 16 * (min(expected_bytes, _EXPECTED_BYTES) // BLOCK_BYTES + 16)
        self._temporary = path.with_name(path.name + ".tmp")
        self._fd = -1
        try:
            self._fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._failed(error) from error

    def append(self, rows: Array) -> None:
        """Copies rows (N, *shape) behind the others."""
        done = 0
        while done < len(rows):
            taken = rows[done : done + len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            done += len(taken)
            if self._filled == len(self._buffer):
                self._spill()

    def close(self, records: int, arrays: Mapping[str, Array], ids: int = 0) -> ShardInfo:
        """Writes the other arrays and the header; the shard is there, and on the disk, when this returns. ids: for the info."""
        try:
            self._spill()
            if self._hashed:
                self._hashes.append(self._hash.hexdigest())
            at = self._rows * self._buffer[:1].nbytes
            shape = (self._rows, *self._buffer.shape[1:])
            table = {self._name: _entry(self._dtype, shape, 0, at)}
            hashes = {self._name: "".join(self._hashes)}
            wide_first = sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
            aligned = -at % 8
            rest = [("padding", np.zeros(aligned, np.uint8)), *wide_first] if aligned else wide_first
            for name, array in rest:
                data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
                self._write(data, 8 + self._room + at)
                table[name] = _entry(array.dtype.name, array.shape, at, at + len(data))
                hashes[name] = block_hashes(data)
                at += len(data)
            meta = {"kind": self._kind, "records": records, "block_bytes": BLOCK_BYTES, "hashes": hashes, "version": VERSION}
            header = json.dumps({"__metadata__": {METADATA_KEY: _canonical(meta)}, **table}, separators=(",", ":")).encode()
            if len(header) > self._room:
                self._make_room(len(header), at)
            head = self._room.to_bytes(8, "little") + header.ljust(self._room)
            self._write(memoryview(head), 0)
            os.fsync(self._fd)
            self._temporary.replace(self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            self.discard()
            raise self._failed(error) from error
        self._close()
        blocks = sum(len(text) // 16 for text in hashes.values())
        digest = xxhash.xxh3_128_hexdigest(head)
        return ShardInfo(records=records, bytes=8 + self._room + at, blocks=blocks, digest=digest, ids=ids)

    def discard(self) -> None:
        """Takes away what was written."""
        if self._fd >= 0:
            self._temporary.unlink(missing_ok=True)
        self._close()

    def _spill(self) -> None:
        """Hands the buffered rows to the disk, the hash and `see`."""
        rows, self._filled = self._buffer[: self._filled], 0
        if not len(rows):
            return
        data = rows.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(data):
            part = data[done : done + BLOCK_BYTES - self._hashed]
            self._hash.update(part)
            self._hashed += len(part)
            done += len(part)
            if self._hashed == BLOCK_BYTES:
                self._hashes.append(self._hash.hexdigest())
                self._hash.reset()
                self._hashed = 0
        try:
            begin = 8 + self._room + self._rows * self._buffer[:1].nbytes
            self._write(data, begin)
            if _START_WRITING is not None:
                _START_WRITING(self._fd, ctypes.c_int64(begin), ctypes.c_int64(len(data)), _SYNC_FILE_RANGE_WRITE)
        except OSError as error:
            self.discard()
            raise self._failed(error) from error
        self._rows += len(rows)
        if self._see is not None:
            self._see(rows)

    def _write(self, data: memoryview, at: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], at + done)

    def _make_room(self, header_bytes: int, data_bytes: int) -> None:
        """Moves the data back, last bytes first, where names take more room than was left: rare, and slow."""
        room = header_bytes + _ROOM_BYTES
        room += -room % 8
        for begin in reversed(range(0, data_bytes, BUFFER_BYTES)):
            part = os.pread(self._fd, min(BUFFER_BYTES, data_bytes - begin), 8 + self._room + begin)
            self._write(memoryview(part), 8 + room + begin)
        self._room = room

    def _failed(self, error: OSError) -> PipelineError:
        return PipelineError(f"{self.path} could not be written ({error.strerror}); expected a writable folder with free space")

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self._close()


def block_hashes(data: memoryview) -> str:
    """XXH3 of every block of the bytes, 16 hex digits each, one after the other."""
    return "".join(xxhash.xxh3_64_hexdigest(data[at : at + BLOCK_BYTES]) for at in range(0, len(data), BLOCK_BYTES))


def _entry(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> dict[str, object]:
    return {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
