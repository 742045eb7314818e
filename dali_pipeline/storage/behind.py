"""WriteBehind: write a file from front to back, around the page cache, while the caller prepares the next bytes."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

_O_DIRECT = getattr(os, "O_DIRECT", 0)
_PAGE = mmap.PAGESIZE  # O_DIRECT asks for multiples of the disk's blocks, which are no larger
# starts writing to the disk early, so that a later fsync waits less; optional
_START_WRITING, _SYNC_FILE_RANGE_WRITE = getattr(ctypes.CDLL(None), "sync_file_range", None), 2


class WriteBehind:
    """Write the bytes of an open file from byte `begin` on, in order.

    The caller fills `free`, then calls `write`. Meanwhile a thread writes the bytes before. They go to the disk without a copy
    in the page cache (O_DIRECT), which costs more time than the disk takes if memory is short; where a file system does not
    offer that, they go through the cache, and the system starts to write them at once.

    Memory: twice `nbytes`.

    Args:
        fd: The file, open for writing. It stays open.
        begin: First byte. Those before may be overwritten with zeros, back to a multiple of the page size, until `finish`.
        nbytes: Size of `free`.
    """

    def __init__(self, fd: int, begin: int, nbytes: int) -> None:
        self._fd, self._nbytes = fd, nbytes
        self._lead = begin % _PAGE  # bytes of a page that is not full yet, at the start of the buffer
        self._begin = begin - self._lead  # place of the buffer in the file
        self._buffer, self._other = (memoryview(mmap.mmap(-1, nbytes + 2 * _PAGE)) for _ in range(2))
        self._direct = False
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    @property
    def free(self) -> memoryview:
        """The next `nbytes` bytes, to be filled. After `write` they must not be changed until the next `write`."""
        return self._buffer[self._lead : self._lead + self._nbytes]

    def write(self, nbytes: int) -> None:
        """Write the first `nbytes` of `free`; raise OSError if these or earlier ones cannot be written."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "write-behind")
            self._direct = bool(_O_DIRECT) and self._switch(_O_DIRECT)
        end = self._lead + nbytes
        full = end - end % _PAGE
        self._wait()
        self._other[: end - full] = self._buffer[full:end]
        self._pending = self._thread.submit(self._write_pages, self._buffer[:full], self._begin)
        self._buffer, self._other = self._other, self._buffer
        self._begin, self._lead = self._begin + full, end - full

    def finish(self, nbytes: int) -> None:
        """Write the first `nbytes` of `free`, the last ones; raise OSError if any cannot be written. Nothing is synced."""
        self._wait()
        self._end_thread()
        if self._direct:
            self._switch(0)
            self._direct = False
        write_at(self._fd, self._buffer[: self._lead + nbytes], self._begin)

    def discard(self) -> None:
        """Wait until nothing is being written, whatever became of it."""
        with suppress(OSError):
            self._wait()
        self._end_thread()

    def _end_thread(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _switch(self, flag: int) -> bool:
        """Turn O_DIRECT on or off; return False if the file system does not have it."""
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~_O_DIRECT | flag)
        except OSError:
            return False
        return True

    def _write_pages(self, data: memoryview, begin: int) -> None:
        if self._direct:
            try:
                write_at(self._fd, data, begin)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:  # larger blocks than pages, or a part of a page was written
                    raise
            self._direct = False
            self._switch(0)
        write_at(self._fd, data, begin)
        if _START_WRITING is not None:
            _START_WRITING(self._fd, ctypes.c_int64(begin), ctypes.c_int64(len(data)), _SYNC_FILE_RANGE_WRITE)


def write_at(fd: int, data: memoryview, begin: int) -> None:
    """Write all bytes at a place in a file; raise OSError if that fails."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], begin + done)
