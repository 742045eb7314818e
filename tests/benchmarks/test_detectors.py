"""The table of detectors on a model's own answers: made by one command, and its figures are those of the predictions."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from benchmarks import detectors, detectortable
from dali_pipeline.cli.app import run
from tests.helpers.languagemodels import make_answering_model, write_questions
from training.baselines import BASELINES
from training.config import MODELS
from training.intervals import intervals, over_trainings
from training.metrics import Predictions
from training.report import read_predictions


def test_one_command_makes_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_answering_model(tmp_path / "model")
    questions = write_questions(tmp_path / "q.jsonl", 120, references=5)
    options = ["--max-new-tokens", "6", "--seeds", "1", "--epochs", "1", "--device", "cpu"]
    files = ["--model", model, "--questions", str(questions), "--folder", str(tmp_path / "runs")]
    monkeypatch.setattr("sys.argv", ["detectors", *files, *options])
    assert run(detectors.app, "benchmarks.detectors") == 0
    assert detectors.middle_layers(model) == (1, 2)
    folder = tmp_path / "runs" / "model-q"
    with (folder / "detectors.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["detector"] for row in rows] == [*BASELINES, *MODELS]
    found = read_predictions(folder / "seed-0" / "predictions.parquet", "binary")
    for row in rows:
        test, _ = found[row["detector"]]
        assert float(row["auroc"]) == pytest.approx(roc_auc_score(test.labels, test.scores), abs=1e-4)
        assert float(row["average_precision"]) == pytest.approx(average_precision_score(test.labels, test.scores), abs=1e-4)
        assert float(row["auroc_low"]) <= float(row["auroc"]) <= float(row["auroc_high"])
        assert (row["beside_probe"] == "") == (row["detector"] == "linear_probe")
        assert int(row["test_right"]) + int(row["test_wrong"]) == int(row["test_answers"]) == len(test.ids)
        assert (row["seeds"], row["model"], row["questions"]) == ("1", "model", "q.jsonl")
    assert (folder / "detectors.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert detectortable.markdown(rows) in out
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- detectors -->\nold\n<!-- end -->\nafter\n")
    detectortable.update_findings(page, rows, "../some.csv")
    text = page.read_text()
    assert "| gvae_lstm | " in text
    assert "([CSV](../some.csv))" in text
    assert "old" not in text
    assert text.startswith("before\n<!-- detectors -->\n")
    assert text.endswith("\n<!-- end -->\nafter\n")


def test_model_and_questions_belong_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["detectors", "--model", str(tmp_path)])
    assert run(detectors.app, "benchmarks.detectors") == 2
    assert capsys.readouterr().err.startswith("benchmarks.detectors: --model and --questions belong together")


def predictions(rng: np.random.Generator, count: int) -> Predictions:
    labels = np.arange(count) % 3 > 0
    return Predictions(
        task="binary",
        level="record",
        ids=[str(number) for number in range(count)],
        positions=np.arange(count),
        counts=np.ones(count, np.int64),
        scores=(labels + rng.normal(size=count)).astype(np.float32),
        labels=labels.astype(np.int64),
        loss=float("nan"),
    )


def test_intervals_over_trainings() -> None:
    """One training has its own intervals; several add the spread of the trainings."""
    rng = np.random.default_rng(0)
    found = [predictions(rng, 90) for _ in range(3)]
    groups = [str(number // 2).encode() for number in range(90)]
    own = intervals(found[0], groups, 0.5)
    for metric, figure in over_trainings(found[:1], groups).items():
        assert figure["interval"] == pytest.approx(own[metric])
        assert figure["std"] == 0
    several = over_trainings(found, groups)["auroc"]
    singles = [over_trainings([one], groups)["auroc"]["mean"] for one in found]
    assert several["mean"] == pytest.approx(np.mean(singles))
    assert several["std"] == pytest.approx(np.std(singles, ddof=1))
    assert several["interval"][0] < several["mean"] < several["interval"][1]
