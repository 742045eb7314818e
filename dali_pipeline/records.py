"""RecordIndex: which shard and row a position is, with the labels, ids and offsets of the rows around it."""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dali_pipeline.manifest import Dataset
from dali_pipeline.plan import Ints
from dali_pipeline.schema import FormatError, Kind
from dali_pipeline.shard import Files, Shard

INDEX_ROWS = 4096
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
        return self.ids[self.id_offsets[row] : self.id_offsets[row + 1]].decode()

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.labels.nbytes + len(self.ids) + self.id_offsets.nbytes + sum(part.nbytes for part in self.offsets.values())


class RecordIndex:
    """The records of one split and kind by position.

    ragged: the arrays whose offsets are read, the first with an entry a record, the others with one a row of the first.
    index_bytes: of labels, ids and offsets kept. Thread-safe; at most 96 files are open. Raises FormatError for damage.
    """

    def __init__(self, data: Dataset, split: str, kind: Kind, ragged: Sequence[str], index_bytes: int) -> None:
        self._data, self._split, self._kind, self._ragged = data, split, kind, ragged
        self._table = data.table(split, kind)
        # a byte a block, 1 once its hash was right; anonymous shared memory, so forked workers tell each other
        self._sound = memoryview(mmap.mmap(-1, max(1, sum(self._table.blocks))))
        self._block_ends = np.cumsum(self._table.blocks)
        self._ends = np.cumsum(self._table.records)  # (shards,) position behind each shard's last record
        self._files = Files()
        self._shards: OrderedDict[int, Shard] = OrderedDict()
        self._indices: OrderedDict[tuple[int, int], IndexPart] = OrderedDict()
        self._index_bytes_left = index_bytes
        self._lock = threading.Lock()

    def locate(self, positions: Ints) -> list[tuple[IndexPart, int]]:
        """The part that holds each position's record, and the record's row in it."""
        shards = np.searchsorted(self._ends, positions, side="right")
        rows = positions - (self._ends - self._table.records)[shards]
        with self._lock:
            return [
                (self._index(shard, row // INDEX_ROWS), row % INDEX_ROWS)
                for shard, row in zip(shards.tolist(), rows.tolist(), strict=True)
            ]

    def _index(self, number: int, chunk: int) -> IndexPart:
        index = self._indices.get((number, chunk))
        if index is not None:
            self._indices.move_to_end((number, chunk))
            return index
        index = self._read_index(self._shard(number), chunk * INDEX_ROWS)
        self._indices[number, chunk] = index
        self._index_bytes_left -= index.nbytes
        while self._index_bytes_left < 0 and len(self._indices) > 1:
            self._index_bytes_left += self._indices.popitem(last=False)[1].nbytes
        return index

    def _shard(self, number: int) -> Shard:
        shard = self._shards.pop(number, None)
        if shard is None:
            block_end, blocks = int(self._block_ends[number]), self._table.blocks[number]
            shard = Shard(
                self._data.shard_path(self._split, self._kind, number),
                nbytes=self._table.bytes[number],
                digest=self._table.digest(number),
                sound=self._sound[block_end - blocks : block_end],
                files=self._files,
            )
            if shard.records != self._table.records[number]:
                raise FormatError(
                    f"{shard.path} has {shard.records} records; expected {self._table.records[number]} as in the manifest"
                )
        self._shards[number] = shard
        if len(self._shards) > MAX_SHARDS:
            self._shards.popitem(last=False)
        return shard

    def _read_index(self, shard: Shard, first: int) -> IndexPart:
        end = min(first + INDEX_ROWS, shard.records)
        id_offsets = shard.read("ids.offsets", first, end + 1)
        leading, *following = self._ragged
        offsets = {leading: shard.read(f"{leading}.offsets", first, end + 1)}
        for name in following:
            offsets[name] = shard.read(f"{name}.offsets", int(offsets[leading][0]), int(offsets[leading][-1]) + 1)
        for name, array in (("ids", id_offsets), *offsets.items()):
            if (np.diff(array) < 0).any():
                raise FormatError(f"{shard.path}, {name}.offsets go backward between records {first} and {end}")
        return IndexPart(
            shard=shard,
            labels=shard.read("labels", first, end),
            ids=shard.read("ids", int(id_offsets[0]), int(id_offsets[-1])).tobytes(),
            id_offsets=id_offsets - id_offsets[0],
            offsets=offsets,
        )
