"""Collate gathered graphs to a PyG batch on the device, by arithmetic; and define the batch that a GraphLoader yields."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch_geometric.data import Batch, Data

from dali_pipeline.format.encoding import BFLOAT16
from dali_pipeline.format.schema import Field, Schema, level_of
from dali_pipeline.loaders.fields import RecordBatch, moved_fields, moved_with_fields, tensors_of
from dali_pipeline.loaders.sidestream import to_device
from dali_pipeline.reading.graphrows import GraphRows, ends_of
from dali_pipeline.reading.superbatch import WIDER
from dali_pipeline.runtime.memory import Buffers
from dali_pipeline.runtime.trace import span
from dali_pipeline.types import Array, Ints, Mask

Selector: TypeAlias = Callable[[str], torch.Tensor]
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
        self.delivered = {name: delivered_type(name, field, dtype) for name, field in fields.items()}
        self._device, self._dtype = device, dtype
        self._buffers, self._copies, self._labels_are_y = Buffers(), copies, one_graph

    def batches(
        self,
        rows: GraphRows,
        valid: Mask,
        sizes: Ints,
        select: Selector | None = None,
        begins: Mapping[str, Ints] | None = None,
    ) -> Iterator[GraphBatch]:
        """Yield several batches; has no loop over graphs or records.

        On a GPU all of them are made at once, with one copy and as many kernels as one batch takes, and are views. On a CPU one
        after the other: at once took three times as long on two busy cores, as torch's threads wait for each other.

        Args:
            rows: Graphs of all batches.
            valid: (N,) bool, False for padding.
            sizes: Records of each batch.
            select: Function from the name of a field to the window's rows of it, on the device, if `rows` has no values.
            begins: By level, (G,) first row of each graph in the window, if there is one.
        """
        if self._device.type != "cpu":
            yield from self._made_at_once(rows, valid, sizes, select, begins or {})
            return
        ends = ends_of(sizes).tolist()
        for number, part in enumerate(rows.cut(sizes)):
            yield from self._made_at_once(part, valid[ends[number] : ends[number + 1]], sizes[number : number + 1], None, {})

    def _made_at_once(
        self, rows: GraphRows, valid: Mask, sizes: Ints, select: Selector | None, begins: Mapping[str, Ints]
    ) -> Iterator[GraphBatch]:
        num_nodes, num_edges = int(rows.node_counts.sum()), int(rows.edge_counts.sum())
        if len(sizes) == 1:
            cuts, parts = [[0, 0, 0, 0], [len(rows.ids), len(rows.node_counts), num_nodes, num_edges]], [rows]
        else:
            cuts, parts = rows.cuts(sizes), list(rows.cut(sizes))
        node_ends = [ends_of(part.node_counts) for part in parts]  # within each batch
        first_nodes = _joined([ends[:-1] for ends in node_ends])
        small = {
            "valid": valid,
            "node_counts": rows.node_counts,
            "edge_counts": rows.edge_counts,
            "layer_index": rows.layer_index,
            "ptr": _joined(node_ends),
            "first_nodes": first_nodes,
            "last_nodes": first_nodes + rows.node_counts - 1,
            "graph_numbers": _joined([np.arange(len(part.node_counts)) for part in parts]),
            **{f"begins.{level}": starts for level, starts in begins.items()},
        }
        if rows.labels is not None:
            small["labels"] = rows.labels
        tensors = {name: torch.from_numpy(array) for name, array in small.items()}
        if select is None:
            tensors |= {f"values.{name}": stored_tensor(rows.arrays[name], bits=self._bits(name)) for name in self._fields}
            tensors["values.edge_index"] = stored_tensor(rows.edge_index, bits=False)
        with span("copy", self._device.type != "cpu"):
            moved, all_fields = moved_with_fields(list(tensors.values()), rows.fields, self._schema, self._dtype, self._device)
        on_device = dict(zip(tensors, moved, strict=True))
        if select is not None:
            chosen = {
                "node": _ranges(on_device["begins.node"], on_device["node_counts"], num_nodes),
                "edge": _ranges(on_device["begins.edge"], on_device["edge_counts"], num_edges),
                "graph": on_device["begins.graph"],
            }
            values = {name: select(name).index_select(0, chosen[level_of(name)]) for name in self._fields}
            local_edges = select("edge_index").index_select(0, chosen["edge"])
        else:
            values = {name: self._delivered(name, on_device[f"values.{name}"]) for name in self._fields}
            local_edges = on_device["values.edge_index"]
        # (E, 2) local to the graph -> (2, E) numbered through the batch
        edge_index = torch.empty((2, num_edges), dtype=torch.int64, device=self._device)
        edge_index.copy_(local_edges.t())
        edge_index += _repeat(on_device["first_nodes"], on_device["edge_counts"], num_edges)
        graph_of_node = _repeat(on_device["graph_numbers"], on_device["node_counts"], num_nodes)
        for number, part in enumerate(parts):
            spans = [slice(*span) for span in zip(cuts[number], cuts[number + 1], strict=True)]
            levels = dict(zip(("record", "graph", "node", "edge"), spans, strict=True))
            record, graph = levels["record"], levels["graph"]
            labels = on_device["labels"][record] if "labels" in on_device else None
            graphs = self._graphs(
                {name: column[levels[level_of(name)]] for name, column in values.items()},
                edge_index[:, levels["edge"]].contiguous(),
                labels if self._labels_are_y else None,
                node_ends[number],
                ends_of(part.edge_counts),
            )
            graphs.batch = graph_of_node[levels["node"]]
            graphs.ptr = on_device["ptr"][graph.start + number : graph.stop + number + 1]
            yield GraphBatch(
                graphs=graphs,
                graphs_per_record=torch.from_numpy(part.graphs_per_record),
                layer_index=on_device["layer_index"][graph],
                last_node=on_device["last_nodes"][graph],
                labels=cast("torch.Tensor", labels),
                valid=on_device["valid"][record],
                ids=part.ids,
                positions=torch.from_numpy(part.positions),
                fields={name: column[record] for name, column in all_fields.items()},
            )

    @staticmethod
    def _graphs(
        values: Mapping[str, torch.Tensor], edge_index: torch.Tensor, y: torch.Tensor | None, node_ends: Ints, edge_ends: Ints
    ) -> Batch:
        """Return a PyG `Batch` of these values, which can be taken apart again; without `batch` and `ptr`."""
        num_graphs = len(node_ends) - 1
        # boundaries at which PyG separates the graphs, on the CPU like in PyG: (G + 1,) each
        first_rows = {"node": node_ends, "edge": edge_ends, "graph": np.arange(num_graphs + 1)}
        cuts = {level: torch.from_numpy(ends) for level, ends in first_rows.items()}
        graphs, slices, increments = copy(_EMPTY), {}, {}
        zeros = torch.zeros(num_graphs, dtype=torch.int64)
        for name, value in values.items():
            attribute = name.rpartition(".")[2]
            graphs[attribute] = value
            slices[attribute], increments[attribute] = cuts[level_of(name)], zeros
        graphs.edge_index, slices["edge_index"], increments["edge_index"] = edge_index, cuts["edge"], cuts["node"][:-1]
        if y is not None:
            graphs.y, slices["y"], increments["y"] = y, cuts["graph"], zeros
        # Batch.to_data_list and indexing need these
        graphs._num_graphs, graphs._slice_dict, graphs._inc_dict = num_graphs, slices, increments
        return graphs

    def values(self, rows: GraphRows) -> dict[str, torch.Tensor]:
        """Return each field of gathered rows as it is delivered, by its stored name."""
        stored = {name: stored_tensor(rows.arrays[name], bits=self._bits(name)) for name in self._fields}
        return {name: self._delivered(name, to_device(tensor, self._device)) for name, tensor in stored.items()}

    def _bits(self, name: str) -> bool:
        return self._fields[name].dtype == BFLOAT16

    def _delivered(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """Return stored rows of a field, which are on the device, in its delivered type."""
        dtype = self.delivered[name]
        unchanged = stored.dtype == dtype and not self._copies
        if self._device.type != "cpu" or unchanged or not stored.numel():
            return stored.to(dtype)
        with span("decode"):
            memory = self._buffers.take(stored.numel() * dtype.itemsize)
            return torch.from_numpy(memory).view(dtype).view(stored.shape).copy_(stored)


def delivered_type(name: str, field: Field, dtype: torch.dtype) -> torch.dtype:
    """Return the type in which a field of graphs is delivered.

    Activations (x and edge_attr) become `dtype`. Other real numbers become `dtype` or stay wider; whole numbers become int64,
    bools stay.
    """
    if name in ("x", "edge_attr"):
        return dtype
    if field.dtype == BFLOAT16:
        return torch.promote_types(torch.bfloat16, dtype)
    if field.dtype == "bool":
        return torch.bool
    if field.storage.kind in "iu":
        return torch.int64
    return torch.promote_types(torch.from_numpy(np.empty(0, field.storage)).dtype, dtype)


def stored_tensor(array: Array, *, bits: bool) -> torch.Tensor:
    """Return stored values as a tensor: bits as bfloat16, and unsigned numbers that a GPU hardly knows as signed ones."""
    if bits:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array.astype(WIDER[array.dtype.name]) if array.dtype.name in WIDER else array)


def _joined(arrays: list[Ints]) -> Ints:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _ranges(begins: torch.Tensor, counts: torch.Tensor, total: int) -> torch.Tensor:
    """Return the numbers from each begin on, `counts` of them, concatenated: (total,) int64, without a wait for a GPU."""
    before = torch.cumsum(counts, 0) - counts
    return _repeat(begins - before, counts, total) + torch.arange(total, device=begins.device)


def _repeat(values: torch.Tensor, counts: torch.Tensor, total: int) -> torch.Tensor:
    """Repeat each value by its count, to `total` values; with NumPy on the CPU, where it takes a fifth of torch's time."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.repeat(values.numpy(), counts.numpy()))
    return torch.repeat_interleave(values, counts, output_size=total)
