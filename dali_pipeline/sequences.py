"""SequenceLoader: shards, through NVIDIA DALI, to batches of sequences on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch

from dali_pipeline.ahead import belonging_to_this_process, map_ahead
from dali_pipeline.dataset import Dataset
from dali_pipeline.digest import Mask
from dali_pipeline.loader import Loader, Workers, check_delivery
from dali_pipeline.order import WINDOW_BYTES, Tail
from dali_pipeline.plan import EpochPlan, Shares
from dali_pipeline.schema import Array, UsageError
from dali_pipeline.source import Layers, SequenceRows, SequenceSource

Engine = Literal["dali", "torch"]
Loaded = Iterator[tuple[SequenceRows, Shares]]
PREFETCH_BATCHES = 2  # that DALI runs ahead
PADDED_BEFORE_DALI = ("float64",)  # fn.pad does not know it
DALI_DTYPES = {torch.float16: "FLOAT16", torch.float32: "FLOAT"}


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

    def to(self, device: str | torch.device) -> SequenceBatch:
        """The batch on that device, `lengths` and `positions` still on the CPU; copies nothing that is there already.

        Lightning calls it with each batch, and would else write to the fields.
        """
        moved = {name: getattr(self, name).to(device) for name in ("sequences", "labels", "valid")}
        return replace(self, **moved)


class SequenceLoader(Loader[SequenceBatch]):
    """Batches of a split's sequences; see `Loader` for epochs and state.

    batch_size: per rank · layers: steps of each sequence to read, a slice or a list · dtype: delivered · window_bytes: of
    shards that are shuffled together at a time · lanes: disjoint parts of the data with a window each, a node's share ·
    workers: threads that gather ahead, 0 for the caller's own · tail: "pad" the last batches or "drop" them · engine: "dali",
    or "torch", which delivers the same batches without DALI · rank, world_size: detected where not given · balance="label":
    labels in equal numbers; weights: of groups, 1 where not named; either makes an epoch as many draws as there are records.

    Raises UsageError for an argument that makes no sense, DataError for data without sequences; while iterating,
    FormatError for a damaged shard.
    """

    kind = "sequences"

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
        on_error: str = "raise",
        rank: int | None = None,
        world_size: int | None = None,
        balance: Literal["label"] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        if engine not in get_args(Engine):
            raise UsageError(f"engine is {engine!r}; expected 'dali' or 'torch'")
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
            rank=rank,
            world_size=world_size,
            balance=balance,
            weights=weights,
        )
        check_delivery(layers, dtype)
        self.dtype, self.engine = dtype, engine
        steps = self.selection.bounds("step")
        equal_lengths = steps is not None and steps[0] == steps[1]  # then padding would be one more copy
        assert data.schema.sequence is not None
        self._pads_in_dali = not equal_lengths and data.schema.sequence.dtype not in PADDED_BEFORE_DALI
        self._source = SequenceSource(self.selection, data.schema, layers, window_bytes=window_bytes)

    def _batches(self, plan: EpochPlan, start: int) -> Iterator[tuple[SequenceBatch, list[str], Mask]]:
        def load(step: int) -> tuple[SequenceRows, Shares]:
            shares = plan.batch(step, self.world.rank, self.world.world_size)
            return signed(self._source.gather(shares.positions)), shares

        loaded = map_ahead(load, range(start, plan.num_steps), 1 if self.workers == "auto" else self.workers)
        try:
            yield from (self._through_dali if self.engine == "dali" else self._through_torch)(loaded)
        finally:
            loaded.close()

    def _through_torch(self, loaded: Loaded) -> Iterator[tuple[SequenceBatch, list[str], Mask]]:
        for rows, shares in loaded:
            batch = self._batch(
                pad(torch.from_numpy(rows.values), torch.from_numpy(rows.lengths)).to(self.device).to(self.dtype),
                torch.from_numpy(rows.labels).to(self.device),
                torch.from_numpy(shares.valid).to(self.device),
                rows,
            )
            yield batch, rows.ids, shares.valid

    def _through_dali(self, loaded: Loaded) -> Iterator[tuple[SequenceBatch, list[str], Mask]]:
        # A pipeline an epoch: building one takes about 10 ms, and nothing read ahead can outlive its epoch.
        from nvidia.dali.plugin.pytorch import DALIGenericIterator

        ahead: deque[tuple[SequenceRows, Shares]] = deque()
        failures: list[BaseException] = []

        def feed() -> tuple[Any, Array, Array]:
            """One batch for external_source; an error ends DALI's epoch and is raised behind the batches before it."""
            try:
                rows, shares = next(loaded)
            except StopIteration:
                raise
            except BaseException as error:
                failures.append(error)
                raise StopIteration from None
            ahead.append((rows, shares))
            return samples(rows), rows.labels, shares.valid

        pipeline = sequence_graph(
            feed,
            cast=DALI_DTYPES.get(self.dtype) if self.device.type == "cuda" else None,
            pads=self._pads_in_dali,
            batch_size=self.batch_size,
            num_threads=2,
            device_id=(self.device.index or 0) if self.device.type == "cuda" else None,
            prefetch_queue_depth=PREFETCH_BATCHES,
        )
        names = ["sequences", "labels", "valid"]
        iterator = DALIGenericIterator([pipeline], names, size=-1, auto_reset=False, prepare_first_batch=False)
        with belonging_to_this_process(iterator):
            for (out,) in iterator:
                rows, shares = ahead.popleft()
                batch = self._batch(out["sequences"].to(self.dtype), out["labels"], out["valid"], rows)
                yield batch, rows.ids, shares.valid
        if failures:
            raise failures[0]

    def _batch(self, sequences: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor, rows: SequenceRows) -> SequenceBatch:
        return SequenceBatch(
            sequences=sequences,
            lengths=torch.from_numpy(rows.lengths),
            labels=labels,
            valid=valid,
            ids=rows.ids,
            positions=torch.from_numpy(rows.positions),
        )


def sequence_graph(feed: Callable[[], tuple[Any, Array, Array]], *, cast: str | None, pads: bool, **pipeline: Any) -> Any:
    """The DALI graph: external_source, cast, pad; on the GPU where `device_id` names one, else on the CPU.

    feed: gives values (a (B, T, F) array, or a list of (T_i, F)), labels (B,) and valid (B,), or raises StopIteration.
    cast: a `types.DALIDataType` name, or None; on the CPU torch casts three times faster, so the loader asks for none there.
    pads: whether to fill sequences up to the batch's longest; where False, they come in equal lengths.
    """
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(**pipeline)  # type: ignore[untyped-decorator]
    def graph() -> tuple[Any, ...]:
        values, labels, valid = fn.external_source(feed, num_outputs=3, batch=True)
        if pipeline["device_id"] is not None:
            values, labels, valid = values.gpu(), labels.gpu(), valid.gpu()
        if cast is not None:
            values = fn.cast(values, dtype=getattr(types, cast))
        if pads:
            values = fn.pad(values, axes=(0,), fill_value=0)
        return values, labels, valid

    return graph()


def samples(rows: SequenceRows) -> Array | list[Array]:
    """What external_source takes: one (B, T, F) array where all lengths are equal, else B views (T_i, F).

    Types that DALI cannot pad are padded here.
    """
    count, longest = len(rows.lengths), int(rows.lengths.max())
    if longest * count == len(rows.values):
        return rows.values.reshape(count, longest, *rows.values.shape[1:])
    if rows.values.dtype.name in PADDED_BEFORE_DALI:
        return pad(torch.from_numpy(rows.values), torch.from_numpy(rows.lengths)).numpy()
    return np.split(rows.values, np.cumsum(rows.lengths)[:-1])


def signed(rows: SequenceRows) -> SequenceRows:
    """uint16 and uint32 in the next wider signed type: neither DALI nor torch does much with them."""
    wider = {"uint16": np.int32, "uint32": np.int64}.get(rows.values.dtype.name)
    return rows if wider is None else replace(rows, values=rows.values.astype(wider))


def pad(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(sum of lengths, F) to (B, T, F), zeros behind each end; a view where all lengths are equal."""
    count, longest = len(lengths), int(lengths.max())
    if longest * count == len(values):
        return values.view(count, longest, *values.shape[1:])
    padded = values.new_zeros(count, longest, *values.shape[1:])
    padded[torch.arange(longest) < lengths[:, None]] = values
    return padded
