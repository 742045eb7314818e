"""SequenceLoader: shards, through NVIDIA DALI, to batches of sequences on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, repeat
from typing import Any, Literal, get_args

import torch

from dali_pipeline.dataset.dataset import Dataset, View
from dali_pipeline.errors import DataError, FormatError, UsageError
from dali_pipeline.format.layers import Layers, select
from dali_pipeline.loaders.dali import check_dali, device_id, import_dali, iterate
from dali_pipeline.loaders.decoding import Decoding, sequence_graph
from dali_pipeline.loaders.delivery import OnError, OnNan, Workers, check_delivery, check_memory
from dali_pipeline.loaders.loader import Loader, Made, Position
from dali_pipeline.loaders.sidestream import UnderWay, a_batch_ahead, to_device
from dali_pipeline.reading.source import Padded, SequenceSource
from dali_pipeline.reading.stretch import STRETCH_BYTES, Part, Stretch, StretchGatherer, stretches
from dali_pipeline.runtime.ahead import background_threads, belonging_to_this_process, cores_beside, map_ahead, on_threads
from dali_pipeline.runtime.checks import one_of, truth
from dali_pipeline.runtime.memory import Buffers
from dali_pipeline.runtime.trace import span, spans
from dali_pipeline.sampling.order import WINDOW_BYTES, Tail
from dali_pipeline.sampling.plan import EpochPlan
from dali_pipeline.types import Array, Ints

Engine = Literal["dali", "torch"]
PREFETCH_STRETCHES = 2  # that DALI runs ahead
STRETCH_STEPS = 64
DALI_THREADS = 2
NOT_FOR_DALI = ("float64",)  # neither fn.pad nor the arithmetic of decoding does it


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceBatch:
    """One batch of one rank.

    sequences: (B, T, F) in the loader's dtype, on its device, zero behind a sequence's end; T is the batch's longest ·
    lengths: (B,) int64 on the CPU, where `pack_padded_sequence` wants them · labels: (B,) int64 and valid: (B,) bool on
    the device; a row that is not valid is padding and repeats a real record · ids: B texts · positions: (B,) int64 on the
    CPU, the records' numbers in their split.
    """

    sequences: torch.Tensor
    lengths: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor
    ids: list[str]
    positions: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of the sequences as delivered."""
        return self.sequences.nbytes

    def tensors(self) -> Iterator[torch.Tensor]:
        """Those that are on the loader's device."""
        yield from (self.sequences, self.labels, self.valid)

    def to(self, device: str | torch.device) -> SequenceBatch:
        """The batch on that device, `lengths` and `positions` still on the CPU; copies nothing that is there already.

        Lightning calls it with each batch, and would else write to the fields.
        """
        moved = {name: getattr(self, name).to(device) for name in ("sequences", "labels", "valid")}
        return replace(self, **moved)


Loaded = Generator[Stretch, None, None]


class SequenceLoader(Loader[SequenceBatch]):
    """Batches of a split's sequences; see `Loader` for epochs and state.

    batch_size: per rank, ceil(records / world_size) at most · layers: steps of each sequence to read, a slice or a list ·
    dtype: delivered · window_bytes: of shards that are shuffled together at a time · lanes: disjoint parts of the data with a
    window each, a node's share ·
    workers: threads that gather ahead, 0 for the caller's own; "auto" is one per four cores with a GPU, 4 at most; without one
    it is 1, or 0 on one core, and on two where
    records are below 32 KiB or come as they are stored · tail: "pad" the last batches or "drop" them · engine: "dali", or
    "torch", which delivers the same batches without DALI · rank, world_size: detected where not given · balance="label":
    labels in equal numbers; weights: of groups, 1 where not named; either makes an epoch as many draws as there are records.

    normalize: every feature to mean 0 and standard deviation 1 over the training split, as the manifest has them ·
    bucket_by_length: batches of like lengths, so less padding: up to 64 neighbouring batches, half a window at most, exchange
    records, then come in a random order · on_error: "skip" makes a record that cannot be read padding, and counts it in
    `left_out` and in the log named dali_pipeline · on_nan: the same for one that holds NaN or infinite values as
    stored (a narrower `dtype` may still make one infinite); "keep" does not look for them, which costs a pass over the values.

    Raises UsageError for an argument that makes no sense, or engine="dali" where DALI is not installed, PipelineError for a
    DALI that does not fit torch's CUDA, DataError for data without sequences, or without the statistics to
    normalize with; while iterating, FormatError for a damaged shard, DataError for NaN with on_nan="raise".
    """

    kind = "sequences"
    _source: SequenceSource

    def __init__(
        self,
        data: Dataset,
        split: str = "train",
        batch_size: int = 32,
        shuffle: bool = True,
        seed: int = 0,
        layers: Layers = None,
        device: str | torch.device = "auto",
        dtype: torch.dtype = torch.float32,
        window_bytes: int = WINDOW_BYTES,
        lanes: int = 1,
        workers: Workers = "auto",
        tail: Tail = "pad",
        engine: Engine = "dali",
        on_error: OnError = "raise",
        rank: int | None = None,
        world_size: int | None = None,
        balance: Literal["label"] | None = None,
        weights: Mapping[str, float] | None = None,
        on_nan: OnNan = "keep",
        normalize: bool = False,
        bucket_by_length: bool = False,
    ) -> None:
        one_of("engine", engine, get_args(Engine))
        if engine == "dali":
            import_dali()
        super().__init__(
            data,
            split=split,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            device=device,
            window_bytes=window_bytes,
            lanes=lanes,
            workers=workers,
            tail=tail,
            on_error=on_error,
            on_nan=on_nan,
            rank=rank,
            world_size=world_size,
            balance=balance,
            weights=weights,
            bucket_by_length=bucket_by_length,
        )
        on_gpu = engine == "dali" and self.device.type == "cuda"
        if on_gpu:
            check_dali()
        layers = self._positions(check_delivery(layers, dtype), "step")
        self.dtype, self.engine = dtype, engine
        steps = self.selection.bounds("step")
        equal_lengths = steps is not None and steps[0] == steps[1]
        field = data.schema.sequence
        assert field is not None
        if self.order.bucket_by_length and FormatError in self.skips:
            raise UsageError("on_error='skip' with bucket_by_length: the order would depend on what can be read; give one")
        if truth("normalize", normalize) and data.manifest.statistics is None:
            if isinstance(data, View) and data.mixed:
                raise DataError("a mix has no feature statistics, as those of its data sets differ; expected normalize=False")
            raise DataError(f"{data.root} has no feature statistics to normalize with; expected those of a training split")
        statistics = data.manifest.statistics if normalize else None
        self._decoding = Decoding.of(field, layers, statistics, dtype, self.device)
        # On the way to a GPU padding would be so many more bytes; on the CPU records are read to where they stand padded.
        self._decodes_in_dali = on_gpu and self._decoding.in_dali and field.dtype not in NOT_FOR_DALI
        self._pads_in_dali = self._decodes_in_dali and not equal_lengths
        record_bytes = self.selection.record_bytes
        batch_bytes = int(self.batch_size * record_bytes)
        self._longest_stretch = max(1, min(STRETCH_STEPS, STRETCH_BYTES // max(1, batch_bytes)))
        handled = 0 if self._decoding.idle and engine == "torch" else record_bytes  # by the caller
        self._threads = background_threads(self.device, handled, self.workers)
        busy = self._threads + (DALI_THREADS if engine == "dali" else 0)
        decodes = self.device.type == "cpu" and not self._decoding.idle
        self.cores = cores_beside(busy if decodes else 0)  # for torch in the caller's thread
        self._source = source = SequenceSource(
            self.selection, data.schema, layers, window_bytes=self.order.window_bytes, finite=on_nan != "keep"
        )
        if self.device.type == "cuda":
            longest = len(select(layers, steps[1])) if steps is not None else 1
            nbytes = self.batch_size * longest * source.row_bytes // field.storage.itemsize * dtype.itemsize
            check_memory(self.device, nbytes, f"a batch of {self.batch_size} sequences of {longest} steps")
            source.use(Buffers(pinned=True))
        bits, skips = self._decoding.bfloat16, self.skips
        padded: Padded = None if self._pads_in_dali else "batch"
        self._stretches = StretchGatherer(source, self.world, self.batch_size, padded, bits=bits, skips=skips)

    def _batches(self, plan: EpochPlan, start: Position) -> Generator[Made[SequenceBatch], None, None]:
        batches = self._moved(plan, start)
        if self.device.type == "cuda" and self.engine == "torch":  # DALI has a stream of its own
            return a_batch_ahead(batches, lambda made: made.batch.tensors(), self.device)
        return batches

    def _moved(self, plan: EpochPlan, start: Position) -> Generator[Made[SequenceBatch], None, None]:
        through = self._through_dali if self.engine == "dali" else self._through_torch
        with UnderWay(self.device) as under_way, closing(self._read_ahead(plan, start.step)) as loaded:
            yield from through(loaded, under_way)

    def _read_ahead(self, plan: EpochPlan, start: int) -> Loaded:
        """Stretches in order, cut by their padding, which is known from the lengths of many batches at once."""
        ranges = stretches(range(start, plan.num_steps), self._longest_stretch)
        planned = map_ahead(partial(self._stretches.parts, plan), ranges, min(1, self._threads))
        with closing(planned):
            parts = (part for found in planned for part in found)
            results = map_ahead(partial(self._stretches.gather, plan), parts, self._threads, _nbytes)
            with closing(results):
                for loaded, error in results:
                    while loaded:  # nothing here holds a stretch while the next is made
                        yield loaded.pop(0)
                    if error is not None:
                        raise error

    def _lengths(self, positions: Ints) -> Ints:
        return self._stretches.lengths(positions)

    def _through_torch(self, loaded: Loaded, under_way: UnderWay) -> Iterator[Made[SequenceBatch]]:
        return chain.from_iterable(map(self._in_torch, loaded, repeat(under_way)))  # holds no stretch while the next is made

    def _in_torch(self, stretch: Stretch, under_way: UnderWay) -> Iterator[Made[SequenceBatch]]:
        values = torch.from_numpy(stretch.rows.values)
        try:
            yield from self._made(stretch, self._spread(stretch, values) if stretch.sparse else self._cut(stretch, values))
        finally:
            under_way.keep(values)

    def _cut(self, stretch: Stretch, values: torch.Tensor) -> Iterator[torch.Tensor]:
        """The values (B, T, *row) of each batch, on the device, of those of all."""
        longest = stretch.longest
        for batch, steps in zip(torch.split(values, [self.batch_size * steps for steps in longest]), longest, strict=True):
            with span("copy", self.device.type != "cpu"):
                moved = batch.to(self.device, non_blocking=True)
            yield moved.view(self.batch_size, steps, *values.shape[1:])

    def _spread(self, stretch: Stretch, values: torch.Tensor) -> Iterator[torch.Tensor]:
        """The decoded values of the one batch that came without padding."""
        with span("copy", self.device.type != "cpu"):
            values = values.to(self.device, non_blocking=True)
        with span("decode"), on_threads(self.cores):
            yield self._decoding.spread(values, stretch.rows.starts, stretch.rows.lengths)

    def _through_dali(self, loaded: Loaded, under_way: UnderWay) -> Iterator[Made[SequenceBatch]]:
        # A pipeline an epoch: building one takes about 10 ms, and nothing read ahead can outlive its epoch.
        ahead: deque[Stretch] = deque()  # what DALI has in hand; it reads from these very arrays
        passing: deque[Stretch] = deque()  # what goes past DALI, once it is empty
        failures: list[BaseException] = []

        def feed() -> Array | list[Array]:
            """One stretch for external_source; an error ends DALI's epoch and is raised behind the batches before it."""
            try:
                stretch = None if passing or failures else next(loaded, None)
            except BaseException as error:
                failures.append(error)
                stretch = None
            if stretch is not None and stretch.lone and not self._decodes_in_dali:
                passing.append(stretch)  # DALI would only copy it, and hold several
            if stretch is None or passing:
                raise StopIteration
            ahead.append(stretch)
            return self._samples(stretch)

        iterator = self._dali(feed)
        with belonging_to_this_process(iterator):
            while True:
                for (out,) in spans("dali", iterator):
                    stretch = ahead.popleft()
                    yield from self._made(stretch, self._out_of_dali(stretch, out["sequences"]))
                if failures:
                    raise failures[0]
                if not passing:
                    return
                yield from self._in_torch(passing.popleft(), under_way)
                iterator.reset()

    def _dali(self, feed: Callable[[], Array | list[Array]]) -> Any:
        """An iterator over what DALI makes of what `feed` gives."""
        pipeline = sequence_graph(
            feed,
            decoding=self._decoding if self._decodes_in_dali else None,
            pads=self._pads_in_dali,
            batch_size=self._longest_stretch * (self.batch_size if self._pads_in_dali else 1) if self._decodes_in_dali else 1,
            num_threads=DALI_THREADS,
            device_id=device_id(self.device),
            prefetch_queue_depth=PREFETCH_STRETCHES,
        )
        return iterate(pipeline)

    def _samples(self, stretch: Stretch) -> Array | list[Array]:
        """What external_source takes: a sample per record or batch for DALI to work on, else one in all."""
        if self._pads_in_dali:
            return stretch.records()
        return stretch.batches() if self._decodes_in_dali else stretch.rows.values[None]

    def _out_of_dali(self, stretch: Stretch, values: torch.Tensor) -> Iterable[torch.Tensor]:
        """The values (B, T, *row) of each batch, of DALI's output for a stretch."""
        if not self._decodes_in_dali:
            return self._cut(stretch, values[0])
        if self._pads_in_dali:
            values = values.view(-1, self.batch_size, *values.shape[1:])
        return (batch[:, :steps] for batch, steps in zip(values.unbind(), stretch.longest, strict=True))

    def _made(self, stretch: Stretch, values: Iterable[torch.Tensor]) -> Iterator[Made[SequenceBatch]]:
        """A stretch's batches, of the values of each."""
        rows, size = stretch.rows, self.batch_size
        on_cpu = [torch.from_numpy(each) for each in (rows.labels, stretch.valid, rows.lengths, rows.positions)]
        with span("copy", self.device.type != "cpu"):
            on_device = [to_device(each, self.device) for each in on_cpu[:2]]
        alike = (torch.split(each, size) for each in on_device + on_cpu[2:])
        for begin, batch, label, kept, length, position in zip(stretch.begins, values, *alike, strict=True):
            end = begin + size
            if not (self._decodes_in_dali or stretch.sparse):
                with span("decode"), on_threads(self.cores):
                    batch = self._decoding.run(batch, rows.lengths[begin:end])
            ids = rows.ids[begin:end]
            delivered = SequenceBatch(
                sequences=batch.contiguous(), lengths=length, labels=label, valid=kept, ids=ids, positions=position
            )
            yield Made(delivered, ids, stretch.valid[begin:end], stretch.left_out)


def _nbytes(part: Part) -> int:
    return part.nbytes
