"""Records: one example's sequence and graphs, and the checks before they are written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from typing import Any

import numpy as np

from dali_pipeline.errors import DataError, UsageError
from dali_pipeline.format.arrays import as_array
from dali_pipeline.format.encoding import BFLOAT16, TEXT, encode
from dali_pipeline.format.schema import LEVELS, Field, Schema, a_or_an, level_of
from dali_pipeline.runtime.checks import shown
from dali_pipeline.types import Array, Kind


@dataclass(frozen=True, kw_only=True, eq=False)
class Graphs:
    """The graphs of one record in flat arrays: what PyG calls a batch, without its offsets.

    Attributes:
        x: (N, F) node features of all graphs, one graph after the other.
        edge_index: (2, E) integers, local to each graph.
        edge_attr: (E,) or (E, D) edge features, or None.
        node_counts: (G,) integers, nodes of each graph; they sum to N.
        edge_counts: (G,) integers, edges of each graph; they sum to E.
        fields: Further arrays by the schema's names (`node.pos`), with N, E or G rows. Default: none.
    """

    x: Array
    edge_index: Array
    edge_attr: Array | None
    node_counts: Array
    edge_counts: Array
    fields: Mapping[str, Array] = dataclass_field(default_factory=dict)

    @classmethod
    def stack(cls, graphs: Iterable[Any], fields: Iterable[str] = ()) -> Graphs:
        """Join single graphs, for example PyG `Data`.

        Args:
            graphs: Objects with `x`, `edge_index` and perhaps `edge_attr`; at least one.
            fields: Names such as `node.pos`; each graph has the attribute `pos`. An attribute for `graph.` may lack its first
                axis. Default: none.

        Returns:
            The `Graphs`.

        Raises:
            UsageError: `fields` are not such names.
            DataError: There are no graphs, or an array is missing, or its shape does not fit.

        Costs a copy of all arrays.
        """
        try:
            names: list[Any] = [] if isinstance(fields, str) else list(fields)
        except (TypeError, RuntimeError):  # a tensor without values raises RuntimeError
            names = [None]
        if isinstance(fields, str) or not all(isinstance(name, str) and level_of(name) in LEVELS for name in names):
            raise UsageError(f"fields are {shown(fields)}; expected names such as node.pos")
        try:
            parts = list(graphs)
        except (TypeError, RuntimeError):  # a tensor without values raises RuntimeError
            raise DataError(f"a record's graphs are {shown(graphs)}; expected Graphs, or a list of graphs") from None
        if not parts:
            raise DataError("a record has no graphs; expected at least one")
        xs = [as_array("x", getattr(part, "x", None)) for part in parts]
        edges = [as_array("edge_index", getattr(part, "edge_index", None)) for part in parts]
        for edge_index in edges:
            if edge_index.ndim != 2 or edge_index.shape[0] != 2:
                raise DataError(f"edge_index has shape {edge_index.shape}; expected (2, edges)")
        shapes = sorted({x.shape[1:] for x in xs})
        if len(shapes) > 1 or xs[0].ndim == 0:
            raise DataError(f"a record's graphs have nodes of shapes {shapes}; expected rows of one shape")
        attrs = [getattr(part, "edge_attr", None) for part in parts]
        present = [as_array("edge_attr", attr) for attr in attrs if attr is not None]
        if present and (len(present) != len(parts) or len({attr.shape[1:] for attr in present}) > 1 or not present[0].ndim):
            raise DataError(
                f"{len(present)} of a record's {len(parts)} graphs have edge_attr; expected all or none, of one width"
            )
        rows = {"node": [len(x) for x in xs], "edge": [edge.shape[1] for edge in edges], "graph": [1] * len(parts)}
        return cls(
            x=np.concatenate(xs),
            edge_index=np.concatenate(edges, axis=1),
            edge_attr=_joined("edge_attr", parts, rows["edge"]) if present else None,
            node_counts=np.array(rows["node"], dtype=np.int64),
            edge_counts=np.array(rows["edge"], dtype=np.int64),
            fields={name: _joined(name, parts, rows[level_of(name)]) for name in names},
        )

    def select(self, layers: Sequence[int]) -> Graphs:
        """Return some graphs.

        Args:
            layers: Numbers of the graphs, in the order of the result.

        Returns:
            A `Graphs` with copies of their arrays.
        """
        node_offsets, edge_offsets = np.cumsum([0, *self.node_counts]), np.cumsum([0, *self.edge_counts])
        node_rows = np.concatenate([np.arange(node_offsets[layer], node_offsets[layer + 1]) for layer in layers])
        edge_rows = np.concatenate([np.arange(edge_offsets[layer], edge_offsets[layer + 1]) for layer in layers])
        rows = {"node": node_rows, "edge": edge_rows, "graph": np.array(layers)}
        return Graphs(
            x=self.x[node_rows],
            edge_index=self.edge_index[:, edge_rows],
            edge_attr=None if self.edge_attr is None else self.edge_attr[edge_rows],
            node_counts=self.node_counts[list(layers)],
            edge_counts=self.edge_counts[list(layers)],
            fields={name: array[rows[level_of(name)]] for name, array in self.fields.items()},
        )


def _joined(name: str, graphs: list[Any], counts: Sequence[int]) -> Array:
    """Concatenate one attribute of all graphs, with the expected number of rows in each."""
    level, attribute = level_of(name), name.rpartition(".")[2]
    parts = [as_array(name, getattr(graph, attribute, None)) for graph in graphs]
    if level == "graph":  # (1, *row), as PyG has it, or (*row,)
        parts = [part if part.ndim and len(part) == 1 else part[None] for part in parts]
    if len({part.shape[1:] for part in parts}) > 1 or not all(part.ndim for part in parts):
        raise DataError(f"{name} has rows of different shapes in a record's graphs; expected rows of one shape")
    for graph, (part, count) in enumerate(zip(parts, counts, strict=True)):
        if len(part) != count:
            raise DataError(f"graph {graph}, {name}: {len(part)} rows; expected {count}, one {a_or_an(level)}")
    return np.concatenate(parts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """One example: an id, a label, and a sequence, graphs, or both, with further fields.

    Attributes:
        id: Text, or a whole number, which becomes text. Each id is used once per data set.
        label: What the schema's label says: a class as a whole number of 0 or more (or as one of its `class_names`), several
            bools, a value, or None.
        group: Records of one group stay in one split (for example a question id). Default: None, for the id itself.
        sequence: (T, *shape) array-like of real numbers. Default: None.
        graphs: A `Graphs`, or a list of objects with `x`, `edge_index` and perhaps `edge_attr`. Default: None.
        fields: Further fields, by names such as `step.token_ids`, with one row per step, and `record.score`. Default: none.

    Raises:
        DataError: The id or the group is neither text nor a whole number.
    """

    id: str
    label: Any = None
    group: str | None = None
    sequence: Any = None
    graphs: Any = None
    fields: Mapping[str, Any] = dataclass_field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("id", "group"):
            value = getattr(self, name)
            if isinstance(value, int | np.integer) and not isinstance(value, bool):
                object.__setattr__(self, name, str(value))  # question ids are often numbers
            elif not isinstance(value, str) and (name == "id" or value is not None):
                raise DataError(f"record {self.id!r} has the {name} {value!r}; expected a text or a whole number")

    @classmethod
    def of(cls, value: Record | Mapping[str, Any]) -> Record:
        """Return a record as it is, or make one from a mapping.

        Args:
            value: A `Record`, or a mapping with the names of its fields.

        Returns:
            The `Record`.

        Raises:
            DataError: The value is neither.
        """
        if isinstance(value, Record):
            return value
        try:
            return cls(**value)
        except (TypeError, RuntimeError) as error:
            fields = f"has the fields {shown(sorted(map(str, value)))}" if isinstance(value, Mapping) else f"is {shown(value)}"
            raise DataError(f"a record {fields}; expected id, label, group, sequence, graphs, fields") from error

    def stored(self, schema: Schema) -> Record:
        """Convert the record to the schema's types, and check it.

        Args:
            schema: The schema.

        Returns:
            A `Record` whose arrays have the stored types. An array is copied only if its type changes.

        Raises:
            DataError: The record does not fit the schema.
        """
        sequence, graphs = self.sequence, self.graphs
        if sequence is not None and schema.sequence is not None:
            sequence = sequence_rows(self, schema.sequence)
        if graphs is not None and schema.x is not None:
            graphs = graph_rows(self, schema)
        label: Any = schema.labels.stored(self.id, self.label)
        if schema.labels.kind == "class":
            label = int(label)
        kind: Kind = "graphs" if sequence is None else "sequences"
        rows = named_rows(self, schema, kind, 0 if sequence is None else len(sequence)) if self.fields else {}
        fields = {
            name: self.fields[name] if f"{name}.counts" in rows else values[0] if name.startswith("record.") else values
            for name, values in rows.items()
            if not name.endswith(".counts")
        }
        return replace(self, label=label, sequence=sequence, graphs=graphs, fields=Fields(fields))


def sequence_rows(record: Record, field: Field) -> Array:
    """Return the record's sequence in the schema's type, (T, *shape), T >= 1; raise DataError if it does not fit."""
    return _rows(record, "sequence", record.sequence, field)


def graph_rows(record: Record, schema: Schema) -> Graphs:
    """Return the record's graphs in the schema's types, checked: every edge within its own graph, no empty graph."""
    assert schema.x is not None
    where = f"record {record.id!r}"
    try:
        graphs = record.graphs if isinstance(record.graphs, Graphs) else Graphs.stack(record.graphs, schema.named)
        edge_index, nodes, edges = (
            as_array(name, getattr(graphs, name)) for name in ("edge_index", "node_counts", "edge_counts")
        )
        given = _given_edge_attr(graphs, schema)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    x = _rows(record, "x", graphs.x, schema.x)
    if nodes.dtype.kind not in "iu" or edges.dtype.kind not in "iu":
        raise DataError(f"{where}: node_counts are {nodes.dtype}, edge_counts {edges.dtype}; expected integers")
    nodes, edges = nodes.astype(np.int64), edges.astype(np.int64)
    if nodes.ndim != 1 or nodes.shape != edges.shape or nodes.sum() != len(x) or (edges < 0).any():
        raise DataError(f"{where}: node_counts and edge_counts do not describe {len(x)} nodes; expected one of each a graph")
    if (nodes < 1).any():
        raise DataError(f"{where}, graph {int(np.argmax(nodes < 1))} has no nodes; expected at least one")
    _check_edges(where, edge_index, nodes, edges)
    attr = None
    if schema.edge_attr is not None:
        if given.ndim == 2 and given.shape[1] == 1 and schema.edge_attr.shape == ():
            given = given[:, 0]
        if len(given) != edge_index.shape[1]:
            raise DataError(f"{where}: {len(given)} rows of edge_attr for {edge_index.shape[1]} edges; expected one an edge")
        attr = _cast(where, "edge_attr", given, schema.edge_attr)
    sizes = {"node": len(x), "edge": edge_index.shape[1], "graph": len(nodes)}
    fields = {name: _further(where, name, graphs.fields, field, sizes) for name, field in schema.named.items()}
    return Graphs(x=x, edge_index=edge_index, edge_attr=attr, node_counts=nodes, edge_counts=edges, fields=fields)


def _given_edge_attr(graphs: Graphs, schema: Schema) -> Array:
    """Return the given edge features; an array without rows if there are none."""
    if graphs.edge_attr is None:
        return np.zeros((0, *(schema.edge_attr.shape if schema.edge_attr else ())))
    given = as_array("edge_attr", graphs.edge_attr)
    if not given.ndim:
        raise DataError("edge_attr is a single number; expected one row an edge")
    return given


def _check_edges(where: str, edge_index: Array, nodes: Array, edges: Array) -> None:
    """Raise DataError for an edge that leaves its graph.

    Args:
        where: The record, for the message.
        edge_index: (2, E) integers.
        nodes: (G,) nodes of each graph.
        edges: (G,) edges of each graph.
    """
    if edge_index.shape != (2, edges.sum()) or (edge_index.size and edge_index.dtype.kind not in "iu"):
        raise DataError(f"{where}, edge_index is {edge_index.dtype} {edge_index.shape}; expected integers (2, {edges.sum()})")
    limit = np.repeat(nodes, edges)  # (E,)
    wrong = ((edge_index < 0) | (edge_index >= limit)).any(axis=0)
    if wrong.any():
        edge = int(np.argmax(wrong))
        graph = int(np.searchsorted(np.cumsum(edges), edge, side="right"))
        raise DataError(
            f"{where}, graph {graph}: edge {tuple(int(node) for node in edge_index[:, edge])} leaves the graph's "
            f"{nodes[graph]} nodes; expected indices 0 to {nodes[graph] - 1}"
        )


def _further(where: str, name: str, fields: Mapping[str, Array], field: Field, sizes: Mapping[str, int]) -> Array:
    """Return a named field's rows in the schema's type, after a check of their number."""
    level, rows = level_of(name), _array(where, name, fields.get(name) if isinstance(fields, Mapping) else fields)
    if rows.ndim == 0 or len(rows) != sizes[level]:
        raise DataError(f"{where}, {name} has shape {rows.shape}; expected {sizes[level]} rows, one {a_or_an(level)}")
    return _cast(where, name, rows, field)


def _array(where: str, name: str, value: Any) -> Array:
    """Return `as_array` of a value, with the record in its errors."""
    try:
        return as_array(name, value)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


class Fields(dict[str, Any]):
    """The further fields of a record, by name; also by the part of the name after the dot."""

    def __missing__(self, name: str) -> Any:
        for key, value in self.items():
            if key.partition(".")[2] == name:
                return value
        raise KeyError(name)


def named_rows(record: Record, schema: Schema, kind: Kind, steps: int) -> dict[str, Array]:
    """Return the rows of the further fields of one kind of record in their stored types; of texts, the bytes and `.counts`.

    Args:
        record: The record.
        schema: The schema.
        kind: "sequences", which has step fields, or "graphs".
        steps: Number of steps of the record's sequence.

    Raises:
        DataError: A field is missing, is unknown, or does not fit; named by record and field.
    """
    where, given = f"record {record.id!r}", record.fields
    expected = {**schema.step_fields, **schema.record_fields}
    if not isinstance(given, Mapping):
        raise DataError(f"{where} has the fields {shown(given)}; expected names and values")
    for name in given:
        if name not in expected:
            known = ", ".join(expected) or "none, as the schema has no step. or record. fields"
            raise DataError(f"{where} has the unknown field {name!r}; expected {known}")
    rows: dict[str, Array] = {}
    for name, field in expected.items():
        level = name.partition(".")[0]
        if level == "step" and kind != "sequences":
            continue
        if given.get(name) is None:
            raise DataError(f"{where} has no {name}; expected {f'{steps} rows' if level == 'step' else 'one'} as in the schema")
        if field.dtype == TEXT:
            rows[name] = np.frombuffer(_text(where, name, given[name]), np.uint8)
            rows[f"{name}.counts"] = np.array([len(rows[name])])
            continue
        values = _array(where, name, given[name])
        if level == "record":
            values = values[None]
        elif values.ndim == 0 or len(values) != steps:
            raise DataError(f"{where}, {name} has shape {values.shape}; expected {steps} rows, one per step")
        rows[name] = _cast(where, name, values, field)
    return rows


def _text(where: str, name: str, value: Any) -> bytes:
    try:
        if isinstance(value, str):
            return value.encode()
    except UnicodeEncodeError:
        pass
    raise DataError(f"{where}, {name} is {shown(value)}; expected a text that UTF-8 can hold")


def _rows(record: Record, name: str, value: Any, field: Field) -> Array:
    rows = _array(f"record {record.id!r}", name, value)
    if rows.ndim == 0 or len(rows) == 0:
        raise DataError(f"record {record.id!r}, {name} has shape {rows.shape}; expected at least one row")
    return _cast(f"record {record.id!r}", name, rows, field)


def _cast(where: str, name: str, rows: Array, field: Field) -> Array:
    """Return rows in the field's stored type; a value that the type cannot hold is an error, never infinity or wrapped."""
    if rows.shape[1:] != field.shape:
        raise DataError(f"{where}, {name} has rows of shape {rows.shape[1:]}; expected {field.shape} as in the schema")
    if field.layout and len(rows) != field.layout.steps:
        raise DataError(f"{where}, {name} has {len(rows)} steps; expected {field.layout.steps}, as rows are stored by layer")
    if rows.dtype == field.storage and field.dtype != BFLOAT16 and not field.scales:
        return rows
    if field.scales and len(field.scales) not in (1, len(rows)):
        raise DataError(f"{where}, {name} has {len(rows)} steps; expected {len(field.scales)}, one for each row of the scale")
    stored, lost = encode(rows, field.dtype, field.scale_rows)
    if lost:
        raise DataError(
            f"{where}, {name} holds {rows.dtype} values that {field.dtype}{' with its scale' if field.scales else ''} cannot; "
            "expected a wider dtype in the schema"
        )
    return stored
