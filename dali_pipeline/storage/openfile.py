"""OpenFile: a file that is open for reading."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dali_pipeline.errors import FormatError, PipelineError
from dali_pipeline.types import Array

_MAX_HEADER_BYTES = 100 << 20  # limit of the safetensors library


def kind_of(error: OSError) -> type[PipelineError]:
    """Return the error class for a failed read.

    FormatError stands for a file that is gone, or damaged on its disk; it may be left out. PipelineError stands for a failure
    that may pass, such as that of a network file system or of a full table of open files.
    """
    return FormatError if error.errno in (errno.ENOENT, errno.EIO) else PipelineError


class Piece(NamedTuple):
    """A hash block.

    Attributes:
        slot: Its number among the slots of the shard.
        begin: Its first byte in the file.
        nbytes: Its bytes.
        hash: Their XXH3-64.
    """

    slot: int
    begin: int
    nbytes: int
    hash: int


class OpenFile:
    """File descriptor of a shard, closed when the object is dropped.

    Attributes:
        fd: File descriptor.
        path: The file.
        size: Bytes of the file.
        identity: Values that change when the file is replaced.
        stamps: None, because all of the file is local; see CachedFile for a file that is not.
        direct_fd: File descriptor with O_DIRECT, once `direct` has opened one; otherwise -1.
        refuses_direct: Whether its file system does not offer that.
        direct_block: What places and addresses of such reads must be multiples of, as far as is known.
    """

    stamps: Array | None = None
    direct_fd = -1
    refuses_direct = False
    direct_block = 512

    def __init__(self, path: Path | str, flags: int = os.O_RDONLY) -> None:
        self.fd, self.path = -1, path
        self.fd = os.open(path, flags | os.O_CLOEXEC)
        stat = os.fstat(self.fd)
        self.size = stat.st_size
        self.identity: tuple[int, ...] = (stat.st_dev, stat.st_ino, stat.st_mtime_ns)

    def __del__(self) -> None:
        for fd in (self.fd, self.direct_fd):
            if fd >= 0:
                os.close(fd)

    def header(self) -> bytes:
        """Return the 8-byte length and the JSON after it; raise FormatError if the file cannot have them."""
        prefix = os.pread(self.fd, 8, 0)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(self.size - 8, _MAX_HEADER_BYTES):
            raise FormatError(
                f"{self.path}: a header of {length} bytes does not fit a file of {self.size}; not a safetensors file"
            )
        return prefix + os.pread(self.fd, length, 8)

    def prefetch(self, pieces: Sequence[Piece], *, wait: bool = True) -> bool:
        """Make these blocks local; return whether any were not."""
        return False

    def note_need(self, pieces: Sequence[Piece], need: float) -> None:
        """Receive when the plan needs these blocks next."""

    def forget(self, piece: Piece) -> bool:
        """Receive a block whose hash is wrong; return whether it may be read again."""
        return False
