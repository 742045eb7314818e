"""Every format becomes the records that were written in it."""

from __future__ import annotations

import csv
import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from torch_geometric.data import Data

import dali_pipeline as dp
from dali_pipeline.ingest.config import ConvertConfig
from dali_pipeline.ingest.convert import convert
from dali_pipeline.ingest.readers.traces import TraceOptions, read_scores
from dali_pipeline.tools.verify import verify

rng = np.random.default_rng(0)


def sequences_of(data: dp.Dataset) -> dict[str, tuple[int, Any]]:
    """Label and values of every record by id, as they are stored."""
    found = {}
    for split in data.splits:
        for batch in dp.SequenceLoader(data, split, engine="torch", dtype=torch.float32, shuffle=False):
            for row, (name, valid) in enumerate(zip(batch.ids, batch.valid.tolist(), strict=True)):
                if valid:
                    found[name] = int(batch.labels[row]), batch.sequences[row, : batch.lengths[row]].numpy()
    return found


def graphs_of(data: dp.Dataset) -> dict[str, tuple[int, list[Data]]]:
    found = {}
    for split in data.splits:
        for batch in dp.GraphLoader(data, split, dtype=torch.float32, shuffle=False):
            every = iter(batch.graphs.to_data_list())
            for row, count in enumerate(batch.graphs_per_record.tolist()):
                graphs = [next(every) for _ in range(count)]
                if batch.valid[row]:
                    found[batch.ids[row]] = int(batch.labels[row]), graphs
    return found


def converted(src: Path, **options: Any) -> dp.Dataset:
    data = convert(src, src.parent / "dst", ConvertConfig(**options))
    assert verify(data.folder).damages == []
    return data


@pytest.mark.parametrize("compressed", [False, True])
def test_npz(tmp_path: Path, compressed: bool) -> None:
    (tmp_path / "src").mkdir()
    stacked = rng.normal(size=(40, 5, 3)).astype(np.float32)
    values, lengths = rng.normal(size=(99, 3)).astype(np.float32), np.array([9, 40, 1, 49])
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "src" / "a.npz", sequences=stacked, labels=np.arange(40) % 3, ids=np.arange(40))
    save(
        tmp_path / "src" / "b.npz",
        values=values,
        offsets=np.append(0, np.cumsum(lengths)),
        labels=np.array([True, False, True, True]),
        groups=np.array(["x", "y", "x", "ü"]),
    )
    found = sequences_of(converted(tmp_path / "src"))
    assert len(found) == 44
    for row in range(40):
        assert found[str(row)][0] == row % 3
        assert np.array_equal(found[str(row)][1], stacked[row])
    for name, label, part in zip(
        ["x#0", "y", "x#1", "ü"], [1, 0, 1, 1], np.split(values, np.cumsum(lengths)[:-1]), strict=True
    ):
        assert found[name][0] == label
        assert np.array_equal(found[name][1], part)


def test_npz_alone_without_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "series.npz", sequences=np.ones((3, 2, 1), np.float16), labels=[0, 1, 0])
    assert sorted(sequences_of(converted(tmp_path / "series.npz"))) == ["series-0", "series-1", "series-2"]


def write_table(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=7)
        return
    new = pa.ipc.new_file if path.parent.name == "feather" else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=11)


@pytest.mark.parametrize("name", ["t.parquet", "train/data-00000-of-00001.arrow", "feather/t.arrow"])
@pytest.mark.parametrize("form", ["lists", "large lists", "fixed lists", "tensors"])
def test_tables_of_sequences(tmp_path: Path, name: str, form: str) -> None:
    steps = [4 if form in ("fixed lists", "tensors") else int(rng.integers(1, 6)) for _ in range(30)]
    values = [rng.normal(size=(count, 3)).astype(np.float32) for count in steps]
    kinds = {
        "lists": pa.list_(pa.list_(pa.float32())),
        "large lists": pa.large_list(pa.large_list(pa.float32())),
        "fixed lists": pa.list_(pa.list_(pa.float32(), 3), 4),
    }
    if form == "tensors":
        column: Any = pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack(values))
    else:
        column = pa.array([one.tolist() for one in values], kinds[form])
    table = pa.table({"label": [at % 2 for at in range(30)], "question_id": [at // 2 for at in range(30)], "sequence": column})
    if form == "tensors":
        table = table.cast(pa.schema([table.schema.field(0), table.schema.field(1), pa.field("sequence", column.type)]))
    write_table(tmp_path / "src" / name, table)
    (tmp_path / "src" / "cache-1234.arrow").write_bytes(b"of `datasets`, and not data")
    (tmp_path / "src" / "dataset_info.json").write_text("{}")
    found = sequences_of(converted(tmp_path / "src"))
    assert len(found) == 30
    for row, one in enumerate(values):
        label, rows = found[f"{row // 2}#{row % 2}"]
        assert label == row % 2
        assert np.array_equal(rows, one)


def test_tables_of_graphs(tmp_path: Path) -> None:
    counts = rng.integers(1, 6, 20)
    x = [rng.normal(size=(count, 2)).astype(np.float32) for count in counts]
    edges = [rng.integers(0, count, size=(2, int(count) - 1)) for count in counts]  # the smallest graphs have none
    attr = [np.float32(rng.random(size=(each.shape[1],))) for each in edges]
    table = pa.table(
        {
            "node_feat": [one.tolist() for one in x],
            "edge_index": pa.array([one.tolist() for one in edges], pa.list_(pa.list_(pa.int64()))),
            "edge_attr": pa.array([one.tolist() for one in attr], pa.list_(pa.float32())),
            "y": [[at % 2] for at in range(20)],
            "sequence": [one[:, 0].tolist() for one in x],  # scalars as rows
        }
    )
    write_table(tmp_path / "src" / "molecules.parquet", table)
    data = converted(tmp_path / "src")
    assert data.schema.kinds == ("sequences", "graphs")
    found, series = graphs_of(data), sequences_of(data)
    for row in range(20):
        label, (graph,) = found[f"molecules-{row}"]
        assert label == row % 2
        assert np.array_equal(graph.x, x[row])
        assert np.array_equal(graph.edge_index, edges[row])
        assert np.array_equal(graph.edge_attr, attr[row])
        assert np.array_equal(series[f"molecules-{row}"][1], x[row][:, 0].astype(np.float64).astype(np.float32))


def make_trace(
    question: Any, nodes: int, *, layers: int = 3, embeddings: bool = False, stacked: bool = False
) -> dict[str, Any]:
    hidden = [rng.normal(size=(nodes, 4)).astype(np.float16) for _ in range(layers + embeddings)]
    raw = rng.random((layers, 2, nodes, nodes)).astype(np.float16)
    trace = {"question_id": question, "hidden_states": hidden, "attentions": list(raw), "tokens": ["t"] * nodes, "score": None}
    return {**trace, "hidden_states": np.stack(hidden), "attentions": raw} if stacked else trace


def by_loops(trace: dict[str, Any], threshold: float) -> list[Data]:
    """Graphs as the issue words them, by a double loop over tokens."""
    graphs = []
    used = list(trace["hidden_states"])[-len(trace["attentions"]) :]
    for x, attention in zip(used, trace["attentions"], strict=True):
        mean = attention.mean(axis=0, dtype=np.float32)
        edges = [(j, i) for i in range(len(x)) for j in range(i + 1) if mean[i, j] > threshold]
        index = np.array(edges, np.int64).reshape(-1, 2).T
        graphs.append(Data(x=x, edge_index=index, edge_attr=np.array([mean[i, j] for j, i in edges], np.float16)))
    return graphs


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("suffix", [".pkl", ".pkl.gz"])
def test_raw_traces(tmp_path: Path, protocol: int, suffix: str) -> None:
    traces = [make_trace(f"q{at}", 2 + at % 5, stacked=at % 2 == 0, embeddings=at % 3 == 0) for at in range(12)]
    traces = [trace for trace in traces if len(trace["hidden_states"]) == 3] + [make_trace(np.int64(7), 1)]
    (tmp_path / "src").mkdir()
    with (
        gzip.open(tmp_path / f"src/a{suffix}", "wb")
        if suffix.endswith("gz")
        else (tmp_path / f"src/a{suffix}").open("wb") as file
    ):
        pickle.dump(traces, file, protocol=protocol)
    scores = {str(trace["question_id"]): at / 10 for at, trace in enumerate(traces)}
    data = converted(tmp_path / "src", traces=TraceOptions(scores=scores, score_threshold=0.4, attention_threshold=0.5))
    sequences, graphs = sequences_of(data), graphs_of(data)
    assert sequences.keys() == graphs.keys() == scores.keys()
    for trace in traces:
        name = str(trace["question_id"])
        label, rows = sequences[name]
        assert label == int(scores[name] < 0.4)
        assert np.array_equal(rows, np.stack([layer[-1] for layer in trace["hidden_states"]]).astype(np.float32))
        for mine, theirs in zip(graphs[name][1], by_loops(trace, 0.5), strict=True):
            assert np.array_equal(mine.x, theirs.x.astype(np.float32))
            assert np.array_equal(mine.edge_index, theirs.edge_index)
            assert np.array_equal(mine.edge_attr, theirs.edge_attr.astype(np.float32))


def test_traces_with_embeddings_give_one_step_more(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    traces = [{**make_trace("q", 4, embeddings=True), "label": 1}]
    (tmp_path / "src" / "a.pkl").write_bytes(pickle.dumps(traces))
    data = converted(tmp_path / "src")
    assert len(sequences_of(data)["q"][1]) == 4
    mine, theirs = graphs_of(data)["q"][1], by_loops(traces[0], 0.01)
    assert all(np.array_equal(one.x, other.x.astype(np.float32)) for one, other in zip(mine, theirs, strict=True))


def test_traces_without_labels_ask_for_scores(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.pkl").write_bytes(pickle.dumps([make_trace("q", 2)]))
    with pytest.raises(dp.UsageError, match=r"a\.pkl has no labels; give --scores"):
        converted(tmp_path / "src")
    with pytest.raises(dp.FormatError, match="question 'q' has no score"):
        converted(tmp_path / "src", traces=TraceOptions(scores={"other": 1.0}))


@pytest.mark.parametrize(
    ("rows", "column", "words"),
    [
        ([["question_id", "score"], ["a", "0.5"], ["a", "0.5"], ["b", "1e-3"]], None, None),
        ([["question_id", "x", "score"], ["a", "1", "0.5"], ["b", "2", "0.001"]], "score", None),
        ([["question_id", "x", "score"], ["a", "1", "0.5"]], None, "named with --score-column"),
        ([["question", "score"], ["a", "1"]], "score", "expected question_id and score"),
        ([["question_id", "score"], ["a", "good"]], None, "line 2: score is 'good'; expected a number"),
        ([["question_id", "score"], ["a", "nan"]], None, "line 2: score is 'nan'"),
        ([["question_id", "score"], ["a", "1"], ["a", "2"]], None, "line 3: question 'a' has two scores"),
    ],
)
def test_scores(tmp_path: Path, rows: list[list[str]], column: str | None, words: str | None) -> None:
    with (tmp_path / "scores.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    if words is None:
        assert read_scores(tmp_path / "scores.csv", column) == {"a": 0.5, "b": 0.001}
        return
    with pytest.raises(dp.UsageError, match=words):
        read_scores(tmp_path / "scores.csv", column)


@pytest.mark.parametrize("old", [False, True])
def test_tensors_of_every_type_and_shape(tmp_path: Path, old: bool) -> None:
    (tmp_path / "src" / "lstm_solo").mkdir(parents=True)
    base = torch.from_numpy(rng.normal(size=(6, 8, 4)).astype(np.float32))
    every: list[Any] = [
        base.bfloat16(),
        base.double(),
        base.transpose(1, 2).contiguous().transpose(1, 2),  # strides of another order
        base[:, ::2],
        base[1:, 3:],  # does not begin where its storage does
        torch.nn.Parameter(base.clone()),
        base[:1].expand(6, 8, 4),
        [row[at : at + 2] for at, row in enumerate(base)],  # six views of one storage
    ]
    for number, sequences in enumerate(every):
        content = {
            "sequences": sequences,
            "labels": torch.ones(len(sequences), 1).long(),
            "question_ids": [number] * len(sequences),
        }
        torch.save(content, tmp_path / "src" / "lstm_solo" / f"batch_{number}.pt", _use_new_zipfile_serialization=not old)
        expected = [torch.as_tensor(row).detach().float().numpy() for row in sequences]
        data = convert(tmp_path / "src", tmp_path / f"dst{number}", ConvertConfig(dtype="float32"))
        found = sequences_of(data)
        for row, one in enumerate(expected):
            assert np.array_equal(found[f"{number}#{row}"][1], one.astype(np.float32))
        (tmp_path / "src" / "lstm_solo" / f"batch_{number}.pt").unlink()


def test_a_flat_list_of_data(tmp_path: Path) -> None:
    (tmp_path / "src" / "gnn").mkdir(parents=True)
    graphs = [
        Data(x=torch.ones(at + 1, 2), edge_index=torch.zeros(2, at, dtype=torch.int64), y=torch.tensor([at % 2]))
        for at in range(9)
    ]
    torch.save(graphs, tmp_path / "src" / "gnn" / "batch_3.pt")
    found = graphs_of(converted(tmp_path / "src"))
    for at in range(9):
        label, (graph,) = found[f"batch_3-{at}"]
        assert label == at % 2
        assert graph.x.shape == (at + 1, 2)
        assert graph.edge_index.shape == (2, at)
        assert graph.edge_attr is None


def test_two_formats_in_one_folder_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", sequences=np.ones((3, 2, 1)), labels=[0, 1, 0])
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([]))
    with pytest.raises(dp.UsageError, match=r"holds \*.pkl or \*.pkl.gz and \*.npz; expected one format"):
        convert(tmp_path, tmp_path / "dst")
