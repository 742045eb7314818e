"""Many reads of files in one system call that holds no interpreter lock (Linux AIO; a `preadv` each elsewhere); reads ahead."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
from collections import deque

import numpy as np

from dali_pipeline.types import Array

READS_AT_ONCE = 256
_ADVISED_BYTES = 128 << 10  # the system takes this much a call at least, and may leave out what is more
_CACHESTAT = 451  # on every architecture
_NUMBERS = {"x86_64": (206, 208, 209), "aarch64": (0, 4, 2)}  # io_setup, io_getevents, io_submit
_IOCB = np.dtype(
    [
        ("data", "u8"), ("key", "u4"), ("flags", "u4"), ("opcode", "u2"), ("priority", "i2"), ("fd", "u4"),
        ("address", "u8"), ("nbytes", "u8"), ("offset", "i8"), ("reserved", "u8"), ("more", "u8"),
    ]
)  # fmt: skip
_EVENT = np.dtype([("data", "u8"), ("iocb", "u8"), ("result", "i8"), ("more", "i8")])
_contexts: deque[ctypes.c_ulong] = deque()  # that no call uses just now; the kernel takes them back with the process
os.register_at_fork(after_in_child=_contexts.clear)  # a child has none of them


def read_many(fds: Array, offsets: Array, addresses: Array, sizes: Array) -> Array:
    """Reads `sizes` (N,) bytes of files at `offsets` to memory at `addresses`; of each the bytes read, below 0 for an error.

    A read may be short at a file's end, or where the system likes; whoever calls reads the rest, and says what is wrong. The
    kernel copies what it has in memory within the one call, while other threads run.
    """
    results = np.empty(len(fds), np.int64)
    for begin in range(0, len(fds), READS_AT_ONCE):
        part = slice(begin, begin + READS_AT_ONCE)
        results[part] = _read_some(fds[part], offsets[part], addresses[part], sizes[part])
    return results


def bring(fd: int, offset: int, nbytes: int) -> bool:
    """Has the system read so many bytes into its cache without waiting; one system call, and False, where they are there."""
    if not hasattr(os, "posix_fadvise") or _is_cached(fd, offset, nbytes):
        return False
    for at in range(offset, offset + nbytes, _ADVISED_BYTES):
        os.posix_fadvise(fd, at, min(_ADVISED_BYTES, offset + nbytes - at), os.POSIX_FADV_WILLNEED)
    return True


def _is_cached(fd: int, offset: int, nbytes: int) -> bool:
    """Whether all of it is, as cachestat tells (Linux 6.5); False where that is not known."""
    asked, found = np.array([offset, nbytes], np.uint64), np.zeros(5, np.uint64)
    failed = _syscall(_CACHESTAT, fd, asked.ctypes.data, found.ctypes.data, 0) if platform.system() == "Linux" else -1
    pages = (offset + nbytes - 1) // mmap.PAGESIZE - offset // mmap.PAGESIZE + 1
    return failed == 0 and int(found[0]) >= pages


def _read_some(fds: Array, offsets: Array, addresses: Array, sizes: Array) -> Array:
    context = _context()
    if context is None:
        return _one_by_one(fds, offsets, addresses, sizes)
    count = len(fds)
    requests = np.zeros(count, _IOCB)  # opcode 0 is IO_CMD_PREAD
    requests["data"] = np.arange(count)
    requests["fd"], requests["offset"], requests["address"], requests["nbytes"] = fds, offsets, addresses, sizes
    pointers = requests.ctypes.data + np.arange(count) * _IOCB.itemsize  # (count,) int64
    events = np.empty(count, _EVENT)
    results = np.full(count, -1, np.int64)
    _, get_events, submit = _NUMBERS[platform.machine()]
    submitted = done = 0
    while submitted < count:
        taken = _syscall(submit, context, count - submitted, pointers.ctypes.data + 8 * submitted)
        if taken <= 0:  # this one cannot be read at all, or the system is short of memory: left at -1
            break
        submitted += taken
    while done < submitted:
        got = _syscall(get_events, context, submitted - done, submitted - done, events[done:].ctypes.data, 0)
        if got < 0 and ctypes.get_errno() != errno.EINTR:  # a sandbox that forbids it, for one
            return results
        done += max(0, got)
    results[events["data"][:done].astype(np.int64)] = events["result"][:done]
    _contexts.append(context)
    return results


def _one_by_one(fds: Array, offsets: Array, addresses: Array, sizes: Array) -> Array:
    results = []
    for fd, offset, address, size in zip(fds.tolist(), offsets.tolist(), addresses.tolist(), sizes.tolist(), strict=True):
        try:
            results.append(os.preadv(fd, [(ctypes.c_char * size).from_address(address)], offset))
        except OSError as error:
            results.append(-(error.errno or 1))
    return np.array(results, np.int64)


def _context() -> ctypes.c_ulong | None:
    """One that is free, or a new one; None where the system has no such calls or grants no more."""
    try:
        return _contexts.popleft()
    except IndexError:
        pass
    numbers = _NUMBERS.get(platform.machine()) if platform.system() == "Linux" else None
    context = ctypes.c_ulong(0)
    if numbers is None or _syscall(numbers[0], READS_AT_ONCE, ctypes.addressof(context)) < 0:
        return None
    return context


def _syscall(number: int, *arguments: ctypes.c_ulong | int) -> int:
    wide = [each if isinstance(each, ctypes.c_ulong) else ctypes.c_ulong(each) for each in arguments]
    return int(_LIBC_SYSCALL(ctypes.c_long(number), *wide))


_LIBC_SYSCALL = ctypes.CDLL(None, use_errno=True).syscall
_LIBC_SYSCALL.restype = ctypes.c_long
