"""Sources: positions in a split to one gathered batch of rows, read straight from the shards."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from dali_pipeline.errors import DataError
from dali_pipeline.format.encoding import all_finite
from dali_pipeline.format.layers import Layers, select
from dali_pipeline.format.schema import Field, Schema
from dali_pipeline.format.shard import Shard
from dali_pipeline.reading.gather import gather
from dali_pipeline.reading.records import Found, RecordIndex
from dali_pipeline.reading.rows import SequenceRows
from dali_pipeline.runtime.memory import Buffers
from dali_pipeline.sampling.order import WINDOW_BYTES
from dali_pipeline.types import Array, Ints, Kind

if TYPE_CHECKING:
    from dali_pipeline.dataset.selection import Selection

Padded: TypeAlias = Literal["batch"] | None


class NotFiniteError(DataError):
    """A record that holds NaN or infinite values, met by who asked for none."""


class BatchSource:
    """What both sources share.

    layers: which steps, or graphs, of each record; the others' bytes are not read · finite: whether to look for values that are
    not, which costs a pass over them. Raises DataError for layers that a record does not have; `gather` raises FormatError for
    damage, NotFiniteError. Several threads may gather.
    """

    kind: Kind
    ragged: tuple[str, ...]
    streamed: tuple[str, ...]  # arrays of values
    axis: str  # what `layers` chooses among, by its name in the manifest

    def __init__(
        self,
        selection: Selection,
        schema: Schema,
        layers: Layers = None,
        window_bytes: int = WINDOW_BYTES,
        *,
        finite: bool = False,
    ) -> None:
        self._selection, self._schema, self._layers, self._finite = selection, schema, layers, finite
        selection.check_cache(window_bytes)
        self._index = RecordIndex(selection, self.ragged, window_bytes)
        self._runs: dict[int, list[tuple[int, int]]] = {}
        self._buffers = Buffers()
        self.cold = True  # whether something lately was not in the page cache, as far as reading ahead has looked
        if rows := selection.bounds(self.axis):
            self._selected(rows[0])  # what the shortest record has, all have

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_runs": {}}  # other threads add to it while it is pickled

    @property
    def num_records(self) -> int:
        """Positions go from 0 to below this."""
        return self._selection.num_records

    def bring(self, start: int, count: int) -> bool:
        """Has the system read the values of so many records from position `start` on, of one shard; whether any was not there.

        Blocks not met before are read here, and hashed. Where records differ in size, about the right bytes are read; of one
        of which most records are not asked for, as in a fold, none. Raises FormatError for damage.
        """
        shard, begin, end = self._index.place(start, count)
        if end - begin > 2 * count:
            return False
        return sum(shard.bring(name, *span) for name, spans in self._wanted(start, count) for span in spans) > 0

    def _wanted(self, start: int, count: int) -> Iterator[tuple[str, Iterable[tuple[int, int]]]]:
        """By array, from which byte to which the values of so many records from position `start` on lie, as far as they are
        read; of one shard."""
        shard, begin, end = self._index.place(start, count)
        for name in self.streamed:
            if name in shard.arrays:
                yield name, self._extents(shard, name, begin, end)

    @property
    def cache_bytes(self) -> int | None:
        """Bytes of the cache that what it reads comes through; None where that lies in folders."""
        return self._selection.cache_bytes

    def wanted(self, start: int, count: int, need: float) -> None:
        """Tells the cache when so many records from position `start` on, of one shard, are asked for next."""
        shard, _, _ = self._index.place(start, count)
        for name, spans in self._wanted(start, count):
            for span in spans:
                shard.wanted(name, *span, need)

    def _extents(self, shard: Shard, name: str, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """From which byte to which the values of records `begin` to `end` lie in an array, as far as they are read."""
        array, records = shard.array(name), max(1, shard.records)
        rows = array.shape[0]
        width, each = array.nbytes // max(1, rows), rows // records
        by_layer = self._schema.sequence.layout if self._schema.sequence is not None and name == "sequence" else None
        if by_layer is not None:
            for step in itertools.chain.from_iterable(range(a, b) for a, b in self._selected(by_layer.steps)):
                yield from ((a * width, b * width) for a, b in by_layer.spans(begin, end, step, rows))
        elif self._layers is None or name != "sequence" or rows % records:
            yield array.nbytes * begin // records, array.nbytes * end // records
        else:
            for record, (a, b) in itertools.product(range(begin, end), self._selected(each)):
                yield (record * each + a) * width, (record * each + b) * width

    def use(self, memory: Buffers) -> None:
        """Takes the rows' memory from there from now on."""
        self._buffers = memory

    def _room(self, name: str, rows: int, field: Field, found: Found, begin: int) -> Array:
        """Memory for so many rows, of which the first is row `begin` of array `name` in the shard of the first record.

        It lies in its cache line as the first row does in the file: where memory stands 1 to 31 bytes beyond the file's place
        in a page, processors that copy by `rep movsb` (AMD Zen 3 and later) take five times as long.
        """
        phase = (found.shard(0).array(name).begin + begin * field.row_bytes) % 64
        if phase % field.storage.itemsize:
            phase = 0
        return self._buffers.take(rows * field.row_bytes, phase).view(field.storage).reshape(rows, *field.shape)

    def _check_finite(self, name: str, field: Field, values: Array, starts: Ints, found: Found, records: Ints) -> None:
        """starts: (n,) where the values of each of these `records` begin."""
        if all_finite(values, field.dtype):
            return
        strange = ~np.isfinite(field.values(values)).reshape(len(values), -1).all(axis=1)
        record = int(records[np.searchsorted(starts, np.argmax(strange), side="right") - 1])
        raise NotFiniteError(
            f"{found.shard(record).path}, {name}: record {found.ids[record]!r} holds NaN or infinite values; "
            "on_nan='skip' leaves such records out, 'keep' delivers them"
        )

    def _selected(self, count: int) -> list[tuple[int, int]]:
        """Runs (begin, end) of the selected ones among `count` steps or graphs, in the order asked for."""
        if self._layers is None:
            return [(0, count)]
        if count not in self._runs:
            self._runs[count] = self._select(count)
        return self._runs[count]

    def _select(self, count: int) -> list[tuple[int, int]]:
        chosen = self._chosen(count)
        cuts = [0, *(at for at in range(1, len(chosen)) if chosen[at] != chosen[at - 1] + 1), len(chosen)]
        return [(chosen[a], chosen[b - 1] + 1) for a, b in itertools.pairwise(cuts)]

    def _chosen(self, count: int) -> list[int]:
        try:
            return select(self._layers, count)
        except DataError as error:
            shards = self._selection.shards[0]
            raise DataError(f"{error} in split {shards.split!r} of {shards.root}") from None


@dataclass(frozen=True, kw_only=True, eq=False)
class Located:
    """Records whose place in the shards is known, and nothing of their values.

    found: where they lie · positions: (N,) in the selection · lengths: (N,) int64 steps of each that are selected.
    """

    found: Found
    positions: Ints
    lengths: Ints

    def cut(self, begin: int, end: int) -> Located:
        """Records `begin` to `end` of these."""
        part = slice(begin, end)
        return Located(found=self.found.cut(begin, end), positions=self.positions[part], lengths=self.lengths[part])


class SequenceSource(BatchSource):
    """Gathers sequences."""

    kind = "sequences"
    ragged = streamed = ("sequence",)
    axis = "step"

    @property
    def row_bytes(self) -> int:
        """Bytes of a step as stored."""
        assert self._schema.sequence is not None
        return self._schema.sequence.row_bytes

    def lengths(self, positions: Ints) -> Ints:
        """Steps of the records (N,), as stored; reads what is to be read of them anyway before their values."""
        found = self._index.locate(positions)
        return found.ends - found.begins

    def locate(self, positions: Ints) -> Located:
        """Look up the records at `positions` (N,), any order, repeats allowed; reads the index alone."""
        found = self._index.locate(positions)
        lengths = found.ends - found.begins
        if self._layers is not None:
            selected = {length: sum(end - begin for begin, end in self._selected(length)) for length in set(lengths.tolist())}
            lengths = np.array([selected[length] for length in lengths.tolist()], np.int64)
        return Located(found=found, positions=positions, lengths=lengths)

    def gather(self, positions: Ints, batch_size: int, padded: Padded) -> SequenceRows:
        """Locate and read the records at `positions` (N,)."""
        return self.read(self.locate(positions), batch_size, padded)

    def read(self, located: Located, batch_size: int, padded: Padded) -> SequenceRows:
        """Read records in batches of `batch_size`.

        padded: each record to the longest of its "batch"; None for no padding. Costs one read a record and run of layers that
        does not go on where the one before ends.
        """
        field = self._schema.sequence
        assert field is not None
        found, lengths, positions = located.found, located.lengths, located.positions
        begins, ends, records = found.begins, found.ends, np.arange(len(positions))
        if self._layers is not None:  # every record several times, once for each run of its layers
            runs = [self._selected(length) for length in (ends - begins).tolist()]
            records = np.repeat(records, [len(each) for each in runs])
            spans = np.array([span for each in runs for span in each], np.int64)  # (reads, 2)
            begins, ends = begins[records] + spans[:, 0], begins[records] + spans[:, 1]
        sizes = lengths  # rows that each record takes in `values`
        if padded is not None:
            sizes = np.repeat(np.maximum.reduceat(lengths, np.arange(0, len(lengths), batch_size)), batch_size)
        starts = np.cumsum(sizes) - sizes
        at = starts[records] + (np.cumsum(ends - begins) - (ends - begins)) - (np.cumsum(lengths) - lengths)[records]
        values = self._room("sequence", int(sizes.sum()), field, found, int(begins[0]))
        for short in np.flatnonzero(lengths < sizes).tolist():
            values[starts[short] + lengths[short] : starts[short] + sizes[short]] = 0
        if field.layout is not None:  # every row is a read of its own
            counts = ends - begins
            into = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
            records, at = np.repeat(records, counts), np.repeat(at, counts) + into
            totals = np.array([part.shard.array("sequence").shape[0] for part in found.parts])[found.which[records]]
            begins = field.layout.stored(np.repeat(begins, counts) + into, totals)
            ends = begins + 1
        gather(found, "sequence", records, begins, ends, values, at)
        if self._finite:
            self._check_finite("sequence", field, values, starts, found, np.arange(len(positions)))
        return SequenceRows(
            values=values,
            starts=starts,
            lengths=lengths,
            positions=self._selection.reported_positions(positions),
            labels=found.labels,
            ids=found.ids,
        )
