"""OpenFile: a file that is open for reading."""

from __future__ import annotations

import os
from pathlib import Path


class OpenFile:
    """A file descriptor that is closed when the object is dropped. identity: what changes when the file is replaced."""

    def __init__(self, path: Path, flags: int = os.O_RDONLY) -> None:
        self.fd = -1
        self.fd = os.open(path, flags | os.O_CLOEXEC)
        stat = os.fstat(self.fd)
        self.size = stat.st_size
        self.identity: tuple[int, ...] = (stat.st_dev, stat.st_ino, stat.st_mtime_ns)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
