"""Many reads of files per system call, without the interpreter lock (Linux AIO, or `preadv` elsewhere), and read-ahead."""

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
_ADVISED_BYTES = 128 << 10  # the system accepts at least this much per call, and may ignore the rest
_CACHESTAT = 451  # number of the system call on every architecture
_NUMBERS = {"x86_64": (206, 208, 209), "aarch64": (0, 4, 2)}  # io_setup, io_getevents, io_submit
_IOCB = np.dtype(
    [
        ("data", "u8"), ("key", "u4"), ("flags", "u4"), ("opcode", "u2"), ("priority", "i2"), ("fd", "u4"),
        ("address", "u8"), ("nbytes", "u8"), ("offset", "i8"), ("reserved", "u8"), ("more", "u8"),
    ]
)  # fmt: skip
_EVENT = np.dtype([("data", "u8"), ("iocb", "u8"), ("result", "i8"), ("more", "i8")])
_contexts: deque[ctypes.c_ulong] = deque()  # unused at the moment; the kernel frees them with the process
os.register_at_fork(after_in_child=_contexts.clear)  # a forked child inherits none of them


def read_many(fds: Array, offsets: Array, addresses: Array, sizes: Array) -> Array:
    """Read parts of files into memory; return the bytes read per part, below 0 for an error.

    A read may be short at the end of a file, or if the system decides so; the caller reads the rest, and reports what is wrong.
    The kernel copies cached data within the one call, while other threads run.

    Args:
        fds: (N,) file descriptors.
        offsets: (N,) first bytes in the files.
        addresses: (N,) addresses in memory.
        sizes: (N,) bytes to read.
    """
    results = np.empty(len(fds), np.int64)
    for begin in range(0, len(fds), READS_AT_ONCE):
        part = slice(begin, begin + READS_AT_ONCE)
        results[part] = _read_some(fds[part], offsets[part], addresses[part], sizes[part])
    return results


def prefetch(fd: int, offset: int, nbytes: int) -> bool:
    """Start reading bytes into the page cache without waiting. Costs one system call, and returns False, if they are cached."""
    if not hasattr(os, "posix_fadvise") or _is_cached(fd, offset, nbytes):
        return False
    for begin in range(offset, offset + nbytes, _ADVISED_BYTES):
        os.posix_fadvise(fd, begin, min(_ADVISED_BYTES, offset + nbytes - begin), os.POSIX_FADV_WILLNEED)
    return True


def _is_cached(fd: int, offset: int, nbytes: int) -> bool:
    """Return whether all bytes are cached, by cachestat (Linux 6.5); False if unknown."""
    byte_range, page_counts = np.array([offset, nbytes], np.uint64), np.zeros(5, np.uint64)
    failed = (
        _syscall(_CACHESTAT, fd, byte_range.ctypes.data, page_counts.ctypes.data, 0) if platform.system() == "Linux" else -1
    )
    pages = (offset + nbytes - 1) // mmap.PAGESIZE - offset // mmap.PAGESIZE + 1
    return failed == 0 and int(page_counts[0]) >= pages


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
        accepted = _syscall(submit, context, count - submitted, pointers.ctypes.data + 8 * submitted)
        if accepted <= 0:  # the read is impossible, or the system is short of memory: the result stays -1
            break
        submitted += accepted
    while done < submitted:
        count_done = _syscall(get_events, context, submitted - done, submitted - done, events[done:].ctypes.data, 0)
        if count_done < 0 and ctypes.get_errno() != errno.EINTR:  # for example a sandbox that forbids it
            return results
        done += max(0, count_done)
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
    """Return a free context or a new one; None if the system has no such calls or grants no more."""
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
    words = [value if isinstance(value, ctypes.c_ulong) else ctypes.c_ulong(value) for value in arguments]
    return int(_LIBC_SYSCALL(ctypes.c_long(number), *words))


_LIBC_SYSCALL = ctypes.CDLL(None, use_errno=True).syscall
_LIBC_SYSCALL.restype = ctypes.c_long
