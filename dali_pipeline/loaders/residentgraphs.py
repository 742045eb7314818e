"""GraphWindow: the shuffle window of graphs in the memory of the device; a batch is one `index_select` per field.

Pieces are read and entered as in `resident`. On a GPU, values lie in the window as they are delivered, a piece crosses in one
copy, and the rows of a batch are computed there from where each graph begins; on a CPU they stay as stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from dali_pipeline.format.encoding import BFLOAT16
from dali_pipeline.format.schema import Field, Schema, level_of
from dali_pipeline.loaders.collate import stored_tensor
from dali_pipeline.loaders.sidestream import to_device_together
from dali_pipeline.reading.graphrows import GraphRows, ends_of
from dali_pipeline.reading.graphsource import GraphSource
from dali_pipeline.reading.graphsuperbatch import GraphSuperbatch
from dali_pipeline.reading.records import spread
from dali_pipeline.reading.residency import Piece, RecordNumbers, Residency
from dali_pipeline.reading.window import Read, WindowFiller
from dali_pipeline.runtime.memory import fresh_bytes
from dali_pipeline.sampling.budget import Portion
from dali_pipeline.types import Array, Ints

ROOM = 1.25  # rows of a slot, relative to what its records have on average


@dataclass(eq=False)
class GraphMemory:
    """Memory of one window of graphs, used again by later epochs.

    Attributes:
        device: Where the values lie.
        values: By stored name, with "edge_index": rows of all nodes, edges or graphs; arrays on a CPU, else tensors.
        bits: Names of the fields that are stored as the bits of bfloat16.
        slot_records: Records that a slot has room for.
        slot_rows: Rows of each level that a slot has room for.
        first_graphs: (N,) number of each record's first graph in `graphs`.
        graph_counts: (N,) graphs of each record.
        graphs: (G, 5) first node, nodes, first edge, edges, and layer of each graph.
        labels: (N, *shape) in the stored type, or None.
        hashes, ids: (N,) of each record.
        fields: Record fields, by the names after their dots.
        numbers: Numbers of the records that are there.
        kept: Whether all records are there, for good.
        size: Slots, records per slot, and bytes per slot that it has room for.
    """

    device: torch.device
    values: dict[str, Any]
    bits: frozenset[str]
    slot_records: int
    slot_rows: dict[str, int]
    first_graphs: Ints
    graph_counts: Ints
    graphs: Ints
    labels: Array | None
    hashes: Array
    ids: Array
    fields: dict[str, Array]
    numbers: RecordNumbers = field(default_factory=RecordNumbers)
    kept: bool = False
    size: tuple[int, int, int] = (0, 0, 0)

    @classmethod
    def of(
        cls,
        source: GraphSource,
        schema: Schema,
        residency: Residency,
        slot_rows: Mapping[str, int],
        delivered: Mapping[str, torch.dtype],
        device: torch.device,
    ) -> GraphMemory:
        """Allocate the memory; pages of the host that are never written take no space.

        Args:
            source: Source of the graphs.
            schema: Schema of the data set.
            residency: What the window must have room for.
            slot_rows: Nodes, edges and graphs that a slot must have room for.
            delivered: Type of each field as delivered, by stored name; of `edge_index`, one that holds its numbers.
            device: Device of the window.
        """
        records = residency.num_records
        fields = {"edge_index": Field(dtype="int64", shape=(2,)), **source.fields}
        values: dict[str, Any] = {}
        for name, stored in fields.items():
            rows = slot_rows[level_of(name)] * residency.num_slots
            if device.type == "cpu":
                dtype = _edge_storage(delivered[name]) if name == "edge_index" else stored.storage
                memory = fresh_bytes(rows * dtype.itemsize * int(np.prod(stored.shape)))
                values[name] = memory.view(dtype).reshape(rows, *stored.shape)
            else:
                values[name] = torch.empty((rows, *stored.shape), dtype=delivered[name], device=device)
        return cls(
            device=device,
            values=values,
            bits=frozenset(name for name, stored in fields.items() if stored.dtype == BFLOAT16),
            slot_records=residency.slot_records,
            slot_rows=dict(slot_rows),
            first_graphs=np.zeros(records, np.int64),
            graph_counts=np.zeros(records, np.int64),
            graphs=np.zeros((slot_rows["graph"] * residency.num_slots, 5), np.int64),
            labels=None if schema.labels.dtype is None else np.zeros((records, *schema.labels.shape), schema.labels.dtype),
            hashes=np.zeros(records, np.uint64),
            ids=np.empty(records, object),
            fields=source.record_columns(records),
        )

    def take(self, numbers: Ints, positions: Ints) -> tuple[GraphRows, dict[str, Ints]]:
        """Return the graphs of records (N,); on a GPU without their values, with the first node, edge and row of each graph.

        Args:
            numbers: Numbers of the records in the window.
            positions: What the batch reports as their positions.
        """
        graphs_per_record = self.graph_counts[numbers]
        begins = self.first_graphs[numbers]
        graph = begins if (graphs_per_record == 1).all() else spread(begins, graphs_per_record)
        node_begins, node_counts, edge_begins, edge_counts, layer_index = np.ascontiguousarray(self.graphs[graph].T)
        arrays: dict[str, Array] = {}
        if self.device.type == "cpu":
            rows = {"node": spread(node_begins, node_counts), "edge": spread(edge_begins, edge_counts), "graph": graph}
            arrays = {name: np.take(array, rows[level_of(name)], axis=0) for name, array in self.values.items()}
        fields: dict[str, Any] = {name: column[numbers] for name, column in self.fields.items()}
        taken = GraphRows(
            edge_index=arrays.pop("edge_index", np.zeros((0, 2), np.int64)),
            arrays=arrays,
            node_counts=node_counts,
            edge_counts=edge_counts,
            layer_index=layer_index,
            graphs_per_record=graphs_per_record,
            labels=None if self.labels is None else self.labels[numbers],
            ids=self.ids[numbers].tolist(),
            hashes=self.hashes[numbers],
            positions=positions,
            fields={name: column.tolist() if column.dtype == object else column for name, column in fields.items()},
        )
        return taken, {"node": node_begins, "edge": edge_begins, "graph": graph}


@dataclass(frozen=True, kw_only=True, eq=False)
class ResidentSuperbatch(GraphSuperbatch):
    """Several batches whose values are in the window of a GPU.

    Attributes:
        memory: The window.
        begins: By level, (G,) first row of each graph in the window.
    """

    memory: GraphMemory
    begins: Mapping[str, Ints]


class GraphWindow(WindowFiller[GraphRows]):
    """Fills a window of graphs along one epoch, and serves its batches.

    Args:
        memory: The memory, unused by others.
        residency: What lies in it when.
        start: The first step that is delivered.
        source: Where pieces are read.
        threads: Threads that read; 0 reads in the caller's thread.
        record_bytes: Bytes of a record as stored, on average.
    """

    def __init__(
        self,
        memory: GraphMemory,
        residency: Residency,
        start: int,
        source: GraphSource,
        *,
        threads: int,
        record_bytes: float,
    ) -> None:
        super().__init__(residency, start, threads=threads, record_bytes=record_bytes, direct=False, kept=memory.kept)
        self._memory, self._source = memory, source
        if not memory.kept:
            memory.numbers = RecordNumbers()
        self._filled: Counter[tuple[int, str]] = Counter()  # rows used of each slot and level

    def superbatch(self, portion: Portion) -> GraphSuperbatch:
        """Return batches whose records are all in the window."""
        positions = portion.shares.positions
        numbers = self._memory.numbers.of(positions)
        rows, begins = self._memory.take(numbers, self._source.reported_positions(positions))
        if self._memory.device.type == "cpu":
            return GraphSuperbatch(rows=rows, portion=portion)
        return ResidentSuperbatch(rows=rows, portion=portion, memory=self._memory, begins=begins)

    def _plan_read(self, piece: Piece) -> tuple[None, Callable[[], GraphRows]]:
        return None, partial(self._source.gather, piece.positions, merge=True)

    def _note(self, read: Read[GraphRows], rows: GraphRows | None) -> None:
        """Find the place of a piece; one that its slot has no room for counts as one that could not be read."""
        slot, piece = read.piece.first // self._residency.slot_records, read.piece
        if piece.first == piece.group.first and not self._residency.whole:
            for level in self._memory.slot_rows:
                self._filled[slot, level] = 0
        if rows is not None:
            counts = {"node": int(rows.node_counts.sum()), "edge": int(rows.edge_counts.sum()), "graph": len(rows.node_counts)}
            read.place = {level: slot * most + self._filled[slot, level] for level, most in self._memory.slot_rows.items()}
            for level, count in counts.items():
                self._filled[slot, level] += count
            if any(self._filled[slot, level] > most for level, most in self._memory.slot_rows.items()):
                rows = None
                self._overflowed += read.piece.group not in self._failed
        super()._note(read, rows)

    @property
    def _numbers(self) -> RecordNumbers:
        return self._memory.numbers

    def _enter(self, read: Read[GraphRows], rows: GraphRows) -> None:
        memory, place = self._memory, read.place
        arrays = {"edge_index": rows.edge_index, **rows.arrays}
        if memory.device.type == "cpu":
            for name, array in arrays.items():
                begin = place[level_of(name)]
                memory.values[name][begin : begin + len(array)] = array
        else:
            moved = to_device_together(
                [stored_tensor(array, bits=name in memory.bits) for name, array in arrays.items()], memory.device
            )
            for name, tensor in zip(arrays, moved, strict=True):
                begin = place[level_of(name)]
                memory.values[name][begin : begin + len(tensor)].copy_(tensor)
        graphs = slice(place["graph"], place["graph"] + len(rows.node_counts))
        memory.graphs[graphs] = np.stack(
            [
                place["node"] + ends_of(rows.node_counts)[:-1],
                rows.node_counts,
                place["edge"] + ends_of(rows.edge_counts)[:-1],
                rows.edge_counts,
                rows.layer_index,
            ],
            axis=1,
        )
        records = slice(read.piece.first, read.piece.first + len(rows.ids))
        memory.first_graphs[records] = place["graph"] + ends_of(rows.graphs_per_record)[:-1]
        memory.graph_counts[records] = rows.graphs_per_record
        if memory.labels is not None:
            memory.labels[records] = rows.labels
        memory.hashes[records], memory.ids[records] = rows.hashes, rows.ids
        for name, column in memory.fields.items():
            column[records] = rows.fields[name]
        memory.numbers.add(read.piece)


def _edge_storage(dtype: torch.dtype) -> np.dtype[Any]:
    return torch.empty(0, dtype=dtype).numpy().dtype
