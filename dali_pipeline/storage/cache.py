"""Cache: a bounded folder of blocks of shards that lie in a store; all processes of a node share it, and so may several runs.

A shard has one sparse file there, named by its digest: its bytes where the shard has them, and behind them a slot for every
hash block. A slot's stamp tells whether the block is there, and changes when it is let go: who read between two equal stamps
read the block. Who brings a block, or lets it go, holds a lock on its slot's number, which a killed process gives back.
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

# need: when the plan asks for the block next, an epoch and its part; what is needed last goes first
SLOT = np.dtype([("stamp", "<u4"), ("nbytes", "<u4"), ("begin", "<u8"), ("need", "<f8")])
ABSENT, COMING, FIRST_STAMP = 0, 1, 2
CACHE_BYTES = 32 << 30
KEPT = 15 / 16  # of the budget once something had to go, so that not every block makes others go
WAIT_SECONDS = 30.0  # for the room that blocks under way take
_PUNCH = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
_fallocate: Any = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)


class Cache:
    """Up to `nbytes` bytes in `folder`; keeps nothing in memory but the count. Raises UsageError where the folder cannot serve:
    it cannot be written to, or its file system cannot give back parts of a file."""

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
        # bytes in use or promised, and stamps given
        self._ledger = np.memmap(folder / "ledger", "<u8", "r+", shape=(2,))

    def __reduce__(self) -> tuple[type[Cache], tuple[Path, int]]:
        return Cache, (self.folder, self.nbytes)

    @property
    def used(self) -> int:
        """Bytes that blocks take, or are promised."""
        return int(self._ledger[0])

    def check_room(self, needed: int, told: str) -> None:
        """Raises UsageError where what is in use at once does not fit."""
        if needed > self.nbytes:
            raise UsageError(f"cache_bytes is {self.nbytes}; {told} needs {needed}: give more, or a smaller window_bytes")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fd = os.open(self.folder / "ledger", os.O_RDWR | os.O_CLOEXEC)  # its own: a forked child would share another's lock
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)  # closing would not do where a child was forked meanwhile, and has it open too
            os.close(fd)

    def file(self, digest: str, nbytes: int, blocks: int) -> Path:
        """The file of a shard, made where it is not there: holes, and slots."""
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
                raise self.failed(error) from None
            self._ledger[0] += np.uint64(tail)
        return path

    def failed(self, error: OSError) -> PipelineError:
        """In words."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DataError(f"the disk of the cache {self.folder} is full; free some space, or give less cache_bytes")
        return DataError(f"the cache {self.folder} cannot be written to ({error.strerror}); expected a writable folder")

    def reserve(self, nbytes: int) -> None:
        """Makes room for so many bytes, letting go what the plan needs last; raises DataError where there is none."""
        limit = self.nbytes - self.nbytes // 64  # a file system gives out whole pages, and keeps folders
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
        """Gives back what was reserved."""
        with self._locked():
            self._ledger[0] = max(0, self.used - nbytes)

    def stamps(self, count: int) -> npt.NDArray[np.uint32]:
        """So many that no block has had."""
        with self._locked():
            first = int(self._ledger[1])
            self._ledger[1] += np.uint64(count)
        return np.asarray(FIRST_STAMP + (first + np.arange(count)) % (2**32 - FIRST_STAMP), np.uint32)

    def _evict(self, wanted: int) -> int:
        """Lets blocks go until `wanted` bytes are in use, or all that may go are gone; the bytes in use then."""
        used, found = 0, []
        files: list[tuple[Path, Any]] = []
        for path in self.folder.glob("??/*"):
            if path.suffix == ".tmp":  # of a killed process: this one holds the lock that makes them
                path.unlink(missing_ok=True)
                continue
            slots = map_slots(path)
            used += slots.nbytes
            for stale in np.flatnonzero(slots["stamp"] == COMING).tolist():
                _let_go(path, slots, stale, COMING)
            here = np.flatnonzero(slots["stamp"] != ABSENT)
            used += int(slots["nbytes"][here].sum(dtype=np.int64))
            here = here[(slots["stamp"][here] >= FIRST_STAMP) & (here > 0)]  # headers stay
            found.append(np.stack([np.full(len(here), len(files)), here, slots["nbytes"][here], slots["stamp"][here]]))
            found[-1] = np.concatenate([found[-1], [slots["need"][here]]])
            files.append((path, slots))
        every = np.concatenate(found, axis=1) if found else np.zeros((5, 0))
        for at in np.lexsort((every[3], -every[4])).tolist():  # needed last; of those, brought first
            if used <= wanted:
                break
            path, slots = files[int(every[0, at])]
            if _let_go(path, slots, int(every[1, at]), int(every[3, at])):
                used -= int(every[2, at])
        return used


def slots_begin(nbytes: int) -> int:
    """Where the slots of a shard of so many bytes begin in its file."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def map_slots(path: Path) -> Any:
    """The slots of a cached shard, shared memory of all who map them: (1 + blocks,), the header's first."""
    mapped = np.memmap(path, SLOT, "r+", offset=slots_begin(int(path.name.rpartition("-")[2])))
    return np.asarray(mapped)  # a look into a plain array costs a fifth of one into a memmap


@contextlib.contextmanager
def locked_slots(path: Path, first: int, count: int, *, wait: bool = True) -> Iterator[bool]:
    """Holds a lock on these slots; whether it was had. Locks of an open file, so that threads exclude each other too."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        asked = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, first, count, 0)
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, asked)
        except (BlockingIOError, PermissionError):
            yield False
        else:
            try:
                yield True
            finally:  # as above
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi", fcntl.F_UNLCK, os.SEEK_SET, first, count, 0))
    finally:
        os.close(fd)


def _let_go(path: Path, slots: Any, slot: int, stamp: int) -> bool:
    """Frees a block unless somebody has it in hand; whether it did."""
    with locked_slots(path, slot, 1, wait=False) as had:
        if not had or slots["stamp"][slot] != stamp:
            return False
        slots["stamp"][slot] = ABSENT  # first, so that nobody takes the hole for the block
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            punch(fd, int(slots["begin"][slot]), int(slots["nbytes"][slot]))
        finally:
            os.close(fd)
    return True


def punch(fd: int, begin: int, nbytes: int) -> None:
    """Gives a part of a file back to the disk; it reads as zeros."""
    if nbytes and _fallocate(fd, _PUNCH, ctypes.c_long(begin), ctypes.c_long(nbytes)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
