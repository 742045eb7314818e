"""Cache: a bounded folder with blocks of shards that lie in a store, shared by all processes of a node and by several runs.

Each shard has one sparse file, named by its digest. Its bytes are where the shard has them; after them is one slot per hash
block. The stamp of a slot tells whether the block is present, and changes when the block is evicted: who read between two equal
stamps read the block. Who downloads or evicts a block holds a lock on its slot's number, which the system releases if the
process is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dali_pipeline.errors import DataError, PipelineError, UsageError
from dali_pipeline.runtime.checks import whole

# need: when the plan needs the block next, as epoch plus the fraction of it that is over; needed last is evicted first
SLOT = np.dtype([("stamp", "<u4"), ("nbytes", "<u4"), ("begin", "<u8"), ("need", "<f8")])
ABSENT, COMING, FIRST_STAMP = 0, 1, 2
CACHE_BYTES = 32 << 30
KEPT = 15 / 16  # share of the budget kept by an eviction, so that not every new block needs one
WAIT_SECONDS = 30.0  # for space reserved by downloads in progress
_PUNCH = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
_fallocate: Any = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)


class Cache:
    """Folder of at most `nbytes` bytes; only the count of bytes is in memory.

    Args:
        folder: The folder.
        nbytes: Maximum size in bytes.

    Raises:
        UsageError: The folder cannot be written to, or its file system cannot free parts of a file.
    """

    def __init__(self, folder: Path, nbytes: int) -> None:
        nbytes = whole("cache_bytes", nbytes, 1)
        if _fallocate is None or not hasattr(fcntl, "F_OFD_SETLKW"):
            raise UsageError("a cache of a store needs Linux: locks of parts of files, and files with holes")
        self.folder, self.nbytes = folder, nbytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "ledger").open("ab") as ledger:
                fcntl.flock(ledger, fcntl.LOCK_EX)
                if not os.fstat(ledger.fileno()).st_size:
                    os.posix_fallocate(ledger.fileno(), 0, mmap.PAGESIZE)
                    punch(ledger.fileno(), 0, mmap.PAGESIZE)
                    ledger.write(bytes(16))
        except OSError as error:
            raise UsageError(
                f"{folder} cannot be a cache ({error.strerror}); expected a writable folder on a local disk"
            ) from None
        # bytes in use or reserved, and stamps given out
        self._ledger = np.memmap(folder / "ledger", "<u8", "r+", shape=(2,))

    def __reduce__(self) -> tuple[type[Cache], tuple[Path, int]]:
        return Cache, (self.folder, self.nbytes)

    @property
    def used(self) -> int:
        """Bytes that blocks take or have reserved."""
        return int(self._ledger[0])

    def check_size(self, needed: int, purpose: str) -> None:
        """Raise UsageError if what is in use at one time does not fit."""
        if needed > self.nbytes:
            raise UsageError(f"cache_bytes is {self.nbytes}; {purpose} needs {needed}: give more, or a smaller window_bytes")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # a descriptor of its own: a forked child would share the lock of another
        fd = os.open(self.folder / "ledger", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)  # closing is not enough: a child forked meanwhile has it open too
            os.close(fd)

    def file(self, digest: str, nbytes: int, blocks: int) -> Path:
        """Return the file of a shard; create it, with holes and slots, if it does not exist."""
        path = self.folder / digest[:2] / f"{digest}-{nbytes}"
        if path.exists():
            return path
        begin, tail = slots_begin(nbytes), (1 + blocks) * SLOT.itemsize
        with self._locked():
            if path.exists():
                return path
            temporary = path.with_name(path.name + ".tmp")
            try:
                path.parent.mkdir(exist_ok=True)
                with temporary.open("wb") as file:
                    file.truncate(begin + tail)
                    os.posix_fallocate(file.fileno(), begin, tail)  # memory mapped onto a full disk would kill the process
                temporary.rename(path)
            except OSError as error:
                raise self.write_error(error) from None
            self._ledger[0] += np.uint64(tail)
        return path

    def write_error(self, error: OSError) -> PipelineError:
        """Return the error for a failed write, in words."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DataError(f"the disk of the cache {self.folder} is full; free some space, or give less cache_bytes")
        return DataError(f"the cache {self.folder} cannot be written to ({error.strerror}); expected a writable folder")

    def reserve(self, nbytes: int) -> None:
        """Reserve `nbytes` bytes, and evict the blocks needed last if necessary; raise DataError if there is no space."""
        limit = self.nbytes - self.nbytes // 64  # a file system allocates whole pages, and stores folders
        end = time.monotonic() + WAIT_SECONDS
        while True:
            with self._locked():
                if self.used + nbytes > limit:
                    self._ledger[0] = self._evict(int(self.nbytes * KEPT) - nbytes)
                if self.used + nbytes <= limit:
                    self._ledger[0] += np.uint64(nbytes)
                    return
            if nbytes > limit or time.monotonic() > end:
                raise DataError(
                    f"the cache {self.folder} of {self.nbytes} bytes is too small for what is read at once; give more"
                )
            time.sleep(0.02)

    def release(self, nbytes: int) -> None:
        """Return reserved bytes."""
        with self._locked():
            self._ledger[0] = max(0, self.used - nbytes)

    def stamps(self, count: int) -> npt.NDArray[np.uint32]:
        """Return `count` stamps that no block has had."""
        with self._locked():
            first = int(self._ledger[1])
            self._ledger[1] += np.uint64(count)
        return np.asarray(FIRST_STAMP + (first + np.arange(count)) % (2**32 - FIRST_STAMP), np.uint32)

    def _evict(self, target_bytes: int) -> int:
        """Evict blocks until `target_bytes` bytes are in use, or nothing more can be evicted; return the bytes then in use."""
        used, parts = 0, []
        files: list[tuple[Path, Any]] = []
        for path in self.folder.glob("??/*"):
            if path.suffix == ".tmp":  # left by a killed process: this one holds the lock for creating them
                path.unlink(missing_ok=True)
                continue
            slots = map_slots(path)
            used += slots.nbytes
            for stale in np.flatnonzero(slots["stamp"] == COMING).tolist():
                _evict_block(path, slots, stale, COMING)
            present = np.flatnonzero(slots["stamp"] != ABSENT)
            used += int(slots["nbytes"][present].sum(dtype=np.int64))
            present = present[(slots["stamp"][present] >= FIRST_STAMP) & (present > 0)]  # headers are never evicted
            parts.append(
                np.stack([np.full(len(present), len(files)), present, slots["nbytes"][present], slots["stamp"][present]])
            )
            parts[-1] = np.concatenate([parts[-1], [slots["need"][present]]])
            files.append((path, slots))
        blocks = np.concatenate(parts, axis=1) if parts else np.zeros((5, 0))
        for index in np.lexsort((blocks[3], -blocks[4])).tolist():  # needed last; among equals, downloaded first
            if used <= target_bytes:
                break
            path, slots = files[int(blocks[0, index])]
            if _evict_block(path, slots, int(blocks[1, index]), int(blocks[3, index])):
                used -= int(blocks[2, index])
        return used


def slots_begin(nbytes: int) -> int:
    """Return the position of the slots in the file of a shard with `nbytes` bytes."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def map_slots(path: Path) -> Any:
    """Map the slots of a cached shard into shared memory: (1 + blocks,), the header's slot first."""
    mapped = np.memmap(path, SLOT, "r+", offset=slots_begin(int(path.name.rpartition("-")[2])))
    return np.asarray(mapped)  # an access to a plain array costs a fifth of one to a memmap


@contextlib.contextmanager
def locked_slots(path: Path, first: int, count: int, *, wait: bool = True) -> Iterator[bool]:
    """Lock some slots; yield whether it succeeded. Locks belong to an open file, so threads exclude each other as well."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        request = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, first, count, 0)
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, request)
        except (BlockingIOError, PermissionError):
            yield False
        else:
            try:
                yield True
            finally:  # closing is not enough, as in `_locked`
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi", fcntl.F_UNLCK, os.SEEK_SET, first, count, 0))
    finally:
        os.close(fd)


def _evict_block(path: Path, slots: Any, slot: int, stamp: int) -> bool:
    """Evict a block unless another process has it locked; return whether it was evicted."""
    with locked_slots(path, slot, 1, wait=False) as locked:
        if not locked or slots["stamp"][slot] != stamp:
            return False
        slots["stamp"][slot] = ABSENT  # first, so that nobody reads the hole as the block
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            punch(fd, int(slots["begin"][slot]), int(slots["nbytes"][slot]))
        finally:
            os.close(fd)
    return True


def punch(fd: int, begin: int, nbytes: int) -> None:
    """Free a part of a file, which then reads as zeros."""
    if nbytes and _fallocate(fd, _PUNCH, ctypes.c_long(begin), ctypes.c_long(nbytes)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
