"""Training and prediction on sets whose records have axes with names, and labels that are no classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import dali_pipeline as dp
from tests.helpers.commands import predict, train


def written(root: Path, label: dp.Label | None = None, count: int = 60) -> dp.Dataset:
    """Layers 0, 4 and 8 of a few tokens; layer 4 tells the class."""
    field = dp.Field(dtype="float16", shape=(3, 2), axes=("layer", "feature"))
    options: dict[str, Any] = {} if label is None else {"label": label}
    rng = np.random.default_rng(0)
    with dp.ShardWriter(root, dp.Schema(sequence=field, step_axis="token", layers=(0, 4, 8), **options)) as writer:
        for number in range(count):
            rows = rng.normal(size=(2 + number % 3, 3, 2))
            rows[:, 1] += 3 * (number % 2)
            given = {None: number % 2, "value": number / 7, "none": None, "multilabel": [1, 0]}
            kind = None if label is None else label.kind
            writer.write({"id": number, "label": given[kind], "sequence": rows})
    return dp.open_dataset(root)


def test_chosen_layers_train_and_predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = written(tmp_path / "set")
    flags = ["--data", data.root, "--model", "lstm", "--epochs", "1", "--device", "cpu", "--layers", "4,8"]
    assert train(monkeypatch, *flags, "--output-dir", tmp_path / "run") == 0
    for label, name in ((None, "class"), (dp.Label(kind="none"), "none"), (dp.Label(kind="value"), "value")):
        other = written(tmp_path / name, label, count=20)
        output = tmp_path / f"{name}.parquet"
        assert predict(monkeypatch, "--checkpoint", tmp_path / "run" / "lstm-best.pt", other.root, "--output", output) == 0
        table = pq.read_table(output)
        assert len(table) == 20
        assert np.isfinite(table["score"].to_numpy()).all()
        assert table["label"].null_count == (0 if label is None else 20)


def test_a_set_without_labels_says_what_could_be_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = written(tmp_path / "set", dp.Label(kind="none"))
    assert train(monkeypatch, "--data", data.root, "--model", "lstm", "--output-dir", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "has no target 'label'; expected one of its labels and fields by level: none that could be one" in said
    assert said.count("\n") == 1
