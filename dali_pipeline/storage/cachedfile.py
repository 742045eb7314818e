"""CachedFile: a shard in a store as a local file with the blocks that were asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import xxhash

from dali_pipeline.errors import FormatError
from dali_pipeline.storage.cache import ABSENT, COMING, FIRST_STAMP, SLOT, Cache, locked_slots, map_slots, punch
from dali_pipeline.storage.openfile import OpenFile, Piece
from dali_pipeline.storage.stores import GoneError, Store

REQUEST_BYTES = 4 << 20  # neighbouring blocks per request: at 100 MB/s and 20 ms per request, half as long again
ARRIVALS = 4  # downloads of a block with a wrong hash before it counts as damaged in the store
WRONG = "restore the file in the store or convert again"


@dataclass(frozen=True)
class RemotePath:
    """Place of an object in a store, like the `Path` of a file.

    Attributes:
        store: The store.
        cache: Cache of its blocks.
        key: Name below the store's URL.
        digest: Header digest of a shard, by its manifest.
        nbytes: Size of a shard, by its manifest.
        blocks: Hash blocks of a shard, by its manifest.
    """

    store: Store
    cache: Cache
    key: str = ""
    digest: str = ""
    nbytes: int = 0
    blocks: int = 0

    def __truediv__(self, name: str) -> RemotePath:
        return replace(self, key=f"{self.key}/{name}" if self.key else name)

    def __str__(self) -> str:
        return f"{self.store}/{self.key}" if self.key else str(self.store)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return str(self).rpartition("/")[2]

    def resolve(self) -> RemotePath:
        """Return the path itself."""
        return self


Place: TypeAlias = Path | RemotePath


class CachedFile(OpenFile):
    """Local file of a shard in a store.

    Attributes:
        fd: File descriptor.
        size: Bytes of the shard.
        identity: Values that change when the file is replaced.
        stamps: (blocks,) stamps, shared by all processes. A block whose stamp is 2 or more, and the same after a read, was
            present during the read.
    """

    def __init__(self, place: RemotePath) -> None:
        self._place, self._cache = place, place.cache
        self._local = self._cache.file(place.digest, place.nbytes, place.blocks)
        super().__init__(self._local, os.O_RDWR)
        self.size, self.identity = place.nbytes, self.identity[:2]
        self._slots = map_slots(self._local)
        self._stamps, self._needs = self._slots["stamp"], self._slots["need"]
        self.stamps = self._stamps[1:]

    def header(self) -> bytes:
        """Return the 8-byte length and the JSON after it; raise FormatError unless their digest is the manifest's."""
        if (data := self._header_here()) is not None:
            return data
        with locked_slots(self._local, 0, 1):
            if (data := self._header_here()) is not None:  # another process was first
                return data
            data = self._read_header()
            kept = len(data) if self._stamps[0] == ABSENT else 0
            self._cache.reserve(kept)
            self._write(data, 0)
            self._slots[0] = np.array((FIRST_STAMP, len(data), 0, 0.0), SLOT)
        return data

    def _header_here(self) -> bytes | None:
        if self._stamps[0] < FIRST_STAMP:
            return None
        data = os.pread(self.fd, int(self._slots["nbytes"][0]), 0)
        return data if xxhash.xxh3_128_hexdigest(data) == self._place.digest else None

    def _read_header(self) -> bytes:
        guess = min(self.size, 4096 + 17 * self._place.blocks)
        for _ in range(ARRIVALS):
            data = self._read(0, guess)
            length = 8 + int.from_bytes(data[:8], "little")
            if length <= self.size:
                data = data[:length] + (self._read(guess, length) if length > guess else b"")
                if xxhash.xxh3_128_hexdigest(data) == self._place.digest:
                    return data
        raise FormatError(f"{self._place}: the header does not have the digest that the manifest names; {WRONG}")

    def _read(self, begin: int, end: int) -> bytes:
        try:
            return self._place.store.read(self._place.key, begin, end)
        except GoneError as error:
            raise FormatError(f"{error}; the manifest names it: restore it or convert again") from None

    def _write(self, data: bytes | memoryview, begin: int) -> None:
        view, done = memoryview(data), 0
        try:
            while done < len(view):
                done += os.pwrite(self.fd, view[done:], begin + done)
        except OSError as error:
            raise self._cache.write_error(error) from None

    def prefetch(self, pieces: Sequence[Piece], *, wait: bool = True) -> bool:
        """Download blocks that are absent, in the order of the file; return whether any were.

        Args:
            pieces: The blocks.
            wait: Whether to wait for blocks that another process is downloading. Reading ahead does not wait.

        Raises:
            FormatError: A block is damaged in the store.
            DataError: The store or the cache's disk fails.
        """
        missing = self._missing(pieces)
        for request in _requests(missing):
            if not self._download_locked(request, wait) and len(request) > 1:
                for piece in request:
                    self._download_locked([piece], wait)
        return bool(missing)

    def _download_locked(self, request: Sequence[Piece], wait: bool) -> bool:
        """Download neighbouring blocks; return whether their locks were free."""
        with locked_slots(self._local, request[0].slot, len(request), wait=wait) as locked:
            for missing in _requests(self._missing(request)) if locked else ():
                self._download(missing)
        return locked

    def note_need(self, pieces: Sequence[Piece], need: float) -> None:
        """Record when the plan needs these blocks next."""
        self._needs[[piece.slot for piece in pieces]] = need

    def forget(self, piece: Piece) -> bool:
        """Drop a block whose bytes are wrong, so that it is downloaded again; return True."""
        with locked_slots(self._local, piece.slot, 1):
            if self._stamps[piece.slot] >= FIRST_STAMP:
                self._stamps[piece.slot] = ABSENT
                self._cache.release(piece.nbytes)
        return True

    def _missing(self, pieces: Sequence[Piece]) -> list[Piece]:
        return [piece for piece in pieces if self._stamps[piece.slot] < FIRST_STAMP]

    def _download(self, request: Sequence[Piece]) -> None:
        """Request neighbouring blocks, whose slots this thread has locked, at once."""
        begin, end = request[0].begin, request[-1].begin + request[-1].nbytes
        slots = [piece.slot for piece in request]
        self._cache.reserve(end - begin)
        try:
            self._slots["begin"][slots] = [piece.begin for piece in request]
            self._slots["nbytes"][slots] = [piece.nbytes for piece in request]
            self._stamps[slots] = COMING
            data = memoryview(self._read(begin, end))
            for piece in request:
                part = data[piece.begin - begin : piece.begin - begin + piece.nbytes]
                self._write(self._checked(piece, part), piece.begin)
            self._stamps[slots] = self._cache.stamps(len(slots))
        except BaseException:
            self._stamps[slots] = ABSENT
            punch(self.fd, begin, end - begin)
            self._cache.release(end - begin)
            raise

    def _checked(self, piece: Piece, data: bytes | memoryview) -> bytes | memoryview:
        for _ in range(ARRIVALS):
            if xxhash.xxh3_64_intdigest(data) == piece.hash:
                return data
            data = self._read(piece.begin, piece.begin + piece.nbytes)
        raise FormatError(
            f"{self._place}: bytes {piece.begin} to {piece.begin + piece.nbytes} of the file are damaged (wrong hash); {WRONG}"
        )


def _requests(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Group neighbouring blocks into requests of up to REQUEST_BYTES."""
    request: list[Piece] = []
    for piece in pieces:
        if request and (
            (request[-1].slot + 1, request[-1].begin + request[-1].nbytes) != (piece.slot, piece.begin)
            or piece.begin + piece.nbytes - request[0].begin > REQUEST_BYTES
        ):
            yield request
            request = []
        request.append(piece)
    if request:
        yield request
