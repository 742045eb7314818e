"""GraphLoader: shards, through parallel torch workers, to PyG batches on the device."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from functools import partial
from typing import Literal

import torch

from dali_pipeline.ahead import background_threads, map_ahead
from dali_pipeline.collate import Collator, GraphBatch
from dali_pipeline.dataset import Dataset
from dali_pipeline.delivery import check_delivery
from dali_pipeline.graphsource import GraphSource
from dali_pipeline.graphstretch import GraphGatherer, Loaded
from dali_pipeline.layers import Layers
from dali_pipeline.loader import Loader, Made, OnError, OnNan, Workers
from dali_pipeline.order import WINDOW_BYTES, Tail
from dali_pipeline.plan import EpochPlan
from dali_pipeline.processes import map_in_processes
from dali_pipeline.stretch import stretches
from dali_pipeline.trace import span

STRETCH_BYTES = 16 << 20
STRETCH_STEPS = 64


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
        self._source = source = GraphSource(
            self.selection, data.schema, layers, window_bytes=window_bytes, finite=on_nan != "keep"
        )
        self._gatherer = GraphGatherer(source, self.world, self.skips)
        shared = workers not in ("auto", 0)  # a worker's arrays hold until the next stretch alone
        self._collator = Collator(data.schema, self.device, dtype, copies=shared)
        batch_bytes = batch_size * int(self.selection.nbytes.sum()) // max(1, self.selection.num_records)
        self._longest_stretch = max(1, min(STRETCH_STEPS, STRETCH_BYTES // max(1, batch_bytes)))
        self._arena_bytes = max(1 << 20, 2 * self._longest_stretch * batch_bytes)  # what is touched of it is in memory

    def _batches(self, plan: EpochPlan, start: int) -> Generator[Made[GraphBatch], None, None]:
        steps = stretches(range(start, plan.num_steps), self._longest_stretch)
        with closing(self._gathered(plan, steps)) as gathered:
            for loaded, error in gathered:
                for stretch in loaded:
                    for rows, valid in stretch.batches():
                        with span("collate"):
                            batch = self._collator.batch(rows, valid)
                        yield Made(batch, batch.ids, valid, stretch.left_out)
                if error is not None:
                    raise error

    def _gathered(self, plan: EpochPlan, steps: Iterator[range]) -> Generator[Loaded, None, None]:
        if self.workers == "auto" or not self.workers:
            threads = background_threads(self.device) if self.workers == "auto" else 0
            return map_ahead(partial(self._gatherer.gather, plan), steps, threads)
        return map_in_processes(partial(self._gatherer.gather_into, plan), steps, self.workers, self._arena_bytes)
