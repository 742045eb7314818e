from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.data import Data

import dali_pipeline as dp
from dali_pipeline.ingest import convert as convert_module
from dali_pipeline.ingest.convert import convert
from dali_pipeline.ingest.pt import find_files, read_file

LAYERS, HIDDEN = 4, 6


def layer(rng: np.random.Generator, nodes: int, edges: int, *, flat: bool = True) -> Data:
    attr = torch.from_numpy(rng.random(edges)).half()
    return Data(
        x=torch.from_numpy(rng.normal(size=(nodes, HIDDEN))).half(),
        edge_index=torch.from_numpy(rng.integers(0, nodes, size=(2, edges))),
        edge_attr=attr if flat else attr[:, None],
    )


def make_folder(root: Path, per_file: int = 12, files: int = 3, *, halves: str = "both", name: str = "batch") -> Path:
    """The layout that users have: stacked sequences in two files, a list of tensors in the third, and their graphs."""
    rng = np.random.default_rng(0)
    for number in range(files):
        ids: list[Any] = [f"q{number * per_file + row}" for row in range(per_file)]
        labels = [row % 2 for row in range(per_file)]
        if halves != "gnn":
            (root / "lstm_solo").mkdir(parents=True, exist_ok=True)
            sequences: Any = torch.from_numpy(rng.normal(size=(per_file, LAYERS, HIDDEN))).half()
            if number == 2:
                sequences = [row[: 2 + at % 3] for at, row in enumerate(sequences)]
            torch.save(
                {"sequences": sequences, "labels": torch.tensor(labels), "question_ids": ids},
                root / "lstm_solo" / f"{name}_{number}.pt",
            )
        if halves != "lstm":
            (root / "gnn").mkdir(parents=True, exist_ok=True)
            graphs = [
                [layer(rng, 3 + row % 4, (row + at) % 5, flat=number != 1) for at in range(LAYERS)] for row in range(per_file)
            ]
            torch.save({"graphs": graphs, "labels": labels, "question_ids": ids}, root / "gnn" / f"{name}_{number}.pt")
    return root


def test_both_halves_become_one_data_set(tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src")
    data = convert(src, tmp_path / "dst", split=dp.Split.parse("50/25/25"))
    expected = {
        name: row
        for path in sorted((src / "lstm_solo").iterdir())
        for file in [torch.load(path)]
        for name, row in zip(file["question_ids"], file["sequences"], strict=True)
    }
    graphs = {
        name: row
        for path in sorted((src / "gnn").iterdir())
        for file in [torch.load(path, weights_only=False)]
        for name, row in zip(file["question_ids"], file["graphs"], strict=True)
    }
    found: dict[str, str] = {}
    for split in data.splits:
        for batch in dp.SequenceLoader(data, split, engine="torch", dtype=torch.float16, shuffle=False):
            for row, length, name, valid in zip(batch.sequences, batch.lengths, batch.ids, batch.valid, strict=True):
                assert torch.equal(row[:length], expected[name])
                if valid:
                    found[name] = split
        for graph_batch in dp.GraphLoader(data, split, dtype=torch.float16, shuffle=False):
            ours = iter(graph_batch.graphs.to_data_list())
            for name in graph_batch.ids:
                assert found[name] == split
                for theirs in graphs[name]:
                    mine = next(ours)
                    assert torch.equal(mine.x, theirs.x)
                    assert torch.equal(mine.edge_index, theirs.edge_index)
                    assert torch.equal(mine.edge_attr, theirs.edge_attr.reshape(-1))
    assert len(found) == 36
    assert data.manifest.source["in_one_half"] == 0


@pytest.mark.parametrize("halves", ["lstm", "gnn"])
def test_one_half_alone_is_enough(tmp_path: Path, halves: str) -> None:
    data = convert(make_folder(tmp_path / "src", halves=halves, name="preprocessed"), tmp_path / "dst")
    assert data.schema.kinds == (("sequences",) if halves == "lstm" else ("graphs",))


def test_recurring_questions_are_numbered_alike_and_stay_together(tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src", per_file=8)
    for kind in ("lstm_solo", "gnn"):
        for number in (0, 2):
            path = src / kind / f"batch_{number}.pt"
            file = torch.load(path, weights_only=False)
            file["question_ids"] = [7, "q1", 7, *file["question_ids"][3:]]
            file["labels"] = torch.zeros(8).tolist()
            torch.save(file, path)
    data = convert(src, tmp_path / "dst")
    homes: dict[str, set[str]] = {"7": set(), "q1": set()}
    names = []
    for split in data.splits:
        for batch in dp.SequenceLoader(data, split, engine="torch"):
            for name, valid in zip(batch.ids, batch.valid.tolist(), strict=True):
                if valid:
                    names.append(name)
                    if name.split("#")[0] in homes:
                        homes[name.split("#")[0]].add(split)
    assert {"7#0", "7#1", "7#2", "7#3", "q1#0", "q1#1", "q9"} <= set(names)
    assert len(names) == 24
    assert all(len(splits) == 1 for splits in homes.values())


def test_files_are_taken_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        (tmp_path / "gnn").mkdir(exist_ok=True)
        (tmp_path / "gnn" / f"batch_{number}.pt").touch()
    assert [path.name for path in find_files(tmp_path)["graphs"]] == ["batch_1.pt", "batch_9.pt", "batch_10.pt"]


def test_killed_and_started_again_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = make_folder(tmp_path / "src")
    monkeypatch.setattr(convert_module, "COMMIT_BYTES", 1)
    whole = convert(src, tmp_path / "whole", shard_bytes=700)
    calls: list[Path] = []

    def dies(path: Path, kind: Any) -> Any:
        calls.append(path)
        if len(calls) == 12:  # in the second pass, behind the commit of the fourth file
            raise KeyboardInterrupt
        return read_file(path, kind)

    monkeypatch.setattr(convert_module, "read_file", dies)
    with pytest.raises(KeyboardInterrupt):
        convert(src, tmp_path / "torn", shard_bytes=700)
    assert not (tmp_path / "torn" / "manifest.json").exists()
    assert any((tmp_path / "torn").rglob("*.safetensors"))
    monkeypatch.setattr(convert_module, "read_file", read_file)
    torn = convert(src, tmp_path / "torn", shard_bytes=700)
    assert torn.digest == whole.digest
    for path in whole.root.rglob("*.*"):
        assert (torn.root / path.relative_to(whole.root)).read_bytes() == path.read_bytes()


def test_a_finished_conversion_is_taken_and_another_refused(tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src", files=1)
    first = convert(src, tmp_path / "dst")
    assert convert(src, tmp_path / "dst").digest == first.digest
    with pytest.raises(dp.UsageError, match="other files or settings"):
        convert(src, tmp_path / "dst", shard_bytes=5)
    more = make_folder(tmp_path / "more", files=2)
    for path in more.rglob("*.pt"):
        os.utime(path, ns=(0, 0))
    with pytest.raises(dp.UsageError, match="other files or settings"):
        convert(more, tmp_path / "dst")


def test_a_file_changed_since_is_never_trained_on_unseen(tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src", files=1)
    first = convert(src, tmp_path / "dst")
    path = src / "gnn" / "batch_0.pt"
    os.utime(path, ns=(0, (first.root / "manifest.json").stat().st_mtime_ns + 1))
    with pytest.raises(dp.UsageError, match=r"batch_0.pt is newer than .*dst, which was made of it"):
        convert(src, tmp_path / "dst")
    os.utime(path, ns=(0, 0))
    assert convert(src, tmp_path / "dst").digest == first.digest


def test_the_schema_is_that_of_the_first_record_that_tells(tmp_path: Path) -> None:
    """Empty files, and records whose graphs have no edges and so no edge_attr, say nothing of the others."""
    src = make_folder(tmp_path / "src", files=2)
    for kind, key in (("lstm_solo", "sequences"), ("gnn", "graphs")):
        torch.save({key: [], "labels": [], "question_ids": []}, src / kind / "batch_00.pt")
    path = src / "gnn" / "batch_0.pt"
    file = torch.load(path, weights_only=False)
    for row in range(5):
        for each in file["graphs"][row]:
            each.edge_index, each.edge_attr = torch.zeros(2, 0, dtype=torch.int64), None
    torch.save(file, path)
    assert convert(src, tmp_path / "dst").schema.edge_attr == dp.Field(dtype="float16")
    file["graphs"] = [[Data(x=each.x, edge_index=each.edge_index) for each in row] for row in file["graphs"]]
    torch.save(file, path)
    with pytest.raises(dp.DataError, match="has edge_attr, which the first graphs with edges had not"):
        convert(src, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_folders_without_any_record_are_refused(tmp_path: Path) -> None:
    (tmp_path / "src" / "gnn").mkdir(parents=True)
    torch.save({"graphs": [], "labels": [], "question_ids": []}, tmp_path / "src" / "gnn" / "batch_0.pt")
    with pytest.raises(dp.DataError, match="src holds no records"):
        convert(tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_files_of_the_old_format_are_read_too(tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src", files=2)
    expected = convert(src, tmp_path / "expected", shard_bytes=1000)
    for path in src.rglob("*.pt"):
        torch.save(torch.load(path, weights_only=False), path, _use_new_zipfile_serialization=False)
        os.utime(path, ns=(0, 0))
    found = convert(src, tmp_path / "dst", shard_bytes=1000)
    for path in expected.root.rglob("*.safetensors"):
        assert (found.root / path.relative_to(expected.root)).read_bytes() == path.read_bytes()


def test_one_byte_shards_and_whole_labels_of_any_type(tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src", files=1, halves="lstm")
    path = src / "lstm_solo" / "batch_0.pt"
    file = torch.load(path)
    file["labels"] = [True, False, 1.0, 0.0, *[torch.tensor(1)] * 8]
    torch.save(file, path)
    data = convert(src, tmp_path / "dst", shard_bytes=1, split=dp.Split.parse("100/0/0"))
    assert data.label_counts("train") == {0: 2, 1: 10}
    assert len(data.table("train", "sequences")) == 12


class Evil:
    """Would run code where a pickle is loaded freely."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def one_edge_too_far(file: dict[str, Any]) -> dict[str, Any]:
    file["graphs"][3][1].edge_index = torch.tensor([[0], [99]])
    file["graphs"][3][1].edge_attr = torch.ones(1).half()
    return file


# what each does to the second file of its half
CHANGES: dict[str, Callable[[dict[str, Any], Path], Any]] = {
    "code": lambda file, root: {**file, "extra": Evil(root / "ran")},
    "numpy": lambda file, root: {**file, "sequences": file["sequences"].numpy()},
    "keys": lambda file, root: {"sequences": file["sequences"]},
    "tensor": lambda file, root: file["sequences"],
    "count": lambda file, root: {**file, "labels": file["labels"][:-1]},
    "label": lambda file, root: {**file, "labels": [0.5] * 12},
    "hidden": lambda file, root: {**file, "sequences": file["sequences"][:, :, :-1].clone()},
    "graph edge": lambda file, root: one_edge_too_far(file),
    "graph count": lambda file, root: {**file, "question_ids": ["q12", *file["question_ids"][:-1]]},
    "graph label": lambda file, root: {**file, "labels": [1 - label for label in file["labels"]]},
    "graph none": lambda file, root: {**file, "graphs": [*file["graphs"][:3], [], *file["graphs"][4:]]},
}
BYTES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "text": lambda content: b"not a file of torch.save",
}


def break_file(root: Path, how: str) -> Path:
    path = root / ("gnn" if how.startswith("graph") else "lstm_solo") / "batch_1.pt"
    if how in BYTES:
        path.write_bytes(BYTES[how](path.read_bytes()))
    else:
        torch.save(CHANGES[how](torch.load(path, weights_only=False), root), path)
    return path


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("code", r"batch_1.pt was refused: it asks for posix.system"),
        ("numpy", r"batch_1.pt was refused: it asks for numpy"),
        ("truncated", "batch_1.pt cannot be read as a file of torch.save"),
        ("empty", "batch_1.pt is empty"),
        ("text", "batch_1.pt (cannot be read|was refused)"),
        ("keys", r"batch_1.pt holds \['sequences'\]; expected a dict with sequences, labels"),
        ("tensor", "batch_1.pt holds Tensor; expected a dict"),
        ("count", "batch_1.pt has 12 sequences, 11 labels and 12 question_ids"),
        ("label", "batch_1.pt, labels holds 0.5; expected whole numbers"),
        ("hidden", r"batch_1.pt: record 'q12', sequence has rows of shape \(5,\); expected \(6,\)"),
        ("graph edge", r"batch_1.pt: record 'q15', graph 1: edge \(0, 99\) leaves the graph's"),
        ("graph count", "question 'q12' has 1 records in lstm_solo and 2 in gnn"),
        ("graph label", "has the label 0 in lstm_solo and 1 in gnn"),
        ("graph none", "batch_1.pt, record 3: expected a list of PyG Data"),
    ],
)
def test_bad_files_are_named_and_nothing_is_left(tmp_path: Path, how: str, words: str) -> None:
    src = make_folder(tmp_path / "src")
    path = break_file(src, how)
    others = {other: other.read_bytes() for other in src.rglob("*.pt")}
    with pytest.raises(dp.PipelineError, match=words) as found:
        convert(src, tmp_path / "dst", shard_bytes=500)
    assert "\n" not in str(found.value)
    assert not (tmp_path / "dst").exists()
    assert not (src / "ran").exists()
    assert {other: other.read_bytes() for other in src.rglob("*.pt")} == others
    assert path.exists()


def test_missing_and_empty_folders_are_said(tmp_path: Path) -> None:
    with pytest.raises(dp.UsageError, match="is not a folder"):
        convert(tmp_path / "missing", tmp_path / "dst")
    with pytest.raises(dp.UsageError, match="holds no lstm_solo/batch"):
        convert(tmp_path, tmp_path / "dst")
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = make_folder(tmp_path / "src", files=1)
    full = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(dp.UsageError, match=r"needs about .* has 0.0 MB free"):
        convert(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
