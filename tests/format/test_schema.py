from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dali_pipeline.errors import DataError, UsageError
from dali_pipeline.format.record import Graphs, Record, graph_rows, sequence_rows
from dali_pipeline.format.schema import Field, Schema

GRAPH_SCHEMA = Schema(x=Field(dtype="float16", shape=(2,)), edge_attr=Field(dtype="float16"))


def graph(nodes: int, edges: list[tuple[int, int]], attr: bool = True) -> SimpleNamespace:
    edge_index = np.array(edges, np.int64).reshape(-1, 2).T
    return SimpleNamespace(
        x=np.ones((nodes, 2), np.float16), edge_index=edge_index, edge_attr=np.ones(len(edges)) if attr else None
    )


def record(*graphs: Any) -> Record:
    return Record(id="r7", label=0, graphs=list(graphs))


def test_stacked_graphs_keep_their_order_and_counts() -> None:
    rows = graph_rows(record(graph(3, [(0, 2), (1, 1)]), graph(1, [])), GRAPH_SCHEMA)
    assert rows.node_counts.tolist() == [3, 1]
    assert rows.edge_counts.tolist() == [2, 0]
    assert rows.edge_index.tolist() == [[0, 1], [2, 1]]
    assert rows.x.shape == (4, 2)
    assert rows.edge_attr is not None
    assert rows.edge_attr.dtype == np.float16


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (record(graph(2, []), graph(2, [(0, 1), (0, 2)])), r"'r7', graph 1: edge \(0, 2\) leaves the graph's 2 nodes"),
        (record(graph(2, [(0, -1)])), r"edge \(0, -1\) leaves"),
        (record(graph(0, [])), "r7"),
        (record(graph(2, [(0, 1)]), graph(0, [])), "graph 1 has no nodes"),
        (record(), "no graphs"),
        (record(graph(2, [(0, 1)]), graph(2, [(0, 1)], attr=False)), "1 of a record's 2 graphs have edge_attr"),
        (record(graph(2, [(0, 1)], attr=False)), "0 rows of edge_attr for 1 edges"),
        (
            record(SimpleNamespace(x=np.ones((2, 3)), edge_index=np.zeros((2, 0), int), edge_attr=np.ones(0))),
            r"rows of shape \(3,\)",
        ),
        (record(SimpleNamespace(x=np.ones((2, 2)), edge_index=np.zeros((3, 0), int), edge_attr=np.ones(0))), r"\(3, 0\)"),
        (record(SimpleNamespace(x=np.ones((2, 2)), edge_index=np.ones((2, 1)), edge_attr=np.ones(1))), "expected integers"),
    ],
)
def test_bad_graphs_are_named(bad: Record, words: str) -> None:
    with pytest.raises(DataError, match=words):
        graph_rows(bad, GRAPH_SCHEMA)


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        (np.zeros((0, 2)), "float16", "at least one row"),
        (np.zeros((3, 4)), "float16", r"rows of shape \(4,\)"),
        (np.array([[70000.0, 1.0]]), "float16", "float64 values that float16 cannot"),
        (np.array([[0.5, 1.0]]), "int8", "float64 values that int8 cannot"),
        (np.array([[300, 1]]), "uint8", "int64 values that uint8 cannot"),
    ],
)
def test_values_that_do_not_fit_are_refused(value: Any, dtype: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        sequence_rows(Record(id="a", label=0, sequence=value), Field(dtype=dtype, shape=(2,)))


def test_infinities_pass_but_are_not_made() -> None:
    rows = sequence_rows(Record(id="a", label=0, sequence=np.array([[np.inf, np.nan]])), Field(dtype="float16", shape=(2,)))
    assert np.isinf(rows[0, 0])
    assert np.isnan(rows[0, 1])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Schema(), "needs `sequence`"),
        (lambda: Schema(sequence=Field(dtype="float16"), edge_attr=Field(dtype="float16")), "needs `x`"),
        (lambda: Field(dtype="object"), "cannot be stored"),
        (lambda: Schema(sequence=Field(dtype="text")), "is bool or text"),
        (lambda: Schema(x=Field(dtype="bool")), "is bool or text"),
        (lambda: Field(dtype=">f4"), "cannot be stored"),
        (lambda: Field(dtype="float16", shape=(0,)), "size below 1"),
    ],
)
def test_senseless_schemas_are_refused(make: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([[1.0], [1.0, 2.0]], "'a': sequence cannot be taken as a NumPy array"),
        (torch.ones(2, 2, requires_grad=True), "cannot be taken as a NumPy array"),
        (np.ones((2, 2), complex), "sequence is complex128; expected real numbers"),
        (["one", "two"], "expected real numbers"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused(value: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        sequence_rows(Record(id="a", label=0, sequence=value), Field(dtype="float16", shape=(2,)))


@pytest.mark.parametrize(("name", "value"), [("id", None), ("id", 1.5), ("id", b"a"), ("group", 2.5), ("id", True)])
def test_ids_and_groups_are_texts_or_whole_numbers(name: str, value: Any) -> None:
    with pytest.raises(DataError, match=f"has the {name}"):
        Record(**{"id": "a", "label": 0, name: value})
    record = Record(id=7, label=0, group=np.int64(8))  # type: ignore[arg-type]
    assert (record.id, record.group) == ("7", "8")


def test_a_mapping_is_a_record() -> None:
    assert Record.of({"id": "a", "label": 1, "sequence": [1]}).label == 1
    with pytest.raises(DataError, match="expected id, label"):
        Record.of({"name": "a"})


def test_flat_graphs_must_add_up() -> None:
    flat = Graphs(
        x=np.ones((3, 2)),
        edge_index=np.zeros((2, 0), int),
        edge_attr=np.ones(0),
        node_counts=np.array([1]),
        edge_counts=np.array([0]),
    )
    with pytest.raises(DataError, match="do not describe 3 nodes"):
        graph_rows(Record(id="a", label=0, graphs=flat), GRAPH_SCHEMA)
