"""Split a batch into pieces that go through the model one after the other, if the batch does not fit in memory."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch_geometric.data import Batch as Graphs
from torch_geometric.data import Data

from dali_pipeline import GraphBatch, SequenceBatch


def cut(batch: SequenceBatch | GraphBatch, pieces: int) -> list[SequenceBatch | GraphBatch]:
    """Return the batch as `pieces` equal parts in order; they are views, and only edge indices are copied."""
    if pieces == 1:
        return [batch]
    size = len(batch) // pieces
    spans = [slice(begin, begin + size) for begin in range(0, len(batch), size)]
    if isinstance(batch, SequenceBatch):
        return [_sequences(batch, rows) for rows in spans]
    ends = batch.graphs_per_record.cumsum(0).tolist()  # graphs before each record's end; on the CPU, so nothing waits for a GPU
    return [_graphs(batch, rows, slice(ends[rows.start - 1] if rows.start else 0, ends[rows.stop - 1])) for rows in spans]


def _sequences(batch: SequenceBatch, rows: slice) -> SequenceBatch:
    parts = {name: getattr(batch, name)[rows] for name in ("sequences", "lengths", "labels", "valid", "ids", "positions")}
    return replace(batch, **parts)


def _graphs(batch: GraphBatch, rows: slice, own: slice) -> GraphBatch:
    """Return the part of a batch with these rows; own: range of the rows' graphs."""
    whole, cuts = batch.graphs, batch.graphs._slice_dict  # on the CPU
    first, last = (int(cuts["x"][graph]) for graph in (own.start, own.stop))
    edges = slice(*(int(cuts["edge_index"][graph]) for graph in (own.start, own.stop)))
    graphs = Graphs(_base_cls=Data)
    graphs.x = whole.x[first:last]
    graphs.edge_index = whole.edge_index[:, edges] - first
    if "edge_attr" in whole:
        graphs.edge_attr = whole.edge_attr[edges]
    graphs.batch = whole.batch[first:last] - own.start
    graphs.ptr = whole.ptr[own.start : own.stop + 1] - first
    parts = {name: getattr(batch, name)[rows] for name in ("graphs_per_record", "labels", "valid", "ids", "positions")}
    index: torch.Tensor = batch.layer_index[own]
    return replace(batch, graphs=graphs, layer_index=index, last_node=batch.last_node[own] - first, **parts)
