"""Read files past the page cache (O_DIRECT), for data that memory cannot keep.

A page of the cache is allocated, filled, copied, and soon thrown away again: 0.6 to 0.8 s of processor per GB on one machine,
where a read to memory of the reader's own and a copy from there took 0.25, and a read to where the bytes belong 0.07.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dali_pipeline.storage.openfile import OpenFile
from dali_pipeline.storage.reads import read_many
from dali_pipeline.types import Array

log = logging.getLogger("dali_pipeline")
LEAST_BYTES = 256 << 10  # shorter reads cost less through the cache, which reads ahead
_PAGE = mmap.PAGESIZE  # O_DIRECT asks for multiples of the disk's blocks, which are no larger
_STEP_BYTES = 2 << 20
_told: set[str] = set()
_LIBC_PREAD = ctypes.CDLL(None, use_errno=True).pread  # to an address, without an object for each size of read
_LIBC_PREAD.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64]
_LIBC_PREAD.restype = ctypes.c_ssize_t


class _Scratch(threading.local):
    """Memory of one thread that O_DIRECT reads into."""

    def __init__(self) -> None:
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # a forked child has its own
        self.memory = mmap.mmap(-1, _STEP_BYTES + 2 * _PAGE, private)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))


_scratch = _Scratch()


class _Gate:
    """Keeps direct reads and forks apart: before Linux 6.3 a page that is shared with a child while the disk writes to it may
    be copied, and the parent is then left with the copy, without what was read (`man 2 open`, O_DIRECT).
    """

    def __init__(self) -> None:
        self._changed, self._reads = threading.Condition(), 0

    def __enter__(self) -> None:
        with self._changed:
            self._reads += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._reads -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Wait for the reads under way, and let no other begin."""
        self._changed.acquire()
        while self._reads:
            self._changed.wait()

    def open(self) -> None:
        """Let reads begin again."""
        self._changed.release()


_gate = _Gate()
if hasattr(os, "register_at_fork"):  # a child has its own copy of the gate, held by the thread that forked
    os.register_at_fork(before=_gate.close, after_in_parent=_gate.open, after_in_child=_gate.open)


def read_past_cache(files: Sequence[OpenFile], offsets: Array, addresses: Array, sizes: Array) -> Array:
    """Read parts of files into memory, long ones past the page cache; return the bytes read per part, below 0 for an error.

    A part whose place in the file and address are both multiples of the disk's blocks is read straight to its address, any
    other by way of memory of the thread's own, 2 MiB. Where a file system refuses O_DIRECT, parts are read through the cache,
    which is logged once per folder.

    Args:
        files: N files.
        offsets: (N,) first bytes in the files.
        addresses: (N,) addresses in memory.
        sizes: (N,) bytes to read.
    """
    results = np.full(len(files), -1, np.int64)
    through = []
    for number, (file, offset, address, size) in enumerate(
        zip(files, offsets.tolist(), addresses.tolist(), sizes.tolist(), strict=True)
    ):
        done = _read_direct(file, offset, address, size) if size >= LEAST_BYTES else None
        if done is None:
            through.append(number)
        else:
            results[number] = done
    if through:
        fds = np.array([files[number].fd for number in through], np.int64)
        results[through] = read_many(fds, offsets[through], addresses[through], sizes[through])
    return results


def _read_direct(file: OpenFile, offset: int, address: int, size: int) -> int | None:
    """Return the bytes read, below 0 for an error; None if the file cannot be read so."""
    fd = _opened(file)
    if fd is None:
        return None
    done = 0
    while done < size:
        first, target, left = offset + done, address + done, size - done
        block = file.direct_block
        in_place = first % block == 0 and target % block == 0 and left >= block
        if in_place:
            begin, wanted = first, left - left % block
            found, error = _pread(fd, target, wanted, begin)
        else:
            begin, wanted = first - first % _PAGE, min(left, _STEP_BYTES)
            if (first - target) % block == 0 and left >= block:  # the rest can be read in place
                wanted = -first % block
            found, error = _pread(fd, _scratch.address, -(-(first + wanted) // _PAGE) * _PAGE - begin, begin)
        if error:
            if error != errno.EINVAL:
                return -error
            if not in_place or block == _PAGE:  # accepted when it was opened, and refused now: larger blocks than pages
                _refused(file)
                return None
            file.direct_block = _PAGE
            continue
        found = min(begin + found - first, wanted)
        if found <= 0:  # the file ends
            break
        if not in_place:
            ctypes.memmove(target, _scratch.address + (first - begin), found)
        done += found
    return done


def _pread(fd: int, address: int, nbytes: int, offset: int) -> tuple[int, int]:
    """Read to an address; return the bytes read and 0, or below 0 and the error's number."""
    with _gate:
        while True:
            found = _LIBC_PREAD(fd, address, nbytes, offset)
            error = ctypes.get_errno() if found < 0 else 0
            if error != errno.EINTR:
                return found, error


def _opened(file: OpenFile) -> int | None:
    """Return a descriptor of the file with O_DIRECT, opened on first use; None if it cannot have one."""
    if file.direct_fd < 0 and not file.refuses_direct:
        try:
            # the same file, whatever has been put at its path since
            fd = os.open(f"/proc/self/fd/{file.fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except (OSError, AttributeError) as error:
            if getattr(error, "errno", None) not in (errno.EMFILE, errno.ENFILE):
                _refused(file)
            return None
        if file.__dict__.setdefault("direct_fd", fd) != fd:  # another thread was first
            os.close(fd)
    return None if file.refuses_direct else file.direct_fd


def _refused(file: OpenFile) -> None:
    file.refuses_direct = True
    folder = str(Path(file.path).parent)
    if folder not in _told:
        _told.add(folder)
        log.info("%s refuses O_DIRECT; what memory cannot keep is read through the page cache", folder)
