"""GraphLoader: shards, through parallel torch workers, to PyG batches on the device."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch_geometric.data import Batch, Data

from dali_pipeline.ahead import belonging_to_this_process, map_ahead
from dali_pipeline.damage import without_damaged
from dali_pipeline.dataset import Dataset
from dali_pipeline.delivery import check_delivery
from dali_pipeline.encoding import BFLOAT16
from dali_pipeline.layers import Layers
from dali_pipeline.loader import Loader, Made, OnError, OnNan, Workers
from dali_pipeline.order import WINDOW_BYTES, Tail
from dali_pipeline.plan import EpochPlan
from dali_pipeline.rows import GraphRows
from dali_pipeline.schema import PipelineError
from dali_pipeline.source import GraphSource

PREFETCH_BATCHES = 2  # a worker
Wire = dict[str, torch.Tensor | list[str]]  # what comes from a thread or process: arrays as stored, and ids


@dataclass(frozen=True, kw_only=True, eq=False)
class GraphBatch:
    """One batch of one rank, on the loader's device but for `positions`.

    graphs: a PyG `Batch` of all graphs of all records, record-major, then layer: x (N, F), edge_index (2, E) int64,
    edge_attr, batch (N,), ptr (G + 1,); `to_data_list()` gives them one by one · graphs_per_record: (B,) int64 ·
    layer_index: (G,) int64, the graph's number in its stored record · last_node: (G,) int64, each graph's last node in x ·
    labels: (B,) int64 · valid: (B,) bool; a record that is not valid is padding and repeats a real one · ids: B texts ·
    positions: (B,) int64 on the CPU, the records' numbers in their split.
    """

    graphs: Batch
    graphs_per_record: torch.Tensor
    layer_index: torch.Tensor
    last_node: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor
    ids: list[str]
    positions: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of the node features, edges and edge features as delivered."""
        return sum(self.graphs[name].nbytes for name in ("x", "edge_index", "edge_attr") if name in self.graphs)

    def to(self, device: str | torch.device) -> GraphBatch:
        """The batch on that device, `positions` still on the CPU; copies nothing that is there already.

        Lightning calls it with each batch, and would else write to the fields.
        """
        on_device = ("graphs_per_record", "layer_index", "last_node", "labels", "valid")
        moved = {name: getattr(self, name).to(device) for name in on_device}
        return replace(self, graphs=copy(self.graphs).to(device), **moved)  # a copy, for PyG moves in place


class GraphLoader(Loader[GraphBatch]):
    """Batches of a split's graphs; see `Loader` for epochs and state.

    batch_size: records per rank · layers: graphs of each record to read, a slice or a list · dtype: of x and edge_attr as
    delivered · workers: processes that read and gather ahead, 0 for the caller's own thread; "auto" is one background thread,
    which measured four times faster than a process, whose batches must cross to this one · the others as in `SequenceLoader`;
    on_nan looks at x and edge_attr.

    Raises UsageError for an argument that makes no sense, DataError for data without graphs; while iterating, FormatError
    for a damaged shard and PipelineError for a worker that died (torch's RuntimeError where that strikes the caller's code).
    """

    kind = "graphs"
    _source: GraphSource

    def __init__(
        self,
        data: Dataset,
        split: str = "train",
        batch_size: int = 16,
        shuffle: bool = True,
        seed: int = 0,
        layers: Layers = None,
        device: str | torch.device = "auto",
        dtype: torch.dtype = torch.float32,
        window_bytes: int = WINDOW_BYTES,
        lanes: int = 1,
        workers: Workers = "auto",
        tail: Tail = "pad",
        on_error: OnError = "raise",
        rank: int | None = None,
        world_size: int | None = None,
        balance: Literal["label"] | None = None,
        weights: Mapping[str, float] | None = None,
        on_nan: OnNan = "keep",
    ) -> None:
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
        )
        check_delivery(layers, dtype)
        self.dtype = dtype
        named = {"x": data.schema.x, "edge_attr": data.schema.edge_attr}
        self.bits = frozenset(name for name, field in named.items() if field is not None and field.dtype == BFLOAT16)
        self._source = GraphSource(self.selection, data.schema, layers, window_bytes=window_bytes, finite=on_nan != "keep")

    def _batches(self, plan: EpochPlan, start: int) -> Generator[Made[GraphBatch], None, None]:
        steps = range(start, plan.num_steps)
        workers = self.workers if self.workers == "auto" else min(self.workers, len(steps))
        if not workers or workers == "auto":
            gathered = map_ahead(lambda step: self.gather(plan, step), steps, 1 if workers else 0)
            try:
                yield from (self._collated(wire) for wire in gathered)
            finally:
                gathered.close()
            return
        processes = DataLoader(
            _WorkerSteps(self, plan, steps),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=PREFETCH_BATCHES,
            multiprocessing_context="fork",  # no main guard needed; workers touch neither CUDA nor DALI
        )
        from_workers = iter(processes)
        try:
            with belonging_to_this_process(from_workers):
                for wire in from_workers:
                    if isinstance(wire, PipelineError):
                        raise wire
                    # copied out of the shared memory, which holds a file descriptor an array
                    own = {name: part.clone() if isinstance(part, torch.Tensor) else part for name, part in wire.items()}
                    yield self._collated(own)
        except (RuntimeError, ConnectionError, EOFError) as error:  # the latter two where it died while it handed a batch over
            if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
                raise
            reason = str(error).split("\n")[0]
            raise PipelineError(
                f"a worker process of the graph loader died ({reason}); expected enough memory for it"
            ) from error

    def _collated(self, wire: Wire) -> Made[GraphBatch]:
        batch, valid, left_out = collate(wire, self.device, self.dtype), wire["valid"], wire["left_out"]
        assert isinstance(valid, torch.Tensor)
        assert isinstance(left_out, list)
        return Made(batch, batch.ids, valid.numpy(), tuple(left_out))

    def gather(self, plan: EpochPlan, step: int) -> Wire:
        """This rank's rows of a step, as stored."""
        shares, told = plan.batch(step, self.world.rank, self.world.world_size), list[str]()
        try:
            rows = self._source.gather(shares.positions)
        except self.skips:
            shares, left_out = without_damaged(shares, self._source.gather, self.skips, self._source.num_records)
            rows, told = self._source.gather(shares.positions), list(left_out)
        wire = to_tensors(rows, self.bits)
        return {**wire, "valid": torch.from_numpy(shares.valid), "left_out": told}


class _WorkerSteps(IterableDataset[Wire | PipelineError]):
    """Gathered batches of the steps; each worker process takes every num_workers-th, and torch hands them on in turn."""

    def __init__(self, loader: GraphLoader, plan: EpochPlan, steps: range) -> None:
        self._loader, self._plan, self._steps = loader, plan, steps

    def __iter__(self) -> Iterator[Wire | PipelineError]:
        info = get_worker_info()
        assert info is not None
        for step in self._steps[info.id :: info.num_workers]:
            try:
                yield self._loader.gather(self._plan, step)
            except PipelineError as error:  # travels as an item: torch would wrap it in the worker's traceback
                yield error
                return


def to_tensors(rows: GraphRows, bits: frozenset[str] = frozenset()) -> Wire:
    """The arrays as tensors, sharing memory; ids stay texts. bits: those that hold the bits of bfloat16."""
    wire: Wire = {}
    for name in (field.name for field in fields(rows)):
        value = getattr(rows, name)
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value.view(np.int16)).view(torch.bfloat16) if name in bits else torch.from_numpy(value)
        if value is not None:
            wire[name] = value
    return wire


def collate(wire: Wire, device: torch.device, dtype: torch.dtype) -> GraphBatch:
    """A GraphBatch from gathered rows, by arithmetic on the device: equal to `Batch.from_data_list` on the same graphs.

    Moves the stored types, then widens: x and edge_attr to `dtype`, indices to int64. No loop over graphs or records.
    """
    on_device = {name: value.to(device, non_blocking=True) for name, value in wire.items() if isinstance(value, torch.Tensor)}
    node_counts, edge_counts = on_device["node_counts"], on_device["edge_counts"]
    num_graphs = len(node_counts)
    node_ptr, edge_ptr = _pointers(node_counts), _pointers(edge_counts)  # (G + 1,)
    first_node_of_edge = torch.repeat_interleave(node_ptr[:-1], edge_counts, output_size=len(on_device["edge_index"]))  # (E,)
    graphs = Batch(_base_cls=Data)
    graphs.x = on_device["x"].to(dtype)
    # (E, 2) local to the graph -> (2, E) numbered through the batch
    graphs.edge_index = on_device["edge_index"].to(torch.int64).t().contiguous() + first_node_of_edge
    slices = {"x": node_ptr, "edge_index": edge_ptr}
    increments = {"x": torch.zeros_like(node_counts), "edge_index": node_ptr[:-1]}
    if "edge_attr" in on_device:
        graphs.edge_attr = on_device["edge_attr"].to(dtype)
        slices["edge_attr"], increments["edge_attr"] = edge_ptr, torch.zeros_like(edge_counts)
    graphs.batch = torch.repeat_interleave(torch.arange(num_graphs, device=device), node_counts, output_size=len(graphs.x))
    graphs.ptr = node_ptr
    # what Batch.to_data_list and indexing need
    graphs._num_graphs, graphs._slice_dict, graphs._inc_dict = num_graphs, slices, increments
    ids, positions = wire["ids"], wire["positions"]
    assert isinstance(ids, list)
    assert isinstance(positions, torch.Tensor)
    return GraphBatch(
        graphs=graphs,
        graphs_per_record=on_device["graphs_per_record"],
        layer_index=on_device["layer_index"],
        last_node=node_ptr[1:] - 1,
        labels=on_device["labels"],
        valid=on_device["valid"],
        ids=ids,
        positions=positions,
    )


def _pointers(counts: torch.Tensor) -> torch.Tensor:
    """(G,) counts to (G + 1,) offsets, beginning with 0."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))
