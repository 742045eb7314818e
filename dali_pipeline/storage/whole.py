"""Atomic writes of files, and the locks that keep two writers of one name apart."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dali_pipeline.errors import PipelineError, UsageError


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file atomically, synced to the disk on return."""
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path, *, wait: bool = True) -> Iterator[BinaryIO]:
    """Yield a file that becomes `path` at the end of the block, atomically: temporary name, fsync, rename.

    A second writer of the same `path`, in any process or thread, waits for the first, or raises UsageError if `wait` is False.
    What a killed process leaves is overwritten by the next one. Raises PipelineError if the file cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open_locked(temporary, wait) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except BlockingIOError:
        raise UsageError(f"{path} is being written by another process; wait for it, or name another file") from None
    except OSError as error:
        reason = error.strerror or error
        raise PipelineError(f"{path} could not be written ({reason}); expected free space and permission") from error
    sync_folder(path.parent)


def open_locked(path: Path, wait: bool) -> BinaryIO:
    """Open the file at `path`, created if needed, locked and empty; raise BlockingIOError if locked and not to `wait`."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "wb")
        try:
            lock(file.fileno(), wait)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    file.truncate(0)
                    return file
        except BaseException:
            file.close()
            raise
        file.close()  # another writer's file, renamed or removed meanwhile


def lock(fd: int, wait: bool = False) -> None:
    """Lock an open folder or file until it is closed or the process ends; do nothing on a file system without locks.

    Raises BlockingIOError if another process has the lock and `wait` is False.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        return


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that a rename in it survives a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
