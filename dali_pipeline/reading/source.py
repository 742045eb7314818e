"""Sources: read the rows of one batch, given as positions in a split, straight from the shards."""

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
from dali_pipeline.reading.records import Locations, RecordIndex
from dali_pipeline.reading.rows import SequenceRows
from dali_pipeline.runtime.memory import Buffers
from dali_pipeline.sampling.order import WINDOW_BYTES
from dali_pipeline.types import Array, Ints, Kind

if TYPE_CHECKING:
    from dali_pipeline.dataset.selection import Selection

Padded: TypeAlias = Literal["batch"] | None


class NotFiniteError(DataError):
    """Error for a record with NaN or infinite values, if the caller asked for none."""


class BatchSource:
    """Common part of both sources. Several threads may gather.

    `gather` raises FormatError for damage, and NotFiniteError.

    Args:
        selection: Records that positions refer to.
        schema: Fields of the data set.
        layers: Steps, or graphs, of each record to read; the bytes of others are not read. Default: all.
        window_bytes: Bytes that are shuffled together at a time.
        finite: Whether to check that values are finite, which costs a pass over them. Default: False.

    Raises:
        DataError: A record does not have these layers.
    """

    kind: Kind
    ragged: tuple[str, ...]
    streamed: tuple[str, ...]  # arrays of values
    axis: str  # axis that `layers` chooses from, by its name in the manifest

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
        self._layer_spans: dict[int, list[tuple[int, int]]] = {}
        self._buffers = Buffers()
        self.cold = True  # whether something was recently not in the page cache, as far as read-ahead has checked
        if rows := selection.bounds(self.axis):
            self._selected(rows[0])  # layers that the shortest record has, all records have

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layer_spans": {}}  # without a cache that other threads may be changing

    @property
    def num_records(self) -> int:
        """Number of records; positions are below it."""
        return self._selection.num_records

    def prefetch(self, start: int, count: int) -> bool:
        """Prefetch the values of `count` records of one shard, from position `start` on; return whether any were absent.

        Blocks never read before are read here and hashed. If records differ in size, approximately the right bytes are read. If
        most records of a range are not selected, as in a fold, none are. Raises FormatError for damage.
        """
        shard, begin, end = self._index.span_of(start, count)
        if end - begin > 2 * count:
            return False
        return sum(shard.prefetch(name, *span) for name, spans in self._value_spans(start, count) for span in spans) > 0

    def _value_spans(self, start: int, count: int) -> Iterator[tuple[str, Iterable[tuple[int, int]]]]:
        """Yield per array the spans of bytes with the values, as far as read, of `count` records of one shard."""
        shard, begin, end = self._index.span_of(start, count)
        for name in self.streamed:
            if name in shard.arrays:
                yield name, self._extents(shard, name, begin, end)

    @property
    def cache_bytes(self) -> int | None:
        """Bytes of the cache that shards are read through; None if all lie in folders."""
        return self._selection.cache_bytes

    def note_need(self, start: int, count: int, need: float) -> None:
        """Tell the cache when `count` records of one shard, from position `start` on, are needed next."""
        shard, _, _ = self._index.span_of(start, count)
        for name, spans in self._value_spans(start, count):
            for span in spans:
                shard.note_need(name, *span, need)

    def _extents(self, shard: Shard, name: str, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the spans of bytes of an array with the values of records `begin` to `end`, as far as they are read."""
        array, records = shard.array(name), max(1, shard.records)
        rows = array.shape[0]
        width, record_rows = array.nbytes // max(1, rows), rows // records
        by_layer = self._schema.sequence.layout if self._schema.sequence is not None and name == "sequence" else None
        if by_layer is not None:
            for step in itertools.chain.from_iterable(range(first, last) for first, last in self._selected(by_layer.steps)):
                yield from ((first * width, last * width) for first, last in by_layer.spans(begin, end, step, rows))
        elif self._layers is None or name != "sequence" or rows % records:
            yield array.nbytes * begin // records, array.nbytes * end // records
        else:
            for record, (first, last) in itertools.product(range(begin, end), self._selected(record_rows)):
                yield (record * record_rows + first) * width, (record * record_rows + last) * width

    def use(self, memory: Buffers) -> None:
        """Take the memory of rows from these buffers from now on."""
        self._buffers = memory

    def _allocate(self, name: str, rows: int, field: Field, locations: Locations, begin: int) -> Array:
        """Return memory for `rows` rows; the first is row `begin` of array `name` in the shard of the first record.

        It has the same offset in its cache line as the first row in the file. If memory is 1 to 31 bytes beyond the file's
        offset in a page, processors that copy by `rep movsb` (AMD Zen 3 and later) take five times as long.
        """
        phase = (locations.shard(0).array(name).begin + begin * field.row_bytes) % 64
        if phase % field.storage.itemsize:
            phase = 0
        return self._buffers.take(rows * field.row_bytes, phase).view(field.storage).reshape(rows, *field.shape)

    def _check_finite(self, name: str, field: Field, values: Array, starts: Ints, locations: Locations, records: Ints) -> None:
        """Raise NotFiniteError if a value is not finite; `starts` (n,) are the first rows of these `records`."""
        if all_finite(values, field.dtype):
            return
        not_finite = ~np.isfinite(field.values(values)).reshape(len(values), -1).all(axis=1)
        record = int(records[np.searchsorted(starts, np.argmax(not_finite), side="right") - 1])
        raise NotFiniteError(
            f"{locations.shard(record).path}, {name}: record {locations.ids[record]!r} holds NaN or infinite values; "
            "on_nan='skip' leaves such records out, 'keep' delivers them"
        )

    def _selected(self, count: int) -> list[tuple[int, int]]:
        """Return spans (begin, end) of the selected layers among `count` steps or graphs, in the order asked for."""
        if self._layers is None:
            return [(0, count)]
        if count not in self._layer_spans:
            self._layer_spans[count] = self._select(count)
        return self._layer_spans[count]

    def _select(self, count: int) -> list[tuple[int, int]]:
        chosen = self._chosen(count)
        cuts = [0, *(index for index in range(1, len(chosen)) if chosen[index] != chosen[index - 1] + 1), len(chosen)]
        return [(chosen[begin], chosen[end - 1] + 1) for begin, end in itertools.pairwise(cuts)]

    def _chosen(self, count: int) -> list[int]:
        try:
            return select(self._layers, count)
        except DataError as error:
            shards = self._selection.shards[0]
            raise DataError(f"{error} in split {shards.split!r} of {shards.root}") from None


@dataclass(frozen=True, kw_only=True, eq=False)
class Located:
    """Records whose locations in the shards are known, but not their values.

    Attributes:
        locations: Locations of the records.
        positions: (N,) in the selection.
        lengths: (N,) int64, selected steps of each.
    """

    locations: Locations
    positions: Ints
    lengths: Ints

    def cut(self, begin: int, end: int) -> Located:
        """Return records `begin` to `end`."""
        part = slice(begin, end)
        return Located(locations=self.locations.cut(begin, end), positions=self.positions[part], lengths=self.lengths[part])


class SequenceSource(BatchSource):
    """Gather sequences."""

    kind = "sequences"
    ragged = streamed = ("sequence",)
    axis = "step"

    @property
    def row_bytes(self) -> int:
        """Bytes of a step as stored."""
        assert self._schema.sequence is not None
        return self._schema.sequence.row_bytes

    def lengths(self, positions: Ints) -> Ints:
        """Return the steps of the records (N,), as stored; reads only what reading their values needs anyway."""
        locations = self._index.locate(positions)
        return locations.ends - locations.begins

    def locate(self, positions: Ints) -> Located:
        """Look up the records at `positions` (N,), any order, repeats allowed; reads the index alone."""
        locations = self._index.locate(positions)
        lengths = locations.ends - locations.begins
        if self._layers is not None:
            selected = {length: sum(end - begin for begin, end in self._selected(length)) for length in set(lengths.tolist())}
            lengths = np.array([selected[length] for length in lengths.tolist()], np.int64)
        return Located(locations=locations, positions=positions, lengths=lengths)

    def gather(self, positions: Ints, batch_size: int, padded: Padded) -> SequenceRows:
        """Locate and read the records at `positions` (N,)."""
        return self.read(self.locate(positions), batch_size, padded)

    def read(self, located: Located, batch_size: int, padded: Padded) -> SequenceRows:
        """Read records in batches of `batch_size`.

        Costs one read per record and span of layers that does not continue the one before.

        Args:
            located: The records.
            batch_size: Records per batch.
            padded: "batch" pads each record to the longest of its batch; None does not pad.
        """
        field = self._schema.sequence
        assert field is not None
        locations, lengths, positions = located.locations, located.lengths, located.positions
        begins, ends, records = locations.begins, locations.ends, np.arange(len(positions))
        if self._layers is not None:  # every record once per span of its layers
            layer_spans = [self._selected(length) for length in (ends - begins).tolist()]
            records = np.repeat(records, [len(record_spans) for record_spans in layer_spans])
            spans = np.array([span for record_spans in layer_spans for span in record_spans], np.int64)  # (reads, 2)
            begins, ends = begins[records] + spans[:, 0], begins[records] + spans[:, 1]
        sizes = lengths  # rows that each record takes in `values`
        if padded is not None:
            sizes = np.repeat(np.maximum.reduceat(lengths, np.arange(0, len(lengths), batch_size)), batch_size)
        starts = np.cumsum(sizes) - sizes
        out_begins = starts[records] + (np.cumsum(ends - begins) - (ends - begins)) - (np.cumsum(lengths) - lengths)[records]
        values = self._allocate("sequence", int(sizes.sum()), field, locations, int(begins[0]))
        for record in np.flatnonzero(lengths < sizes).tolist():
            values[starts[record] + lengths[record] : starts[record] + sizes[record]] = 0
        if field.layout is not None:  # every row is one read
            counts = ends - begins
            offsets = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
            records, out_begins = np.repeat(records, counts), np.repeat(out_begins, counts) + offsets
            totals = np.array([part.shard.array("sequence").shape[0] for part in locations.parts])[locations.which[records]]
            begins = field.layout.stored(np.repeat(begins, counts) + offsets, totals)
            ends = begins + 1
        gather(locations, "sequence", records, begins, ends, values, out_begins)
        if self._finite:
            self._check_finite("sequence", field, values, starts, locations, np.arange(len(positions)))
        return SequenceRows(
            values=values,
            starts=starts,
            lengths=lengths,
            positions=self._selection.reported_positions(positions),
            labels=locations.labels,
            ids=locations.ids,
        )
