"""Collate: gathered graphs to a PyG batch on the device, by arithmetic; and the batch that a GraphLoader gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch_geometric.data import Batch, Data

from dali_pipeline.format.encoding import BFLOAT16
from dali_pipeline.format.schema import Field, Schema, level_of
from dali_pipeline.loaders.sidestream import to_device
from dali_pipeline.reading.graphrows import GraphRows, ends_of
from dali_pipeline.runtime.memory import Buffers
from dali_pipeline.runtime.trace import span
from dali_pipeline.types import Array, Mask

_EMPTY = Batch(_base_cls=Data)  # making one takes PyG a fifth of a millisecond, copying it none


@dataclass(frozen=True, kw_only=True, eq=False)
class GraphBatch:
    """One batch of one rank, on the loader's device but for `graphs_per_record` and `positions`.

    graphs: a PyG `Batch` of all graphs of all records, record-major, then layer: x (N, F), edge_index (2, E) int64,
    edge_attr, batch (N,), ptr (G + 1,), and the schema's further fields by the names behind their dots, real numbers
    never narrower than stored, whole ones as int64; `to_data_list()` gives them one by one; where each record of the data
    is one graph, y (G,) int64 is its label · graphs_per_record: (B,) int64 on
    the CPU, where `pack_padded_sequence` wants it · layer_index: (G,) int64, the graph's number in its stored record ·
    last_node: (G,) int64, each graph's last node in x · labels: (B,) int64 · valid: (B,) bool; a record that is not valid is
    padding and repeats a real one · ids: B texts ·
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
        """Bytes of the edges and of all fields as delivered."""
        return sum(tensor.nbytes for name, tensor in self.graphs.to_dict().items() if name not in ("batch", "ptr", "y"))

    def tensors(self) -> Iterator[torch.Tensor]:
        """All of them, those that PyG cuts the batch by too."""
        graphs = self.graphs
        yield from (each for each in (*graphs.to_dict().values(), *graphs._slice_dict.values()) if torch.is_tensor(each))
        yield from (each for each in (*graphs._inc_dict.values(), *vars(self).values()) if torch.is_tensor(each))

    def to(self, device: str | torch.device) -> GraphBatch:
        """The batch on that device, `graphs_per_record` and `positions` still on the CPU; copies nothing that is there already.

        Lightning calls it with each batch, and would else write to the fields.
        """
        on_device = ("layer_index", "last_node", "labels", "valid")
        moved = {name: getattr(self, name).to(device) for name in on_device}
        return replace(self, graphs=copy(self.graphs).to(device), **moved)  # a copy, for PyG moves in place


class Collator:
    """Makes a GraphBatch of gathered rows: equal to `Batch.from_data_list` on the same graphs, but made by arithmetic.

    Moves the stored types to the device, then widens: x and edge_attr to `dtype`, indices to int64. copies: whether values that
    are of `dtype` as stored, on the CPU, are copied all the same, as their memory will be used again. one_graph: whether every
    record is delivered as one graph, whose label PyG calls `y`.
    """

    def __init__(self, schema: Schema, device: torch.device, dtype: torch.dtype, *, copies: bool, one_graph: bool) -> None:
        self._fields = schema.of_graphs
        self._device, self._dtype = device, dtype
        self._buffers, self._copies, self._labels_are_y = Buffers(), copies, one_graph

    def batch(self, rows: GraphRows, valid: Mask) -> GraphBatch:
        """One batch. No loop over graphs or records."""
        num_graphs = len(rows.node_counts)
        # where PyG cuts the batch, on the CPU as PyG itself has it: (G + 1,) each
        first_rows = {"node": ends_of(rows.node_counts), "edge": ends_of(rows.edge_counts), "graph": np.arange(num_graphs + 1)}
        cuts = {level: torch.from_numpy(ends) for level, ends in first_rows.items()}
        small = (rows.node_counts, rows.edge_counts, first_rows["node"], rows.layer_index, rows.labels, valid)
        node_counts, edge_counts, node_ptr, layer_index, labels, valid_B = self._move_together(small)
        graphs, slices, increments = copy(_EMPTY), {}, {}
        numbers, zeros = torch.arange(num_graphs, device=self._device), torch.zeros(num_graphs, dtype=torch.int64)
        for name, values in self.values(rows).items():
            attribute = name.rpartition(".")[2]
            graphs[attribute] = values
            slices[attribute], increments[attribute] = cuts[level_of(name)], zeros
        # (E, 2) local to the graph -> (2, E) numbered through the batch
        edge_index = torch.empty((2, len(rows.edge_index)), dtype=torch.int64, device=self._device)
        edge_index.copy_(self._move(rows.edge_index).t())
        edge_index += first_nodes(node_ptr, edge_counts, len(rows.edge_index))
        graphs.edge_index, slices["edge_index"], increments["edge_index"] = edge_index, cuts["edge"], cuts["node"][:-1]
        if self._labels_are_y:
            graphs.y, slices["y"], increments["y"] = labels, cuts["graph"], zeros
        graphs.batch = _repeat(numbers, node_counts, len(rows.arrays["x"]))
        graphs.ptr = node_ptr
        # what Batch.to_data_list and indexing need
        graphs._num_graphs, graphs._slice_dict, graphs._inc_dict = num_graphs, slices, increments
        return GraphBatch(
            graphs=graphs,
            graphs_per_record=torch.from_numpy(rows.graphs_per_record),
            layer_index=layer_index,
            last_node=node_ptr[1:] - 1,
            labels=labels,
            valid=valid_B.bool(),
            ids=rows.ids,
            positions=torch.from_numpy(rows.positions),
        )

    def values(self, rows: GraphRows) -> dict[str, torch.Tensor]:
        """Each field as it is delivered, by its name as stored."""
        return {
            name: self._values(rows.arrays[name], field, activations=name in ("x", "edge_attr"))
            for name, field in self._fields.items()
        }

    def _move(self, array: Array) -> torch.Tensor:
        with span("copy", self._device.type != "cpu"):
            return to_device(torch.from_numpy(array), self._device)

    def _move_together(self, arrays: Sequence[Array]) -> Sequence[torch.Tensor]:
        """Arrays of whole numbers: to a GPU as int64, in one copy."""
        if self._device.type == "cpu":
            return [torch.from_numpy(array) for array in arrays]
        return torch.split(self._move(np.concatenate(arrays, dtype=np.int64)), [len(array) for array in arrays])

    def _values(self, array: Array, field: Field, *, activations: bool) -> torch.Tensor:
        """Stored rows of a field, on the device: activations as `dtype`; else real numbers as that or wider, whole ones as
        int64."""
        bits = field.dtype == BFLOAT16
        stored = self._move(array.view("int16")).view(torch.bfloat16) if bits else self._move(array)
        dtype = self._dtype
        if not activations:
            dtype = torch.promote_types(stored.dtype, dtype) if stored.is_floating_point() else torch.int64
        unchanged = stored.dtype == dtype and not self._copies
        if self._device.type != "cpu" or unchanged or not stored.numel():
            return stored.to(dtype)
        with span("decode"):
            memory = self._buffers.take(stored.numel() * dtype.itemsize)
            return torch.from_numpy(memory).view(dtype).view(stored.shape).copy_(stored)


def first_nodes(node_ptr: torch.Tensor, edge_counts: torch.Tensor, num_edges: int) -> torch.Tensor:
    """(E,) int64, for every edge the number in the batch of its graph's first node."""
    return _repeat(node_ptr[:-1], edge_counts, num_edges)


def _repeat(values: torch.Tensor, counts: torch.Tensor, total: int) -> torch.Tensor:
    """Each value as often as its count says, `total` in all; on the CPU by NumPy, which takes a fifth of torch's time."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.repeat(values.numpy(), counts.numpy()))
    return torch.repeat_interleave(values, counts, output_size=total)
