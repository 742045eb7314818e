"""StoredZip: where the members of an uncompressed zip lie, so that parts of them can be read. `.pt` and `.npz` are such."""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path
from typing import IO

from dali_pipeline.errors import FormatError
from dali_pipeline.storage.openfile import OpenFile


class Bytes:
    """A file, read at any place. Raises FormatError where it cannot be opened, is empty, or ends too early."""

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what
        try:
            self._file = OpenFile(path)
        except OSError as error:
            raise FormatError(f"{path} cannot be opened ({error.strerror})") from error
        if not self._file.size:
            raise FormatError(f"{path} is empty; expected {what}")

    def read(self, at: int, nbytes: int) -> bytes:
        """Exactly the bytes asked for."""
        data = os.pread(self._file.fd, nbytes, at)
        while len(data) < nbytes:
            more = os.pread(self._file.fd, nbytes - len(data), at + len(data))
            if not more:
                raise FormatError(f"{self.path} ends at byte {at + len(data)}, within its data: truncated")
            data += more
        return data


class StoredZip:
    """Where the members of a zip lie. None of its bytes but the directory are read before a member is asked for.

    compressed: whether some member is, so that none can be read in part. Raises FormatError for what is no zip.
    """

    def __init__(self, source: Bytes, file: IO[bytes]) -> None:
        self._source = source
        try:
            members = zipfile.ZipFile(file).infolist()
        except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError, RuntimeError) as error:
            raise FormatError(
                f"{source.path} cannot be read as {source.what} ({error}): truncated, or something else"
            ) from None
        self.compressed = any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in members)
        self._headers = {member.filename: (member.header_offset, member.file_size) for member in members}

    @property
    def names(self) -> list[str]:
        """Of all members."""
        return list(self._headers)

    def place(self, name: str) -> tuple[int, int]:
        """First byte, length. Content lies behind a header of its own, whose two last lengths the directory does not know."""
        header, nbytes = self._headers[name]
        name_bytes, extra_bytes = struct.unpack("<HH", self._source.read(header + 26, 4))
        return header + 30 + name_bytes + extra_bytes, nbytes

    def read(self, name: str) -> bytes:
        """All bytes of a member."""
        return self._source.read(*self.place(name))
