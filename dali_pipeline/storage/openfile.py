"""OpenFile: a file that is open for reading."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dali_pipeline.errors import FormatError, PipelineError
from dali_pipeline.types import Array

_MAX_HEADER_BYTES = 100 << 20  # as the safetensors library


def kind_of(error: OSError) -> type[PipelineError]:
    """FormatError for what is gone, or damaged on its disk, and may be left out; PipelineError for what may be well a moment
    later, as a file system behind a network, or a full table of open files."""
    return FormatError if error.errno in (errno.ENOENT, errno.EIO) else PipelineError


class Piece(NamedTuple):
    """A hash block: its number among the shard's slots, its first byte in the file, its bytes and their XXH3-64."""

    slot: int
    begin: int
    nbytes: int
    hash: int


class OpenFile:
    """A shard's file descriptor, closed when the object is dropped. identity: what changes when the file is replaced · stamps:
    None, as all of it is here; of a file that comes block by block see CachedFile."""

    stamps: Array | None = None

    def __init__(self, path: Path, flags: int = os.O_RDONLY) -> None:
        self.fd, self.path = -1, path
        self.fd = os.open(path, flags | os.O_CLOEXEC)
        stat = os.fstat(self.fd)
        self.size = stat.st_size
        self.identity: tuple[int, ...] = (stat.st_dev, stat.st_ino, stat.st_mtime_ns)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def header(self) -> bytes:
        """The 8-byte length and the JSON behind it; raises FormatError where they cannot be."""
        prefix = os.pread(self.fd, 8, 0)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(self.size - 8, _MAX_HEADER_BYTES):
            raise FormatError(
                f"{self.path}: a header of {length} bytes does not fit a file of {self.size}; not a safetensors file"
            )
        return prefix + os.pread(self.fd, length, 8)

    def bring(self, pieces: Sequence[Piece], *, wait: bool = True) -> bool:
        """Has these blocks here; whether one was not."""
        return False

    def wanted(self, pieces: Sequence[Piece], need: float) -> None:
        """Told when the plan asks for these blocks next."""

    def forget(self, piece: Piece) -> bool:
        """Told of a block whose hash is wrong; whether it may come anew."""
        return False
