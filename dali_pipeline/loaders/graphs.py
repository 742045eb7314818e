"""GraphLoader: make PyG batches on the device from shards, gathered by background threads or processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import closing
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch

from dali_pipeline.dataset.dataset import Dataset
from dali_pipeline.errors import UsageError
from dali_pipeline.format.layers import Layers, select
from dali_pipeline.format.schema import LEVELS, Field, Schema, level_of
from dali_pipeline.loaders.collate import Collator, GraphBatch
from dali_pipeline.loaders.device import check_memory
from dali_pipeline.loaders.loader import LoadedBatch, Loader, Position
from dali_pipeline.loaders.options import LoaderOptions, NumWorkers, OnError, OnNan, WindowKind
from dali_pipeline.loaders.residentgraphs import ROOM, GraphMemory, GraphWindow, ResidentSuperbatch
from dali_pipeline.loaders.sidestream import a_batch_ahead
from dali_pipeline.reading.graphsource import GraphSource
from dali_pipeline.reading.graphsuperbatch import GraphGatherer, GraphSuperbatch, Loaded, gather_into
from dali_pipeline.reading.residency import Residency
from dali_pipeline.reading.superbatch import superbatches
from dali_pipeline.reading.window import Memories
from dali_pipeline.runtime.ahead import background_threads, cores_beside, map_ahead, on_threads
from dali_pipeline.runtime.checks import one_of, real, refuses_old_keywords
from dali_pipeline.runtime.processes import map_in_processes
from dali_pipeline.runtime.trace import span
from dali_pipeline.sampling.budget import BudgetPlan, Portion
from dali_pipeline.sampling.order import WINDOW_BYTES
from dali_pipeline.sampling.plan import EpochPlan

SUPERBATCH_BYTES = 32 << 20  # a gather costs a millisecond of Python, whatever its size
SUPERBATCH_STEPS = 64
_EDGES = Field(dtype="uint8", shape=(2,))  # the narrowest that edges are stored in, so the most of them
Oversize = Literal["alone", "raise"]


class GraphLoader(Loader[GraphBatch]):
    """Iterate over the batches of one split's graphs: whole PyG batches of this rank, epoch after epoch.

    An `IterableDataset` with `__len__` that yields `GraphBatch`; epochs, state and cost are those of `SequenceLoader`.

    Args:
        data: What `open_dataset`, `mix`, `folds` or `subset` returns.
        split: Name of the split.
        batch_size: Records per rank and step; not used with `max_nodes` or `max_edges`.
        shuffle, seed, drop_last: Like in `SequenceLoader`.
        num_workers: Number of processes that gather ahead; 0 gathers in the caller's thread. "auto" gathers in background
            threads, which are four times faster, because the batches of a process must be copied to this one. "auto" starts
            one thread per four cores with a GPU, 4 at most. Without a GPU it starts one; but none on one core, and none on two
            cores if records are below 32 KiB.
        layers: Graphs of each record to read, as a slice or a list of numbers; nothing else is read. By default all.
        fields: Names of the further fields to read and deliver, of records and of graphs; [] for none. By default all.
        device: Like in `SequenceLoader`.
        dtype: Floating type of x and edge_attr as delivered.
        window_bytes, num_partitions, on_error: Like in `SequenceLoader`.
        on_nan: Like in `SequenceLoader`; checks the values of all fields.
        window: Like in `SequenceLoader`; "auto" is "gather" with worker processes too.
        class_balanced, group_weights, rank, world_size: Like in `SequenceLoader`.
        max_nodes: Budget of nodes per batch: a batch takes the next records in order while their nodes fit. With several
            partitions, their number must be a multiple of the world size, or the world size a multiple of their number.
        max_edges: Budget of edges per batch. If both are given, both hold.
        oversize: What happens to a record that exceeds the budget: "alone" puts it in a batch of its own, "raise" raises
            DataError.
        min_weight: Leave out edges whose edge_attr, which must be one number, is smaller. A budget still counts these edges.

    Raises:
        UsageError: An argument makes no sense.
        DataError: The data have no graphs. While iterating: NaN with on_nan="raise", or a record over the budget.
        FormatError: While iterating: a damaged shard, which is named.
        PipelineError: While iterating: a worker process died.
    """

    kind = "graphs"
    _source: GraphSource

    @refuses_old_keywords
    def __init__(
        self,
        data: Dataset,
        split: str = "train",
        *,
        batch_size: int = 16,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        num_workers: NumWorkers = "auto",
        layers: Layers = None,
        fields: Collection[str] | None = None,
        device: str | torch.device = "auto",
        dtype: torch.dtype = torch.float32,
        window_bytes: int = WINDOW_BYTES,
        num_partitions: int = 1,
        on_error: OnError = "raise",
        on_nan: OnNan = "keep",
        window: WindowKind = "auto",
        class_balanced: bool = False,
        group_weights: Mapping[str, float] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        max_nodes: int | None = None,
        max_edges: int | None = None,
        oversize: Oversize = "alone",
        min_weight: float | None = None,
    ) -> None:
        one_of("oversize", oversize, get_args(Oversize))
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
            max_nodes=max_nodes,
            max_edges=max_edges,
        )
        super().__init__(data, options)
        layers = self._positions(options.layers, "graph")
        self._fill_by(layers)
        if min_weight is not None:
            min_weight = _check_weight(min_weight, data.schema)
        self._source = source = GraphSource(
            self.selection,
            data.schema,
            options.wanted(layers),
            min_weight=min_weight,
        )
        self._gatherer = GraphGatherer(source, self.world, self.skips)
        shared = self.num_workers not in ("auto", 0)  # the arrays of a worker process are valid only until its next superbatch
        counts = self.selection.bounds("graph")
        one_graph = counts is not None and all(len(select(layers, count)) == 1 for count in counts)
        self._collator = Collator(data.schema, source.fields, self.device, dtype, copies=shared, one_graph=one_graph)
        self._oversize = oversize
        record_bytes = max(1, int(self.selection.record_bytes))
        check_memory(self.device, self.batch_size * record_bytes, f"a batch of {self.batch_size} records of graphs")
        self._threads = background_threads(self.device, record_bytes, self.num_workers)
        self.cores = cores_beside(self._threads if self.device.type == "cpu" else 0)  # for torch in the caller's thread
        self._memories: Memories[GraphMemory] = Memories()
        self._choose_window(window, "num_workers, which are processes" if shared else "")
        self._superbatch_records = SUPERBATCH_BYTES // record_bytes
        self._longest_superbatch = max(1, min(SUPERBATCH_STEPS, self._superbatch_records // self.batch_size))
        if self.budgeted:
            self._longest_superbatch = SUPERBATCH_STEPS
        # twice the expected size, as pages that are not touched take no memory
        records = self._superbatch_records if self.budgeted else self._longest_superbatch * self.batch_size
        limits = {"node": self.order.max_nodes or 0, "edge": self.order.max_edges or 0, "graph": self.order.max_nodes or 0}
        batch_bytes = sum(field.row_bytes * limits[level_of(name)] for name, field in source.fields.items())
        batch_bytes += 16 * limits["edge"]
        self._arena_bytes = max(1 << 20, 2 * records * record_bytes, 2 * batch_bytes)

    def _window_rows(self, residency: Residency) -> dict[str, int]:
        """Return the nodes, edges and graphs that a slot of a window has room for, somewhat more than usual.

        On a CPU they are what the slot's bytes can hold at most, as memory that is never written takes no space.
        """
        fields, records = {"edge_index": _EDGES, **self._source.fields}, residency.slot_records
        widths = {level: sum(field.row_bytes for name, field in fields.items() if level_of(name) == level) for level in LEVELS}
        most = {level: ROOM * residency.slot_bytes / max(1, widths[level]) for level in LEVELS}
        graphs = self.selection.bounds("graph")
        most["graph"] = float(records * graphs[1]) if graphs is not None else most["graph"]
        if self.device.type != "cpu":
            nodes = ROOM * records * self.selection.mean_rows
            most["node"] = min(most["node"], nodes)
            most["edge"] = max(0.0, ROOM * residency.slot_bytes - nodes * widths["node"]) / max(1, widths["edge"])
        bounds = {level: (self.selection.bounds(level) or (0, 0))[1] for level in LEVELS}
        return {level: int(most[level]) + 2 * bounds[level] + 1 for level in LEVELS}

    def _window_nbytes(self, residency: Residency) -> int:
        rows = self._window_rows(residency)
        widths = {
            name: math.prod(field.shape) * self._collator.delivered[name].itemsize
            for name, field in self._source.fields.items()
        }
        widths["edge_index"] = 2 * self._edge_type().itemsize
        return residency.num_slots * sum(rows[level_of(name)] * width for name, width in widths.items())

    def _edge_type(self) -> torch.dtype:
        """Return the smallest type for numbers of nodes within a graph."""
        nodes = self.selection.bounds("node")
        if nodes is None or nodes[1] > 1 << 31:
            return torch.int64
        return torch.int16 if nodes[1] <= 1 << 15 else torch.int32

    def _window_memory(self, residency: Residency) -> GraphMemory:
        delivered = {"edge_index": self._edge_type(), **self._collator.delivered}
        rows = self._window_rows(residency)
        return GraphMemory.of(self._source, self.data.schema, residency, rows, delivered, self.device)

    def gathered(self, plan: EpochPlan, step: int) -> GraphSuperbatch:
        """Gather one batch as stored."""
        loaded, error = self._gatherer.gather(plan, range(step, step + 1))
        if error is not None:
            raise error
        return loaded[0]

    def decoded(self, gathered: GraphSuperbatch) -> dict[str, torch.Tensor]:
        """Decode the fields of a gathered batch, and return them by their stored names."""
        ((rows, _, _),) = gathered.batches()
        with on_threads(self.cores):
            return self._collator.values(rows)

    def collated(self, gathered: GraphSuperbatch) -> GraphBatch:
        """Decode a gathered batch, number its nodes through, and return it as delivered."""
        with on_threads(self.cores):
            return next(self._collated_batches(gathered))

    def _batches(self, plan: EpochPlan, start: Position) -> Generator[LoadedBatch[GraphBatch], None, None]:
        batches = self._collated(plan, start)
        if self.device.type == "cuda":
            return a_batch_ahead(batches, lambda loaded: loaded.batch.tensors(), self.device)
        return batches

    def _collated(self, plan: EpochPlan, start: Position) -> Generator[LoadedBatch[GraphBatch], None, None]:
        residency = self._residency(plan) if self.window == "resident" else None
        self._window_fails |= residency is None
        # the groups of an epoch may be too many where those of another are not
        superbatches = self._gathered(plan, start) if residency is None else self._from_window(residency, start)
        with closing(superbatches) as gathered:
            for loaded, error in gathered:
                for superbatch in loaded:
                    batches = self._collated_batches(superbatch)
                    for rows, valid, cursors in superbatch.batches():
                        with span("collate"), on_threads(self.cores):
                            batch = next(batches)
                        yield LoadedBatch(batch, rows.hashes, valid, superbatch.left_out, cursors)
                if error is not None:
                    raise error

    def _collated_batches(self, superbatch: GraphSuperbatch) -> Iterator[GraphBatch]:
        rows, portion = superbatch.rows, superbatch.portion
        if not isinstance(superbatch, ResidentSuperbatch):
            return self._collator.batches(rows, portion.shares.valid, portion.sizes)
        select = superbatch.memory.values.__getitem__
        return self._collator.batches(rows, portion.shares.valid, portion.sizes, select, superbatch.begins)

    def _from_window(self, residency: Residency, start: Position) -> Generator[Loaded, None, None]:
        """Yield superbatches from the resident window; gather those whose records it could not read."""
        plan = residency.plan
        memory = self._memory_of(residency)
        record_bytes = self.selection.record_bytes
        threads = self._window_threads
        first = self._window_start(start)
        window = GraphWindow(memory, residency, first, self._source, threads=threads, record_bytes=record_bytes)
        holds_all = False
        try:
            with closing(window):
                if self.budgeted:
                    yield from self._budget_from_window(window, self._budget(plan), start)
                else:
                    yield from self._steps_from_window(window, plan, start.step)
            holds_all = window.holds_all
        finally:
            self._memories.give_back(memory, kept=holds_all)

    def _budget_from_window(self, window: GraphWindow, budget: BudgetPlan, start: Position) -> Iterator[Loaded]:
        longest, most = self._longest_superbatch, self._superbatch_records
        for packed, served in self._packed_from_window(window, budget, start, longest, most):
            if served:
                yield [window.superbatch(budget.portion(packed))], None
            else:
                yield self._gatherer.gather_packed(budget, packed)
            if self._by_record:
                window.passed(range(packed[0].begin, packed[-1].end))

    def _steps_from_window(self, window: GraphWindow, plan: EpochPlan, step: int) -> Iterator[Loaded]:
        longest = 1
        while step < plan.num_steps:
            steps = range(step, min(window.reach(step), step + longest, plan.num_steps))
            longest = min(2 * longest, self._longest_superbatch)
            if window.serves(steps):
                shares = plan.batches(steps, self.world.rank, self.world.world_size)
                sizes = np.full(len(steps), len(shares.positions) // len(steps))
                yield [window.superbatch(Portion(shares=shares, sizes=sizes))], None
            else:
                yield self._gatherer.gather(plan, steps)
            for delivered in steps:
                window.passed(range(delivered, delivered + 1))
            self._window_fails |= window.fails
            step = steps.stop

    def _gathered(self, plan: EpochPlan, start: Position) -> Generator[Loaded, None, None]:
        work: Callable[[Any], Loaded] = partial(self._gatherer.gather, plan)
        items: Iterator[Any] = superbatches(range(start.step, plan.num_steps), self._longest_superbatch)
        if self.budgeted:
            budget = self._budget(plan)
            work, items = (
                partial(self._gatherer.gather_packed, budget),
                self._packed_batches(budget, start, self._longest_superbatch, self._superbatch_records),
            )
        if self.num_workers == "auto" or not self.num_workers:
            return map_ahead(work, items, self._threads)
        return map_in_processes(partial(gather_into, self._gatherer, work), items, self.num_workers, self._arena_bytes)


def _check_weight(given: float, schema: Schema) -> float:
    """Return `min_weight` as a float; raise UsageError if edges have no single weight."""
    least = real("min_weight", given, "a number", finite=False)
    if schema.edge_attr is None or math.prod(schema.edge_attr.shape) != 1:
        has = "no edge_attr" if schema.edge_attr is None else f"edge_attr in rows of {schema.edge_attr.shape}"
        raise UsageError(f"min_weight is {least!r} for data with {has}; expected one weight an edge")
    return least
