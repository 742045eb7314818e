"""Collate gathered graphs to a PyG batch on the device, by arithmetic; and define the batch that a GraphLoader yields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch_geometric.data import Batch, Data

from dali_pipeline.format.encoding import BFLOAT16
from dali_pipeline.format.schema import Field, Schema, level_of
from dali_pipeline.loaders.fields import RecordBatch, moved_fields, moved_with_fields, tensors_of
from dali_pipeline.loaders.sidestream import to_device
from dali_pipeline.reading.graphrows import GraphRows, ends_of
from dali_pipeline.runtime.memory import Buffers
from dali_pipeline.runtime.trace import span
from dali_pipeline.types import Array, Mask

_EMPTY = Batch(_base_cls=Data)  # constructing a Batch takes PyG 0.2 ms; copying this one takes almost no time


@dataclass(frozen=True, kw_only=True, eq=False)
class GraphBatch(RecordBatch):
    """One batch of one rank, on the loader's device except for `graphs_per_record` and `positions`.

    B is the number of records, G of graphs, N of nodes and E of edges in the batch; F is the number of features of a node.

    Attributes:
        graphs: PyG `Batch` of all graphs of all records, ordered by record, then by layer: x (N, F), edge_index (2, E) int64,
            edge_attr, batch (N,), ptr (G + 1,), and y (G,) int64, the labels, if every record of the data is one graph. Further
            fields of the schema are attributes named by the part behind the dot; real numbers are never narrower than stored,
            whole numbers are int64. `graphs.to_data_list()` returns the graphs one by one.
        graphs_per_record: (B,) int64 on the CPU, where `pack_padded_sequence` wants it.
        layer_index: (G,) int64, the number of each graph in its stored record.
        last_node: (G,) int64, the row in x of each graph's last node.
        labels: (B,) int64 classes, (B, K) bool of several labels, (B, *shape) float32 values; None if there are none.
        valid: (B,) bool. A record that is not valid is padding and repeats a real record.
        ids: B texts.
        positions: (B,) int64 on the CPU: the records' numbers in their split.
        fields: Further fields of records by name, (B, *row) on the device, in types as in `SequenceBatch`; lists of B texts.
    """

    graphs: Batch
    graphs_per_record: torch.Tensor
    layer_index: torch.Tensor
    last_node: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Size of the edges and of all fields as delivered, in bytes."""
        return sum(tensor.nbytes for name, tensor in self.graphs.to_dict().items() if name not in ("batch", "ptr", "y"))

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield all tensors of the batch, with those by which PyG separates its graphs."""
        graphs = self.graphs
        values = [*graphs.to_dict().values(), *graphs._slice_dict.values(), *graphs._inc_dict.values(), *vars(self).values()]
        yield from (value for value in values if torch.is_tensor(value))
        yield from tensors_of(self.fields)

    def to(self, device: str | torch.device) -> GraphBatch:
        """Return the batch on a device, as `SequenceBatch.to` does; `graphs_per_record` and `positions` stay on the CPU."""
        moved = {name: getattr(self, name).to(device) for name in ("layer_index", "last_node", "valid")}
        labels: Any = None if self.labels is None else self.labels.to(device)
        fields = moved_fields(self.fields, device)
        graphs = copy(self.graphs).to(device)  # a copy, for PyG moves in place
        return replace(self, graphs=graphs, labels=labels, fields=fields, **moved)


class Collator:
    """Makes a GraphBatch from gathered rows: equal to `Batch.from_data_list` on the same graphs, but computed by arithmetic.

    Moves values to the device in their stored types, then widens them: x and edge_attr to `dtype`, indices to int64.

    Args:
        schema: Schema of the data set.
        fields: Fields of graphs that are delivered, by name.
        device: Device of the batches.
        dtype: Floating type of x and edge_attr as delivered.
        copies: Whether to copy values on the CPU even if they are stored as `dtype`, because their memory is reused.
        one_graph: Whether every record is delivered as one graph, whose label PyG calls `y`.
    """

    def __init__(
        self,
        schema: Schema,
        fields: Mapping[str, Field],
        device: torch.device,
        dtype: torch.dtype,
        *,
        copies: bool,
        one_graph: bool,
    ) -> None:
        self._schema, self._fields = schema, fields
        self._device, self._dtype = device, dtype
        self._buffers, self._copies, self._labels_are_y = Buffers(), copies, one_graph

    def batch(self, rows: GraphRows, valid: Mask) -> GraphBatch:
        """Return one batch; has no loop over graphs or records."""
        num_graphs = len(rows.node_counts)
        # boundaries at which PyG separates the graphs, on the CPU like in PyG: (G + 1,) each
        first_rows = {"node": ends_of(rows.node_counts), "edge": ends_of(rows.edge_counts), "graph": np.arange(num_graphs + 1)}
        cuts = {level: torch.from_numpy(ends) for level, ends in first_rows.items()}
        small = [rows.node_counts, rows.edge_counts, first_rows["node"], rows.layer_index, valid]
        labels: torch.Tensor | None = None
        if rows.labels is not None and rows.labels.dtype == np.int64:
            small.append(rows.labels)  # classes: in the same copy
        node_counts, edge_counts, node_ptr, layer_index, valid_B, *classes = self._move_together(small)
        if rows.labels is not None:
            labels = classes[0] if classes else self._move(rows.labels)
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
        if self._labels_are_y and labels is not None:
            graphs.y, slices["y"], increments["y"] = labels, cuts["graph"], zeros
        graphs.batch = _repeat(numbers, node_counts, len(rows.arrays["x"]))
        graphs.ptr = node_ptr
        # Batch.to_data_list and indexing need these
        graphs._num_graphs, graphs._slice_dict, graphs._inc_dict = num_graphs, slices, increments
        return GraphBatch(
            graphs=graphs,
            graphs_per_record=torch.from_numpy(rows.graphs_per_record),
            layer_index=layer_index,
            last_node=node_ptr[1:] - 1,
            labels=cast("torch.Tensor", labels),
            valid=valid_B.bool(),
            ids=rows.ids,
            positions=torch.from_numpy(rows.positions),
            fields=moved_with_fields([], rows.fields, self._schema, self._dtype, self._device)[1],
        )

    def values(self, rows: GraphRows) -> dict[str, torch.Tensor]:
        """Return each field as it is delivered, by its stored name."""
        return {
            name: self._values(rows.arrays[name], field, activations=name in ("x", "edge_attr"))
            for name, field in self._fields.items()
        }

    def _move(self, array: Array) -> torch.Tensor:
        with span("copy", self._device.type != "cpu"):
            return to_device(torch.from_numpy(array), self._device)

    def _move_together(self, arrays: Sequence[Array]) -> Sequence[torch.Tensor]:
        """Return arrays of whole numbers on the device; on a GPU as int64, moved in one copy."""
        if self._device.type == "cpu":
            return [torch.from_numpy(array) for array in arrays]
        return torch.split(self._move(np.concatenate(arrays, dtype=np.int64)), [len(array) for array in arrays])

    def _values(self, array: Array, field: Field, *, activations: bool) -> torch.Tensor:
        """Return stored rows of a field on the device.

        Activations become `dtype`. Other real numbers become `dtype` or stay wider; whole numbers become int64, bools stay.
        """
        bits = field.dtype == BFLOAT16
        stored = self._move(array.view("int16")).view(torch.bfloat16) if bits else self._move(array)
        dtype = self._dtype
        if not activations and stored.is_floating_point():
            dtype = torch.promote_types(stored.dtype, dtype)
        elif not activations:
            dtype = torch.bool if stored.dtype == torch.bool else torch.int64
        unchanged = stored.dtype == dtype and not self._copies
        if self._device.type != "cpu" or unchanged or not stored.numel():
            return stored.to(dtype)
        with span("decode"):
            memory = self._buffers.take(stored.numel() * dtype.itemsize)
            return torch.from_numpy(memory).view(dtype).view(stored.shape).copy_(stored)


def first_nodes(node_ptr: torch.Tensor, edge_counts: torch.Tensor, num_edges: int) -> torch.Tensor:
    """Return, for every edge, the number in the batch of its graph's first node: (E,) int64."""
    return _repeat(node_ptr[:-1], edge_counts, num_edges)


def _repeat(values: torch.Tensor, counts: torch.Tensor, total: int) -> torch.Tensor:
    """Repeat each value by its count, to `total` values; with NumPy on the CPU, where it takes a fifth of torch's time."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.repeat(values.numpy(), counts.numpy()))
    return torch.repeat_interleave(values, counts, output_size=total)
