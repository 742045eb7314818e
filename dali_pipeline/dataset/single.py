"""Single records: read complete as NumPy arrays, found by id, chosen by position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dali_pipeline.errors import UsageError
from dali_pipeline.format.encoding import TEXT
from dali_pipeline.format.record import Fields, Graphs, Record
from dali_pipeline.format.schema import Schema, level_of
from dali_pipeline.runtime.checks import shown
from dali_pipeline.storage.files import Files

if TYPE_CHECKING:
    from dali_pipeline.dataset.selection import Selection
    from dali_pipeline.format.label import Label
    from dali_pipeline.format.shard import Shard
    from dali_pipeline.types import Array, Ints


def read_record(selection: Selection, schema: Schema, position: int) -> Record:
    """Read the record at a position of a selection of one kind; costs its bytes and the offsets before it in its shard.

    Values are those that a loader delivers before its `dtype`: numbers as stored, and float32 for bfloat16 and int8 with a
    scale.
    """
    shards, number, row = selection.at(position)
    shard = shards.open(number, Files(1))
    sequence = sequence_at(shard, schema, row) if shards.kind == "sequences" else None
    return Record(
        id=text_at(shard, "ids", row),
        group=text_at(shard, "groups", row),
        label=label_at(shard, schema.labels, row),
        sequence=sequence,
        graphs=graphs_at(shard, schema, row) if shards.kind == "graphs" else None,
        fields=fields_at(shard, schema, row),
    )


def label_at(shard: Shard, label: Label, row: int) -> Any:
    """Read one label: an int, an array of the label's shape, or None."""
    if label.dtype is None:
        return None
    stored = shard.read("labels", row, row + 1)[0]
    return int(stored) if label.kind == "class" else stored


def fields_at(shard: Shard, schema: Schema, row: int) -> Fields:
    """Read the step and record fields of one record, by name."""
    fields = Fields()
    for name, field in schema.record_fields.items():
        fields[name] = text_at(shard, name, row) if field.dtype == TEXT else field.values(shard.read(name, row, row + 1))[0]
    if shard.kind == "sequences" and schema.step_fields:
        begin, end = shard.read("sequence.offsets", row, row + 2).tolist()
        fields |= {name: field.values(shard.read(name, begin, end)) for name, field in schema.step_fields.items()}
    return fields


def find_id(selection: Selection, record_id: str, guess: int) -> int | None:
    """Return the position of the record with an id, or None; reads one id if it is at `guess`, otherwise all ids."""
    if guess < selection.num_records:
        shards, number, row = selection.at(guess)
        if text_at(shards.open(number, Files(1)), "ids", row) == record_id:
            return guess
    ids, wanted = selection.texts("ids"), record_id.encode()
    return ids.index(wanted) if wanted in ids else None


def checked_positions(positions: npt.ArrayLike, count: int) -> Ints:
    """Return the positions of a subset as (n,) int64; raises UsageError unless each is in 0 to `count` - 1, once."""
    expected = f"whole numbers from 0 to {count - 1}, each once, or {count} bools"
    try:
        given = np.asarray(positions)
    except (TypeError, ValueError, RuntimeError):  # ragged, or a tensor without values
        given = np.zeros((0, 0))
    if given.dtype.kind == "b" and given.shape == (count,):
        return np.flatnonzero(given)
    if given.ndim == 1 and not len(given):
        return np.zeros(0, np.int64)
    if given.ndim != 1 or given.dtype.kind not in "iu" or isinstance(positions, np.ma.MaskedArray):
        raise UsageError(f"positions are {shown(positions)}; expected {expected}")
    if int(given.min()) < 0 or int(given.max()) >= count:
        raise UsageError(f"positions reach from {given.min()} to {given.max()}; expected {expected}")
    if len(np.unique(given)) < len(given):
        raise UsageError(f"positions name a record twice; expected {expected}")
    return given.astype(np.int64)


def text_at(shard: Shard, name: str, row: int) -> str:
    """Read one of the `ids`, `groups` or texts of a record field of a shard."""
    begin, end = shard.read(f"{name}.offsets", row, row + 2).tolist()
    return shard.read(name, begin, end).tobytes().decode()


def sequence_at(shard: Shard, schema: Schema, row: int) -> Array:
    """Read the sequence of one record, (T, *shape)."""
    field = schema.sequence
    assert field is not None
    begin, end = shard.read("sequence.offsets", row, row + 2).tolist()
    if schema.layer_axis is not None:
        layers = schema.stored_layers
        stored = shard.read("sequence", begin * layers, end * layers)  # layer by layer
        if field.step_major:
            return field.values(stored.reshape(end - begin, layers, *stored.shape[1:]))
        by_layer = stored.reshape(layers, end - begin, *stored.shape[1:])
        return field.values(np.moveaxis(by_layer, 0, 1 + schema.layer_axis))
    if field.layout is None:
        return field.values(shard.read("sequence", begin, end))
    # rows of several records lie layer by layer: a block of `records` records holds all first steps, then all second ones
    first = row // field.layout.records * field.layout.records
    count, steps = min(field.layout.records, shard.records - first), field.layout.steps
    begin = first * steps + row - first
    rows = [shard.read("sequence", at, at + 1) for at in range(begin, begin + steps * count, count)]
    return field.values(np.concatenate(rows))


def graphs_at(shard: Shard, schema: Schema, row: int) -> Graphs:
    """Read the graphs of one record."""
    begin, end = shard.read("graphs.offsets", row, row + 2).tolist()
    nodes, edges = shard.read("x.offsets", begin, end + 1), shard.read("edge_index.offsets", begin, end + 1)
    return graphs_between(shard, schema, begin, nodes, edges)


def graphs_between(shard: Shard, schema: Schema, begin: int, nodes: Array, edges: Array) -> Graphs:
    """Read consecutive graphs of a shard, from number `begin` on.

    Args:
        shard: The shard.
        schema: Fields of the data set.
        begin: Number of the first graph.
        nodes: (G + 1,) first row of each graph's nodes, and the end of the last one's.
        edges: (G + 1,) first row of each graph's edges, and the end of the last one's.
    """
    end = begin + len(nodes) - 1
    spans = {"node": (int(nodes[0]), int(nodes[-1])), "edge": (int(edges[0]), int(edges[-1])), "graph": (begin, end)}
    values = {name: field.values(shard.read(name, *spans[level_of(name)])) for name, field in schema.of_graphs.items()}
    return Graphs(
        x=values["x"],
        edge_index=shard.read("edge_index", *spans["edge"]).T,
        edge_attr=values.get("edge_attr"),
        node_counts=np.diff(nodes),
        edge_counts=np.diff(edges),
        fields={name: values[name] for name in schema.named},
    )
