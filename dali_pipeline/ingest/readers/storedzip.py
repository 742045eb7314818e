"""StoredZip: the byte ranges of the members of an uncompressed zip, such as `.pt` and `.npz`, to read parts of them."""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path
from typing import IO

from dali_pipeline.errors import FormatError
from dali_pipeline.storage.openfile import OpenFile


class Bytes:
    """A file with random access; raises FormatError if it cannot be opened, is empty, or ends too early."""

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what
        try:
            self._file = OpenFile(path)
        except OSError as error:
            raise FormatError(f"{path} cannot be opened ({error.strerror})") from error
        if not self._file.size:
            raise FormatError(f"{path} is empty; expected {what}")

    def read(self, begin: int, nbytes: int) -> bytes:
        """Return exactly `nbytes` bytes from byte `begin` on."""
        data = os.pread(self._file.fd, nbytes, begin)
        while len(data) < nbytes:
            more = os.pread(self._file.fd, nbytes - len(data), begin + len(data))
            if not more:
                raise FormatError(f"{self.path} ends at byte {begin + len(data)}, within its data: truncated")
            data += more
        return data


class StoredZip:
    """The directory of a zip. Opening it reads nothing but the directory; raises FormatError for a file that is no zip.

    compressed: whether a member is compressed, so that it cannot be read in part.
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
        """Names of all members."""
        return list(self._headers)

    def place(self, name: str) -> tuple[int, int]:
        """Return the first byte and the length of a member.

        Reads the member's own header, because the directory does not hold the lengths of its last two fields.
        """
        header, nbytes = self._headers[name]
        name_bytes, extra_bytes = struct.unpack("<HH", self._source.read(header + 26, 4))
        return header + 30 + name_bytes + extra_bytes, nbytes

    def read(self, name: str) -> bytes:
        """Return all bytes of a member."""
        return self._source.read(*self.place(name))
