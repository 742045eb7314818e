"""Split a batch into pieces that go through the model one after the other, if the batch does not fit in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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
    return replace(batch, sequences=batch.sequences[rows], lengths=batch.lengths[rows], **_records(batch, rows))


def _records(batch: SequenceBatch | GraphBatch, rows: slice) -> dict[str, Any]:
    """Return what batches of both kinds have for each record, of these rows."""
    parts: dict[str, Any] = {name: getattr(batch, name)[rows] for name in ("valid", "ids", "positions")}
    parts["labels"] = None if batch.labels is None else batch.labels[rows]
    return {**parts, "fields": {name: field[rows] for name, field in batch.fields.items()}}


def _graphs(batch: GraphBatch, rows: slice, own: slice) -> GraphBatch:
    """Return the part of a batch with these rows; own: range of the rows' graphs."""
    whole, cuts = batch.graphs, batch.graphs._slice_dict  # on the CPU
    graphs = Graphs(_base_cls=Data)
    spans = {name: slice(int(ends[own.start]), int(ends[own.stop])) for name, ends in cuts.items()}
    first = spans["x"].start
    for name, span in spans.items():
        graphs[name] = whole[name][:, span] - first if name == "edge_index" else whole[name][span]
    graphs.batch = whole.batch[spans["x"]] - own.start
    graphs.ptr = whole.ptr[own.start : own.stop + 1] - first
    parts: dict[str, Any] = _records(batch, rows)
    parts |= {"graphs_per_record": batch.graphs_per_record[rows], "layer_index": batch.layer_index[own]}
    return replace(batch, graphs=graphs, last_node=batch.last_node[own] - first, **parts)
