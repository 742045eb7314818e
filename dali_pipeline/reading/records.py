"""RecordIndex: shard and row of a position, with the labels, ids and offsets of the records around it."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dali_pipeline.errors import FormatError
from dali_pipeline.format.encoding import TEXT
from dali_pipeline.format.schema import Field
from dali_pipeline.format.shard import Shard, hash_texts
from dali_pipeline.runtime.workerprocess import SharedBytes
from dali_pipeline.storage.files import Files, Recent
from dali_pipeline.types import Array, Ints

if TYPE_CHECKING:
    from dali_pipeline.dataset.selection import Selection

INDEX_ROWS = 1024  # records of an index part
LEAST_INDEX_BYTES = 64 << 20
MAX_SHARDS = 1024  # parsed headers kept
_UNIT_BYTES = 64 << 10  # of the index of values in other files, which count as one more of them


@dataclass(frozen=True, kw_only=True, eq=False)
class IndexPart:
    """Labels, ids and offsets of up to INDEX_ROWS consecutive records of a shard.

    Attributes:
        shard: The shard.
        first_block: Number of the shard's first block among all blocks of the index.
        table: (n, 3) int64, row in the shard, and where the rows of the first ragged array begin and end.
        labels: (n, *shape) in the stored type, or None.
        ids: (n,) texts, as objects.
        hashes: (n,) uint64, XXH3-64 of each id.
        columns: (n, *shape) values of each short record field, or (n,) texts, as objects.
        step_columns: (rows of the first ragged array, *shape) values of each short step field.
        spans: (rows of the first ragged array, 2 per other ragged array), where its rows begin and end.
    """

    shard: Shard
    first_block: int
    table: Ints
    labels: Array | None
    ids: Array
    hashes: Array
    columns: Mapping[str, Array]
    step_columns: Mapping[str, Array]
    spans: Ints

    @property
    def nbytes(self) -> int:
        """Bytes of memory, approximately."""
        texts = [self.ids, *(column for column in self.columns.values() if column.dtype == object)]
        characters = sum(sum(map(len, column)) for column in texts)
        arrays = [self.spans, self.hashes, *self.columns.values(), *self.step_columns.values()]
        arrays += [] if self.labels is None else [self.labels]
        return 100 * len(self.ids) * len(texts) + characters + sum(array.nbytes for array in arrays)


@dataclass(frozen=True, kw_only=True, eq=False)
class Locations:
    """Locations of N records.

    Attributes:
        parts: Index parts that the records are in.
        which: (N,) number of each record's part in `parts`.
        labels: (N, *shape) in the stored type, or None.
        rows: (N,) int64, row of each record in its shard.
        begins: (N,) int64, first row of each record in the first ragged array.
        ends: (N,) int64, row after its last one.
        ids: N texts.
        hashes: (N,) uint64, XXH3-64 of each id.
        columns: (N, *shape) values of each short record field, or (N,) texts, as objects.
        sound: (blocks,) uint8 of the whole index, 1 once a block's hash was right.
        files_at_once: Number of files that may be open.
    """

    parts: list[IndexPart]
    which: Ints
    labels: Array | None
    rows: Ints
    begins: Ints
    ends: Ints
    ids: list[str]
    hashes: Array
    columns: Mapping[str, Array]
    sound: Array
    files_at_once: int

    def shard(self, record: int) -> Shard:
        """Return the shard of a record."""
        return self.parts[int(self.which[record])].shard

    def step_rows(self, records: Ints, begins: Ints, ends: Ints, out_begins: Ints) -> list[tuple[IndexPart, Ints, Ints]]:
        """Return, per index part, rows of its short step fields and the rows of an output that they go to.

        Args:
            records: (n,) record of each run of steps.
            begins: (n,) first step of each run in its shard.
            ends: (n,) step after the last one.
            out_begins: (n,) row of the output that each run goes to.
        """
        order = np.argsort(self.which[records], kind="stable")
        which, counts = self.which[records][order], (ends - begins)[order]
        first_rows = np.array([part.table[0, 1] for part in self.parts])
        rows, out_rows = spread(begins[order] - first_rows[which], counts), spread(out_begins[order], counts)
        runs = np.searchsorted(which, np.arange(len(self.parts) + 1))
        cuts = np.concatenate([[0], np.cumsum(counts)])[runs].tolist()
        return [
            (part, rows[first:last], out_rows[first:last])
            for part, first, last in zip(self.parts, cuts, cuts[1:], strict=False)
        ]

    def cut(self, begin: int, end: int) -> Locations:
        """Return the locations of records `begin` to `end`."""
        part = slice(begin, end)
        chosen, which = np.unique(self.which[part], return_inverse=True)
        return replace(
            self,
            parts=[self.parts[number] for number in chosen.tolist()],
            which=which,
            labels=None if self.labels is None else self.labels[part],
            rows=self.rows[part],
            begins=self.begins[part],
            ends=self.ends[part],
            ids=self.ids[part],
            hashes=self.hashes[part],
            columns={name: column[part] for name, column in self.columns.items()},
        )


def spread(begins: Ints, counts: Ints) -> Ints:
    """Return the rows from each begin on, `counts` of them, concatenated."""
    ends = np.cumsum(counts)
    rows: Ints = np.repeat(begins - (ends - counts), counts) + np.arange(counts.sum())
    return rows


class RecordIndex:
    """Index of a selection's records by position.

    Several threads may share it. A pickled one has an empty cache; in a worker it keeps the known sound blocks.
    Methods raise FormatError for damage.

    Args:
        selection: The records.
        ragged: Arrays whose offsets are read: the first with one entry per record, the others with one per row of the first.
        window_bytes: Size of the cached index in bytes, at most about this.
        sound: Memory with one byte per block, 1 once its hash was right. Default: new memory.
        columns: Record fields that are read with the ids: texts, and short ones. Default: none.
        step_columns: Step fields that are read with the ids, because their rows are short. Default: none.
        labels: Whether records have labels. Default: True.
    """

    def __init__(
        self,
        selection: Selection,
        ragged: Sequence[str],
        window_bytes: int,
        sound: SharedBytes | None = None,
        columns: Mapping[str, Field] | None = None,
        step_columns: Sequence[str] = (),
        labels: bool = True,
    ) -> None:
        self._selection, self._ragged, self._labels = selection, ragged, labels
        self._columns, self._step_columns = dict(columns or {}), tuple(step_columns)
        self._texts = [name for name, field in self._columns.items() if field.dtype == TEXT]
        # shards, and blocks, are numbered through all tables
        tables = [shards.table for shards in selection.shards]
        self._first_shards = np.cumsum([0, *map(len, tables)]).tolist()
        blocks = [np.asarray(table.blocks, np.int64) for table in tables]
        self._block_ends = np.cumsum(np.concatenate([np.zeros(1, np.int64), *blocks]))
        # one byte per block, 1 once its hash was right; in shared memory, so workers share it
        shared = SharedBytes(max(1, int(self._block_ends[-1]))) if sound is None else sound
        self._arguments = selection, ragged, window_bytes, shared, self._columns, self._step_columns, labels
        self._memory = shared.memory
        self._sound = np.frombuffer(self._memory, np.uint8)
        self._numbers = np.asarray(self._first_shards)[selection.table] + selection.number  # (entries,)
        self._ends = np.cumsum(selection.records)  # (entries,) position after the last record of each entry
        self._starts = self._ends - selection.records
        self._files = Files()
        self._shards: Recent[int, Shard] = Recent(MAX_SHARDS)
        self._parts: Recent[tuple[int, int], IndexPart] = Recent(max(window_bytes, LEAST_INDEX_BYTES))

    def __reduce__(self) -> tuple[type[RecordIndex], tuple[Any, ...]]:
        return RecordIndex, self._arguments

    def locate(self, positions: Ints) -> Locations:
        """Return the locations of the records at `positions` (N,)."""
        entries = np.searchsorted(self._ends, positions, side="right")
        selected_rows = self._selection.rows
        rows = positions - self._starts[entries] if selected_rows is None else selected_rows[positions]
        shard_numbers, part_numbers = self._numbers[entries], rows // INDEX_ROWS
        order = np.lexsort((part_numbers, shard_numbers))  # the records of a part become neighbours
        shard_numbers, part_numbers, rows = shard_numbers[order], part_numbers[order], rows[order] % INDEX_ROWS
        heads = np.flatnonzero(
            np.append(True, (shard_numbers[1:] != shard_numbers[:-1]) | (part_numbers[1:] != part_numbers[:-1]))
        )
        parts = [self._part(*key) for key in zip(shard_numbers[heads].tolist(), part_numbers[heads].tolist(), strict=True)]
        part_rows = [rows[begin:end] for begin, end in itertools.pairwise([*heads.tolist(), len(rows)])]
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        table = np.concatenate([part.table[chosen] for part, chosen in zip(parts, part_rows, strict=True)])[inverse]
        shard_rows, begins, ends = np.ascontiguousarray(table.T)

        def joined(arrays: Iterable[Array]) -> Array:
            taken: Array = np.concatenate([array[chosen] for array, chosen in zip(arrays, part_rows, strict=True)])[inverse]
            return taken

        return Locations(
            parts=parts,
            which=np.repeat(np.arange(len(parts)), [len(chosen) for chosen in part_rows])[inverse],
            labels=joined(part.labels for part in parts if part.labels is not None) if self._labels else None,
            rows=shard_rows,
            begins=begins,
            ends=ends,
            ids=joined(part.ids for part in parts).tolist(),
            hashes=joined(part.hashes for part in parts),
            columns={name: joined(part.columns[name] for part in parts) for name in self._columns},
            sound=self._sound,
            files_at_once=self._files.limit,
        )

    def span_of(self, position: int, count: int) -> tuple[Shard, int, int]:
        """Return the shard of `count` records of one entry, their first row, and the row after their last."""
        entry = int(np.searchsorted(self._ends, position, side="right"))
        selected_rows = self._selection.rows
        first, last = position - int(self._starts[entry]), position + count - 1 - int(self._starts[entry])
        if selected_rows is not None:
            first, last = int(selected_rows[position]), int(selected_rows[position + count - 1])
        return self._shard(int(self._numbers[entry])), first, last + 1

    def parts(self) -> Iterator[IndexPart]:
        """Yield the index parts of a whole split, in order."""
        for number, records in zip(self._numbers.tolist(), self._selection.records.tolist(), strict=True):
            yield from (self._part(number, which) for which in range(-(-records // INDEX_ROWS)))

    def _part(self, number: int, which: int) -> IndexPart:
        part = self._parts.get((number, which))
        if part is None:
            part = self._read_part(number, which * INDEX_ROWS)
            part = self._parts.put((number, which), part, part.nbytes)
        return part

    def _shard(self, number: int) -> Shard:
        shard = self._shards.get(number)
        if shard is None:
            table = bisect.bisect_right(self._first_shards, number) - 1
            sound = memoryview(self._memory)[self._block_ends[number] : self._block_ends[number + 1]]
            shard = self._selection.shards[table].open(number - self._first_shards[table], self._files, sound)
            shard = self._shards.put(number, shard, 1 + shard.index_bytes // _UNIT_BYTES)
        return shard

    def _read_part(self, number: int, first: int) -> IndexPart:
        shard = self._shard(number)
        end = min(first + INDEX_ROWS, shard.records)
        leading, *following = self._ragged
        offsets = {name: shard.read(f"{name}.offsets", first, end + 1) for name in ("ids", *self._texts, leading)}
        begin_row, end_row = int(offsets[leading][0]), int(offsets[leading][-1])
        offsets |= {name: shard.read(f"{name}.offsets", begin_row, end_row + 1) for name in following}
        for name, array in offsets.items():
            if (np.diff(array) < 0).any() or (first == 0 and array[0] != 0):
                raise FormatError(
                    f"{shard.path}, {name}.offsets do not begin with 0 or go backward between records {first} and {end}"
                )
        texts: dict[str, Array] = {}
        for name in ("ids", *self._texts):
            cuts = offsets.pop(name)
            data = shard.read(name, int(cuts[0]), int(cuts[-1])).tobytes()
            bounds = (cuts - cuts[0]).tolist()
            texts[name] = np.array(_texts(shard, name, data, bounds), object)
            if name == "ids":
                hashes = hash_texts(data[begin:stop] for begin, stop in itertools.pairwise(bounds))
        rows = offsets.pop(leading)
        return IndexPart(
            shard=shard,
            first_block=int(self._block_ends[number]),
            table=np.stack([np.arange(first, end), rows[:-1], rows[1:]], axis=1, dtype=np.int64),
            labels=shard.read("labels", first, end) if self._labels else None,
            ids=texts.pop("ids"),
            hashes=hashes,
            columns={name: texts[name] if name in texts else shard.read(name, first, end) for name in self._columns},
            step_columns={name: shard.read(name, begin_row, end_row) for name in self._step_columns},
            spans=np.stack([bound for array in offsets.values() for bound in (array[:-1], array[1:])] or [cuts[:0]], axis=1),
        )


def _texts(shard: Shard, name: str, texts: bytes, cuts: list[int]) -> list[str]:
    try:
        if texts.isascii():
            decoded = texts.decode()
            return [decoded[begin:end] for begin, end in itertools.pairwise(cuts)]
        return [texts[begin:end].decode() for begin, end in itertools.pairwise(cuts)]
    except UnicodeDecodeError as error:
        what = "id" if name == "ids" else "text"
        raise FormatError(f"{shard.path}, {name}: the bytes of a record's {what} are not UTF-8 ({error.reason})") from None
