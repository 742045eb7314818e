"""SequenceLoader: make batches of sequences on the device from shards, with NVIDIA DALI or torch."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from functools import cache, cached_property, partial
from itertools import chain, repeat
from typing import Any, Literal, cast, get_args

import numpy as np
import torch

from dali_pipeline.dataset.dataset import Dataset, View
from dali_pipeline.errors import DataError, FormatError, UsageError
from dali_pipeline.format.digest import EpochDigest, step_hashes
from dali_pipeline.format.layers import Layers, select, to_positions
from dali_pipeline.format.schema import Schema
from dali_pipeline.loaders.dali import check_dali, device_id, import_dali, iterate
from dali_pipeline.loaders.decoding import Decoding, sequence_graph
from dali_pipeline.loaders.device import check_memory
from dali_pipeline.loaders.fields import Fields, RecordBatch, cut_fields, moved_fields, moved_with_fields, tensors_of
from dali_pipeline.loaders.loader import LoadedBatch, Loader, Position
from dali_pipeline.loaders.options import LoaderOptions, NumWorkers, OnError, OnNan, Unit, WindowKind
from dali_pipeline.loaders.resident import RAGGED_ROOM, ResidentWindow, Shape, StepMemory, StepWindow, WindowMemory, torch_type
from dali_pipeline.loaders.sidestream import UnderWay, a_batch_ahead, to_device
from dali_pipeline.reading.graphrows import ends_of
from dali_pipeline.reading.residency import Residency
from dali_pipeline.reading.source import Padded, SequenceSource
from dali_pipeline.reading.steps import StepIndex, StepSource
from dali_pipeline.reading.superbatch import SUPERBATCH_BYTES, Part, SequenceGatherer, Superbatch, superbatches
from dali_pipeline.reading.window import Memories
from dali_pipeline.runtime.ahead import (
    background_threads,
    belonging_to_this_process,
    cores_beside,
    map_ahead,
    on_threads,
)
from dali_pipeline.runtime.checks import one_of, refuses_old_keywords, shown, truth
from dali_pipeline.runtime.memory import Buffers
from dali_pipeline.runtime.trace import span, spans
from dali_pipeline.sampling.budget import BudgetPlan, Packed, Portion
from dali_pipeline.sampling.order import WINDOW_BYTES
from dali_pipeline.sampling.plan import EpochPlan
from dali_pipeline.types import Array, Ints

log = logging.getLogger("dali_pipeline")
Engine = Literal["dali", "torch"]
PREFETCH_SUPERBATCHES = 2  # number of superbatches that DALI prefetches
SUPERBATCH_STEPS = 64
SUPERBATCH_ROWS = 1 << 17  # single steps whose numbers are computed at once
DALI_THREADS = 2
NOT_FOR_DALI = ("float64",)  # neither fn.pad nor the arithmetic of decoding supports it


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceBatch(RecordBatch):
    """One batch of one rank.

    Attributes:
        sequences: (B, T, *row) in the loader's dtype, on its device; zero behind a sequence's end. T is the batch's longest.
            If an axis of the row is named layer, it is a view (not contiguous), because layers are stored one by one.
        cu_seqlens: With packed=True, (B + 1,) int32 on the device: where each record begins in `sequences`, which is then
            (S, *row), the steps of all records one after the other; otherwise None.
        lengths: (B,) int64 on the CPU, where `pack_padded_sequence` wants them.
        labels: On the device: (B,) int64 classes, (B, K) bool of several labels, (B, *shape) float32 values; None if there are
            none.
        valid: (B,) bool on the device. A row that is not valid is padding and repeats a real record.
        ids: B texts.
        positions: (B,) int64 on the CPU: the records' numbers in their split.
        fields: Further fields by name, on the device: (B, T, *row) of steps, `Field.pad` behind a sequence's end; (B, *row) of
            records. Real numbers in the loader's dtype or as stored if that is wider, whole ones as int64, bools, and lists of
            B texts.
    """

    sequences: torch.Tensor
    lengths: torch.Tensor
    cu_seqlens: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Size of the sequences as delivered, in bytes."""
        return self.sequences.nbytes

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield the tensors that are on the loader's device."""
        yield from (tensor for tensor in (self.sequences, self.labels, self.valid, self.cu_seqlens) if tensor is not None)
        yield from tensors_of(self.fields)

    def to(self, device: str | torch.device) -> SequenceBatch:
        """Return the batch on a device; `lengths` and `positions` stay on the CPU.

        Copies nothing that is on the device already. Lightning calls this method for each batch; without it, Lightning would
        write to the fields.

        Args:
            device: For example "cpu" or "cuda:0".

        Returns:
            A new batch; this one is unchanged.
        """
        labels: Any = None if self.labels is None else self.labels.to(device)
        ends = None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        moved: dict[str, Any] = {"sequences": self.sequences.to(device), "valid": self.valid.to(device), "cu_seqlens": ends}
        return replace(self, labels=labels, fields=moved_fields(self.fields, device), **moved)


@dataclass(frozen=True, kw_only=True, eq=False)
class StepBatch:
    """One batch of single steps of one rank, from a loader with `unit="step"`; N is the batch size.

    Attributes:
        values: (N, *row) in the loader's dtype, on its device: (N, F) for rows of F features. If an axis of a row is named
            layer, (N, L', F) for several layers, and (N, F) for one.
        labels: The label of each row's record, on the device, in types as in `SequenceBatch`; None if there are none. With
            `labels=` of the loader, those of the rows themselves.
        valid: (N,) bool on the device. A row that is not valid is padding and repeats a real one.
        record_positions: (N,) int64 on the CPU: the number of each row's record in its split.
        steps: (N,) int64 on the CPU: the number of each row within its record as stored.
        fields: Further fields by name, on the device: (N, *row), of steps and of the row's record; lists of N texts.
        source: Where `ids` are read; None once the batch has been pickled, with its ids.
    """

    values: torch.Tensor
    labels: torch.Tensor  # None without labels, as in `RecordBatch`
    valid: torch.Tensor
    record_positions: torch.Tensor
    steps: torch.Tensor
    fields: dict[str, Any]
    source: StepSource = dataclass_field(repr=False)

    @cached_property
    def ids(self) -> list[str]:
        """The id of each row's record, N texts; read from the index on first use."""
        return self.source.ids(self.record_positions.numpy())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "ids": self.ids, "source": None}  # a pickled batch needs no index

    def __len__(self) -> int:
        return len(self.record_positions)

    @property
    def nbytes(self) -> int:
        """Size of the values as delivered, in bytes."""
        return self.values.nbytes

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield the tensors that are on the loader's device."""
        yield from (tensor for tensor in (self.values, self.labels, self.valid) if tensor is not None)
        yield from tensors_of(self.fields)

    def to(self, device: str | torch.device) -> StepBatch:
        """Return the batch on a device; `record_positions` and `steps` stay on the CPU.

        Args:
            device: For example "cpu" or "cuda:0".

        Returns:
            A new batch; this one is unchanged.
        """
        labels: Any = None if self.labels is None else self.labels.to(device)
        moved: dict[str, Any] = {"values": self.values.to(device), "valid": self.valid.to(device)}
        return replace(self, labels=labels, fields=moved_fields(self.fields, device), **moved)


Loaded = Generator[Superbatch, None, None]


@cache
def _warn_of_steps(root: str) -> None:
    log.warning("%s does not name its axes (format version 1): layers= chooses steps by position, as steps= does", root)


class SequenceLoader(Loader[SequenceBatch]):
    """Iterate over the batches of one split's sequences: whole batches of this rank, epoch after epoch.

    An `IterableDataset` with `__len__` that yields `SequenceBatch`, or `StepBatch` with `unit="step"`. Use it as it is, or in
    `DataLoader(loader, batch_size=None, num_workers=0)`. Every `for` is the next epoch; `set_epoch` chooses one; `state_dict`
    and `load_state_dict` resume within an epoch, bit-identically. `Loader` documents the methods.

    Opening costs a read of the manifest, which the data set has done. The first batch costs its own records; from a resident
    window the first group of the shuffle: half a window, or a split that fits in one. The memory beside the batches and the
    window is about 300 MB, whatever the size of the data.

    Args:
        data: What `open_dataset`, `mix`, `folds` or `subset` returns.
        split: Name of the split.
        batch_size: Records per rank and step, ceil(records / world_size) at most. With `unit="step"`, steps of records.
        shuffle: Whether to shuffle within a window that moves over the split; otherwise records come in file order.
        seed: Seed of the shuffle, 0 to 2**64 - 1. It is one word of a sequence, so neighbouring seeds share nothing.
        drop_last: Whether to leave out the records that do not fill a batch on every rank. By default the last batches are
            padded: padding has `valid` False and repeats a real record.
        num_workers: Threads that gather ahead; 0 gathers in the caller's thread. "auto" is one thread per four cores with a
            GPU, 4 at most. Without a GPU it is 1; but 0 on one core, and on two cores if records are below 32 KiB or are
            delivered as they are stored.
        layers: Layers to read, as a slice or a list of the numbers that the data set records (0 for the embeddings, l for the
            output of block l; 0, 1, 2 and so on if it records none; negative numbers count from the end). They lie along the
            axis named layer: the steps, or an axis of each step. Nothing else is read. By default all.
        steps: Steps to read, by position, as a slice or a list of numbers. By default all.
        fields: Names of the further fields to read and deliver, such as ["token_ids"]; [] for none. By default all.
        device: Where batches go: "auto" (this process's GPU if there is one), "cpu", "cuda" or "cuda:N".
        dtype: Floating type of the delivered sequences.
        window_bytes: Bytes of shards that are shuffled together at a time, 256 MiB by default. A larger window mixes better and
            makes a resume read more.
        num_partitions: Number of disjoint sets of shards, each with a window of its own. With as many partitions as nodes, each
            node reads its own shards only. The order depends on it.
        engine: "dali", or "torch", which delivers the same batches without DALI.
        on_error: "raise", or "skip", which makes a record that cannot be read padding, and counts it in `left_out` and in
            the log named dali_pipeline.
        on_nan: "keep" does not look. "raise" and "skip" look for NaN and infinite values as stored, which costs a pass over the
            values. A narrower `dtype` may still make a value infinite.
        normalize: Whether to bring every feature to mean 0 and standard deviation 1 over the training split, by the statistics
            in the manifest.
        bucket_by_length: Whether up to 64 neighbouring batches, half a window at most, exchange records so that lengths within
            a batch are alike, and then come in a random order: less padding.
        max_steps: Budget of a batch, instead of `batch_size`: it takes the next records in order while their steps fit. Every
            rank takes equally many batches; their number differs a little between epochs. A longer record is a batch of its
            own. With several partitions, one of their number and the world size must be a multiple of the other.
        count_padding: Whether `max_steps` counts the padding of a batch, which is what memory and time grow with.
        packed: Whether to deliver the steps of all records one after the other, (S, *row), with `cu_seqlens`, as attention
            kernels for variable lengths take them, instead of padded (B, T, *row). Step fields are packed alike.
        unit: What is shuffled and delivered: "record", or "step" for single steps of records, each a row, as `StepBatch`. Then
            `batch_size`, `len` and `num_records` count steps; every step comes once per epoch, and the steps of a record come
            apart. For records of different lengths with chosen `steps` or a `mask`, and for folds, opening reads the offsets of
            all records once. A batch may not be larger than what the split has. It does not go with max_steps,
            bucket_by_length, packed, class_balanced or group_weights.
        mask: With unit="step", the name of a step field, such as "loss_mask": only steps where it is not zero are delivered.
        labels: With unit="step", the name of a step field that is delivered as the labels of a batch, instead of among its
            fields: bools and whole numbers as int64, others as float32. By default a step has the label of its record.
        window: Where batches are put together. "resident": in the memory of the device, which the shuffle's window is read into
            whole, in large pieces; takes 1.5 `window_bytes` per partition there, on a GPU as delivered. "gather": on the host,
            record by record, from the page cache. Both deliver the same batches. "auto" is "resident" on a GPU, and on a CPU
            for single steps, for records below 32 KiB, for splits that fit in the window, and for splits that memory cannot
            keep, if it can be: without draws; and, unless the split fits in the window, shuffled, without buckets, with whole
            partitions for each process (with max_steps one process and one partition), and, of whole records that memory can
            keep on a CPU, with engine="torch". Otherwise it is "gather".
        class_balanced: Whether an epoch draws from all classes in equal numbers: as many draws as there are records, each class
            without replacement within its own pass.
        group_weights: How often each group is drawn, relative to 1 for groups that are not named; draws as with
            `class_balanced`.
        rank: Number of this process; detected from torch.distributed or torchrun if not given.
        world_size: Number of processes; given together with `rank`, or detected.

    Raises:
        UsageError: An argument makes no sense, or engine="dali" without DALI.
        PipelineError: DALI was built for another CUDA version than torch.
        DataError: The data have no sequences, or no statistics to normalize with. While iterating: NaN with on_nan="raise".
        FormatError: While iterating: a damaged shard, which is named.

    Examples:
        >>> loader = dp.SequenceLoader(dp.open_dataset("data/traces"), batch_size=64)  # doctest: +SKIP
        >>> for batch in loader:  # doctest: +SKIP
        ...     loss = model(batch.sequences, batch.lengths)[batch.valid].mean()
    """

    kind = "sequences"
    _source: SequenceSource
    _index: StepIndex | None = None  # of single steps, with unit="step"
    _labels: str | None = None

    @refuses_old_keywords
    def __init__(
        self,
        data: Dataset,
        split: str = "train",
        *,
        batch_size: int = 32,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        num_workers: NumWorkers = "auto",
        layers: Layers = None,
        steps: Layers = None,
        fields: Collection[str] | None = None,
        device: str | torch.device = "auto",
        dtype: torch.dtype = torch.float32,
        window_bytes: int = WINDOW_BYTES,
        num_partitions: int = 1,
        engine: Engine = "dali",
        on_error: OnError = "raise",
        on_nan: OnNan = "keep",
        normalize: bool = False,
        bucket_by_length: bool = False,
        max_steps: int | None = None,
        count_padding: bool = True,
        packed: bool = False,
        unit: Unit = "record",
        mask: str | None = None,
        labels: str | None = None,
        window: WindowKind = "auto",
        class_balanced: bool = False,
        group_weights: Mapping[str, float] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        one_of("engine", engine, get_args(Engine))
        if engine == "dali":
            import_dali()
        options = LoaderOptions(
            split=split,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            num_workers=num_workers,
            layers=layers,
            fields=fields,
            device=device,
            dtype=dtype,
            window_bytes=window_bytes,
            num_partitions=num_partitions,
            on_error=on_error,
            on_nan=on_nan,
            class_balanced=class_balanced,
            group_weights=group_weights,
            rank=rank,
            world_size=world_size,
            bucket_by_length=bucket_by_length,
            max_steps=max_steps,
            count_padding=count_padding,
            packed=packed,
            steps=steps,
            unit=unit,
            mask=mask,
            labels=labels,
        )
        super().__init__(data, options)
        on_gpu = engine == "dali" and self.device.type == "cuda"
        if on_gpu:
            check_dali()
        layers, row_layers = self._chosen(options.layers, options.steps)
        self._steps = layers  # which steps are read
        self._fill_by(layers)
        self.engine, self.packed, self.unit = engine, options.packed, options.unit
        if field_scales_by_step(data.schema) and self.packed:
            raise UsageError("packed=True for int8 with a scale for every step, which needs them apart; expected packed=False")
        num_steps = (1, 1) if self.unit == "step" else self.selection.bounds("step")
        equal_lengths = num_steps is not None and num_steps[0] == num_steps[1]
        field = data.schema.sequence
        assert field is not None
        if self.order.bucket_by_length and FormatError in self.skips:
            raise UsageError("on_error='skip' with bucket_by_length: the order would depend on what can be read; give one")
        if truth("normalize", normalize) and data.manifest.statistics is None:
            if isinstance(data, View) and data.mixed:
                raise DataError("a mix has no feature statistics, as those of its data sets differ; expected normalize=False")
            raise DataError(f"{data.root} has no feature statistics to normalize with; expected those of a training split")
        statistics = data.manifest.statistics if normalize else None
        scaled_steps = None if self.unit == "step" else layers  # rows find their own scale
        self._decoding = Decoding.of(field, scaled_steps, statistics, dtype, self.device, row_layers)
        # On the way to a GPU, padding would be more bytes to copy. On the CPU, records are read straight into padded rows.
        self._decodes_in_dali = (
            on_gpu
            and self._decoding.in_dali
            and field.dtype not in NOT_FOR_DALI
            and data.schema.layer_axis is None
            and not self.packed
            and not self.budgeted
            and not (self.unit == "step" and field_scales_by_step(data.schema))
        )
        self._pads_in_dali = self._decodes_in_dali and not equal_lengths
        # in a resident window; a layer axis is moved to its place when a batch is taken, and constants fit only there
        self._decodes_at_load = self.device.type == "cuda" and data.schema.layer_axis is None
        wanted = options.wanted(layers, None if row_layers is None else row_layers[1])
        if self._index is None:
            self._source = source = SequenceSource(self.selection, data.schema, wanted)
        else:
            self._source = source = StepSource(self.selection, data.schema, wanted, index=self._index)
        longest = max(1, num_steps[1]) if num_steps is not None and self.unit == "record" else 1
        chosen = len(select(layers, longest)) if self.unit == "record" and num_steps is not None else 1
        self._share_read = source.row_bytes / max(1, field.row_bytes) * chosen / longest
        self._record_bytes = record_bytes = self.selection.record_bytes if self._index is None else source.row_bytes
        batch_bytes = int(self.batch_size * record_bytes)
        self._longest_superbatch = max(1, min(SUPERBATCH_STEPS, SUPERBATCH_BYTES // max(1, batch_bytes)))
        if max_steps is not None:
            row_bytes = record_bytes / max(1, num_steps[1] if num_steps is not None else 1)
            self._longest_superbatch = max(1, min(SUPERBATCH_STEPS, int(SUPERBATCH_BYTES // max(1, max_steps * row_bytes))))
        caller_bytes = 0 if self._decoding.idle and engine == "torch" else record_bytes  # bytes per record that it decodes
        self._threads = background_threads(self.device, caller_bytes, self.num_workers)
        busy = self._threads + (DALI_THREADS if engine == "dali" else 0)
        decodes = self.device.type == "cpu" and not self._decoding.idle
        self.cores = cores_beside(busy if decodes else 0)  # for torch in the caller's thread
        if self.device.type == "cuda":
            longest = len(select(None if self.unit == "step" else layers, num_steps[1])) if num_steps is not None else 1
            nbytes = self.batch_size * longest * source.row_bytes // field.storage.itemsize * dtype.itemsize
            check_memory(self.device, nbytes, f"a batch of {self.batch_size} sequences of {longest} steps")
            source.use(Buffers(pinned=True))
        bits, skips = self._decoding.bfloat16, self.skips
        self._padded: Padded = "packed" if self.packed else None if self._pads_in_dali else "batch"
        self._superbatches = SequenceGatherer(source, self.world, self.batch_size, self._padded, bits=bits, skips=skips)
        self._memories: Memories[WindowMemory | StepMemory] = Memories()
        self._choose_window(window)

    def _count(self, options: LoaderOptions) -> Ints:
        if options.unit == "record":
            return super()._count(options)
        schema, name = self.data.schema, None if options.mask is None else f"step.{options.mask}"
        numbers = [known.partition(".")[2] for known, stored in schema.step_fields.items() if not stored.shape]
        every = [known.partition(".")[2] for known in schema.step_fields]
        for argument, given, fit, kind in (
            ("mask", options.mask, numbers, " of one number per step"),
            ("labels", options.labels, every, ""),
        ):
            if given is not None and given not in fit:
                known = ", ".join(fit) or "none, as there are none"
                raise UsageError(f"{argument} is {given!r}; expected a step field{kind}: {known}")
        self._labels = options.labels
        self._index = StepIndex(self.selection, schema, self._chosen(options.layers, options.steps)[0], name)
        if self.selection.num_records and not self._index.num_steps:
            left = "are empty" if name is None else f"have no step whose {options.mask!r} is not zero"
            raise DataError(f"all records of split {self.split!r} of {self.data.root} {left}; expected some steps to deliver")
        return self._index.counts

    def _expected(self) -> EpochDigest:
        return super()._expected() if self._index is None else self._index.expected()

    def _chosen(self, layers: Layers, steps: Layers) -> tuple[Layers, tuple[int, list[int]] | None]:
        """Return the positions of the steps to read; and, if an axis of the rows is named layer, that axis and its positions.

        Raises UsageError if layers are asked for and no axis is named layer, DataError for layers that are not there.
        """
        data, schema = self.data, self.data.schema
        if layers is None:
            return steps, None
        if schema.layer_axis is not None and schema.sequence is not None:
            numbers = schema.layers or range(schema.sequence.shape[schema.layer_axis])
            try:
                return steps, (schema.layer_axis, to_positions(layers, numbers))
            except DataError as error:
                raise DataError(f"{error} in split {self.split!r} of {data.root}") from None
        if steps is not None:
            raise UsageError(f"layers and steps both choose steps of {data.root}, as no axis of a step is a layer; give one")
        if schema.steps != "layer" and data.manifest.version > 1:
            raise UsageError(
                f"layers are {shown(layers)}, and {data.root} has no axis named layer: its steps are named {schema.steps!r}; "
                "expected steps="
            )
        if schema.steps != "layer" and data.layer_numbers(self.kind) is None:
            _warn_of_steps(str(data.root))
        return self._positions(layers, "step"), None

    def _batch_view(self, values: torch.Tensor, steps: int) -> torch.Tensor:
        """Return the gathered rows of one batch, each record padded to `steps` steps, as (B, steps, *row)."""
        axis, parts = self.data.schema.layer_axis, self._source.parts_per_record
        records = len(values) // max(1, steps * parts)
        if axis is None or not self._source.layered:
            return values.view(records, steps, *values.shape[1:])
        return values.view(records, parts, steps, *values.shape[1:]).movedim(1, 2 + axis)

    def gathered(self, plan: EpochPlan, step: int) -> Superbatch:
        """Gather one batch as stored, and pad it even if the loader leaves padding to DALI."""
        bits = self._decoding.bfloat16
        padded = SequenceGatherer(self._source, self.world, self.batch_size, "batch", bits=bits, skips=self.skips)
        loaded, error = padded.gather(plan, Part(range(step, step + 1)))
        if error is not None:
            raise error
        return loaded[0]

    def decoded(self, gathered: Superbatch) -> torch.Tensor:
        """Decode a gathered batch with torch: (B, T, F) in the loader's dtype, on its device."""
        values = self._batch_view(torch.from_numpy(gathered.rows.values), gathered.longest[0])
        with on_threads(self.cores):
            return self._decoding.run(values.to(self.device), gathered.rows.lengths)

    def _batches(self, plan: EpochPlan, start: Position) -> Generator[LoadedBatch[SequenceBatch], None, None]:
        batches = self._on_device(plan, start)
        if self.device.type == "cuda" and self.engine == "torch":  # DALI has a stream of its own
            return a_batch_ahead(batches, lambda loaded: loaded.batch.tensors(), self.device)
        return batches

    def _window_pays(self) -> bool:
        if self._index is not None:
            return True  # a gather reads row by row
        shortest, longest = self.selection.bounds("step") or (1, 1)
        steps = self.batch_size * longest if self.order.max_steps is None else max(longest, self.order.max_steps)
        padded_bytes = steps * self._source.row_bytes  # a batch as stored, with its longest record
        if shortest != longest and padded_bytes > SUPERBATCH_BYTES:
            return False
        if self.device.type == "cpu" and self.selection.cache_bytes is None:
            most = 2 * self.order.window_bytes * self.order.num_partitions  # more than slots hold; saves a look at all runs
            small = 0 < self.selection.nbytes.sum() <= most
            residency = self._residency(self._first_plan) if small else None
            if residency is not None and residency.whole:  # later epochs copy each record once, from memory
                return self._affords(residency)
            if self.engine == "dali":  # which copies every piece once more on a CPU
                return self._spills()
        return super()._window_pays()

    def _window_nbytes(self, residency: Residency) -> int:
        per_step = self._source.row_bytes // self._source.unit.storage.itemsize * self.dtype.itemsize
        if self._index is not None:
            return residency.num_records * per_step
        return self._slot_steps(residency) * residency.num_slots * per_step

    def _slot_steps(self, residency: Residency) -> int:
        """Return the steps that a slot of the window has room for; if lengths differ, some more than its bytes can hold."""
        shortest, longest = self.selection.bounds("step") or (1, 1)
        most = len(select(self._steps, longest))
        if shortest == longest:
            return residency.slot_records * most
        assert self.data.schema.sequence is not None
        by_bytes = RAGGED_ROOM * residency.slot_bytes / max(1, self.data.schema.sequence.row_bytes)
        return min(residency.slot_records * most, int(by_bytes) + 2 * most)

    def _on_device(self, plan: EpochPlan, start: Position) -> Generator[LoadedBatch[SequenceBatch], None, None]:
        with UnderWay(self.device) as under_way:
            residency = self._residency(plan) if self.window == "resident" else None
            self._window_fails |= residency is None
            if residency is not None:  # the groups of an epoch may be too many where those of another are not
                yield from self._through_window(residency, start, under_way)
                return
            through = self._through_dali if self.engine == "dali" else self._through_torch
            with closing(self._read_ahead(plan, start)) as loaded:
                yield from through(loaded, under_way)

    def _through_window(
        self, residency: Residency, start: Position, under_way: UnderWay
    ) -> Generator[LoadedBatch[SequenceBatch], None, None]:
        """Yield batches from the resident window; gather those whose records it could not read."""
        plan = residency.plan
        memory = self._memory_of(residency)
        window = (ResidentWindow if self._index is None else StepWindow)(
            memory,
            residency,
            self._window_start(start),
            self._source,
            decoding=self._decoding if self._decodes_at_load and not self._decodes_in_dali else None,
            device=self.device,
            threads=self._window_threads,
            record_bytes=self._record_bytes,
            bits=self._decoding.bfloat16,
            under_way=under_way,
            through_dali=self._pieces_through_dali if self.engine == "dali" else None,
        )
        served = self._steps_served if not self.budgeted else self._budget_served
        holds_all = False
        try:
            with closing(window), closing(served(window, plan, start, under_way)) as batches:
                yield from batches
            holds_all = window.holds_all
        finally:
            self._memories.give_back(memory, kept=holds_all)

    def _steps_served(
        self, window: ResidentWindow, plan: EpochPlan, start: Position, under_way: UnderWay
    ) -> Generator[LoadedBatch[SequenceBatch], None, None]:
        """Yield the batches of all steps."""
        step, most = start.step, SUPERBATCH_STEPS
        if self._index is not None:
            most = max(1, min(most, SUPERBATCH_ROWS // self.batch_size))
        rank, world_size = self.world.rank, self.world.world_size
        ranges = superbatches(range(start.step, plan.num_steps), most)
        threads = min(1, self._window_threads)
        ordered = map_ahead(lambda steps: plan.batches(steps, rank, world_size), ranges, threads, name="order")
        with closing(ordered):
            for shares in ordered:
                end = step + len(shares.positions) // self.batch_size
                while step < end:
                    steps = range(step, min(window.reach(step), end))
                    own, shares = shares.cut(len(steps) * self.batch_size)
                    portion = Portion(shares=own, sizes=np.full(len(steps), self.batch_size))
                    batches = (
                        self._from_window(window, portion)
                        if window.serves(steps)
                        else self._gather_steps(plan, steps, under_way)
                    )
                    for loaded in batches:
                        yield loaded
                        window.passed(range(step, step + 1))
                        step += 1
                    self._window_fails |= window.fails

    def _budget_served(
        self, window: ResidentWindow, plan: EpochPlan, start: Position, under_way: UnderWay
    ) -> Generator[LoadedBatch[SequenceBatch], None, None]:
        """Yield the batches that a budget fills."""
        budget = self._budget(plan)
        for packed, served in self._packed_from_window(window, budget, start, self._longest_superbatch, self._most_records):
            if served:
                batches = self._from_window(window, budget.portion(packed))
            else:
                batches = self._gather_packed(budget, packed, under_way)
            for loaded, batch in zip(batches, packed, strict=True):
                yield loaded
                if self._by_record:
                    window.passed(range(batch.begin, batch.end))

    def _window_memory(self, residency: Residency) -> WindowMemory | StepMemory:
        source, (shortest, longest) = self._source, self.selection.bounds("step") or (1, 1)
        stored = torch.int16 if self._decoding.bfloat16 else torch_type(source.unit.storage)
        shape = Shape(
            steps=len(select(self._steps, longest)) if shortest == longest else None,
            parts=source.parts_per_record,
            row=source.unit.shape,
            dtype=self.dtype if self._decodes_at_load else stored,
        )
        if self._index is not None:
            return StepMemory.of(replace(shape, steps=None), source, self.data.schema, residency, self.device)
        return WindowMemory.of(shape, source, self.data.schema, residency, self._slot_steps(residency), self.device)

    def _pieces_through_dali(self, feed: Callable[[], Any]) -> Generator[torch.Tensor, None, None]:
        """Yield the output of DALI for each piece that `feed` returns."""
        iterator = self._dali(feed, batch_size=1, decoding=self._decoding if self._decodes_in_dali else None)
        with belonging_to_this_process(iterator):
            for (out,) in spans("dali", iterator):
                yield out["sequences"][0]

    def _from_window(self, window: ResidentWindow, portion: Portion) -> Iterator[LoadedBatch[SequenceBatch]]:
        superbatch, index, counts = window.superbatch(portion, packed=self.packed)
        parts, longest = self._source.parts_per_record, superbatch.longest

        def values(index: torch.Tensor) -> Iterator[torch.Tensor]:
            for rows, steps in zip(torch.split(index, counts), longest, strict=True):
                with span("select"):
                    selected = window.select(rows, packed=self.packed)
                yield self._batch_view(selected, len(selected) // parts if self.packed else steps)

        return self._deliver(superbatch, values, [torch.from_numpy(index)], decoded=self._decodes_at_load)

    def _gather_steps(self, plan: EpochPlan, steps: range, under_way: UnderWay) -> Iterator[LoadedBatch[SequenceBatch]]:
        """Gather the batches of these steps."""
        bits, padded = self._decoding.bfloat16, cast("Padded", "packed" if self.packed else "batch")
        gatherer = SequenceGatherer(self._source, self.world, self.batch_size, padded, bits=bits, skips=self.skips)
        for part in gatherer.parts(plan, steps):
            loaded, error = gatherer.gather(plan, part)
            for superbatch in loaded:
                yield from self._torch_batches(superbatch, under_way)
            if error is not None:
                raise error

    def _gather_packed(
        self, budget: BudgetPlan, packed: list[Packed], under_way: UnderWay
    ) -> Iterator[LoadedBatch[SequenceBatch]]:
        """Gather batches that a budget has filled."""
        loaded, error = self._superbatches.gather_packed(budget, packed)
        for superbatch in loaded:
            yield from self._torch_batches(superbatch, under_way)
        if error is not None:
            raise error

    @property
    def _most_records(self) -> int:
        """Records of a superbatch with a budget."""
        return max(1, SUPERBATCH_BYTES // max(1, int(self.selection.record_bytes)))

    def _read_ahead(self, plan: EpochPlan, start: Position) -> Loaded:
        """Yield superbatches in order, split so that their batches need little padding."""
        ranges = superbatches(range(start.step, plan.num_steps), self._longest_superbatch)
        planned = map_ahead(partial(self._superbatches.parts, plan), ranges, min(1, self._threads))
        with closing(planned):
            parts = chain.from_iterable(planned)
            results = map_ahead(partial(self._superbatches.gather, plan), parts, self._threads, _nbytes)
            if self.budgeted:
                budget = self._budget(plan)
                filled = self._packed_batches(budget, start, self._longest_superbatch, self._most_records)
                results = map_ahead(partial(self._superbatches.gather_packed, budget), filled, self._threads)
            with closing(results):
                for loaded, error in results:
                    while loaded:  # no local name keeps a superbatch alive while the next one is gathered
                        yield loaded.pop(0)
                    if error is not None:
                        raise error

    def _lengths(self, positions: Ints) -> Ints:
        return self._superbatches.lengths(positions)

    def _through_torch(self, loaded: Loaded, under_way: UnderWay) -> Iterator[LoadedBatch[SequenceBatch]]:
        return chain.from_iterable(
            map(self._torch_batches, loaded, repeat(under_way))
        )  # keeps no superbatch alive while the next one is gathered

    def _torch_batches(self, superbatch: Superbatch, under_way: UnderWay) -> Iterator[LoadedBatch[SequenceBatch]]:
        values = torch.from_numpy(superbatch.rows.values)
        try:
            split = self._decode_unpadded if superbatch.sparse else self._split
            yield from self._deliver(superbatch, lambda: split(superbatch, values), decoded=superbatch.sparse)
        finally:
            under_way.keep(values)

    def _split(self, superbatch: Superbatch, values: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the values (B, T, *row) of each batch on the device, from the values of a superbatch."""
        parts = self._source.parts_per_record
        rows = superbatch.rows_per_batch if self.packed else superbatch.padded_rows
        for batch, steps in zip(torch.split(values, [parts * count for count in rows]), superbatch.longest, strict=True):
            with span("copy", self.device.type != "cpu"):
                moved = batch.to(self.device, non_blocking=True)
            yield self._batch_view(moved, len(moved) // parts if self.packed else steps)

    def _decode_unpadded(self, superbatch: Superbatch, values: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the decoded values of the only batch of a superbatch that was gathered without padding."""
        with span("copy", self.device.type != "cpu"):
            values = values.to(self.device, non_blocking=True)
        with span("decode"), on_threads(self.cores):
            yield self._decoding.spread(values, superbatch.rows.starts, superbatch.rows.lengths)

    def _through_dali(self, loaded: Loaded, under_way: UnderWay) -> Iterator[LoadedBatch[SequenceBatch]]:
        # One pipeline per epoch: building it takes about 10 ms, and nothing that was read ahead can outlive its epoch.
        ahead: deque[Superbatch] = deque()  # superbatches that DALI reads from, so they must stay unchanged
        passing: deque[Superbatch] = deque()  # superbatches that bypass DALI, once DALI is empty
        failures: list[BaseException] = []

        def feed() -> Array | list[Array]:
            """Return the next superbatch; an error ends DALI's epoch and is raised after the preceding batches."""
            try:
                superbatch = None if passing or failures else next(loaded, None)
            except BaseException as error:
                failures.append(error)
                superbatch = None
            if superbatch is not None and superbatch.lone and not self._decodes_in_dali:
                passing.append(superbatch)  # DALI would only copy it, and keep several copies
            if superbatch is None or passing:
                raise StopIteration
            ahead.append(superbatch)
            return self._samples(superbatch)

        # a sample is a record if DALI pads, a batch if DALI only decodes, otherwise a whole superbatch
        samples = self._longest_superbatch if self._decodes_in_dali else 1
        iterator = self._dali(
            feed,
            batch_size=samples * self.batch_size if self._pads_in_dali else samples,
            decoding=self._decoding if self._decodes_in_dali else None,
            pads=self._pads_in_dali,
        )
        with belonging_to_this_process(iterator):
            while True:
                for (out,) in spans("dali", iterator):
                    superbatch = ahead.popleft()
                    values = partial(self._dali_values, superbatch, out["sequences"])
                    yield from self._deliver(superbatch, values, decoded=self._decodes_in_dali)
                if failures:
                    raise failures[0]
                if not passing:
                    return
                yield from self._torch_batches(passing.popleft(), under_way)
                iterator.reset()

    def _dali(self, feed: Callable[[], Any], *, batch_size: int, decoding: Decoding | None, pads: bool = False) -> Any:
        """Return an iterator over DALI's outputs for the samples that `feed` returns."""
        pipeline = sequence_graph(
            feed,
            decoding=decoding,
            pads=pads,
            batch_size=batch_size,
            num_threads=DALI_THREADS,
            device_id=device_id(self.device),
            prefetch_queue_depth=PREFETCH_SUPERBATCHES,
        )
        return iterate(pipeline)

    def _samples(self, superbatch: Superbatch) -> Array | list[Array]:
        """Return the samples for external_source: one per record if DALI pads, per batch if it only decodes, otherwise one."""
        if self._pads_in_dali:
            return superbatch.records()
        return superbatch.batches() if self._decodes_in_dali else superbatch.rows.values[None]

    def _dali_values(self, superbatch: Superbatch, values: torch.Tensor) -> Iterable[torch.Tensor]:
        """Return the values (B, T, *row) of each batch, from DALI's output for a superbatch."""
        if not self._decodes_in_dali:
            return self._split(superbatch, values[0])
        if self._pads_in_dali:
            values = values.view(-1, self.batch_size, *values.shape[1:])
        return (batch[:, :steps] for batch, steps in zip(values.unbind(), superbatch.longest, strict=True))

    def _deliver(
        self,
        superbatch: Superbatch,
        values: Callable[..., Iterable[torch.Tensor]],
        moved_along: Sequence[torch.Tensor] = (),
        *,
        decoded: bool,
    ) -> Iterator[LoadedBatch[SequenceBatch]]:
        """Yield the batches of a superbatch.

        Args:
            superbatch: The batches.
            values: Function that yields the values of each batch, (B, T, *row), from `moved_along` on the device.
            moved_along: Tensors that are moved to the device together with labels and fields.
            decoded: Whether the values are decoded already.
        """
        rows, sizes, schema = superbatch.rows, superbatch.sizes.tolist(), self.data.schema
        hashes = rows.hashes if rows.steps is None else step_hashes(rows.hashes, rows.steps)
        small = [*moved_along, torch.from_numpy(superbatch.valid)]
        small += [] if rows.labels is None else [torch.from_numpy(rows.labels)]
        with span("copy", self.device.type != "cpu"):
            small, all_fields = moved_with_fields(small, rows.fields, schema, self.dtype, self.device)
        by_batch = zip(
            superbatch.begins,
            sizes,
            values(*small[: len(moved_along)]),
            torch.split(small[len(moved_along)], sizes),
            repeat(None) if rows.labels is None else torch.split(small[-1], sizes),
            torch.split(torch.from_numpy(rows.lengths), sizes),
            torch.split(torch.from_numpy(rows.positions), sizes),
            cut_fields(
                all_fields, schema, sizes, superbatch.rows_per_batch if self.packed else superbatch.longest, packed=self.packed
            )
            if all_fields
            else repeat({}),
            superbatch.cursors or repeat(()),
            strict=False,
        )
        for begin, size, batch, valid, labels, lengths, positions, fields, cursors in by_batch:
            end = begin + size
            if not decoded:
                with nullcontext() if self._decoding.idle else span("decode"), self._on_threads():
                    ends = np.array([batch.shape[1]]) if self.packed else rows.lengths[begin:end]
                    decoding = self._decoding if rows.steps is None else self._decoding.of_steps(rows.steps[begin:end])
                    batch = decoding.run(batch, ends)
            cu_seqlens = None
            if self.packed:
                batch = batch[0]
                cu_seqlens = to_device(torch.from_numpy(ends_of(rows.lengths[begin:end]).astype(np.int32)), self.device)
            if rows.steps is not None:
                single = self._step_batch(batch, torch.from_numpy(rows.steps[begin:end]), fields, labels)
                delivered: Any = single(valid=valid, record_positions=positions)
                yield LoadedBatch(delivered, hashes[begin:end], superbatch.valid[begin:end], superbatch.left_out, cursors)
                continue
            delivered = SequenceBatch(
                sequences=batch if self._source.layered else batch.contiguous(),
                lengths=lengths,
                labels=cast("torch.Tensor", labels),
                valid=valid,
                ids=rows.ids[begin:end],
                positions=positions,
                fields=fields,
                cu_seqlens=cu_seqlens,
            )
            yield LoadedBatch(delivered, hashes[begin:end], superbatch.valid[begin:end], superbatch.left_out, cursors)

    def _step_batch(
        self, sequences: torch.Tensor, steps: torch.Tensor, fields: Fields, labels: Any
    ) -> Callable[..., StepBatch]:
        """Return the function that makes a batch of single steps from its sequences of one step, (N, 1, *row)."""
        values, axis = sequences[:, 0], self.data.schema.layer_axis
        if axis is not None and values.shape[1 + axis] == 1:
            values = values.squeeze(1 + axis)
        per_step = {name.partition(".")[2] for name in self.data.schema.step_fields}
        rows = {name: column[:, 0] if name in per_step else column for name, column in fields.items()}
        if self._labels is not None:
            own = rows.pop(self._labels)
            labels = own.to(torch.float32 if own.is_floating_point() else torch.int64)
        source = cast("StepSource", self._source)
        return partial(StepBatch, values=values.contiguous(), steps=steps, fields=rows, labels=labels, source=source)

    def _on_threads(self) -> AbstractContextManager[object]:
        return nullcontext() if self._decoding.idle else on_threads(self.cores)


def field_scales_by_step(schema: Schema) -> bool:
    """Return whether a sequence has a scale of its own for every step."""
    return schema.sequence is not None and schema.sequence.scales is not None and len(schema.sequence.scales) > 1


def _nbytes(part: Part) -> int:
    return part.nbytes
