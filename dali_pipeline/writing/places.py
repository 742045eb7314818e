"""Places: where the values of a shard's records lie in files of others, collected record by record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import xxhash

from dali_pipeline.format.references import FILES, HASHES, NUMBERS, PLACES, SIZES
from dali_pipeline.types import BLOCK_BYTES, Array


class Piece(NamedTuple):
    """The values of one record and array, which stay where they are.

    Attributes:
        file: Name of the file, below the folder of files.
        size: Bytes of that file.
        begin: First byte of the values in it.
        data: (bytes,) uint8, the values as they lie there.
    """

    file: str
    size: int
    begin: int
    data: Array


class PlacedRecord(NamedTuple):
    """A record of which some values stay where they are.

    Attributes:
        id: The id.
        group: The group.
        label: The label.
        fields: The further fields that are copied, by name.
        pieces: Values that stay, by array.
        steps: Number of steps.
        values: (T, *row) the sequence as a loader delivers it, in the stored type; for the statistics.
    """

    id: str
    group: str
    label: Any
    fields: Mapping[str, Any]
    pieces: Mapping[str, Piece]
    steps: int
    values: Array

    @property
    def nbytes(self) -> int:
        """Bytes of the values that stay."""
        return sum(piece.data.nbytes for piece in self.pieces.values())


class Places:
    """The places of all records of a shard. Costs the hash of the values, and about 20 bytes per record and array."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._files: dict[str, int] = {}
        self._sizes: list[int] = []
        self._numbers: dict[str, list[int]] = {}
        self._begins: dict[str, list[int]] = {}
        self._hashes: dict[str, list[int]] = {}
        self._bytes: dict[str, int] = {}

    def add(self, pieces: Mapping[str, Piece]) -> None:
        """Add the pieces of one record, and hash them."""
        for name, piece in pieces.items():
            number = self._files.setdefault(piece.file, len(self._files))
            if number == len(self._sizes):
                self._sizes.append(piece.size)
            self._numbers.setdefault(name, []).append(number)
            self._begins.setdefault(name, []).append(piece.begin)
            data, hashes = piece.data.data, self._hashes.setdefault(name, [])
            for begin in range(0, len(data), BLOCK_BYTES):
                hashes.append(xxhash.xxh3_64_intdigest(data[begin : begin + BLOCK_BYTES]))
            self._bytes[name] = self._bytes.get(name, 0) + len(data)
            self.nbytes += len(data)

    def arrays(self) -> dict[str, Array]:
        """Return the arrays that a shard has of them."""
        texts = [name.encode() for name in self._files]
        ends = np.cumsum([0, *map(len, texts)])
        arrays: dict[str, Array] = {
            FILES: np.frombuffer(b"".join(texts), np.uint8),
            f"{FILES}.offsets": ends.astype(np.int64),
            SIZES: np.array(self._sizes, np.int64),
        }
        for name in self._numbers:
            arrays[name + NUMBERS] = np.array(self._numbers[name], np.uint32)
            arrays[name + PLACES] = np.array(self._begins[name], np.int64)
            arrays[name + HASHES] = np.array(self._hashes[name], np.uint64).view(np.int64)
        return arrays

    @property
    def names(self) -> list[str]:
        """Names of the arrays."""
        return list(self._numbers)

    def rows(self, name: str, row_bytes: int) -> int:
        """Return how many rows of `row_bytes` bytes an array has."""
        return self._bytes[name] // row_bytes
