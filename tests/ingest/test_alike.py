"""Many files of one record each: read together where they are alike, alone where they are not, to the same records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

from dali_pipeline.errors import FormatError
from dali_pipeline.ingest.config import ConvertConfig
from dali_pipeline.ingest.convert import convert
from dali_pipeline.ingest.layouts import alike
from dali_pipeline.ingest.layouts.recipe import Recipe
from tests.ingest.test_layouts import taken

COUNT = 90


def folder(root: Path, shape: tuple[int, ...] = (5, 4)) -> dict[str, Any]:
    """Write COUNT files of one record and a table of their labels; return the records by id."""
    root.mkdir()
    rng = np.random.default_rng(0)
    records = {f"r{number}": rng.normal(size=shape).astype(np.float16) for number in range(COUNT)}
    for name, rows in records.items():
        np.save(root / f"{name}.npy", rows)
    table(root)
    return records


def table(root: Path, but: str = "") -> None:
    rows = [f"r{number},{number % 2}" for number in range(COUNT) if f"r{number}" != but]
    (root / "labels.csv").write_text("\n".join(["id,label", *rows]) + "\n")


def recipe(root: Path, **options: Any) -> Recipe:
    return Recipe(labels_from=str(root / "labels.csv"), **options)


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_records_equal_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    records = folder(tmp_path / "src")
    monkeypatch.setattr(alike, "rows_at_a_time", lambda _: at_once)
    read, together = alike.Pattern.read, list[bool]()

    def counted(pattern: alike.Pattern, paths: Any) -> Any:
        stored = read(pattern, paths)
        together.append(stored is not None)
        return stored

    monkeypatch.setattr(alike.Pattern, "read", counted)
    data, found = taken(tmp_path / "src", recipe(tmp_path / "src"))
    assert together == [True] * -(-COUNT // at_once)
    assert found.keys() == records.keys()
    for name, rows in records.items():
        assert np.array_equal(found[name].sequence, rows)
        assert found[name].label == int(name[1:]) % 2
    alone = convert_alone(tmp_path, monkeypatch)
    assert {path.name: path.read_bytes() for path in data.folder.rglob("*.safetensors")} == alone


def convert_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Return the shards as they become if every file is read alone."""
    monkeypatch.setattr(alike.Pattern, "read", lambda *_: None)
    data, _ = taken(tmp_path / "src", recipe(tmp_path / "src"), tmp_path / "alone")
    return {path.name: path.read_bytes() for path in data.folder.rglob("*.safetensors")}


def test_lengths_and_values_that_differ_are_read_alone(tmp_path: Path) -> None:
    records = folder(tmp_path / "src")
    for number in (3, 40, 41, 89):
        records[f"r{number}"] = np.full((number + 1, 4), number, np.float16)
        np.save(tmp_path / "src" / f"r{number}.npy", records[f"r{number}"])
    _, found = taken(tmp_path / "src", recipe(tmp_path / "src"))
    for name, rows in records.items():
        assert np.array_equal(found[name].sequence, rows)


def test_bfloat16_and_a_second_tensor(tmp_path: Path) -> None:
    src, rng = tmp_path / "src", np.random.default_rng(0)
    src.mkdir()
    tensors = {f"r{number}": torch.from_numpy(rng.normal(size=(6, 3))).bfloat16() for number in range(COUNT)}
    for name, rows in tensors.items():
        save_tensors({"hidden_states": rows}, src / f"{name}.safetensors")
    table(src)
    data, found = taken(src, recipe(src, sequence="hidden_states"))
    assert data.schema.sequence is not None
    assert data.schema.sequence.dtype == "bfloat16"
    for name, rows in tensors.items():
        assert np.array_equal(found[name].sequence, rows.float().numpy())
    second: dict[str, dict[str, Any]] = {
        name: {"a": np.full((2, 2), number, np.float32), "b": np.zeros(3)} for number, name in enumerate(tensors)
    }
    for name, arrays in second.items():
        save_file(arrays, src / f"{name}.safetensors")
    for key in ("a", "b"):
        _, found = taken(src, recipe(src, sequence=key, layout="record-per-file"), tmp_path / key)
        assert all(np.array_equal(found[name].sequence.reshape(-1), second[name][key].reshape(-1)) for name in second)


@pytest.mark.parametrize("damage", ["cut", "longer", "other shape", "other type", "gone text"])
def test_one_bad_file_among_many_is_named_and_can_be_left_out(tmp_path: Path, damage: str) -> None:
    src = tmp_path / "src"
    records = folder(src)
    bad = src / "r50.npy"
    data = bad.read_bytes()
    if damage == "cut":
        bad.write_bytes(data[:-2])
    elif damage == "longer":
        bad.write_bytes(data + b"\0")
    elif damage == "gone text":
        bad.write_bytes(b"\0" * len(data))
    else:
        np.save(bad, np.zeros((5, 3), np.float16) if damage == "other shape" else np.zeros((5, 4), np.float64))
    with pytest.raises(FormatError if damage != "other type" else Exception, match="r50"):
        convert(src, tmp_path / "dst", ConvertConfig(recipe=recipe(src), num_workers=1))
    assert not (tmp_path / "dst" / "manifest.json").exists()
    data_set, found = taken(src, recipe(src), tmp_path / "kept", skip_bad=True)
    assert found.keys() == records.keys() - {"r50"}
    assert list(data_set.manifest.source["left_out"]) == ["r50.npy"]


def test_a_missing_label_is_named(tmp_path: Path) -> None:
    src = tmp_path / "src"
    folder(src)
    table(src, but="r61")
    with pytest.raises(FormatError, match="r61"):
        convert(src, tmp_path / "dst", ConvertConfig(recipe=recipe(src), num_workers=1))
