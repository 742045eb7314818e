"""Containers: every family of formats gives exact keys, shapes, dtypes and values, and reads no more than it is asked for."""

from __future__ import annotations

import gzip
import json
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file as save_torch
from torch_geometric.data import Data, InMemoryDataset

from dali_pipeline.errors import FormatError
from dali_pipeline.ingest.containers.base import Container, Leaf, is_container, open_container

DTYPES = ["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"]


def numbers(dtype: str, *shape: int) -> Any:
    rng = np.random.default_rng(len(dtype))
    return rng.integers(0, 2 if dtype == "bool" else 100, shape).astype(dtype)


def bfloats(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).normal(size=shape)).bfloat16()


def about(container: Container, record: int = 0) -> dict[str, tuple[tuple[int, ...], str]]:
    return {leaf.key: (leaf.shape, leaf.dtype) for leaf in container.leaves(record)}


def equal(found: Any, expected: Any) -> None:
    """Assert equality of dtype, shape and every bit."""
    if isinstance(expected, torch.Tensor):
        expected = (expected.float() if expected.dtype == torch.bfloat16 else expected).numpy()
    expected = np.asarray(expected)
    assert isinstance(found, np.ndarray)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.dtype.isnative
    assert np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(expected).tobytes()


def check_rows(container: Container, key: str, expected: Any, record: int | None = None) -> None:
    """Assert that the whole, a middle part, a first row and no rows are as expected."""
    equal(container.read(key, record=record), expected)
    if expected.ndim:
        rows = len(expected)
        for begin, end in {(rows // 3, rows - rows // 3), (0, min(1, rows)), (rows // 2, rows // 2), (max(0, rows - 1), rows)}:
            equal(container.read(key, begin, end, record), expected[begin:end])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (5, 3), (4, 3, 2), (2, 0, 3)])
@pytest.mark.parametrize("suffix", ["safetensors", "npy", "npz", "pt", "pkl"])
def test_values_are_exact(tmp_path: Path, dtype: str, shape: tuple[int, ...], suffix: str) -> None:
    values, path, key = np.asarray(numbers(dtype, *shape)), tmp_path / f"a.{suffix}", "x"
    if suffix == "safetensors":
        save_numpy({"x": values, "other": numbers("int8", 3)}, path)
    elif suffix == "npy":
        np.save(path, values)
        key = ""
    elif suffix == "npz":
        np.savez(path, x=values, other=numbers("int8", 3))
    elif suffix == "pt":
        torch.save({"x": torch.from_numpy(values), "other": 1}, path)
    else:
        path.write_bytes(pickle.dumps({"x": values, "other": [1, 2]}))
    container = open_container(path)
    assert container.records is None
    assert about(container)[key] == (shape, dtype)
    check_rows(container, key, values)
    container.close()


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pkl", "memmap", "ckpt.gz", "pth"])
def test_bfloat16_is_exact(tmp_path: Path, suffix: str) -> None:
    values, path, key = bfloats(6, 5, 3), tmp_path / f"a.{suffix}", "x"
    if suffix == "safetensors":
        save_torch({"x": values}, path)
    elif suffix == "pkl":
        path.write_bytes(pickle.dumps({"x": values}))
    elif suffix == "memmap":
        path.write_bytes(values.view(torch.int16).numpy().tobytes())
        path.with_suffix(".meta").write_text(json.dumps({"shape": [6, 5, 3], "dtype": "torch.bfloat16"}))
        key = ""
    else:
        torch.save({"x": values}, tmp_path / "a")
        data = (tmp_path / "a").read_bytes()
        path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    container = open_container(path)
    assert about(container) == {key: ((6, 5, 3), "bfloat16")}
    check_rows(container, key, values)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("shape", [(7,), (5, 3), (4, 3, 2)])
def test_npy_in_fortran_order_and_of_either_byte_order(tmp_path: Path, order: str, shape: tuple[int, ...]) -> None:
    values = numbers("float32", *shape)
    np.save(tmp_path / "a.npy", np.asfortranarray(values.astype(f"{order}f4")))
    np.savez_compressed(tmp_path / "a.npz", x=np.asfortranarray(values.astype(f"{order}f4")))
    check_rows(open_container(tmp_path / "a.npy"), "", values)
    check_rows(open_container(tmp_path / "a.npz"), "x", values)


def test_large_arrays_in_fortran_order_are_read_by_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dali_pipeline.ingest.containers.source._WHOLE_BYTES", 0)
    values = numbers("int32", 3000, 7, 2)
    np.save(tmp_path / "a.npy", np.asfortranarray(values))
    equal(open_container(tmp_path / "a.npy").read("", 1000, 1005), values[1000:1005])


def test_compressed_npz_is_read_in_order_without_being_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dali_pipeline.ingest.containers.npy._KEPT_BYTES", 0)
    values = numbers("int32", 100, 7)
    np.savez_compressed(tmp_path / "a.npz", x=values, y=np.int64(3))
    container = open_container(tmp_path / "a.npz")
    for begin in (0, 30, 60, 10):
        equal(container.read("x", begin, begin + 20), values[begin : begin + 20])
    equal(container.read("y"), np.int64(3))


def test_texts_in_numpy_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", ids=np.array(["a", "bé"]), raw=np.array([b"x", b"yz"]), one=np.array("t"), table=[["a"]])
    container = open_container(tmp_path / "a.npz")
    assert about(container)["ids"] == ((2,), "text")
    assert container.read("ids") == ["a", "bé"]
    assert container.read("raw", 1, 2) == ["yz"]
    assert container.read("one") == "t"
    assert about(container)["table"] == ((1, 1), "object")


@pytest.mark.parametrize("name", ["float16", "<f4", "torch.float32", "int64", "bool"])
def test_raw_files(tmp_path: Path, name: str) -> None:
    values = numbers({"<f4": "float32", "torch.float32": "float32"}.get(name, name), 6, 4)
    for suffix, beside in (("memmap", "a.meta"), ("bin", "a.json"), ("dat", "a.dat.json"), ("raw", "a.raw.meta")):
        folder = tmp_path / suffix
        folder.mkdir()
        (folder / f"a.{suffix}").write_bytes(values.tobytes())
        (folder / beside).write_text(json.dumps({"shape": [6, 4], "dtype": name, "more": 1}))
        check_rows(open_container(folder / f"a.{suffix}"), "", values)


def test_a_bin_without_json_may_be_one_of_torch(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert about(open_container(tmp_path / "pytorch_model.bin")) == {"w": ((2,), "float32")}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", "float16", "bool"])
def test_tensors_of_both_formats_of_torch(tmp_path: Path, dtype: str, old: bool) -> None:
    values = numbers(dtype, 5, 4)
    torch.save(torch.from_numpy(values)[1:, ::2], tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
    container = open_container(tmp_path / "a.pt")
    assert about(container) == {"": ((4, 2), dtype)}
    check_rows(container, "", values[1:, ::2])


@dataclass
class Sample:
    """A class that no reader knows."""

    states: Any
    name: str = "n"


def nested() -> dict[Any, Any]:
    return {
        "most_likely_answer": {"embedding": bfloats(1, 4), "accuracy": 0.5, "response": "yes"},
        "layers": (torch.ones(2, 3), torch.zeros(4, 3)),
        "token_ids": [1, 2, 3],
        "table": [[1, 2.5], [3, 4]],
        "words": ["a", "b"],
        "array": np.arange(6).reshape(2, 3),
        "scalars": [np.float32(1.5), np.float32(2.5)],
        "tensors": [torch.tensor(1), torch.tensor(2)],
        "ragged": [[1], [2, 3]],
        "nothing": None,
        "blocks.8.hook": torch.arange(3),
        7: {"x": True},
        "sample": Sample(torch.ones(2)),
        "plain": SimpleNamespace(alpha=1),
        "size": torch.ones(2, 3).shape,
        "odd": {1, 2},
        "empty": [],
    }


@pytest.mark.parametrize("suffix", ["pt", "pkl", "pkl.gz"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_nested_keys(tmp_path: Path, suffix: str, protocol: int) -> None:
    given, path = nested(), tmp_path / f"a.{suffix}"
    if suffix == "pt":
        torch.save(given, path, pickle_protocol=protocol)
    else:
        data = pickle.dumps(given, protocol)
        path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    container = open_container(path)
    assert container.records is None
    found = about(container)
    assert found == {
        "most_likely_answer.embedding": ((1, 4), "bfloat16"), "most_likely_answer.accuracy": ((), "float64"),
        "most_likely_answer.response": ((), "text"), "layers[0]": ((2, 3), "float32"), "layers[1]": ((4, 3), "float32"),
        "token_ids": ((3,), "int64"), "table": ((2, 2), "float64"), "words": ((2,), "text"), "array": ((2, 3), "int64"),
        "scalars": ((2,), "float32"), "tensors": ((2,), "int64"), "ragged[0]": ((1,), "int64"), "ragged[1]": ((2,), "int64"),
        "nothing": ((), "object"), "blocks.8.hook": ((3,), "int64"), "7.x": ((), "bool"), "sample.states": ((2,), "float32"),
        "sample.name": ((), "text"), "plain.alpha": ((), "int64"), "size": ((2,), "int64"), "odd": ((), "object"),
        "empty": ((0,), "float64"),
    }  # fmt: skip
    equal(container.read("most_likely_answer.embedding"), given["most_likely_answer"]["embedding"])
    equal(container.read("most_likely_answer.accuracy"), np.float64(0.5))
    assert container.read("most_likely_answer.response") == "yes"
    equal(container.read("layers[1]", 1, 3), given["layers"][1][1:3])
    equal(container.read("token_ids", 1), np.array([2, 3]))
    equal(container.read("table"), np.array(given["table"]))
    assert container.read("words", 1, 2) == ["b"]
    equal(container.read("array"), given["array"])
    equal(container.read("scalars"), np.array([1.5, 2.5], np.float32))
    equal(container.read("tensors", 1), np.array([2]))
    equal(container.read("ragged[1]"), np.array([2, 3]))
    equal(container.read("blocks.8.hook"), given["blocks.8.hook"])
    equal(container.read("7.x"), np.array(True))
    equal(container.read("sample.states"), torch.ones(2))
    equal(container.read("plain.alpha"), np.int64(1))
    equal(container.read("empty"), np.zeros(0))
    for key in ("nothing", "odd", "layers", "most_likely_answer", "layers[2]", "layers[x]", "token_ids[0].x"):
        with pytest.raises(FormatError, match=r"a\.p"):
            container.read(key)
    with pytest.raises(FormatError, match=r"no key 'token_id'.*token_ids"):
        container.read("token_id")


def records() -> list[dict[str, Any]]:
    return [
        {"ratio": torch.full((2, 3 + row), row / 7), "ids": [row] * (row + 1), "label": row, "id": f"r{row}"}
        for row in range(4)
    ]


@pytest.mark.parametrize("kind", ["list", "dict", "numbered"])
@pytest.mark.parametrize("suffix", ["pt", "pkl", "json"])
def test_records(tmp_path: Path, kind: str, suffix: str) -> None:
    given, path = records(), tmp_path / f"a.{suffix}"
    if suffix == "json":
        given = [{**record, "ratio": record["ratio"].double().tolist()} for record in given]
    named = {f"q{row}" if kind == "dict" else row: record for row, record in enumerate(given)}
    content = given if kind == "list" else named
    if suffix == "pt":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content) if suffix == "pkl" else json.dumps(content).encode())
    container = open_container(path)
    assert container.records is not None
    assert list(container.records) == [f"q{row}" if kind == "dict" else str(row) for row in range(4)]
    dtype = "float64" if suffix == "json" else "float32"
    assert about(container) == {"ratio": ((2, 3), dtype), "ids": ((1,), "int64"), "label": ((), "int64"), "id": ((), "text")}
    assert about(container, 2)["ratio"] == ((2, 5), dtype)
    for row, record in enumerate(given):
        expected = np.array(record["ratio"]) if suffix == "json" else record["ratio"]
        check_rows(container, "ratio", expected, row)
        equal(container.read("ids", record=row), np.array(record["ids"]))
        assert container.read("id", record=row) == f"r{row}"
    equal(container.read("label"), np.arange(4))
    equal(container.read("label", 1, 3), np.arange(1, 3))
    assert container.read("id") == ["r0", "r1", "r2", "r3"]
    with pytest.raises(FormatError, match="differs in shape"):
        container.read("ratio")
    with pytest.raises(FormatError, match="4 records, but record 4"):
        container.read("label", record=4)
    with pytest.raises(FormatError, match=r"has no key 'labels'; it has label"):
        container.read("labels", record=1)


def test_a_list_of_pairs_is_records_and_a_tuple_of_tensors_is_not(tmp_path: Path) -> None:
    torch.save([(torch.ones(3), 1), (torch.zeros(2), 0)], tmp_path / "a.pt")
    container = open_container(tmp_path / "a.pt")
    assert list(container.records or ()) == ["0", "1"]
    assert about(container) == {"[0]": ((3,), "float32"), "[1]": ((), "int64")}
    equal(container.read("[1]"), np.array([1, 0]))
    for content in ((torch.ones(3), torch.zeros(2)), [torch.ones(3), torch.zeros(2)]):
        torch.save(content, tmp_path / "b.pt")
        container = open_container(tmp_path / "b.pt")
        assert container.records is None
        assert about(container) == {"[0]": ((3,), "float32"), "[1]": ((2,), "float32")}
        equal(container.read("[1]"), torch.zeros(2))


def test_splits_and_single_entries_are_no_records(tmp_path: Path) -> None:
    torch.save({"train": {"x": torch.ones(2)}, "test": {"x": torch.ones(1)}}, tmp_path / "a.pt")
    torch.save({"data": {"x": torch.ones(2)}}, tmp_path / "b.pt")
    assert about(open_container(tmp_path / "a.pt")) == {"train.x": ((2,), "float32"), "test.x": ((1,), "float32")}
    assert about(open_container(tmp_path / "b.pt")) == {"data.x": ((2,), "float32")}


def graph(row: int) -> Data:
    edges, attr = torch.tensor([[0, 1, 2], [1, 2, 0]])[:, : row + 1], bfloats(row + 1, 4)
    return Data(
        x=torch.full((3 + row, 2), row + 0.5).half(), edge_index=edges, edge_attr=attr, y=torch.tensor([row / 3]),
        name=f"g{row}", head=row, words=["a", "b"], sizes=[1, 2, row],
    )  # fmt: skip


def check_graphs(container: Container, graphs: list[Data], squeezed: bool = False) -> None:
    assert container.records is not None
    assert len(container.records) == len(graphs)
    for row, data in enumerate(graphs):
        assert about(container, row)["edge_attr"] == ((row + 1, 4), "bfloat16")
        for key in ("x", "edge_index", "edge_attr", "y"):
            check_rows(container, key, data[key], row)
        assert container.read("name", record=row) == data.name
        head = np.array([data.head]) if squeezed else np.int64(data.head)
        equal(container.read("head", record=row), head)
        assert container.read("words", record=row) == ["a", "b"]
        equal(container.read("sizes", record=row), np.array(data.sizes))


def test_graphs_of_pyg(tmp_path: Path) -> None:
    graphs = [graph(row) for row in range(3)]
    torch.save(graphs, tmp_path / "list.pt")
    check_graphs(open_container(tmp_path / "list.pt"), graphs)
    InMemoryDataset.save(graphs, str(tmp_path / "data.pt"))
    check_graphs(open_container(tmp_path / "data.pt"), graphs, squeezed=True)
    torch.save(InMemoryDataset.collate(graphs), tmp_path / "old.pt")
    check_graphs(open_container(tmp_path / "old.pt"), graphs, squeezed=True)
    torch.save(graphs[1], tmp_path / "one.pt")
    one = open_container(tmp_path / "one.pt")
    assert one.records is None
    assert {"x", "edge_index", "edge_attr", "y", "name", "head", "words", "sizes"} == about(one).keys()
    check_rows(one, "x", graphs[1].x)


def test_collated_graphs_keep_their_number_of_nodes(tmp_path: Path) -> None:
    graphs = [Data(edge_index=torch.tensor([[0], [1]]), num_nodes=2 + row, y=torch.tensor(0.5)) for row in range(3)]
    InMemoryDataset.save(graphs, str(tmp_path / "data.pt"))
    container = open_container(tmp_path / "data.pt")
    equal(container.read("num_nodes"), np.array([2, 3, 4]))
    equal(container.read("y", record=1), np.array([0.5], np.float32))


def table() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    return {
        "blocks.8.hook": [rng.normal(size=(2 + row % 3, 4)).astype(np.float32).tolist() for row in range(10)],
        "cube": [rng.integers(0, 9, (2, 3, 2)).tolist() for _ in range(10)],
        "ids": [[row, 1] for row in range(10)],
        "label": list(range(10)),
        "score": [row / 3 for row in range(10)],
        "good": [row % 2 == 0 for row in range(10)],
        "name": [f"n{row}" for row in range(10)],
        "words": [["a", f"{row}"] for row in range(10)],
        "answer": [{"text": f"t{row}", "accuracy": row / 2} for row in range(10)],
        "blob": [b"x"] * 10,
    }


SCHEMA = {"blocks.8.hook": pa.list_(pa.list_(pa.float32(), 4)), "cube": pa.list_(pa.list_(pa.list_(pa.int32())))}


def write_table(path: Path, content: dict[str, Any]) -> None:
    data = pa.table({name: pa.array(values, SCHEMA.get(name)) for name, values in content.items()})
    if path.suffix == ".parquet":
        parquet.write_table(data, path, row_group_size=4)
        return
    new = pa.ipc.new_stream if "stream" in path.name else pa.ipc.new_file
    with new(str(path), data.schema) as writer:
        writer.write_table(data, max_chunksize=3)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow", "folder"])
def test_tables(tmp_path: Path, name: str) -> None:
    given, path = table(), tmp_path / name
    if name == "folder":
        path.mkdir()
        parts = [slice(0, 6), slice(6, 10)]
        for number, part in enumerate(parts):
            write_table(path / f"data-stream-{number}.arrow", {key: values[part] for key, values in given.items()})
        files = [{"filename": f"data-stream-{number}.arrow"} for number in range(2)]
        (path / "state.json").write_text(json.dumps({"_data_files": files}))
    else:
        write_table(path, given)
    container = open_container(path)
    assert container.records is not None
    assert list(container.records) == [str(row) for row in range(10)]
    assert about(container) == {
        "blocks.8.hook": ((2, 4), "float32"), "cube": ((2, 3, 2), "int32"), "ids": ((2,), "int64"), "label": ((), "int64"),
        "score": ((), "float64"), "good": ((), "bool"), "name": ((), "text"), "words": ((2,), "text"),
        "answer.text": ((), "text"), "answer.accuracy": ((), "float64"), "blob": ((), "object"),
    }  # fmt: skip
    for row in (0, 9, 5, 4, 3, 7):
        check_rows(container, "blocks.8.hook", np.array(given["blocks.8.hook"][row], np.float32), row)
        check_rows(container, "cube", np.array(given["cube"][row], np.int32), row)
        equal(container.read("label", record=row), np.int64(row))
        assert container.read("name", record=row) == f"n{row}"
        assert container.read("words", record=row) == ["a", f"{row}"]
        equal(container.read("answer.accuracy", record=row), np.float64(row / 2))
    equal(container.read("label"), np.arange(10))
    equal(container.read("good", 2, 9), np.array(given["good"][2:9]))
    equal(container.read("ids"), np.array(given["ids"]))
    assert container.read("answer.text") == [f"t{row}" for row in range(10)]
    for key in ("blob", "blocks.8.hook"):
        with pytest.raises(FormatError, match=key):
            container.read(key)
    container.close()


def test_tables_name_missing_cells_and_the_splits_of_a_folder(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", {"x": [[1, 2], None, [3, 4], [5, None]], "y": [1, None, 3, 4]})
    container = open_container(tmp_path / "a.parquet")
    equal(container.read("x", record=0), np.array([1, 2]))
    equal(container.read("x", record=2), np.array([3, 4]))
    equal(container.read("y", record=3), np.int64(4))
    for row in (1, 3):
        with pytest.raises(FormatError, match=f"record {row} has a missing value"):
            container.read("x", record=row)
    with pytest.raises(FormatError, match="record 1 has a missing value"):
        container.read("y")
    (tmp_path / "dict" / "train").mkdir(parents=True)
    (tmp_path / "dict" / "dataset_dict.json").write_text("{}")
    with pytest.raises(FormatError, match="holds the splits train"):
        open_container(tmp_path / "dict")


def test_tensors_of_arrow(tmp_path: Path) -> None:
    values = numbers("float32", 5, 2, 3)
    data = pa.table({"x": pa.FixedShapeTensorArray.from_numpy_ndarray(values)})
    parquet.write_table(data, tmp_path / "a.parquet")
    container = open_container(tmp_path / "a.parquet")
    assert about(container) == {"x": ((2, 3), "float32")}
    check_rows(container, "x", values[3], 3)
    equal(container.read("x"), values)


@pytest.mark.parametrize("packed", [False, True])
def test_json_lines_and_csv(tmp_path: Path, packed: bool) -> None:
    lines = [{"id": f"i{row}", "y": row, "p": row / 3, "states": [[row, 1.5]] * (row + 1)} for row in range(4)]
    text = "\n".join(json.dumps(line) for line in lines) + "\n\n  \n"
    rows = "id,y,p,flag,code\n" + "".join(f'"a, {row}",{row},{row / 3!r},{row > 1},{row:03}\n' for row in range(4))
    for name, content in (("a.jsonl", text), ("a.csv", rows)):
        data = content.encode()
        (tmp_path / (name + ".gz" * packed)).write_bytes(gzip.compress(data) if packed else data)
    container = open_container(tmp_path / ("a.jsonl" + ".gz" * packed))
    assert list(container.records or ()) == ["0", "1", "2", "3"]
    assert about(container, 1)["states"] == ((2, 2), "float64")
    equal(container.read("states", record=2), np.array([[2, 1.5]] * 3))
    equal(container.read("y"), np.arange(4))
    assert container.read("id", 1, 2) == ["i1"]
    container = open_container(tmp_path / ("a.csv" + ".gz" * packed))
    assert about(container) == {
        "id": ((), "text"), "y": ((), "int64"), "p": ((), "float64"), "flag": ((), "bool"), "code": ((), "text")
    }  # fmt: skip
    assert container.read("id", record=1) == "a, 1"
    equal(container.read("p"), np.arange(4) / 3)
    equal(container.read("flag", 1, 3), np.array([False, True]))
    assert container.read("code") == ["000", "001", "002", "003"]


def test_json_of_columns(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"y": [1, 2], "nan": [NaN, 1.0], "deep": {"z": "t"}}')
    container = open_container(tmp_path / "a.json")
    assert container.records is None
    assert about(container) == {"y": ((2,), "int64"), "nan": ((2,), "float64"), "deep.z": ((), "text")}
    equal(container.read("nan"), np.array([np.nan, 1.0]))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, "text"])
def test_hdf5(tmp_path: Path, dtype: str, packed: bool) -> None:
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "a.h5"
    values = np.array(["a", "bé", "c"], object) if dtype == "text" else numbers(dtype, 9, 4)
    with h5py.File(path, "w") as file:
        file["plain"] = values
        plain = dtype == "text"  # texts of any length lie outside the filters
        file.create_dataset("deep/packed", data=values, **({} if plain else {"compression": "gzip", "fletcher32": True}))
        file.create_dataset("deep/lzf", data=values, **({} if plain else {"compression": "lzf", "shuffle": True}))
        file["one"] = values[0]
        file["soft"] = h5py.SoftLink("/plain")
    if packed:
        path = tmp_path / "b.h5.gz"
        path.write_bytes(gzip.compress((tmp_path / "a.h5").read_bytes()))
    container = open_container(path)
    assert container.records is None
    shape = values.shape
    assert about(container) == {
        "plain": (shape, dtype), "deep.packed": (shape, dtype), "deep.lzf": (shape, dtype), "one": (shape[1:], dtype),
        "soft": ((), "object"),
    }  # fmt: skip
    for key in ("plain", "deep.packed", "deep.lzf", "/deep/lzf"):
        if dtype == "text":
            assert container.read(key) == ["a", "bé", "c"]
            assert container.read(key, 1, 2) == ["bé"]
        else:
            check_rows(container, key, values)
    container.close()


def test_groups_of_hdf5_are_records(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for row in range(3):
            file[f"w{row}/X"] = numbers("float32", 2, 3 + row)
            file[f"w{row}/y"] = row
            file[f"w{row}/name"] = f"n{row}"
    container = open_container(tmp_path / "a.hdf5")
    assert container.records == ["w0", "w1", "w2"]
    assert about(container, 1) == {"X": ((2, 4), "float32"), "y": ((), "int64"), "name": ((), "text")}
    equal(container.read("y"), np.arange(3))
    assert container.read("name") == ["n0", "n1", "n2"]
    check_rows(container, "X", numbers("float32", 2, 5), 2)


def test_names() -> None:
    for name in ("a.safetensors", "A.NPY", "a.ckpt.gz", "a.jsonl", "a.b.h5", "x.csv.gz"):
        assert is_container(Path(name))
    for name in ("a.txt", "a", "a.gz", ".npy.bak", "npy"):
        assert not is_container(Path(name))


def test_an_unknown_name_and_a_file_that_is_gone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"a\.txt is none of \.safetensors"):
        open_container(tmp_path / "a.txt")
    for name in (
        "a.safetensors",
        "a.npy",
        "a.npz",
        "a.pt",
        "a.pkl",
        "a.parquet",
        "a.arrow",
        "a.json",
        "a.jsonl",
        "a.csv",
        "a.gz.pt",
    ):
        with pytest.raises(FormatError, match=name):
            open_container(tmp_path / name)


@pytest.mark.parametrize("name", ["a.safetensors", "a.npy", "a.npz", "a.pt"])
def test_leaves_read_no_array_and_rows_read_only_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    values, path = numbers("float32", 1000, 1000), tmp_path / name
    if name == "a.safetensors":
        save_numpy({"x": values}, path)
    elif name == "a.pt":
        torch.save({"x": torch.from_numpy(values)}, path)
    else:
        (np.save if name == "a.npy" else np.savez)(path, **({"arr": values} if name == "a.npy" else {"x": values}))
    before = read_bytes()
    container = open_container(path)
    assert container.leaves() == [Leaf("" if name == "a.npy" else "x", (1000, 1000), "float32")]
    assert read_bytes() - before < 70_000
    container.read("" if name == "a.npy" else "x", 500, 510)
    assert read_bytes() - before < 130_000


def read_bytes() -> int:
    """Return the bytes that this process has read through system calls."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def test_a_gz_that_is_large_goes_to_a_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dali_pipeline.ingest.containers.source.IN_MEMORY_BYTES", 1000)
    values = np.random.default_rng(0).normal(size=(100, 50))
    np.save(tmp_path / "a.npy", values)
    torch.save({"x": torch.from_numpy(values)}, tmp_path / "a.pt")
    for name, key in (("a.npy", ""), ("a.pt", "x")):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        container = open_container(tmp_path / f"{name}.gz")
        check_rows(container, key, values)
        container.close()


def test_opening_imports_neither_torch_nor_pyarrow(tmp_path: Path) -> None:
    save_numpy({"x": numbers("int8", 3)}, tmp_path / "a.safetensors")
    np.save(tmp_path / "a.npy", numbers("int8", 3))
    torch.save(torch.ones(3), tmp_path / "a.pt")
    code = (
        "import sys; from pathlib import Path; from dali_pipeline.ingest.containers.base import open_container as o; "
        f"[o(path).leaves() for path in Path({str(tmp_path)!r}).iterdir()]; "
        "print(sorted({'torch', 'pyarrow', 'h5py', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
