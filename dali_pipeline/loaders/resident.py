"""ResidentWindow: the shuffle window in the memory of the device, filled piece by piece; a batch is one `index_select`.

1. A piece, some MiB of neighbouring records of one group, is read by a thread, checked against its hashes.
2. It is moved into its group's slot of the window, in one copy. If the device is a GPU, DALI or torch decodes it on the way. On
   a CPU values stay as stored, so that the window takes no more memory than the bytes that are shuffled.
3. A batch's rows are found by arithmetic (`residency`), for many batches at once.

What belongs to records or steps besides their values (lengths, labels, ids, fields) stays in tables on the host, and follows
many batches at a time.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import torch

from dali_pipeline.format.schema import Schema
from dali_pipeline.loaders.dali import pinned_samples
from dali_pipeline.loaders.decoding import Decoding
from dali_pipeline.loaders.sidestream import UnderWay
from dali_pipeline.reading.records import spread
from dali_pipeline.reading.residency import Piece, RecordNumbers, Residency
from dali_pipeline.reading.rows import SequenceRows
from dali_pipeline.reading.source import Located, SequenceSource, stored_pad
from dali_pipeline.reading.steps import StepSource
from dali_pipeline.reading.superbatch import WIDER, Superbatch, signed
from dali_pipeline.reading.window import STAGED_AHEAD, NoRoomError, Read, WindowFiller
from dali_pipeline.runtime.memory import Buffers, fresh_bytes
from dali_pipeline.runtime.trace import span
from dali_pipeline.sampling.budget import Portion
from dali_pipeline.types import Array, Ints

RAGGED_ROOM = 1.25  # steps of a slot, relative to what its bytes hold: runs are cut by the average size of a shard's records


@dataclass(frozen=True, kw_only=True, eq=False)
class Shape:
    """What a window holds of each record.

    Attributes:
        steps: Steps of every record as read, T; None if their numbers differ.
        parts: Layers of each step that lie apart, as in `SequenceSource.parts_per_record`; otherwise 1.
        row: Shape of a row: one step of one part.
        dtype: Type of the values in the window.
    """

    steps: int | None
    parts: int
    row: tuple[int, ...]
    dtype: torch.dtype


def _allocated(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return memory on the device, not initialised on a GPU."""
    if device.type != "cpu":
        return torch.empty(size, dtype=dtype, device=device)
    return torch.from_numpy(fresh_bytes(int(np.prod(size)) * dtype.itemsize)).view(dtype).view(size)


@dataclass(eq=False)
class WindowMemory:
    """Memory of one window, used again by later epochs.

    Record r has number r in every table. Its rows in `values` begin at `starts[r] * parts`: all its steps of part 0, then those
    of part 1.

    Attributes:
        shape: What the window holds of each record.
        values: (R + 1, *row) rows on the device; the last one is padding, zero.
        slot_records: Records that a slot has room for.
        slot_steps: Steps that a slot has room for.
        lengths, starts, hashes: (N,) of each record.
        ids: (N,) texts, as objects.
        labels: (N, *shape) in the stored type, or None.
        record_fields: By the names after their dots, (N, *shape); texts as objects.
        step_fields: Likewise, (steps + 1, *shape), the last one `Field.pad`.
        numbers: Numbers of the records that are there.
        kept: Whether all records of the partitions are there, for good.
        size: Slots, records per slot, and bytes per slot that it has room for.
        buffers: Memory of batches on a CPU.
    """

    shape: Shape
    values: torch.Tensor
    slot_records: int
    slot_steps: int
    lengths: Ints
    starts: Ints
    hashes: Array
    ids: Array
    labels: Array | None
    record_fields: dict[str, Array]
    step_fields: dict[str, Array]
    numbers: RecordNumbers = field(default_factory=RecordNumbers)
    kept: bool = False
    size: tuple[int, int, int] = (0, 0, 0)
    buffers: Buffers = field(default_factory=Buffers)

    @classmethod
    def of(
        cls, shape: Shape, source: SequenceSource, schema: Schema, residency: Residency, slot_steps: int, device: torch.device
    ) -> WindowMemory:
        """Allocate the memory; pages of the host that are never written take no space."""
        records = residency.num_records
        steps = residency.num_slots * slot_steps
        values = _allocated((steps * shape.parts + 1, *shape.row), shape.dtype, device)
        values[-1].zero_()
        step_fields = {}
        for name, stored in source.step_fields.items():
            step_fields[name.partition(".")[2]] = rows = np.empty((steps + 1, *stored.shape), stored.storage)
            rows[-1] = stored_pad(stored)
        return cls(
            shape=shape,
            values=values,
            slot_records=residency.slot_records,
            slot_steps=slot_steps,
            lengths=np.zeros(records, np.int64),
            starts=np.zeros(records, np.int64),
            hashes=np.zeros(records, np.uint64),
            ids=np.empty(records, object),
            labels=None if schema.labels.dtype is None else np.zeros((records, *schema.labels.shape), schema.labels.dtype),
            record_fields=source.record_columns(records),
            step_fields=step_fields,
        )

    def forget(self) -> None:
        """Forget what is in the window."""
        self.numbers = RecordNumbers()

    def note(self, piece: Piece, rows: SequenceRows, first_step: int) -> None:
        """Enter a piece, whose steps lie in the window from `first_step` on, into the tables."""
        part = slice(piece.first, piece.first + len(rows.lengths))
        self.lengths[part], self.starts[part], self.hashes[part] = rows.lengths, first_step + rows.starts, rows.hashes
        self.ids[part] = rows.ids
        if self.labels is not None:
            self.labels[part] = rows.labels
        for name, column in self.record_fields.items():
            column[part] = rows.fields[name]
        steps = int(rows.lengths.sum())
        for name, column in self.step_fields.items():
            column[first_step : first_step + steps] = rows.fields[name]
        self.numbers.add(piece)

    def rows(self, numbers: Ints, sizes: Ints, positions: Ints, *, packed: bool) -> SequenceRows:
        """Return everything about these records (N,) but their values; step fields padded to each batch's longest."""
        lengths, padded = self.lengths[numbers], np.zeros(0, np.int64)
        if self.step_fields:
            longest = np.maximum.reduceat(lengths, np.cumsum(sizes) - sizes)
            padded = self._steps(numbers, lengths if packed else np.repeat(longest, sizes))
        fields: dict[str, Any] = {name: column[padded] for name, column in self.step_fields.items()}
        for name, column in self.record_fields.items():
            taken = column[numbers]
            fields[name] = taken.tolist() if taken.dtype == object else taken
        return SequenceRows(
            values=np.zeros(0, np.uint8),
            starts=np.zeros(len(numbers), np.int64),
            lengths=lengths,
            labels=None if self.labels is None else self.labels[numbers],
            ids=self.ids[numbers].tolist(),
            hashes=self.hashes[numbers],
            positions=positions,
            fields=fields,
        )

    def _steps(self, numbers: Ints, sizes: Ints) -> Ints:
        """Return the steps of records, each padded to its size: numbers of rows of `step_fields`, -1 for padding."""
        steps = spread(self.starts[numbers], sizes)
        offsets = spread(np.zeros_like(sizes), sizes)
        steps[offsets >= np.repeat(self.lengths[numbers], sizes)] = -1
        return steps

    def index(self, numbers: Ints, sizes: Ints, *, packed: bool) -> tuple[Ints, list[int]]:
        """Return what `select` takes of the records of several batches, and how much of it belongs to each batch.

        These are the numbers of the records if all have one length; otherwise the rows: of each batch part by part.
        """
        parts = self.shape.parts
        if self.shape.steps is not None and not (packed and parts > 1):
            return numbers, sizes.tolist()
        lengths = self.lengths[numbers]
        begins = np.cumsum(sizes) - sizes
        if not packed:
            padded = np.repeat(np.maximum.reduceat(lengths, begins), sizes)
            counts = np.repeat(padded, parts)
            first = (self.starts[numbers][:, None] * parts + lengths[:, None] * np.arange(parts)).reshape(-1)
            rows = spread(first, counts)
            rows[spread(np.zeros_like(counts), counts) >= np.repeat(np.repeat(lengths, parts), counts)] = len(self.values) - 1
            return rows, (np.add.reduceat(padded, begins) * parts).tolist()
        rows_of_batches = []
        for begin, size in zip(begins.tolist(), sizes.tolist(), strict=True):
            chosen, counts = numbers[begin : begin + size], lengths[begin : begin + size]
            rows_of_batches += [spread(self.starts[chosen] * parts + part * counts, counts) for part in range(parts)]
        return np.concatenate(rows_of_batches), (np.add.reduceat(lengths, begins) * parts).tolist()

    def select(self, index: torch.Tensor, *, packed: bool) -> torch.Tensor:
        """Return the rows of one batch, (rows, *row), from its part of the index, on the device."""
        rows = self.values
        if self.shape.steps is not None and not (packed and self.shape.parts > 1):
            rows = self.values[:-1].view(-1, self.shape.steps * self.shape.parts, *self.shape.row)
        return taken_rows(rows, index, self.buffers).view(-1, *self.shape.row)


def taken_rows(rows: torch.Tensor, index: torch.Tensor, buffers: Buffers) -> torch.Tensor:
    """Return `rows` (R, *row) at an index (N,), on their device; on the CPU in memory from `buffers`.

    NumPy copies on the CPU: on two busy cores torch's `index_select` took ten times as long, as its threads wait for each
    other.
    """
    if rows.device.type != "cpu":
        return rows.index_select(0, index)
    memory = buffers.take(len(index) * rows[0].nbytes)
    selected = torch.from_numpy(memory).view(rows.dtype).view(len(index), *rows.shape[1:])
    np.take(rows.numpy(), index.numpy(), axis=0, out=selected.numpy(), mode="clip")  # "raise" would copy again
    return selected


@dataclass(eq=False)
class StepMemory:
    """Memory of a window of single steps. Step r has number r in `values`, `owners`, `steps` and `step_fields`.

    Records are numbered so that slot s has the numbers s, s + slots, s + 2 * slots and so on. Their tables grow when a group
    has more records than any before it, and no number changes.

    Attributes:
        shape: What the window holds of each step.
        values: (R, parts, *row) on the device.
        slot_records: Steps that a slot has room for.
        num_slots: Number of slots.
        owners: (R,) int32, number of each step's record.
        steps: (R,) int32, number of each step within its record.
        positions, hashes: (records,) of each record.
        labels: (records, *shape) in the stored type, or None.
        record_fields: By the names after their dots, (records, *shape); texts as objects.
        step_fields: Likewise, (R, *shape).
        used: Records of each slot.
        numbers: Numbers of the steps that are there.
        kept: Whether all steps of the partitions are there, for good.
        size: Slots, records per slot, and bytes per slot that it has room for.
        buffers: Memory of batches on a CPU.
    """

    shape: Shape
    values: torch.Tensor
    slot_records: int
    num_slots: int
    owners: Array
    steps: Array
    positions: Ints
    hashes: Array
    labels: Array | None
    record_fields: dict[str, Array]
    step_fields: dict[str, Array]
    used: Counter[int] = field(default_factory=Counter)
    numbers: RecordNumbers = field(default_factory=RecordNumbers)
    kept: bool = False
    size: tuple[int, int, int] = (0, 0, 0)
    buffers: Buffers = field(default_factory=Buffers)

    @classmethod
    def of(cls, shape: Shape, source: SequenceSource, schema: Schema, residency: Residency, device: torch.device) -> StepMemory:
        """Allocate the memory; pages of the host that are never written take no space."""
        rows = residency.num_records
        values = _allocated((rows, shape.parts, *shape.row), shape.dtype, device)
        labels = schema.labels
        return cls(
            shape=shape,
            values=values,
            slot_records=residency.slot_records,
            num_slots=residency.num_slots,
            owners=np.empty(rows, np.int32),
            steps=np.empty(rows, np.int32),
            positions=np.empty(0, np.int64),
            hashes=np.empty(0, np.uint64),
            labels=None if labels.dtype is None else np.empty((0, *labels.shape), labels.dtype),
            record_fields=source.record_columns(0),
            step_fields={
                name.partition(".")[2]: np.empty((rows, *stored.shape), stored.storage)
                for name, stored in source.step_fields.items()
            },
        )

    def forget(self) -> None:
        """Forget what is in the window."""
        self.numbers, self.used = RecordNumbers(), Counter()

    def note(self, piece: Piece, rows: SequenceRows) -> None:
        """Enter a piece into the tables."""
        slot = 0 if self.num_slots == 1 else piece.first // self.slot_records
        if piece.first == piece.group.first and self.num_slots > 1:
            self.used[slot] = 0
        begin, records, part = self.used[slot], len(rows.lengths), slice(piece.first, piece.first + piece.num_records)
        self.used[slot] = begin + records
        self._grow(self.used[slot])
        numbers = slice(begin * self.num_slots + slot, (begin + records) * self.num_slots, self.num_slots)
        assert rows.steps is not None
        self.owners[part] = np.repeat(np.arange(numbers.start, numbers.stop, numbers.step), rows.lengths)
        self.steps[part] = rows.steps
        self.positions[numbers], self.hashes[numbers] = rows.positions, rows.hashes
        if self.labels is not None:
            self.labels[numbers] = rows.labels
        for name, column in self.record_fields.items():
            column[numbers] = rows.fields[name]
        for name, column in self.step_fields.items():
            column[part] = rows.fields[name]
        self.numbers.add(piece)

    def _grow(self, records: int) -> None:
        """Make room for so many records of each slot."""
        if records * self.num_slots <= len(self.positions):
            return
        room = min(2 * records, max(records, self.slot_records)) * self.num_slots

        def grown(table: Array) -> Array:
            larger = np.empty((room, *table.shape[1:]), table.dtype)
            larger[: len(table)] = table
            return larger

        self.positions, self.hashes = grown(self.positions), grown(self.hashes)
        self.labels = None if self.labels is None else grown(self.labels)
        self.record_fields = {name: grown(column) for name, column in self.record_fields.items()}

    def rows(self, numbers: Ints) -> SequenceRows:
        """Return everything about these steps (N,) but their values, each as a sequence of one step."""
        owners = self.owners[numbers]
        fields: dict[str, Any] = {name: column[numbers] for name, column in self.step_fields.items()}
        for name, column in self.record_fields.items():
            taken = column[owners]
            fields[name] = taken.tolist() if taken.dtype == object else taken
        return SequenceRows(
            values=np.zeros(0, np.uint8),
            starts=np.zeros(len(numbers), np.int64),
            lengths=np.ones(len(numbers), np.int64),
            labels=None if self.labels is None else self.labels[owners],
            ids=[],
            hashes=self.hashes[owners],
            positions=self.positions[owners],
            fields=fields,
            steps=self.steps[numbers].astype(np.int64),
        )

    def select(self, index: torch.Tensor, *, packed: bool = False) -> torch.Tensor:
        """Return the values of these steps, (N * parts, *row), on the device; `packed` makes no difference."""
        return taken_rows(self.values, index, self.buffers).view(-1, *self.shape.row)


class ResidentWindow(WindowFiller[SequenceRows]):
    """Fills the window along one epoch, and serves its batches.

    Args:
        memory: The memory, unused by others.
        residency: What lies in it when.
        start: The first step that is delivered.
        source: Where pieces are read.
        decoding: How values are decoded on their way into the window; None keeps them as stored.
        device: Device of the window.
        threads: Threads that read; 0 reads in the caller's thread.
        record_bytes: Bytes of a record as stored, on average.
        bits: Whether values are the bits of bfloat16.
        under_way: Keeps pinned memory while a GPU reads it.
        through_dali: Function from one that feeds pieces to an iterator over DALI's outputs for them. None moves pieces by
            torch.
    """

    def __init__(
        self,
        memory: WindowMemory | StepMemory,
        residency: Residency,
        start: int,
        source: SequenceSource,
        *,
        decoding: Decoding | None,
        device: torch.device,
        threads: int,
        record_bytes: float,
        bits: bool,
        under_way: UnderWay,
        through_dali: Callable[[Callable[[], Any]], Generator[torch.Tensor, None, None]] | None,
    ) -> None:
        # read straight into the window, if values stay there as stored, and in the same order
        direct = device.type == "cpu" and through_dali is None and (bits or source.unit.storage.name not in WIDER)
        direct &= memory.shape.parts == 1 or isinstance(memory, WindowMemory)
        super().__init__(residency, start, threads=threads, record_bytes=record_bytes, direct=direct, kept=memory.kept)
        self._memory = cast("WindowMemory", memory)  # StepWindow has a StepMemory
        self._source, self._decoding, self._device, self._bits = source, decoding, device, bits
        if not memory.kept:
            memory.forget()
        self._under_way = under_way
        self._fed: deque[Read[SequenceRows]] = deque()  # inside DALI
        self._filled: Counter[int] = Counter()  # steps used of each slot, by the slot's number
        self._buffers = Buffers(2 * (threads + STAGED_AHEAD), pinned=device.type == "cuda")
        self._outputs = None if through_dali is None else through_dali(self._feed)

    def superbatch(self, portion: Portion, *, packed: bool) -> tuple[Superbatch, Ints, list[int]]:
        """Return these batches without their values, and the index that `select` takes, with its sizes."""
        shares, sizes = portion.shares, portion.sizes
        numbers = self._memory.numbers.of(shares.positions)
        rows = self._memory.rows(numbers, sizes, self._source.reported_positions(shares.positions), packed=packed)
        index, counts = self._memory.index(numbers, sizes, packed=packed)
        return Superbatch(rows=rows, valid=shares.valid, sizes=sizes, cursors=portion.cursors), index, counts

    def select(self, index: torch.Tensor, *, packed: bool) -> torch.Tensor:
        """Return the rows of one batch, (rows, *row), from its part of the index, on the device."""
        return self._memory.select(index, packed=packed)

    def _next(self) -> Piece | None:
        return self._fed[0].piece if self._fed else super()._next()

    def close(self) -> None:
        """Wait for the reads in flight, and let go of the memory, which DALI's pipeline would keep with this window."""
        super().close()
        if self._outputs is not None:
            self._outputs.close()
        self.__dict__.pop("_memory", None)

    @property
    def _numbers(self) -> RecordNumbers:
        return self._memory.numbers

    def _plan_read(self, piece: Piece) -> tuple[int, Callable[[], SequenceRows]]:
        """Return the first step of the piece in the window, and the function that reads it."""
        memory, steps, located = self._memory, self._memory.shape.steps, None
        slot = piece.first // self._residency.slot_records
        if piece.first == piece.group.first and not self._residency.whole:
            self._filled[slot] = 0
        if steps is None:  # where the next piece begins depends on the lengths in this one
            located = self._source.locate(piece.positions)
            count, first_step = int(located.lengths.sum()), slot * memory.slot_steps + self._filled[slot]
            self._filled[slot] += count
            if self._filled[slot] > memory.slot_steps:
                raise NoRoomError(f"a group has more than the {memory.slot_steps} steps that its slot has room for")
        else:
            count, first_step = piece.num_records * steps, piece.first * steps
        out = None
        if self._direct:
            rows = memory.values[first_step * memory.shape.parts : (first_step + count) * memory.shape.parts]
            out = rows.numpy().view(self._source.unit.storage)
        return first_step, partial(self._read, piece, located, out)

    def _read(self, piece: Piece, located: Located | None, out: Array | None) -> SequenceRows:
        located = self._source.locate(piece.positions) if located is None else located
        one_by_one = np.ones(len(located.lengths), np.int64)
        return signed(self._source.read(located, one_by_one, "packed", out, self._buffers), self._bits)

    def _feed(self) -> Any:
        """Return the values of the next piece as a sample for DALI; a record of zeros if it could not be read."""
        if self._unread() is None and not self._reads:
            raise StopIteration
        read, rows = self._take()
        self._fed.append(read)
        if rows is not None:
            samples = self._by_record(rows.values)[None]
            return pinned_samples(samples) if self._device.type == "cuda" else samples
        shape, storage = self._memory.shape, self._source.unit.storage
        size = ((shape.steps or 1) * shape.parts, *shape.row)
        return self._by_record(np.zeros(size, np.int16 if self._bits else WIDER.get(storage.name, storage)))[None]

    def _by_record(self, values: Array) -> Array:
        """Return values as (records, rows of a record, *row) if all records have one length; otherwise (rows, *row)."""
        steps, parts = self._memory.shape.steps, self._memory.shape.parts
        return values if steps is None else values.reshape(-1, steps * parts, *values.shape[1:])

    def _enter_next(self) -> None:
        if self._outputs is None:
            super()._enter_next()
            return
        values, read = next(self._outputs), self._fed.popleft()
        failed = read.result.exception() is not None
        if not failed:
            self._place(read, read.result.result(), values)
        self._note(read, None if failed else read.result.result())

    def _enter(self, read: Read[SequenceRows], rows: SequenceRows) -> None:
        if self._outputs is None and not self._direct:
            stored = torch.from_numpy(self._by_record(rows.values))
            with span("copy", self._device.type != "cpu"):
                values = stored.to(self._device, non_blocking=True)
            self._place(read, rows, values)
        self._note_piece(read, rows)

    def _note_piece(self, read: Read[SequenceRows], rows: SequenceRows) -> None:
        self._memory.note(read.piece, rows, read.place)

    def _place(self, read: Read[SequenceRows], rows: SequenceRows, values: torch.Tensor) -> None:
        """Decode the values of a piece, which are on the device, and copy them into the window."""
        memory, parts = self._memory, self._memory.shape.parts
        if self._decoding is not None:
            framed = values[None] if memory.shape.steps is None else values
            values = self._decoding.run(framed, np.array([framed.shape[1]]))
        begin, count = read.place * parts, int(rows.lengths.sum()) * parts
        memory.values[begin : begin + count].copy_(values.view(count, *memory.shape.row))
        self._under_way.keep(rows.values)  # DALI, or the copy, may still read it


class StepWindow(ResidentWindow):
    """Fills a window of single steps along one epoch, and serves its batches; arguments as in `ResidentWindow`."""

    _memory: StepMemory  # type: ignore[assignment]
    _source: StepSource

    def superbatch(self, portion: Portion, *, packed: bool) -> tuple[Superbatch, Ints, list[int]]:
        """Return these batches without their values, and the index that `select` takes, with its sizes."""
        numbers, sizes = self._memory.numbers.of(portion.shares.positions), portion.sizes
        batches = Superbatch(rows=self._memory.rows(numbers), valid=portion.shares.valid, sizes=sizes)
        return batches, numbers, sizes.tolist()

    def _plan_read(self, piece: Piece) -> tuple[int, Callable[[], SequenceRows]]:
        out = None
        if self._direct:
            rows = self._memory.values[piece.first : piece.first + piece.num_records, 0]
            out = rows.numpy().view(self._source.unit.storage)
        return piece.first, partial(self._read_steps, piece, out)

    def _read_steps(self, piece: Piece, out: Array | None) -> SequenceRows:
        located = self._source.locate_runs(piece.runs)
        return signed(self._source.read(located, np.array([len(located.lengths)]), "packed", out, self._buffers), self._bits)

    def _note_piece(self, read: Read[SequenceRows], rows: SequenceRows) -> None:
        self._memory.note(read.piece, rows)

    def _place(self, read: Read[SequenceRows], rows: SequenceRows, values: torch.Tensor) -> None:
        """Decode the values of a piece, (parts * steps, *row) on the device, and copy them into the window."""
        memory, count = self._memory, read.piece.num_records
        if self._decoding is not None:
            assert rows.steps is not None
            values = self._decoding.of_steps(rows.steps).run(values[:, None], np.ones(count, np.int64))[:, 0]
        by_step = values.view(memory.shape.parts, count, *memory.shape.row).movedim(0, 1)
        memory.values[read.place : read.place + count].copy_(by_step)
        self._under_way.keep(rows.values)  # DALI, or the copy, may still read it


def torch_type(storage: np.dtype[Any]) -> torch.dtype:
    """Return the type of stored values in torch, where unsigned ones are widened to signed ones."""
    return torch.from_numpy(np.empty(0, WIDER.get(storage.name, storage))).dtype
