"""StepSource: read single steps of records, by their positions among all steps that are delivered."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from dali_pipeline.errors import DataError, FormatError
from dali_pipeline.format.digest import EpochDigest, step_hashes
from dali_pipeline.format.layers import Layers, select
from dali_pipeline.format.schema import Schema
from dali_pipeline.format.shard import Shard, hash_texts
from dali_pipeline.reading.records import spread
from dali_pipeline.reading.rows import SequenceRows
from dali_pipeline.reading.source import ALL, Located, Padded, SequenceSource, Wanted
from dali_pipeline.runtime.memory import Buffers
from dali_pipeline.storage.files import Files, Recent
from dali_pipeline.types import Array, Ints

if TYPE_CHECKING:
    from dali_pipeline.dataset.selection import Selection

INDEX_BYTES = 64 << 20  # of the steps of entries that are kept in memory


@dataclass(frozen=True, kw_only=True, eq=False)
class EntrySteps:
    """The delivered steps of one entry of a selection.

    Attributes:
        starts: (records + 1,) number of the first delivered step of each record, counted within the entry.
        steps: (n,) int32, step within its record of each; None if every step of each record is delivered.
    """

    starts: Ints
    steps: Array | None

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.starts.nbytes + (0 if self.steps is None else self.steps.nbytes)


class StepIndex:
    """The steps that a loader delivers. Their positions count them: entry after entry, record after record.

    The number of steps per entry comes from the manifest if it is known there. Otherwise, for chosen steps of records of
    different lengths, for a mask, a fold, or data of format 1, opening reads the offsets of all records once, and the mask.

    Args:
        selection: The records.
        schema: Fields of the data set.
        steps: Steps to deliver of each record, by position. Default: all.
        mask: Name, with its level, of the step field whose steps that are not zero are delivered. Default: none, all are.

    Raises:
        DataError: A record does not have these steps.
        FormatError: A damaged shard, if the index is read.
    """

    def __init__(self, selection: Selection, schema: Schema, steps: Layers = None, mask: str | None = None) -> None:
        self._selection, self._schema, self._chosen, self._mask = selection, schema, steps, mask
        self._files = Files()
        self._entries: Recent[int, EntrySteps] = Recent(INDEX_BYTES)
        self._record_starts = np.cumsum(selection.records) - selection.records
        bounds, per_table = selection.bounds("step"), [shards.table.steps for shards in selection.shards]
        self._every: Ints | None = None  # the steps of each record, if they are the same for all
        if bounds is not None and bounds[0] == bounds[1] and mask is None:
            self._every = self._steps_of(bounds[0])
            self.counts = selection.records * len(self._every)
        elif mask is None and steps is None and selection.rows is None and all(per_table):
            pairs = zip(selection.table.tolist(), selection.number.tolist(), strict=True)
            self.counts = np.array([per_table[table][number] for table, number in pairs], np.int64)
        else:
            self.counts = np.array([int(self._entry(entry).starts[-1]) for entry in range(len(selection.records))], np.int64)
        self._ends = np.cumsum(self.counts)

    @property
    def num_steps(self) -> int:
        """Number of steps that are delivered."""
        return int(self.counts.sum())

    def find(self, positions: Ints) -> tuple[Ints, Ints]:
        """Return the position of the record of each step, (N,), and the step's number within its record, (N,)."""
        if self._every is not None:
            return positions // len(self._every), self._every[positions % len(self._every)]
        records, steps = np.empty_like(positions), np.empty_like(positions)
        entries = np.searchsorted(self._ends, positions, side="right")
        order = np.argsort(entries, kind="stable")
        heads = np.flatnonzero(np.diff(entries[order], prepend=-1))
        for chosen in np.split(order, heads[1:]):
            number = int(entries[chosen[0]])
            entry = self._entry(number)
            inner = positions[chosen] - int(self._ends[number] - self.counts[number])
            record = np.searchsorted(entry.starts, inner, side="right") - 1
            records[chosen] = self._record_starts[number] + record
            steps[chosen] = inner - entry.starts[record] if entry.steps is None else entry.steps[inner]
        return records, steps

    def find_runs(self, runs: Iterable[tuple[int, int]]) -> tuple[Ints, Ints, Ints]:
        """Look up runs of steps (first position, number), each within an entry, at a fraction of the cost of `find`.

        Returns:
            The positions of their records, (n,); how many steps are in each, (n,); their numbers within these, (steps,).
        """
        records, counts, skipped, steps = [], [], [], []
        for start, count in runs:
            number = bisect.bisect_right(self._ends.data, start)
            begin = start - int(self._ends[number] - self.counts[number])  # within the entry
            if self._every is not None:
                first, last = begin // len(self._every), (begin + count - 1) // len(self._every)
                cuts = np.arange(first, last + 2) * len(self._every)
            else:
                entry = self._entry(number)
                first, last = (bisect.bisect_right(entry.starts.data, step) - 1 for step in (begin, begin + count - 1))
                cuts = entry.starts[first : last + 2].copy()
                if entry.steps is not None:
                    steps.append(entry.steps[begin : begin + count])
            skipped.append(np.zeros(len(cuts) - 1, np.int64))
            skipped[-1][0] = begin - cuts[0]
            cuts[0], cuts[-1] = begin, begin + count
            records.append(np.arange(first, last + 1) + self._record_starts[number])
            counts.append(np.diff(cuts))
        of_record = np.concatenate(counts)
        numbers = np.concatenate(steps).astype(np.int64) if steps else spread(np.concatenate(skipped), of_record)
        delivered = of_record > 0
        return (
            np.concatenate(records)[delivered],
            of_record[delivered],
            numbers if self._every is None else self._every[numbers],
        )

    def lengths(self) -> Ints:
        """Return the number of delivered steps of every record, (records,); reads all offsets."""
        if self._every is not None:
            return np.full(self._selection.num_records, len(self._every))
        lengths = [np.diff(self._entry(number).starts) for number in range(len(self._selection.records))]
        return np.concatenate([np.zeros(0, np.int64), *lengths])

    def expected(self) -> EpochDigest:
        """Return the digest of an epoch that delivers every step once; reads the ids and offsets of all records."""
        total = 0
        for number in range(len(self._selection.records)):
            shard, rows = self._open(number)
            texts = shard.texts("ids")
            hashes = hash_texts(texts[row] for row in rows.tolist())
            entry = self._read(shard, rows)
            lengths = np.diff(entry.starts)
            steps = np.arange(int(entry.starts[-1])) - np.repeat(entry.starts[:-1], lengths)
            steps = steps if entry.steps is None else entry.steps
            total += int(step_hashes(np.repeat(hashes, lengths), steps).sum())
        return EpochDigest(records=self.num_steps, total=total % 2**64)

    def _steps_of(self, length: int) -> Ints:
        """Return the chosen steps of a record with `length` steps, each once, ascending."""
        try:
            return np.unique(np.array(select(self._chosen, length), np.int64))
        except DataError as error:
            shards = self._selection.shards[0]
            raise DataError(f"{error} in split {shards.split!r} of {shards.root}") from None

    def _open(self, number: int) -> tuple[Shard, Ints]:
        """Return the shard of an entry, and the rows of its records there."""
        chosen = self._selection
        begin, count = int(self._record_starts[number]), int(chosen.records[number])
        rows = np.arange(count) if chosen.rows is None else chosen.rows[begin : begin + count]
        return chosen.shards[int(chosen.table[number])].open(int(chosen.number[number]), self._files), rows

    def _entry(self, number: int) -> EntrySteps:
        entry = self._entries.get(number)
        if entry is None:
            entry = self._read(*self._open(number))
            entry = self._entries.put(number, entry, entry.nbytes)
        return entry

    def _read(self, shard: Shard, rows: Ints) -> EntrySteps:
        """Read which steps of these records of a shard are delivered."""
        offsets = np.asarray(shard.read("sequence.offsets"), np.int64)
        if (np.diff(offsets) < 0).any() or offsets[0] != 0:
            raise FormatError(f"{shard.path}, sequence.offsets do not begin with 0 or go backward")
        begins, lengths = offsets[rows], offsets[rows + 1] - offsets[rows]
        if self._mask is None and self._chosen is None:
            return EntrySteps(starts=np.append(0, np.cumsum(lengths)), steps=None)
        of_length = {length: self._steps_of(length) for length in set(lengths.tolist())}
        steps = np.concatenate([of_length[length] for length in lengths.tolist()] or [np.zeros(0, np.int64)])
        counts = np.array([len(of_length[length]) for length in lengths.tolist()], np.int64)
        if self._mask is not None:
            owners = np.repeat(np.arange(len(rows)), counts)
            kept = self._schema.step_fields[self._mask].values(shard.read(self._mask))[begins[owners] + steps] != 0
            steps, counts = steps[kept], np.bincount(owners[kept], minlength=len(rows))
        return EntrySteps(starts=np.append(0, np.cumsum(counts)), steps=steps.astype(np.int32))


@dataclass(frozen=True, kw_only=True, eq=False)
class LocatedSteps(Located):
    """Steps of records whose locations are known. `lengths` counts the steps that are read of each record.

    Attributes:
        steps: (sum of lengths,) numbers of these steps within their records.
    """

    steps: Ints

    def cut(self, begin: int, end: int) -> LocatedSteps:
        """Return records `begin` to `end`."""
        part, ends = super().cut(begin, end), np.append(0, np.cumsum(self.lengths))
        steps = self.steps[ends[begin] : ends[end]]
        return LocatedSteps(locations=part.locations, positions=part.positions, lengths=part.lengths, steps=steps)


class StepSource(SequenceSource):
    """Gather single steps, each as a sequence of one step; positions are those of a `StepIndex`.

    Args:
        selection: The records.
        schema: Fields of the data set.
        wanted: What to read of each step. Default: everything.
        index: The steps.
    """

    def __init__(self, selection: Selection, schema: Schema, wanted: Wanted = ALL, *, index: StepIndex) -> None:
        super().__init__(selection, schema, replace(wanted, layers=None))
        self.steps = index

    @property
    def num_records(self) -> int:
        """Number of steps; positions are below it."""
        return self.steps.num_steps

    def locate(self, positions: Ints) -> LocatedSteps:
        """Look up steps (N,), any order, repeats allowed, each as a record of its own."""
        records, steps = self.steps.find(positions)
        locations, ones = self._index.locate(records), np.ones(len(positions), np.int64)
        return LocatedSteps(locations=locations, positions=records, lengths=ones, steps=steps)

    def locate_runs(self, runs: Iterable[tuple[int, int]]) -> LocatedSteps:
        """Look up runs of steps (first position, number), each within an entry; the steps of a record as that record."""
        records, lengths, steps = self.steps.find_runs(runs)
        return LocatedSteps(locations=self._index.locate(records), positions=records, lengths=lengths, steps=steps)

    def read(
        self, located: Located, batches: Ints, padded: Padded, out: Array | None = None, buffers: Buffers | None = None
    ) -> SequenceRows:
        """Read the steps of several batches, as `SequenceSource.read` does."""
        assert isinstance(located, LocatedSteps)
        return replace(super().read(located, batches, padded, out, buffers), steps=located.steps)

    def ids(self, records: Ints) -> list[str]:
        """Return the ids of the records at these positions of the selection, (N,)."""
        unique, inverse = np.unique(records, return_inverse=True)
        ids = self._index.locate(unique).ids
        return [ids[number] for number in inverse.tolist()]

    def prefetch(self, start: int, count: int) -> bool:
        """Prefetch the records of `count` steps of one entry, from position `start` on, as `SequenceSource.prefetch` does."""
        return super().prefetch(*self._records_of(start, count))

    def note_need(self, start: int, count: int, need: float) -> None:
        """Tell the cache when the records of `count` steps of one entry are needed next."""
        super().note_need(*self._records_of(start, count), need)

    def _records_of(self, start: int, count: int) -> tuple[int, int]:
        """Return the position of the first record of some steps, and the number of their records."""
        first, last = self.steps.find(np.array([start, start + count - 1]))[0].tolist()
        return first, last - first + 1

    def _runs(self, located: Located) -> tuple[Ints, Ints, Ints]:
        assert isinstance(located, LocatedSteps)
        lengths, steps = located.lengths, located.steps
        firsts = np.cumsum(lengths) - lengths
        if np.array_equal(steps[firsts + lengths - 1] - steps[firsts] + 1, lengths):  # ascending, so without a gap
            begins = located.locations.begins + steps[firsts]
            return np.arange(len(lengths)), begins, begins + lengths
        owners = np.repeat(np.arange(len(lengths)), lengths)
        head = np.ones(len(steps), bool)
        head[1:] = (owners[1:] != owners[:-1]) | (steps[1:] != steps[:-1] + 1)
        heads = np.flatnonzero(head)
        records = owners[heads]
        begins = located.locations.begins[records] + steps[heads]
        return records, begins, begins + np.diff(heads, append=len(steps))
