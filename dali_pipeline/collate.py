"""Collate: gathered graphs to a PyG batch on the device, by arithmetic; and the batch that a GraphLoader gives."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace

import torch
from torch_geometric.data import Batch, Data

from dali_pipeline.digest import Mask
from dali_pipeline.encoding import BFLOAT16
from dali_pipeline.graphsource import GraphRows
from dali_pipeline.memory import Buffers
from dali_pipeline.schema import Array, Field, Schema
from dali_pipeline.trace import span

_EMPTY = Batch(_base_cls=Data)  # making one takes PyG a fifth of a millisecond, copying it none


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


class Collator:
    """Makes a GraphBatch of gathered rows: equal to `Batch.from_data_list` on the same graphs, but made by arithmetic.

    Moves the stored types to the device, then widens: x and edge_attr to `dtype`, indices to int64. copies: whether values that
    are of `dtype` as stored, on the CPU, are copied all the same, as their memory will be used again.
    """

    def __init__(self, schema: Schema, device: torch.device, dtype: torch.dtype, *, copies: bool) -> None:
        assert schema.x is not None
        self._x, self._edge_attr, self._device, self._dtype = schema.x, schema.edge_attr, device, dtype
        self._buffers, self._copies = Buffers(), copies

    def batch(self, rows: GraphRows, valid: Mask) -> GraphBatch:
        """One batch. No loop over graphs or records."""
        node_counts, edge_counts = self._move(rows.node_counts), self._move(rows.edge_counts)  # (G,)
        node_ptr, edge_ptr = _pointers(node_counts), _pointers(edge_counts)  # (G + 1,)
        num_graphs = len(node_counts)
        graphs = copy(_EMPTY)
        graphs.x = self._values(rows.x, self._x)
        # (E, 2) local to the graph -> (2, E) numbered through the batch
        edge_index = torch.empty((2, len(rows.edge_index)), dtype=torch.int64, device=self._device)
        edge_index.copy_(self._move(rows.edge_index).t())
        edge_index += first_nodes(node_ptr, edge_counts, len(rows.edge_index))
        graphs.edge_index = edge_index
        zeros = torch.zeros_like(node_counts)
        slices = {"x": node_ptr, "edge_index": edge_ptr}
        increments = {"x": zeros, "edge_index": node_ptr[:-1]}
        if rows.edge_attr is not None and self._edge_attr is not None:
            graphs.edge_attr = self._values(rows.edge_attr, self._edge_attr)
            slices["edge_attr"], increments["edge_attr"] = edge_ptr, zeros
        numbers = torch.arange(num_graphs, device=self._device)
        graphs.batch = torch.repeat_interleave(numbers, node_counts, output_size=len(rows.x))
        graphs.ptr = node_ptr
        # what Batch.to_data_list and indexing need
        graphs._num_graphs, graphs._slice_dict, graphs._inc_dict = num_graphs, slices, increments
        return GraphBatch(
            graphs=graphs,
            graphs_per_record=self._move(rows.graphs_per_record),
            layer_index=self._move(rows.layer_index),
            last_node=node_ptr[1:] - 1,
            labels=self._move(rows.labels),
            valid=self._move(valid),
            ids=rows.ids,
            positions=torch.from_numpy(rows.positions),
        )

    def _move(self, array: Array) -> torch.Tensor:
        with span("copy", self._device.type != "cpu"):
            return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _values(self, array: Array, field: Field) -> torch.Tensor:
        """Stored rows of a field, on the device, as `dtype`."""
        bits = field.dtype == BFLOAT16
        stored = self._move(array.view("int16")).view(torch.bfloat16) if bits else self._move(array)
        unchanged = stored.dtype == self._dtype and not self._copies
        if self._device.type != "cpu" or unchanged or not stored.numel():
            return stored.to(self._dtype)
        with span("decode"):
            memory = self._buffers.take(stored.numel() * self._dtype.itemsize)
            return torch.from_numpy(memory).view(self._dtype).view(stored.shape).copy_(stored)


def first_nodes(node_ptr: torch.Tensor, edge_counts: torch.Tensor, num_edges: int) -> torch.Tensor:
    """(E,) int64, for every edge the number in the batch of its graph's first node."""
    return torch.repeat_interleave(node_ptr[:-1], edge_counts, output_size=num_edges)


def _pointers(counts: torch.Tensor) -> torch.Tensor:
    """(G,) counts to (G + 1,) offsets, beginning with 0."""
    ends = torch.zeros(len(counts) + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=ends[1:])
    return ends
