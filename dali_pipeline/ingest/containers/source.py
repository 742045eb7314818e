"""Source: the bytes of a file, read in part; those of a .gz file are unpacked first, within a bound."""

from __future__ import annotations

import gzip
import io
import math
import mmap
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple, cast

import numpy as np

from dali_pipeline.errors import FormatError
from dali_pipeline.ingest.containers.leaf import BFLOAT16, from_bfloat16, row_range
from dali_pipeline.ingest.readers.storedzip import Bytes
from dali_pipeline.ingest.readers.tensors import Tensor
from dali_pipeline.storage.openfile import kind_of
from dali_pipeline.storage.reads import prefetch
from dali_pipeline.types import Array

IN_MEMORY_BYTES = 256 << 20  # a .gz file that unpacks to more goes to a temporary file
MOST_EXPANSION = 200  # a .gz file beyond IN_MEMORY_BYTES may unpack to so many times its size
_CHUNK_BYTES = 1 << 20
_WHOLE_BYTES = 64 << 20  # an array in Fortran order up to this size is read at once, and kept


class Source(Bytes):
    """Bytes of a file, or of memory.

    Args:
        path: The file. If its name ends in .gz, it is unpacked.
        what: Description of what was expected, for messages.
        memory: Bytes to read from instead; `path` is for messages only.

    Raises:
        FormatError: The file cannot be opened or unpacked, or is empty.
    """

    def __init__(self, path: Path, what: str, memory: bytes | None = None) -> None:
        self._memory, self._fd = memory, -1
        self._spilled: IO[bytes] | None = None
        if memory is not None:
            self.path, self.what, self.size = path, what, len(memory)
            return
        super().__init__(path, what)
        self._fd, self.size = self._file.fd, self._file.size
        if stat.S_ISDIR(os.fstat(self._fd).st_mode):
            raise FormatError(f"{path} is a folder; expected {what}")
        if path.name.lower().endswith(".gz"):
            try:
                self._unpack()
            except FormatError:
                self.close()
                raise

    def _unpack(self) -> None:
        """Unpack a .gz file to memory or, if it is large, to a temporary file."""
        most = max(IN_MEMORY_BYTES, MOST_EXPANSION * self.size)
        parts, total = list[bytes](), 0
        try:
            with self.file() as packed, gzip.open(packed) as file:
                while part := file.read(_CHUNK_BYTES):
                    total += len(part)
                    if total > most:
                        raise FormatError(
                            f"{self.path} unpacks to more than {most} bytes; expected at most that, unpack it first"
                        )
                    if total > IN_MEMORY_BYTES and self._spilled is None:
                        self._spilled = TemporaryFile()  # noqa: SIM115 - open as long as the source
                        self._spilled.writelines(parts)
                        parts = []
                    if self._spilled is None:
                        parts.append(part)
                    else:
                        self._spilled.write(part)
        except (OSError, EOFError, zlib.error) as error:
            raise FormatError(f"{self.path} cannot be unpacked ({error}): truncated, or something else") from None
        if not total:
            raise FormatError(f"{self.path} is empty; expected {self.what}")
        del self._file
        self.size = total
        if self._spilled is None:
            self._memory = b"".join(parts)
        else:
            self._spilled.flush()
            self._fd = self._spilled.fileno()

    @property
    def is_plain(self) -> bool:
        """Whether the bytes are those of the file itself, not unpacked."""
        return self._memory is None and self._spilled is None

    def file(self) -> IO[bytes]:
        """Return an open file over all bytes, whose closing leaves the source open."""
        if self._memory is not None:
            return io.BytesIO(self._memory)
        os.lseek(self._fd, 0, os.SEEK_SET)
        return open(self._fd, "rb", closefd=False)

    @contextmanager
    def mapped(self) -> Iterator[bytes | mmap.mmap]:
        """Yield all bytes without reading them into memory."""
        if self._memory is not None:
            yield self._memory
            return
        with mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ) as data:
            yield data

    def check(self, begin: int, nbytes: int) -> None:
        """Raise FormatError if the bytes do not lie in the file."""
        if begin < 0 or nbytes < 0 or begin + nbytes > self.size:
            raise FormatError(f"{self.path} ends at byte {self.size}, within its data: truncated")

    def read(self, begin: int, nbytes: int) -> bytes:
        """Return exactly `nbytes` bytes from byte `begin` on; raise FormatError if the file ends before."""
        self.check(begin, nbytes)
        if self._memory is not None:
            return self._memory[begin : begin + nbytes]
        try:
            data = os.pread(self._fd, nbytes, begin)
        except OSError as error:
            raise kind_of(error)(f"{self.path} cannot be read ({error.strerror})") from error
        return data if len(data) == nbytes else self.array(begin, nbytes).tobytes()

    def array(self, begin: int, nbytes: int) -> Array:
        """Return exactly `nbytes` bytes from byte `begin` on, as uint8; raise FormatError if the file ends before."""
        self.check(begin, nbytes)
        if self._memory is not None:
            return np.frombuffer(self._memory, np.uint8, nbytes, begin)
        data = np.empty(nbytes, np.uint8)
        view, done = memoryview(data.data), 0
        while done < nbytes:
            try:
                count = os.preadv(self._fd, [view[done:]], begin + done)
            except OSError as error:
                raise kind_of(error)(f"{self.path} cannot be read ({error.strerror})") from error
            if not count:
                raise FormatError(f"{self.path} ends at byte {begin + done}, within its data: truncated")
            done += count
        return data

    def read_ahead(self, begin: int, nbytes: int) -> None:
        """Start reading bytes that are needed soon; bytes behind the end are none."""
        nbytes = min(nbytes, self.size - begin)
        if self.is_plain and nbytes > 0:
            prefetch(self._fd, begin, nbytes)

    def close(self) -> None:
        """Close the file."""
        self._memory, self._fd = b"", -1
        if self._spilled is not None:
            self._spilled.close()
        elif hasattr(self, "_file"):
            del self._file


class Extent(NamedTuple):
    """Where an array lies in a file in one piece, as it lies in memory: little-endian, in C order, not packed.

    Attributes:
        begin: Its first byte in the file.
        shape: Its shape.
        dtype: NumPy's name, or "bfloat16".
    """

    begin: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * (2 if self.dtype == BFLOAT16 else np.dtype(self.dtype).itemsize)


class Stored:
    """An array that lies in one piece in a source.

    Args:
        source: The bytes.
        key: Key of the array, for messages.
        begin: Its first byte.
        shape: Its shape.
        dtype: dtype of its elements, or "bfloat16".
        fortran: Whether its first axis is the one that varies fastest.
    """

    __slots__ = ("_begin", "_dtype", "_fortran", "_key", "_shape", "_source", "_whole")

    def __init__(
        self, source: Source, key: str, begin: int, shape: tuple[int, ...], dtype: np.dtype[Any] | str, fortran: bool = False
    ) -> None:
        self._source, self._key, self._begin, self._shape = source, key, begin, shape
        self._dtype, self._fortran = dtype, fortran and len(shape) > 1
        self._whole: Array | None = None

    @property
    def extent(self) -> Extent | None:
        """Where the array lies in the file; None if it is unpacked first, in Fortran order or big-endian."""
        dtype = self._dtype if isinstance(self._dtype, str) else self._dtype.name
        swapped = not isinstance(self._dtype, str) and not self._dtype.isnative
        if self._fortran or swapped or not self._source.is_plain:
            return None
        return Extent(self._begin, self._shape, dtype)

    def rows(self, begin: int = 0, end: int | None = None) -> Array:
        """Return rows of the array, in native byte order; bfloat16 as float32."""
        begin, end = row_range(self._source.path, self._key, self._shape, begin, end)
        bfloat16 = isinstance(self._dtype, str)
        dtype = np.dtype(np.uint16) if isinstance(self._dtype, str) else self._dtype
        if self._fortran:
            rows = self._by_column(begin, end, dtype)
        else:
            shape = (end - begin, *self._shape[1:]) if self._shape else ()
            row_bytes = dtype.itemsize
            for size in self._shape[1:]:
                row_bytes *= size
            first, count = (begin, end - begin) if self._shape else (0, 1)
            rows = self._source.array(self._begin + first * row_bytes, count * row_bytes).view(dtype).reshape(shape)
        if bfloat16:
            return from_bfloat16(rows)
        return rows if dtype.isnative else rows.astype(dtype.newbyteorder("="))

    def _by_column(self, begin: int, end: int, dtype: np.dtype[Any]) -> Array:
        """Return rows of an array in Fortran order: from the whole of a small one, column by column of a large one."""
        strides = tuple(int(stride) for stride in np.cumprod((1, *self._shape[:-1])))
        tensor = Tensor(cast(Any, self._source), dtype.str, self._shape, strides, self._begin, dtype.itemsize)
        if self._whole is None and tensor.span * dtype.itemsize <= _WHOLE_BYTES:
            self._whole = tensor.read()
        rows = tensor.rows(begin, end).read() if self._whole is None else self._whole[begin:end]
        return np.ascontiguousarray(rows)


def dtype_named(name: str) -> np.dtype[Any] | str | None:
    """Return the dtype that a text such as "torch.float16", "<f4" or "bfloat16" names; None for an unknown one."""
    plain = name.removeprefix("torch.").removeprefix("numpy.").removeprefix("np.").removeprefix("jnp.")
    if plain == BFLOAT16:
        return BFLOAT16
    plain = {"half": "float16", "float": "float32", "double": "float64", "long": "int64", "int": "int32"}.get(plain, plain)
    try:
        dtype = np.dtype(plain)
    except (TypeError, ValueError, SyntaxError):
        return None
    return dtype if dtype.kind in "biuf" and dtype.itemsize <= 8 else None
