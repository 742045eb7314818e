"""Sources: read the rows of one batch, given as positions in a split, straight from the shards."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec
import numpy as np

from dali_pipeline.errors import DataError
from dali_pipeline.format.encoding import TEXT, all_finite, encode
from dali_pipeline.format.layers import Layers, select
from dali_pipeline.format.schema import Field, Schema
from dali_pipeline.format.shard import Shard
from dali_pipeline.reading.gather import gather
from dali_pipeline.reading.records import Locations, RecordIndex, spread
from dali_pipeline.reading.rows import FieldRows, SequenceRows
from dali_pipeline.runtime.memory import PAGE_BYTES, Buffers
from dali_pipeline.sampling.order import WINDOW_BYTES
from dali_pipeline.types import Array, Ints, Kind

if TYPE_CHECKING:
    from dali_pipeline.dataset.selection import Selection

Padded: TypeAlias = Literal["batch", "packed"] | None

SHORT_ROW_BYTES = 64  # of a further field: such rows are read with the index, many records at once


class NotFiniteError(DataError):
    """Error for a record with NaN or infinite values, if the caller asked for none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Wanted:
    """What is read of each record, and how.

    Attributes:
        layers: Steps, or graphs, of each record to read; the bytes of others are not read. Default: all.
        row_layers: Numbers of the layers to read, if an axis of a sequence's rows is named layer. Default: all.
        fields: Names, without their level, of the further fields to read; no byte of others is read. Default: all.
        window_bytes: Bytes that are shuffled together at a time.
        finite: Whether to check that values are finite, which costs a pass over them. Default: False.
    """

    layers: Layers = None
    row_layers: Sequence[int] | None = None
    fields: Collection[str] | None = None
    window_bytes: int = WINDOW_BYTES
    finite: bool = False


ALL = Wanted()


class BatchSource:
    """Common part of both sources. Several threads may gather.

    `gather` raises FormatError for damage, and NotFiniteError.

    Args:
        selection: Records that positions refer to.
        schema: Fields of the data set.
        wanted: What to read of each record. Default: everything.

    Raises:
        DataError: A record does not have these layers.
    """

    kind: Kind
    ragged: tuple[str, ...]
    streamed: tuple[str, ...]  # arrays of values
    axis: str  # axis that `layers` chooses from, by its name in the manifest

    def __init__(self, selection: Selection, schema: Schema, wanted: Wanted = ALL) -> None:
        self._selection, self._schema = selection, schema
        self._layers, self._finite, window_bytes, fields = wanted.layers, wanted.finite, wanted.window_bytes, wanted.fields
        selection.check_cache(window_bytes)
        self.record_fields = chosen_fields(schema.record_fields, fields)
        self.step_fields = chosen_fields(schema.step_fields, fields) if self.kind == "sequences" else {}
        # read with the index: their rows are short, and lie in the shards everywhere
        elsewhere = {name for shards in selection.shards for name in shards.referenced}
        fields_read = {**self.record_fields, **self.step_fields}
        self._short = {
            name for name, field in fields_read.items() if field.row_bytes <= SHORT_ROW_BYTES and name not in elsewhere
        }
        self._index = RecordIndex(
            selection,
            self.ragged,
            window_bytes,
            columns={name: field for name, field in self.record_fields.items() if name in self._short},
            step_columns=[name for name in self.step_fields if name in self._short],
            labels=schema.labels.dtype is not None,
        )
        self._layer_spans: dict[int, list[tuple[int, int]]] = {}
        self._buffers = Buffers()
        self.past_cache = False  # whether pieces of a window are read past the page cache, which cannot keep the data
        self.cold = True  # whether something was recently not in the page cache, as far as read-ahead has checked
        if rows := selection.bounds(self.axis):
            self._selected(rows[0])  # layers that the shortest record has, all records have

    @property
    def in_place(self) -> bool:
        """Whether any values lie in files of others."""
        return any(shards.referenced for shards in self._selection.shards)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layer_spans": {}}  # without a cache that other threads may be changing

    @abstractmethod
    def sizes(self, positions: Ints) -> Ints:
        """Return what a budget counts of each record, (N, 2) int64; reads only what reading their values needs anyway."""

    def name(self, position: int) -> str:
        """Return the record at a position in words, for errors."""
        locations = self._index.locate(np.array([position]))
        return f"{locations.shard(0).path}: record {locations.ids[0]!r}"

    def record_columns(self, count: int) -> dict[str, Array]:
        """Return empty columns for the record fields of `count` records, by the names after their dots; texts as objects."""
        return {
            name.partition(".")[2]: np.empty((count, *field.shape), object if field.dtype == TEXT else field.storage)
            for name, field in self.record_fields.items()
        }

    def reported_positions(self, positions: Ints) -> Ints:
        """Return what a batch reports as the positions of these records."""
        return self._selection.reported_positions(positions)

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

    def _read_record_fields(self, locations: Locations) -> dict[str, FieldRows]:
        """Read the record fields of N records, by the names after their dots: (N, *shape), or N texts."""
        read: dict[str, FieldRows] = {}
        for name, field in self.record_fields.items():
            short = name.partition(".")[2]
            if field.dtype == TEXT:
                read[short] = locations.columns[name].tolist()
                continue
            records = np.arange(len(locations.rows))
            if name in locations.columns:
                out = locations.columns[name]
            else:
                out = np.empty((len(records), *field.shape), field.storage)
                gather(locations, name, records, locations.rows, locations.rows + 1, out, records)
            if self._finite:
                self._check_finite(name, field, out, records, locations, records)
            read[short] = out
        return read

    def use(self, memory: Buffers) -> None:
        """Take the memory of rows from these buffers from now on."""
        self._buffers = memory

    def _allocate(
        self, name: str, rows: int, field: Field, locations: Locations, begin: int, buffers: Buffers | None = None
    ) -> Array:
        """Return memory for `rows` rows; the first is row `begin` of array `name` in the shard of the first record.

        It has the same offset in its page as the first row in the file, so it can be read past the page cache. If memory is 1
        to 31 bytes beyond that offset, processors that copy by `rep movsb` (AMD Zen 3 and later) take five times as long.
        """
        phase = (locations.shard(0).array(name).begin + begin * field.row_bytes) % PAGE_BYTES
        if phase % field.storage.itemsize:
            phase = 0
        return (buffers or self._buffers).take(rows * field.row_bytes, phase).view(field.storage).reshape(rows, *field.shape)

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


def chosen_fields(fields: Mapping[str, Field], names: Collection[str] | None) -> dict[str, Field]:
    """Return the fields whose names, without their level, are asked for; None asks for all."""
    return {name: field for name, field in fields.items() if names is None or name.partition(".")[2] in names}


def stored_pad(field: Field) -> Any:
    """Return what a step field has behind a sequence's end, as stored."""
    return 0 if field.pad is msgspec.UNSET else encode(np.array([field.pad]), field.dtype, None)[0][0]


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
    """Gather sequences; arguments as in `BatchSource`."""

    kind = "sequences"
    ragged = ("sequence",)
    axis = "step"

    def __init__(self, selection: Selection, schema: Schema, wanted: Wanted = ALL) -> None:
        super().__init__(selection, schema, wanted)
        assert schema.sequence is not None
        self.streamed = ("sequence", *(name for name in self.step_fields if name not in self._short))
        # A sequence with a layer axis is stored as one part per layer, (layers, steps, *rest). `unit` is one step of a part.
        # If the layers of a step lie together, some of them are read row by row, and all as if there were no such axis.
        self.stored_layers, self._parts_read = schema.stored_layers, np.zeros(1, np.int64)
        self._step_major = bool(schema.sequence.step_major)
        self.layered = schema.layer_axis is not None
        if self.layered:
            self._parts_read = np.arange(self.stored_layers)
            if wanted.row_layers is not None:
                self._parts_read = np.array(wanted.row_layers, np.int64)
        if self._step_major and np.array_equal(self._parts_read, np.arange(self.stored_layers)):
            self.layered, self._parts_read = False, np.zeros(1, np.int64)
        self.unit = schema.stored_sequence if self.layered else schema.sequence

    @property
    def parts_per_record(self) -> int:
        """Number of layers of each record that are read, if the rows have a layer axis; otherwise 1."""
        return len(self._parts_read)

    @property
    def row_bytes(self) -> int:
        """Bytes of a step as stored, as far as it is read."""
        return self.unit.row_bytes * self.parts_per_record

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
        """Locate and read the records at `positions` (N,), in batches of `batch_size`."""
        batches = np.full(-(-len(positions) // batch_size), batch_size)
        batches[-1] = len(positions) - batch_size * (len(batches) - 1)
        return self.read(self.locate(positions), batches, padded)

    def sizes(self, positions: Ints) -> Ints:
        """Return the selected steps of each record, and 0, (N, 2) int64; reads only what reading their values needs anyway."""
        lengths = self.locate(positions).lengths
        return np.stack([lengths, np.zeros_like(lengths)], axis=1)

    def read(
        self, located: Located, batches: Ints, padded: Padded, out: Array | None = None, buffers: Buffers | None = None
    ) -> SequenceRows:
        """Read the records of several batches.

        Costs one read per record, layer of its rows, and run of steps that does not continue the one before; and one per record
        and step field.

        Args:
            located: The records.
            batches: (batches,) records of each batch.
            padded: "batch" pads each record to the longest of its batch; None does not pad; "packed" does not pad, and puts
                each layer of all records of a batch together. Step fields are padded unless it is "packed".
            out: Rows to read the values into. Default: memory of its own.
            buffers: Where that memory is taken from. Default: the buffers in use.
        """
        locations, lengths, positions = located.locations, located.lengths, located.positions
        records, begins, ends = self._runs(located)
        reads = _Reads(records=records, begins=begins, ends=ends, lengths=lengths)
        first_records = np.cumsum(batches) - batches
        longest = np.repeat(np.maximum.reduceat(lengths, first_records), batches)
        sizes = longest if padded == "batch" else lengths
        starts = np.cumsum(sizes) - sizes
        bases, strides = starts * self.parts_per_record, sizes
        if padded == "packed":  # all records of a batch, layer by layer
            totals = np.add.reduceat(lengths, first_records)
            batch_starts, strides = np.repeat(starts[first_records], batches), np.repeat(totals, batches)
            bases = batch_starts * self.parts_per_record + starts - batch_starts
        values = self._read_values(locations, reads, sizes, bases, strides, out, buffers or self._buffers)
        if self._finite:
            part_starts = (bases[:, None] + strides[:, None] * np.arange(self.parts_per_record)).reshape(-1)
            order = np.argsort(part_starts, kind="stable")
            self._check_finite("sequence", self.unit, values, part_starts[order], locations, order // self.parts_per_record)
        fields = self._read_record_fields(locations)
        if self.step_fields:
            sizes = lengths if padded == "packed" else longest
            field_starts = np.cumsum(sizes) - sizes
            out_begins = field_starts[reads.records] + reads.offsets()
            short_rows = locations.step_rows(reads.records, reads.begins, reads.ends, out_begins)
            for name, field in self.step_fields.items():
                out = self._padded_rows(field, reads.lengths, sizes, field_starts)
                if name in self._short:
                    for part, rows, out_rows in short_rows:
                        out[out_rows] = part.step_columns[name][rows]
                else:
                    gather(locations, name, reads.records, reads.begins, reads.ends, out, out_begins)
                if self._finite:
                    self._check_finite(name, field, out, field_starts, locations, np.arange(len(sizes)))
                fields[name.partition(".")[2]] = out
        return SequenceRows(
            values=values,
            starts=starts,
            lengths=lengths,
            positions=self._selection.reported_positions(positions),
            labels=locations.labels,
            ids=locations.ids,
            hashes=locations.hashes,
            fields=fields,
        )

    def _runs(self, located: Located) -> tuple[Ints, Ints, Ints]:
        """Return the runs of steps to read: record, first step in its shard, and the step behind the last, (n,) each."""
        locations = located.locations
        begins, ends, records = locations.begins, locations.ends, np.arange(len(located.positions))
        if self._layers is None:
            return records, begins, ends
        # every record once per span of its layers
        layer_spans = [self._selected(length) for length in (ends - begins).tolist()]
        records = np.repeat(records, [len(record_spans) for record_spans in layer_spans])
        spans = np.array([span for record_spans in layer_spans for span in record_spans], np.int64)  # (reads, 2)
        return records, begins[records] + spans[:, 0], begins[records] + spans[:, 1]

    def _read_values(
        self,
        locations: Locations,
        reads: _Reads,
        sizes: Ints,
        bases: Ints,
        strides: Ints,
        out: Array | None,
        buffers: Buffers,
    ) -> Array:
        """Read the sequences into rows of `unit`.

        Args:
            locations: Locations of the records.
            reads: Runs of steps to read.
            sizes: (N,) steps that each record takes in the output, padding included.
            bases: (N,) row of each record's first layer.
            strides: (N,) rows from one of its layers to the next.
            out: Rows to read into. Default: memory from `buffers`.
            buffers: Memory.
        """
        unit, parts, field = self.unit, self.parts_per_record, self._schema.sequence
        assert field is not None
        records, begins, ends, lengths = reads.records, reads.begins, reads.ends, reads.lengths
        out_begins = bases[records] + reads.offsets()
        first = int(begins[0])
        if self.layered and self._step_major:
            counts = ends - begins
            owners, steps, inner = np.repeat(records, counts), spread(begins, counts), spread(reads.offsets(), counts)
            begins = (steps[:, None] * self.stored_layers + self._parts_read).reshape(-1)
            out_begins = (bases[owners] + inner)[:, None] + strides[owners][:, None] * np.arange(parts)
            records, ends, out_begins = np.repeat(owners, parts), begins + 1, out_begins.reshape(-1)
        elif self.layered:
            counts, stored = ends - begins, locations.ends - locations.begins
            first_steps = locations.begins[records]
            records, counts, inner = (np.repeat(array, parts) for array in (records, counts, begins - first_steps))
            part_number = np.tile(np.arange(parts), len(begins))
            first_unit = np.repeat(first_steps, parts) * self.stored_layers
            begins = first_unit + self._parts_read[part_number] * stored[records] + inner
            ends = begins + counts
            out_begins = bases[records] + part_number * strides[records] + np.repeat(reads.offsets(), parts)
            first = int(begins[0])
        values = self._allocate("sequence", int(sizes.sum()) * parts, unit, locations, first, buffers) if out is None else out
        for record in np.flatnonzero(lengths < sizes).tolist():
            begin, size = int(bases[record]), int(sizes[record])
            values[begin : begin + size * parts].reshape(parts, size, *unit.shape)[:, int(lengths[record]) :] = 0
        if field.layout is not None:  # every row is one read
            counts = ends - begins
            offsets = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
            records, out_begins = np.repeat(records, counts), np.repeat(out_begins, counts) + offsets
            totals = np.array([part.shard.array("sequence").shape[0] for part in locations.parts])[locations.which[records]]
            begins = field.layout.stored(np.repeat(begins, counts) + offsets, totals)
            ends = begins + 1
        window = buffers is not self._buffers  # a piece of one; who meets an error there gathers again, one by one
        how = {"merge": window, "past_cache": window and self.past_cache}
        if self._step_major and not self.layered:
            rows, layers = values.reshape(-1, *self._schema.stored_sequence.shape), self.stored_layers
            gather(locations, "sequence", records, begins * layers, ends * layers, rows, out_begins * layers, **how)
        else:
            gather(locations, "sequence", records, begins, ends, values, out_begins, **how)
        return values

    @staticmethod
    def _padded_rows(field: Field, lengths: Ints, sizes: Ints, starts: Ints) -> Array:
        """Return memory for a step field, (sum of sizes, *row), with the padding of records shorter than their size."""
        out = np.empty((int(sizes.sum()), *field.shape), field.storage)
        pad = stored_pad(field)
        for record in np.flatnonzero(lengths < sizes).tolist():
            out[starts[record] + lengths[record] : starts[record] + sizes[record]] = pad
        return out

    def _extents(self, shard: Shard, name: str, begin: int, end: int) -> Iterator[tuple[int, int]]:
        if name != "sequence" or self._step_major or self.parts_per_record == self.stored_layers:
            yield from super()._extents(shard, name, begin, end)
            return
        width, offsets = self.unit.row_bytes, shard.read("sequence.offsets", begin, end + 1).tolist()
        for first, last in itertools.pairwise(offsets):
            for part in self._parts_read.tolist():
                row = first * self.stored_layers + part * (last - first)
                yield row * width, (row + last - first) * width


@dataclass(frozen=True, kw_only=True, eq=False)
class _Reads:
    """Runs of steps that are read of N records, in the order of the records.

    Attributes:
        records: (n,) record of each run.
        begins: (n,) its first step in the shard.
        ends: (n,) step behind its last.
        lengths: (N,) steps that are read of each record.
    """

    records: Ints
    begins: Ints
    ends: Ints
    lengths: Ints

    def offsets(self) -> Ints:
        """Return how many steps of the same record are read before each run."""
        counts = self.ends - self.begins
        before: Ints = np.cumsum(counts) - counts - (np.cumsum(self.lengths) - self.lengths)[self.records]
        return before
