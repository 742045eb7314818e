"""GraphLoader: shards, through parallel torch workers, to PyG batches on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from functools import partial
from typing import Any, Literal, get_args

import torch

from dali_pipeline.dataset.dataset import Dataset
from dali_pipeline.errors import PipelineError, UsageError
from dali_pipeline.format.layers import Layers
from dali_pipeline.format.schema import Schema, level_of
from dali_pipeline.loaders.collate import Collator, GraphBatch
from dali_pipeline.loaders.delivery import OnError, OnNan, Workers, check_delivery, check_memory
from dali_pipeline.loaders.loader import Loader, Made, Position
from dali_pipeline.loaders.sidestream import a_batch_ahead
from dali_pipeline.loaders.state import LoaderState, StateError
from dali_pipeline.reading.graphsource import GraphSource
from dali_pipeline.reading.graphstretch import GraphGatherer, Loaded, gather_into
from dali_pipeline.reading.stretch import stretches
from dali_pipeline.runtime.ahead import background_threads, cores_beside, map_ahead, on_threads
from dali_pipeline.runtime.checks import one_of, real
from dali_pipeline.runtime.processes import map_in_processes
from dali_pipeline.runtime.trace import span
from dali_pipeline.sampling.budget import BudgetPlan, Packed
from dali_pipeline.sampling.order import WINDOW_BYTES, Tail
from dali_pipeline.sampling.plan import EpochPlan

STRETCH_BYTES = 32 << 20  # a gather costs a millisecond of Python, whatever it carries
STRETCH_STEPS = 64
Oversize = Literal["alone", "raise"]


class GraphLoader(Loader[GraphBatch]):
    """Batches of a split's graphs; see `Loader` for epochs and state.

    batch_size: records per rank, as in `SequenceLoader` · max_nodes, max_edges: a budget in its stead, batches of as many
    records, in order, as have no more nodes and edges together; a record beyond it by itself is a batch "alone", or raises
    DataError, as `oversize` says ·
    layers: graphs of each record to read, a slice or a list · dtype: of x and edge_attr as delivered · workers: processes that
    read and gather ahead, 0 for the caller's own thread; "auto" is background threads, which measured four times faster
    than processes, whose batches must cross to this one: with a GPU one per four cores, 4 at most, else one, or none on one
    core, and on two with records below 32
    KiB · min_weight: edges whose edge_attr, one number, is smaller are left out; a budget counts them all the same ·
    window_bytes: records of 4 KiB and less are kept in memory where all fit in it and this process is alone on its node ·
    the others as in `SequenceLoader`; on_nan looks at the values of all fields.

    Raises UsageError for an argument that makes no sense, DataError for data without graphs; while iterating, FormatError
    for a damaged shard and PipelineError for a worker that died.
    """

    kind = "graphs"
    _source: GraphSource

    def __init__(
        self,
        data: Dataset,
        split: str = "train",
        batch_size: int = 16,
        max_nodes: int | None = None,
        max_edges: int | None = None,
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
        oversize: Oversize = "alone",
        min_weight: float | None = None,
    ) -> None:
        one_of("oversize", oversize, get_args(Oversize))
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
            max_nodes=max_nodes,
            max_edges=max_edges,
        )
        if self.budgeted and on_error == "skip":
            raise UsageError("max_nodes and max_edges need the size of every record; expected on_error='raise'")
        if self.budgeted and self.world.world_size % self.order.lanes and self.order.lanes % self.world.world_size:
            raise UsageError(
                f"lanes is {lanes} and world_size {self.world.world_size}; expected one to be a multiple of the other, "
                "for with max_nodes or max_edges every rank's batches come from whole lanes"
            )
        layers = self._positions(check_delivery(layers, dtype), "graph")
        if min_weight is not None:
            min_weight = _check_weight(min_weight, data.schema)
        self.dtype = dtype
        self._source = source = GraphSource(
            self.selection,
            data.schema,
            layers,
            self.order.window_bytes,
            finite=on_nan != "keep",
            min_weight=min_weight,
            may_hold=self.order.shuffle and self.workers in ("auto", 0) and self.world.alone,  # in order, reads are long anyway
        )
        self._gatherer = GraphGatherer(source, self.world, self.skips)
        shared = self.workers not in ("auto", 0)  # a worker's arrays hold until the next stretch alone
        self._collator = Collator(data.schema, self.device, dtype, copies=shared)
        self._oversize = oversize
        self._steps_of = (-1, 0)  # an epoch, and its steps by the budget
        record_bytes = max(1, int(self.selection.record_bytes))
        check_memory(self.device, self.batch_size * record_bytes, f"a batch of {self.batch_size} records of graphs")
        self._threads = background_threads(self.device, record_bytes, self.workers)
        self.cores = cores_beside(self._threads if self.device.type == "cpu" else 0)  # for torch in the caller's thread
        self._stretch_records = STRETCH_BYTES // record_bytes
        self._longest_stretch = max(1, min(STRETCH_STEPS, self._stretch_records // self.batch_size))
        if self.budgeted:
            self._longest_stretch = STRETCH_STEPS
        # twice what is expected in it, for only what is touched is in memory
        records = self._stretch_records if self.budgeted else self._longest_stretch * self.batch_size
        most = {"node": self.order.max_nodes or 0, "edge": self.order.max_edges or 0, "graph": self.order.max_nodes or 0}
        batch_bytes = sum(field.row_bytes * most[level_of(name)] for name, field in source.fields.items()) + 16 * most["edge"]
        self._arena_bytes = max(1 << 20, 2 * records * record_bytes, 2 * batch_bytes)

    def __len__(self) -> int:
        """Steps of an epoch, the same on every rank.

        With a budget it is about the same number in every epoch, not quite: of the epoch that `set_epoch` chose, that is under
        way, or that ended last. It then costs a pass over the index of all shards, and raises what is wrong there.
        """
        if self.budgeted and self._steps_of[0] != self._len_of:
            self._steps_of = self._len_of, self._budget(self._plan(self._len_of)).num_steps(self.world.world_size)
        return self._steps_of[1] if self.budgeted else super().__len__()

    def _batches(self, plan: EpochPlan, start: Position) -> Generator[Made[GraphBatch], None, None]:
        batches = self._collated(plan, start)
        if self.device.type == "cuda":
            return a_batch_ahead(batches, lambda made: made.batch.tensors(), self.device)
        return batches

    def _collated(self, plan: EpochPlan, start: Position) -> Generator[Made[GraphBatch], None, None]:
        with closing(self._gathered(plan, start)) as gathered:
            for loaded, error in gathered:
                for stretch in loaded:
                    for rows, valid, places in stretch.batches():
                        with span("collate"), on_threads(self.cores):
                            batch = self._collator.batch(rows, valid)
                        yield Made(batch, batch.ids, valid, stretch.left_out, places)
                if error is not None:
                    raise error

    def _gathered(self, plan: EpochPlan, start: Position) -> Generator[Loaded, None, None]:
        work: Callable[[Any], Loaded] = partial(self._gatherer.gather, plan)
        items: Iterator[Any] = stretches(range(start.step, plan.num_steps), self._longest_stretch)
        if self.budgeted:
            budget = self._budget(plan)
            work, items = partial(self._gatherer.gather_packed, budget), self._packed(budget, start)
        if self.workers == "auto" or not self.workers:
            return map_ahead(work, items, self._threads)
        return map_in_processes(partial(gather_into, self._gatherer, work), items, self.workers, self._arena_bytes)

    def _budget(self, plan: EpochPlan) -> BudgetPlan:
        return BudgetPlan(plan, self._source.sizes, self._source.name, alone=self._oversize == "alone")

    def _packed(self, budget: BudgetPlan, start: Position) -> Iterator[list[Packed] | PipelineError]:
        """What is packed ahead must not fail ahead: an error comes behind the batches before it."""
        world, stretch = self.world, (self._longest_stretch, self._stretch_records)
        try:
            yield from budget.stretches(start.step, start.places, world.rank, world.world_size, *stretch)
        except PipelineError as error:
            yield error

    def _check_place(self, state: LoaderState) -> None:
        expected = [self._first_plan.length(lane) for lane in range(self.order.lanes)]
        if not self.budgeted:
            super()._check_place(state)
        elif len(state.places) != len(expected) * bool(state.step) or any(map(int.__gt__, state.places, expected)):
            raise StateError(
                f"the state is at places {list(state.places)} of step {state.step}; the lanes have {expected} records"
            )


def _check_weight(given: float, schema: Schema) -> float:
    least = real("min_weight", given, "a number", finite=False)
    if schema.edge_attr is None or math.prod(schema.edge_attr.shape) != 1:
        has = "no edge_attr" if schema.edge_attr is None else f"edge_attr in rows of {schema.edge_attr.shape}"
        raise UsageError(f"min_weight is {least!r} for data with {has}; expected one weight an edge")
    return least
