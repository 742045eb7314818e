"""RecordIndex: which shard and row a position is, with the labels, ids and offsets of the rows around it."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dali_pipeline.files import Files, Recent
from dali_pipeline.order import Ints
from dali_pipeline.schema import FormatError
from dali_pipeline.selection import Selection
from dali_pipeline.shard import Shard

INDEX_ROWS = 1024  # records of an index part
LEAST_INDEX_BYTES = 64 << 20
MAX_SHARDS = 1024  # parsed headers kept


@dataclass(frozen=True, kw_only=True, eq=False)
class IndexPart:
    """Labels, ids and offsets of up to INDEX_ROWS consecutive records of a shard.

    labels, id_offsets and rows (of the first ragged array) are lists, as one is asked for at a time; offsets: of every ragged
    array.
    """

    shard: Shard
    labels: list[int]
    ids: bytes
    id_offsets: list[int]
    rows: list[int]
    offsets: dict[str, Ints]

    def id_of(self, row: int) -> str:
        """The id of a row."""
        try:
            return self.ids[self.id_offsets[row] : self.id_offsets[row + 1]].decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.shard.path}, ids: the bytes of a record's id are not UTF-8 ({error.reason})") from None

    @property
    def nbytes(self) -> int:
        """Bytes of memory, about."""
        return 120 * len(self.labels) + len(self.ids) + sum(part.nbytes for part in self.offsets.values())


class RecordIndex:
    """The records of a selection by position.

    ragged: the arrays whose offsets are read, the first with an entry a record, the others with one a row of the first.
    window_bytes: the index kept is of about its size at most. Several threads may share it; a pickled one begins anew, with
    nothing kept. Raises FormatError for damage.
    """

    def __init__(self, selection: Selection, ragged: Sequence[str], window_bytes: int) -> None:
        self._arguments = selection, ragged, window_bytes
        self._selection, self._ragged = selection, ragged
        self._block_ends = [np.cumsum(shards.table.blocks, dtype=np.int64) for shards in selection.shards]
        # a byte a block, 1 once its hash was right; anonymous shared memory, so forked workers tell each other
        self._sound = [memoryview(mmap.mmap(-1, max(1, int(ends[-1]) if len(ends) else 0))) for ends in self._block_ends]
        self._ends = np.cumsum(selection.records)  # (entries,) position behind each entry's last record
        self._starts = self._ends - selection.records
        self._files = Files()
        self._shards: Recent[tuple[int, int], Shard] = Recent(MAX_SHARDS)
        self._parts: Recent[tuple[int, int, int], IndexPart] = Recent(max(window_bytes, LEAST_INDEX_BYTES))

    def __reduce__(self) -> tuple[type[RecordIndex], tuple[Selection, Sequence[str], int]]:
        return RecordIndex, self._arguments

    def locate(self, positions: Ints) -> list[tuple[IndexPart, int]]:
        """The part that holds each position's record, and the record's row in it."""
        entries = np.searchsorted(self._ends, positions, side="right")
        every = self._selection.rows
        rows = positions - self._starts[entries] if every is None else every[positions]
        places = self._selection.table[entries].tolist(), self._selection.number[entries].tolist(), rows.tolist()
        return [
            (self._part(table, number, row // INDEX_ROWS), row % INDEX_ROWS) for table, number, row in zip(*places, strict=True)
        ]

    def _part(self, table: int, number: int, which: int) -> IndexPart:
        part = self._parts.get((table, number, which))
        if part is None:
            part = self._read_part(self._shard(table, number), which * INDEX_ROWS)
            part = self._parts.put((table, number, which), part, part.nbytes)
        return part

    def _shard(self, table: int, number: int) -> Shard:
        shard = self._shards.get((table, number))
        if shard is None:
            shards = self._selection.shards[table]
            end, blocks = int(self._block_ends[table][number]), shards.table.blocks[number]
            shard = shards.open(number, self._files, self._sound[table][end - blocks : end])
            shard = self._shards.put((table, number), shard)
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
            labels=shard.read("labels", first, end).tolist(),
            ids=shard.read("ids", int(id_offsets[0]), int(id_offsets[-1])).tobytes(),
            id_offsets=(id_offsets - id_offsets[0]).tolist(),
            rows=offsets[leading].tolist(),
            offsets=offsets,
        )
