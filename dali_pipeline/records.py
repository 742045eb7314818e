"""RecordIndex: which shard and row a position is, with the labels, ids and offsets of the rows around it."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dali_pipeline.files import Files, Recent
from dali_pipeline.manifest import Dataset
from dali_pipeline.plan import Ints
from dali_pipeline.schema import FormatError, Kind
from dali_pipeline.shard import Shard

INDEX_ROWS = 1024  # records of an index part
LEAST_INDEX_BYTES = 64 << 20
MAX_SHARDS = 1024  # parsed headers kept


@dataclass(frozen=True, kw_only=True, eq=False)
class IndexPart:
    """Labels, ids and offsets of up to INDEX_ROWS consecutive records of a shard."""

    shard: Shard
    labels: Ints
    ids: bytes
    id_offsets: Ints
    offsets: dict[str, Ints]

    def id_of(self, row: int) -> str:
        """The id of a row."""
        try:
            return self.ids[self.id_offsets[row] : self.id_offsets[row + 1]].decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.shard.path}, ids: the bytes of a record's id are not UTF-8 ({error.reason})") from None

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.labels.nbytes + len(self.ids) + self.id_offsets.nbytes + sum(part.nbytes for part in self.offsets.values())


class RecordIndex:
    """The records of one split and kind by position.

    ragged: the arrays whose offsets are read, the first with an entry a record, the others with one a row of the first.
    window_bytes: the index kept is of about its size at most. Several threads may share it. Raises FormatError for damage.
    """

    def __init__(self, data: Dataset, split: str, kind: Kind, ragged: Sequence[str], window_bytes: int) -> None:
        self._data, self._split, self._kind, self._ragged = data, split, kind, ragged
        self._table = data.table(split, kind)
        # a byte a block, 1 once its hash was right; anonymous shared memory, so forked workers tell each other
        self._sound = memoryview(mmap.mmap(-1, max(1, sum(self._table.blocks))))
        self._block_ends = np.cumsum(self._table.blocks)
        self._ends = np.cumsum(self._table.records)  # (shards,) position behind each shard's last record
        self._starts = self._ends - self._table.records
        self._files = Files()
        self._shards: Recent[int, Shard] = Recent(MAX_SHARDS)
        self._parts: Recent[tuple[int, int], IndexPart] = Recent(max(window_bytes, LEAST_INDEX_BYTES))

    def locate(self, positions: Ints) -> list[tuple[IndexPart, int]]:
        """The part that holds each position's record, and the record's row in it."""
        shards = np.searchsorted(self._ends, positions, side="right")
        rows = positions - self._starts[shards]
        return [
            (self._part(shard, row // INDEX_ROWS), row % INDEX_ROWS)
            for shard, row in zip(shards.tolist(), rows.tolist(), strict=True)
        ]

    def _part(self, shard: int, number: int) -> IndexPart:
        part = self._parts.get((shard, number))
        if part is None:
            part = self._read_part(self._shard(shard), number * INDEX_ROWS)
            part = self._parts.put((shard, number), part, part.nbytes)
        return part

    def _shard(self, number: int) -> Shard:
        shard = self._shards.get(number)
        if shard is None:
            end, blocks, records = int(self._block_ends[number]), self._table.blocks[number], self._table.records[number]
            path = self._data.shard_path(self._split, self._kind, number)
            shard = self._table.open(path, number, self._files, self._sound[end - blocks : end])
            if (shard.kind, shard.records) != (self._kind, records):
                raise FormatError(
                    f"{shard.path} has {shard.records} {shard.kind}; expected {records} {self._kind} as in the manifest"
                )
            shard = self._shards.put(number, shard)
        return shard

    def _read_part(self, shard: Shard, first: int) -> IndexPart:
        end = min(first + INDEX_ROWS, shard.records)
        leading, *following = self._ragged
        offsets = {name: shard.read(f"{name}.offsets", first, end + 1) for name in ("ids", leading)}
        begin_row, end_row = int(offsets[leading][0]), int(offsets[leading][-1])
        offsets |= {name: shard.read(f"{name}.offsets", begin_row, end_row + 1) for name in following}
        for name, array in offsets.items():
            if (np.diff(array) < 0).any() or (first == 0 and array[0] != 0):
                raise FormatError(
                    f"{shard.path}, {name}.offsets do not begin with 0 or go backward between records {first} and {end}"
                )
        id_offsets = offsets.pop("ids")
        return IndexPart(
            shard=shard,
            labels=shard.read("labels", first, end),
            ids=shard.read("ids", int(id_offsets[0]), int(id_offsets[-1])).tobytes(),
            id_offsets=id_offsets - id_offsets[0],
            offsets=offsets,
        )
