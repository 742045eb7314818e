"""ShardFile: one shard being written, its values streamed to the disk. docs/format.md specifies the bytes."""

from __future__ import annotations

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
from dali_pipeline.format.references import HASHES
from dali_pipeline.format.shard import ShardInfo
from dali_pipeline.runtime.memory import PAGE_BYTES
from dali_pipeline.storage.behind import WriteBehind, write_at
from dali_pipeline.storage.whole import sync_folder
from dali_pipeline.types import BLOCK_BYTES, Array, Kind

BUFFER_BYTES = 2 << 20  # values not yet written: fits in a core's cache
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_BYTES = 2048  # reserved for a header, without its hashes
_EXPECTED_BYTES = 16 << 30  # largest shard for whose hashes space is reserved: 256 KiB


class ShardFile:
    """Write a shard atomically: temporary name, fsync, rename.

    The rows of one array, `name`, are appended, and hashed and written while they are in the processor's cache. All other
    arrays are given to `close`. The header stands at the start of the file, in space reserved for it and filled up with blanks.
    Memory: twice BUFFER_BYTES.

    Args:
        path: The shard.
        kind: Kind of its records.
        name: Array that is streamed; None if it lies in files of others.
        dtype: Its stored type.
        shape: Shape of one row.
        expected_bytes: Expected size of the file, from which the space for the header is computed.
        on_rows: Called with the streamed rows, some thousand at a time, in order. Default: None.

    Raises:
        PipelineError: The disk is full, or the folder cannot be written to.
    """

    def __init__(
        self,
        path: Path,
        kind: Kind,
        name: str | None,
        dtype: str,
        shape: tuple[int, ...],
        *,
        expected_bytes: int,
        on_rows: Callable[[Array], None] | None = None,
    ) -> None:
        self.path, self._kind, self._name, self._on_rows = path, kind, name, on_rows
        self._dtype, self._row_shape, self._row_bytes = dtype, shape, storage(dtype).itemsize * math.prod(shape)
        self._rows = 0  # rows written
        self._hashes: list[str] = []
        self._hash, self._hashed = xxhash.xxh3_64(), 0  # hash of the current block, and its bytes so far
        # what the header and its length fill; the streamed rows behind them can be read past the page cache (O_DIRECT)
        self._page = 8 if name is None else PAGE_BYTES
        self._header_bytes = self._filling(_HEADER_BYTES + 16 * (min(expected_bytes, _EXPECTED_BYTES) // BLOCK_BYTES + 16))
        self._temporary = path.with_name(path.name + ".tmp")
        self._fd = -1
        self._rows_at_once = max(1, BUFFER_BYTES // self._row_bytes)
        try:
            fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            self._behind = WriteBehind(fd, 8 + self._header_bytes, self._rows_at_once * self._row_bytes)
        except OSError as error:
            raise self._failed(error) from error
        self._fd = fd
        self._buffer, self._filled = self._next_buffer(), 0

    def append(self, rows: Array) -> None:
        """Append a copy of rows (N, *shape)."""
        done = 0
        while done < len(rows):
            taken = rows[done : done + len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            done += len(taken)
            if self._filled == len(self._buffer):
                self._spill()

    def close(
        self,
        records: int,
        arrays: Mapping[str, Array],
        ids: int = 0,
        referenced: Mapping[str, tuple[str, tuple[int, ...]]] | None = None,
    ) -> ShardInfo:
        """Write the other arrays and the header; the shard exists, synced to the disk, on return.

        Args:
            records: Number of records.
            arrays: The arrays that were not streamed.
            ids: Sum of the hashes of the ids, for the info.
            referenced: Stored type and shape of each array that lies in files of others.
        """
        try:
            self._take_rows(self._buffer[: self._filled])
            self._behind.finish(self._filled * self._row_bytes)
            if self._hashed:
                self._hashes.append(self._hash.hexdigest())
            array_end = self._rows * self._row_bytes
            shape = (self._rows, *self._row_shape)
            table, hashes = dict[str, object](), dict[str, str]()
            if self._name is not None:
                table[self._name] = _entry(self._dtype, shape, 0, array_end)
                hashes[self._name] = "".join(self._hashes)
            wide_first = sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
            padding_bytes = -array_end % 8
            remaining = [("padding", np.zeros(padding_bytes, np.uint8)), *wide_first] if padding_bytes else wide_first
            for name, array in remaining:
                data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
                write_at(self._fd, data, 8 + self._header_bytes + array_end)
                table[name] = _entry(array.dtype.name, array.shape, array_end, array_end + len(data))
                hashes[name] = block_hashes(data)
                array_end += len(data)
            meta: dict[str, object] = {"kind": self._kind, "records": records, "block_bytes": BLOCK_BYTES}
            meta |= {"hashes": hashes, "version": VERSION}
            if referenced:
                meta["referenced"] = {name: [_NAMES[dtype], list(shape)] for name, (dtype, shape) in referenced.items()}
            header = json.dumps({"__metadata__": {METADATA_KEY: _canonical(meta)}, **table}, separators=(",", ":")).encode()
            if len(header) > self._header_bytes:
                self._enlarge_header(len(header), array_end)
            head = self._header_bytes.to_bytes(8, "little") + header.ljust(self._header_bytes)
            write_at(self._fd, memoryview(head), 0)
            os.fsync(self._fd)
            self._temporary.replace(self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            self.discard()
            raise self._failed(error) from error
        self._close()
        blocks = sum(len(text) // 16 for text in hashes.values())
        blocks += sum(len(arrays[name + HASHES]) for name in referenced or {})
        digest = xxhash.xxh3_128_hexdigest(head)
        return ShardInfo(
            records=records, bytes=8 + self._header_bytes + array_end, blocks=blocks, digest=digest, ids=ids, steps=self._rows
        )

    def discard(self) -> None:
        """Remove what was written."""
        if self._fd >= 0:
            self._temporary.unlink(missing_ok=True)
        self._close()

    def _spill(self) -> None:
        """Write the full buffer to the disk, the hash and `on_rows`."""
        rows = self._buffer
        try:
            self._behind.write(rows.nbytes)
        except OSError as error:
            self.discard()
            raise self._failed(error) from error
        self._take_rows(rows)
        self._buffer, self._filled = self._next_buffer(), 0

    def _take_rows(self, rows: Array) -> None:
        """Count and hash rows, and hand them to `on_rows`."""
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
        self._rows += len(rows)
        if self._on_rows is not None:
            self._on_rows(rows)

    def _next_buffer(self) -> Array:
        return np.frombuffer(self._behind.free, storage(self._dtype)).reshape(self._rows_at_once, *self._row_shape)

    def _enlarge_header(self, header_bytes: int, data_bytes: int) -> None:
        """Move the data back, last bytes first, if the header is larger than the reserved space; rare and slow."""
        enlarged_bytes = self._filling(header_bytes + _HEADER_BYTES)
        for begin in reversed(range(0, data_bytes, BUFFER_BYTES)):
            data = os.pread(self._fd, min(BUFFER_BYTES, data_bytes - begin), 8 + self._header_bytes + begin)
            write_at(self._fd, memoryview(data), 8 + enlarged_bytes + begin)
        self._header_bytes = enlarged_bytes

    def _filling(self, header_bytes: int) -> int:
        """Return the size of a header of at least so many bytes that fills whole pages together with its length."""
        return header_bytes + -(header_bytes + 8) % self._page

    def _failed(self, error: OSError) -> PipelineError:
        return PipelineError(f"{self.path} could not be written ({error.strerror}); expected a writable folder with free space")

    def _close(self) -> None:
        if self._fd >= 0:
            self._behind.discard()  # its thread must not write to whatever gets this number next
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self._close()


def block_hashes(data: memoryview) -> str:
    """Return the XXH3 of every block of the bytes, 16 hexadecimal digits each, joined."""
    return "".join(xxhash.xxh3_64_hexdigest(data[begin : begin + BLOCK_BYTES]) for begin in range(0, len(data), BLOCK_BYTES))


def _entry(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> dict[str, object]:
    return {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
