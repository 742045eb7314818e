"""Layouts of public projects, made small: every value, type, order, length and label equals the source to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import dali_pipeline as dp
from dali_pipeline.ingest.config import ConvertConfig
from dali_pipeline.ingest.convert import convert
from dali_pipeline.ingest.layouts.recipe import Recipe, parse_fields, read_recipe
from dali_pipeline.tools.verify import verify

rng = np.random.default_rng(0)


def taken(src: Path, recipe: Recipe | None = None, dst: Path | None = None, **options: Any) -> tuple[dp.Dataset, dict[str, Any]]:
    """Convert, verify, and return the data set and its records by id."""
    target = dst or src.parent / "dst"
    data = convert(src, target, ConvertConfig(recipe=recipe or Recipe(), num_workers=1, **options))
    assert verify(data.folder).damages == []
    records = {}
    for split in data.splits:
        for row in range(data.num_records(split, "sequences")):
            record = data.record(split, row)
            assert record.id not in records
            records[record.id] = record
    return data, records


def bf16(*shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.normal(size=shape).astype(np.float32)).bfloat16()


def f32(*shape: int) -> Any:
    return rng.normal(size=shape).astype(np.float32)


def equal(given: Any, expected: Any) -> None:
    """Assert equal shapes and equal bits."""
    array = expected.float().numpy() if isinstance(expected, torch.Tensor) and expected.dtype == torch.bfloat16 else expected
    array = np.asarray(array)
    assert np.shape(given) == array.shape
    assert np.array_equal(np.asarray(given), array)


def sequence_dtype(data: dp.Dataset) -> str:
    assert data.schema.sequence is not None
    return data.schema.sequence.dtype


def test_vllm_hidden_states(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    states = {f"hs_{number}": bf16(2 + number % 5, 3, 4) for number in range(12)}
    ids = {name: torch.randint(0, 50_000, (len(states[name]),)) for name in states}
    for name, tensor in states.items():
        save_file({"hidden_states": tensor, "token_ids": ids[name]}, tmp_path / "src" / f"{name}.safetensors")
    data, records = taken(tmp_path / "src")
    assert sequence_dtype(data) == "bfloat16"
    assert (data.schema.steps, data.schema.sequence.axes) == ("token", ("layer", "feature"))  # type: ignore[union-attr]
    assert data.schema.labels.kind == "none"
    assert data.schema.step_fields["step.token_ids"].dtype == "int64"
    assert sorted(records) == sorted(states)
    for name, record in records.items():
        equal(record.sequence, states[name])
        equal(record.fields["token_ids"], ids[name])
        assert record.label is None
    data, records = taken(tmp_path / "src", dst=tmp_path / "few", layers=[0, 2])
    for name, record in records.items():
        equal(record.sequence, states[name][:, [0, 2]])


def test_honest_llama(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "src").mkdir()
    layer_wise, labels = f32(20, 5, 8), rng.integers(0, 2, 20)
    np.save(tmp_path / "src" / "llama_tqa_layer_wise.npy", layer_wise)
    np.save(tmp_path / "src" / "llama_tqa_head_wise.npy", f32(20, 4, 8))
    np.save(tmp_path / "src" / "llama_tqa_labels.npy", labels)
    data, records = taken(tmp_path / "src")
    assert (data.schema.steps, sequence_dtype(data)) == ("layer", "float32")
    assert len(records) == 20
    for row in range(20):
        record = records[f"llama_tqa_layer_wise-{row}"]
        equal(record.sequence, layer_wise[row])
        assert record.label == labels[row]
    assert "{set}_head_wise" in caplog.text
    _, heads = taken(tmp_path / "src", Recipe(sequence="{set}_head_wise"), tmp_path / "heads")
    equal(heads["llama_tqa_head_wise-3"].sequence, np.load(tmp_path / "src" / "llama_tqa_head_wise.npy")[3])
    assert heads["llama_tqa_head_wise-3"].label == labels[3]


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_haloscope(tmp_path: Path, threshold: float | None) -> None:
    (tmp_path / "src").mkdir()
    states, scores = f32(15, 4, 6), rng.random(15).astype(np.float32)
    np.save(tmp_path / "src" / "embeddings.npy", states)
    np.save(tmp_path / "src" / "bleurt.npy", scores)
    data, records = taken(tmp_path / "src", Recipe(label_threshold=threshold))
    assert data.schema.labels.kind == ("value" if threshold is None else "class")
    for row in range(15):
        record = records[f"embeddings-{row}"]
        equal(record.sequence, states[row])
        assert record.label == (scores[row] if threshold is None else int(scores[row] < threshold))


def test_dictionary_learning(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    shards = [bf16(10, 6), bf16(7, 6)]
    for number, shard in enumerate(shards):
        (tmp_path / "src" / f"shard_{number}.memmap").write_bytes(shard.view(torch.int16).numpy().tobytes())
        meta = {"shape": list(shard.shape), "dtype": "torch.bfloat16"}
        (tmp_path / "src" / f"shard_{number}.meta").write_text(json.dumps(meta))
    data, records = taken(tmp_path / "src")
    assert sequence_dtype(data) == "bfloat16"
    assert len(records) == 17
    for number, shard in enumerate(shards):
        for row in range(len(shard)):
            equal(records[f"shard_{number}-{row}"].sequence, shard[row : row + 1])


def test_eeg_windows(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    windows = [f32(4, 9) for _ in range(10)]
    for number, window in enumerate(windows):
        np.savez(tmp_path / "src" / f"window_{number}.npz", X=window, y=number % 3)
    data, records = taken(tmp_path / "src", Recipe(sequence="X", label="y", axes=("channel", "time")))
    assert (data.schema.steps, data.schema.sequence.axes) == ("time", ("channel",))  # type: ignore[union-attr]
    for number, window in enumerate(windows):
        equal(records[f"window_{number}"].sequence, window.T)
        assert records[f"window_{number}"].label == number % 3


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_stacked_by_any_key(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "src").mkdir()
    values, labels, mask = f32(30, 6, 4), rng.integers(0, 4, 30), np.zeros((30, 6), np.int64)
    lengths = rng.integers(1, 7, 30)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    tokens, scores = rng.integers(0, 99, (30, 6)).astype(np.int32), f32(30)
    arrays = {"acts": values, "target": labels, "mask": mask, "tokens": tokens, "score": scores, "who": np.arange(30) + 100}
    if suffix == "npz":
        np.savez(tmp_path / "src" / "a.npz", **arrays)
    else:
        save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, tmp_path / "src" / "a.safetensors")
    fields = (("step.tokens", "tokens"), ("record.score", "score"))
    recipe = Recipe(sequence="acts", label="target", mask="mask", id="who", fields=fields)
    data, records = taken(tmp_path / "src", recipe)
    assert data.schema.step_fields["step.tokens"].dtype == "int32"
    assert sorted(records) == sorted(str(100 + row) for row in range(30))
    for row, length in enumerate(lengths):
        record = records[str(100 + row)]
        equal(record.sequence, values[row, :length])
        equal(record.fields["tokens"], tokens[row, :length])
        equal(record.fields["score"], scores[row])
        assert record.label == labels[row]
