"""What a run leaves, and what is made of it: predictions, folds, layers, scores of other data; and what stops it."""

from __future__ import annotations

import csv
import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from sklearn.metrics import roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

import dali_pipeline as dp
import train as train_module
from dali_pipeline.storage.whole import replacing
from models.noise import keyed_normal
from tests.helpers.commands import predict
from tests.helpers.commands import train as call
from tests.helpers.records import FEATURES, SCHEMA, make_records, write
from training.checkpoint import CheckpointWriter, load_checkpoint
from training.config import METRICS, Conduct, TrainConfig
from training.extras import Board
from training.interrupt import Interrupts
from training.prepare import Options
from training.processes import Processes
from training.report import prediction_table
from training.trainer import Trainer
from training.watch import verdict

ALONE = Processes(dp.World())

pytestmark = pytest.mark.usefixtures("restored")


def rows_of(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def test_a_run_leaves_its_predictions_and_where_they_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And `predict` gives the same scores, of this data set or another."""
    data = write(tmp_path / "set", make_records(120, ragged=False))
    out = tmp_path / "out"
    assert call(monkeypatch, "--data", data.root, "--epochs", 2, "--batch-size", 16, "--output-dir", out) == 0
    said = capsys.readouterr().out
    assert "structure: gnn_lstm" in said
    assert "uncertainty: gvae_lstm" in said
    metrics, config = (json.loads((out / name).read_text()) for name in ("metrics.json", "config.json"))
    assert config["data_digest"] == data.digest
    assert config["precision"] == "fp32"
    (start,) = json.loads((out / "starts.json").read_text())
    assert start["version"] == dp.__version__
    assert start["commit"] is None or len(start["commit"].rstrip("+")) == 40
    rows, records = rows_of(out / "predictions.parquet"), {record.id: record for record in make_records(120)}
    assert list(rows[0]) == ["model", "id", "group", "label", "score", "split"]
    assert all(records[row["id"]].group == row["group"] for row in rows)
    for model, result in metrics.items():
        for split in ("val", "test"):
            own = [row for row in rows if (row["model"], row["split"]) == (model, split)]
            assert len({row["id"] for row in own}) == len(own) == data.num_records(split, "graphs")
            auroc = roc_auc_score([row["label"] for row in own], [row["score"] for row in own])
            assert result[split]["auroc"] == pytest.approx(auroc)
        low, high = result["test_interval"]["auroc"]
        assert low <= result["test"]["auroc"] <= high
    with (out / "layers.csv").open() as file:
        layers = list(csv.DictReader(file))
    assert [row["layer"] for row in layers] == ["0", "1", "2", "3", "4"]
    assert max(float(row["test_auroc"]) for row in layers) > 0.9  # the label shows in every step

    for model, name in (("lstm", "scores.csv"), ("gvae_lstm", "scores.parquet")):
        checkpoint, output = out / f"{model}-best.pt", tmp_path / name
        assert predict(monkeypatch, "--checkpoint", checkpoint, data.root, "--output", output, "--device", "cpu") == 0
        assert "120 records" in capsys.readouterr().out
        scores: list[dict[str, Any]]
        scores = list(csv.DictReader(output.read_text().splitlines())) if output.suffix == ".csv" else rows_of(output)
        assert len({row["id"] for row in scores}) == 120
        expected = {row["id"]: row for row in rows if row["model"] == model}
        assert {row["split"] for row in scores} == {"train", "val", "test"}
        for row in scores:
            if row["id"] in expected:
                assert float(row["score"]) == pytest.approx(expected[row["id"]]["score"], abs=1e-6)
                assert {**row, "label": int(row["label"]), "score": 0, "model": model} == {**expected[row["id"]], "score": 0}


def test_predict_refuses_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write(tmp_path / "set", make_records(60)), tmp_path / "out"
    assert call(monkeypatch, "--data", data.root, "--model", "lstm", "--epochs", 1, "--output-dir", out) == 0
    wider = replace(SCHEMA, sequence=dp.Field(dtype="float32", shape=(FEATURES + 1,)))
    with dp.ShardWriter(tmp_path / "wider", wider) as writer:
        for record in make_records(20):
            writer.write(replace(record, sequence=np.zeros((3, FEATURES + 1))))
    with dp.ShardWriter(tmp_path / "graphs", dp.Schema(x=SCHEMA.x, edge_attr=SCHEMA.edge_attr)) as writer:
        for record in make_records(20):
            writer.write(replace(record, sequence=None))
    checkpoint = out / "lstm-best.pt"
    for arguments, words in [
        ((checkpoint, tmp_path / "wider"), r"sequence has rows of shape \(9,\); expected rows of shape \(8,\)"),
        ((checkpoint, tmp_path / "graphs"), "sequence has none; expected rows of shape"),
        ((checkpoint, tmp_path), "has no manifest.json"),
        ((out / "metrics.json", data.root), "is not a checkpoint"),
        ((tmp_path / "missing.pt", data.root), "is not a checkpoint"),
        ((checkpoint, data.root, "--split", "dev"), "unknown split 'dev'"),
        ((checkpoint, data.root, "--output", tmp_path / "scores.txt"), "ends in '.txt'"),
        ((checkpoint, data.root, "--output", tmp_path / "nowhere" / "scores.csv"), "could not be written"),
        ((checkpoint, data.root, "--batch-size", 0), "batch size is 0"),
        ((checkpoint, data.root, "--device", "tpu"), "device is 'tpu'"),
    ]:
        capsys.readouterr()
        assert predict(monkeypatch, "--output", tmp_path / "scores.parquet", "--checkpoint", *arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        import re

        assert re.search(words, error), error
    assert not list(tmp_path.glob("scores*"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `set`, 60 records, and `out`, where the LSTM and the GNN are trained on it."""
    folder = tmp_path_factory.mktemp("trained")
    write(folder / "set", make_records(60))
    for model in ("lstm", "gnn_lstm"):
        arguments = [
            "--data",
            folder / "set",
            "--model",
            model,
            "--epochs",
            1,
            "--device",
            "cpu",
            "--output-dir",
            folder / model,
        ]
        with pytest.MonkeyPatch.context() as patch:
            assert call(patch, *arguments) == 0
        (folder / model / f"{model}-best.pt").rename(folder / f"{model}.pt")
    return folder


def scores_of(path: Path) -> dict[str, float]:
    if path.suffix == ".csv":
        return {row["id"]: float(row["score"]) for row in csv.DictReader(path.read_text().splitlines())}
    return {row["id"]: row["score"] for row in rows_of(path)}


@pytest.mark.parametrize("ending", ["parquet", "csv"])
@pytest.mark.parametrize(("model", "where"), [("lstm", "sequence"), ("gnn_lstm", "x"), ("gnn_lstm", "edge_attr")])
def test_records_of_no_numbers_are_refused_left_out_or_kept(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: str,
    where: str,
    ending: str,
) -> None:
    """Never scored without a word: not a whole split of them either, as a few records may be all of val."""
    records = make_records(60)
    val = {one for batch in dp.SequenceLoader(dp.open_dataset(trained / "set"), "val", engine="torch") for one in batch.ids}
    assert 0 < len(val) < 58
    bad = {*val, *[record.id for record in records if record.id not in val][:2]}
    for record in records:
        if record.id in bad:
            values = record.sequence if where == "sequence" else getattr(record.graphs, where)
            if not len(values):  # no edges at all
                values = record.graphs.x
            values[0] = np.nan if record.id in val else np.inf
    data, output = write(tmp_path / "set", records), tmp_path / f"scores.{ending}"
    arguments = ("--checkpoint", trained / f"{model}.pt", data.root, "--output", output, "--device", "cpu", "--batch-size", 16)
    assert predict(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert "record '" in error
    assert "holds NaN or infinite values" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("scores*"))

    assert predict(monkeypatch, *arguments, "--on-nan", "skip") == 0
    sound = scores_of(output)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{output}: {60 - len(bad)} records, {len(bad)} left out for NaN"
    assert said[1].startswith("Metrics on set, beside the data of the training")
    assert sound.keys() == {record.id for record in records} - bad

    assert predict(monkeypatch, *arguments, "--on-nan", "keep") == 0
    kept = scores_of(output)
    strange = {id_ for id_, score in kept.items() if not np.isfinite(score)}
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{output}: 60 records, {len(strange)} without a finite score"
    assert strange == bad  # edges run both ways, so the readout is a sum, which every node reaches
    assert {id_: kept[id_] for id_ in sound} == pytest.approx(sound, abs=1e-6)

    before = output.read_bytes()
    assert predict(monkeypatch, *arguments, "--on-nan", "skip", "--split", "val") == 2
    assert "holds finite values alone" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_weights_that_give_no_finite_score_are_said(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(trained / "lstm.pt", weights_only=True)
    state["model"]["answer.head.4.bias"] += torch.nan
    torch.save(state, tmp_path / "lstm.pt")
    arguments = ("--checkpoint", tmp_path / "lstm.pt", trained / "set", "--output", tmp_path / "scores.csv", "--device", "cpu")
    for on_nan in ("raise", "skip"):
        assert predict(monkeypatch, *arguments, "--on-nan", on_nan) == 2
        assert "the weights are damaged or too large" in capsys.readouterr().err
    assert not (tmp_path / "scores.csv").exists()
    assert predict(monkeypatch, *arguments, "--on-nan", "keep") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'scores.csv'}: 60 records, 60 without a finite score",
        "no table: no record has both a label that this detector knows and a finite score",
    ]


def test_labels_that_the_model_never_saw_are_delivered_as_they_are(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No loss is computed: scores are those of the same records with other labels."""
    records = make_records(60)
    other = [replace(record, label=[0, 1, 9, 2**40, 2**63 - 1][number % 5]) for number, record in enumerate(records)]
    data = write(tmp_path / "set", other)
    state = torch.load(trained / "lstm.pt", weights_only=True)
    head = "answer.head.4"
    state["model"] |= {
        f"{head}.{part}": state["model"][f"{head}.{part}"].repeat_interleave(3, dim=0) for part in ("weight", "bias")
    }
    torch.save({**state, "target": {"name": "label", "task": "multiclass", "classes": 3}}, tmp_path / "three.pt")
    for checkpoint, column in (
        (trained / "lstm.pt", "score"),
        (tmp_path / "three.pt", "score_2"),
        (trained / "gnn_lstm.pt", "score"),
    ):
        found = []
        for name, root in (("other", data.root), ("same", trained / "set")):
            output = tmp_path / f"{name}.parquet"
            assert predict(monkeypatch, "--checkpoint", checkpoint, root, "--output", output, "--device", "cpu") == 0
            found.append({row["id"]: row for row in rows_of(output)})
        assert {id_: row["label"] for id_, row in found[0].items()} == {record.id: record.label for record in other}
        assert {id_: row[column] for id_, row in found[0].items()} == {id_: row[column] for id_, row in found[1].items()}


@pytest.mark.parametrize(
    "change",
    [
        {"config": None},
        {"config": {"dropout": "a"}},
        {"config": {"layers": 3}},
        {"config": {"precision": "fp8"}},
        {"config": {"epochs": None}},
        {"target": None},
        {"target": {"name": "label", "task": "guess"}},
        {"target": {"name": "label", "task": "multiclass", "classes": -1}},
        {"target": {"name": "label", "task": "multiclass", "classes": 2**40}},
        {"target": {"name": "label", "task": "multilabel", "shape": [3]}},
        {"model": None},
        {"model": {}},
        {"schema": []},
    ],
    ids=str,
)
def test_a_damaged_checkpoint_is_one_sentence(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    torch.save(torch.load(trained / "lstm.pt", weights_only=True) | change, tmp_path / "lstm.pt")
    arguments = ("--checkpoint", tmp_path / "lstm.pt", trained / "set", "--output", tmp_path / "scores.csv", "--device", "cpu")
    assert predict(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"predict.py: {tmp_path / 'lstm.pt'} holds")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "part", ["model", "best", "optimizer", "scheduler", "loader", "epoch", "history", "random", "delivered"]
)
def test_a_damaged_state_is_one_sentence(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    state = torch.load(trained / "lstm" / "lstm-last.pt", weights_only=True)
    arguments = ("--data", trained / "set", "--model", "lstm", "--epochs", 1, "--output-dir", tmp_path / "out")
    for damage in (None, "x"):
        torch.save(state | {part: damage}, tmp_path / "lstm-last.pt")
        assert call(monkeypatch, *arguments, "--resume", tmp_path / "lstm-last.pt") == 2
        error = capsys.readouterr().err
        assert "holds no" in error or "cannot be gone on from" in error or "not a loader state" in error or "digest" in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_predict_is_stopped_without_a_trace(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    """In the middle of its writing, with an earlier file of that name."""
    output, table = tmp_path / "scores.parquet", prediction_table
    output.write_text("of an earlier run")

    def stopping(*given: Any) -> Any:
        assert [path.name for path in tmp_path.iterdir() if path != output] == ["scores.parquet.tmp"]
        os.kill(os.getpid(), number)
        return table(*given)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as a program begins, whatever trained here before
    monkeypatch.setattr("training.scores.prediction_table", stopping)
    assert predict(monkeypatch, "--checkpoint", trained / "lstm.pt", trained / "set", "--output", output) == code
    assert output.read_text() == "of an earlier run"
    assert list(tmp_path.iterdir()) == [output]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_two_predictions_into_one_file_do_not_meet(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second is refused; what a killed one left is taken over; a link stays one; a name may be no UTF-8."""
    output, link = tmp_path / os.fsdecode(b"scores-\xe9.csv"), tmp_path / "link.csv"
    link.symlink_to(output)
    arguments = ("--checkpoint", trained / "lstm.pt", trained / "set", "--device", "cpu", "--output", link)
    with replacing(output) as other:
        other.write(b"of another process")
        other.flush()
        assert predict(monkeypatch, *arguments) == 2
        assert "is being written by another process" in capsys.readouterr().err
    assert output.read_bytes() == b"of another process"
    (tmp_path / f"{output.name}.tmp").write_text("of a killed process, " * 10_000)
    assert predict(monkeypatch, *arguments) == 0
    assert len(scores_of(output)) == 60
    assert link.is_symlink()
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "full.csv").symlink_to("/dev/full")
    assert predict(monkeypatch, *arguments[:-1], tmp_path / "full.csv") == 2
    assert "is no regular file" in capsys.readouterr().err


def test_folds_are_runs_by_group_with_mean_and_spread(
    make: Callable[..., dp.Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = make(120), tmp_path / "out"
    arguments = ("--data", data.root, "--model", "lstm", "--epochs", 2, "--batch-size", 16, "--folds", 3, "--output-dir", out)
    assert call(monkeypatch, *arguments) == 0
    assert "over 3 folds" in capsys.readouterr().out
    held: list[set[str]] = []
    tested: list[set[str]] = []
    for fold in range(3):
        rows = rows_of(out / f"fold-{fold}" / "predictions.parquet")
        held.append({row["group"] for row in rows if row["split"] == "val"})
        tested.append({row["id"] for row in rows if row["split"] == "test"})
    assert len(set.union(*held)) == sum(map(len, held))  # no group in two folds
    assert tested[0] == tested[1] == tested[2]
    runs = [json.loads((out / f"fold-{fold}" / "metrics.json").read_text())["lstm"] for fold in range(3)]
    summary = json.loads((out / "metrics.json").read_text())["lstm"]
    for split in ("val", "test"):
        for name in METRICS:
            values = [each[split][name] for each in runs]
            assert summary[split][name] == pytest.approx(np.mean(values))
            assert summary[f"{split}_std"][name] == pytest.approx(np.std(values, ddof=1))
    assert call(monkeypatch, *arguments) == 0
    assert "epoch" not in capsys.readouterr().out
    for more, words in [(("--seeds", 2), "exclude each other"), (("--folds", 1), "folds is 1"), (("--folds", 500), "groups")]:
        assert call(monkeypatch, *arguments, "--output-dir", tmp_path / "bad", *more) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("function", "name", "error"),
    [
        ("write_history", "history.csv", OSError(errno.ENOSPC, "full")),
        ("write_predictions", "predictions.parquet", MemoryError()),
        ("layers_of", "layers.csv", dp.FormatError("damage")),
        ("draw_curves", "curves.png", ValueError("many\nlines")),
    ],
)
def test_an_extra_that_fails_is_one_line_and_the_metrics_are_there(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    function: str,
    name: str,
    error: Exception,
) -> None:
    def failing(*given: Any) -> Any:
        raise error

    monkeypatch.setattr(f"training.run.{function}", failing)
    last, out = trained / "lstm" / "lstm-last.pt", tmp_path / "out"
    arguments = ("--data", trained / "set", "--model", "lstm", "--epochs", 1, "--output-dir", out, "--resume", last)
    assert call(monkeypatch, *arguments) == 0
    written = {"metrics.json", "history.csv", "predictions.parquet", "curves.png"} - {name}
    assert written <= {path.name for path in out.iterdir()}
    assert not (out / name).exists()
    (line,) = [record.getMessage() for record in caplog.records if "the run goes on without" in record.getMessage()]
    assert line.startswith(str(out / name))
    assert "\n" not in line
    assert json.loads((out / "metrics.json").read_text()) == json.loads((trained / "lstm" / "metrics.json").read_text())


def test_a_run_killed_behind_its_metrics_says_what_it_lacks(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And how it is had: without metrics.json the same command makes it, and trains nothing anew."""

    def interrupted(*given: Any) -> None:
        raise KeyboardInterrupt

    last, out = trained / "lstm" / "lstm-last.pt", tmp_path / "out"
    arguments = ("--data", trained / "set", "--model", "lstm", "--epochs", 1, "--output-dir", out)
    with monkeypatch.context() as patch:
        patch.setattr("training.run.write_predictions", interrupted)
        assert call(patch, *arguments, "--resume", last) == 130
    capsys.readouterr()
    assert call(monkeypatch, *arguments) == 0
    said = capsys.readouterr().out
    assert f"{out} lacks predictions.parquet, curves.png; remove {out / 'metrics.json'}, and the same command makes" in said
    (out / "metrics.json").unlink()
    assert call(monkeypatch, *arguments, "--resume", last) == 0
    said = capsys.readouterr().out
    assert " epoch " not in said
    assert " lacks " not in said
    assert (out / "predictions.parquet").exists()


def test_tensorboard_ends_with_the_first_figures_that_cannot_be_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    board = Board(tmp_path / "file", 0)
    board.note(0, {"loss": 1.0})
    board.close()
    assert len(caplog.records) == 1
    board = Board(tmp_path / "board", 0)
    board.note(0, {"loss": 1.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        board.note(1, {"loss": 0.5})
        board.note(2, {"loss": 0.25})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    board.close()
    assert len(caplog.records) == 2
    assert capfd.readouterr().err == ""
    found = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(0, 1.0)]


def test_names_and_classes_that_extras_stumble_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Dollars in the set's name, a group of 3 MB, and so few of a class that the probe's part of the records has one alone."""
    monkeypatch.setattr("training.baselines.MOST_ROWS", 1)
    records = make_records(60, ragged=False)
    root, out, loader = tmp_path / "a$\\frac{$b", tmp_path / "out", dp.SequenceLoader
    write(root, [replace(one, group="g" * 3_000_000 if one.id == "record-1" else one.id) for one in records])
    one_by_one = lambda *given, **named: loader(*given, **{**named, "batch_size": 1})  # noqa: E731
    monkeypatch.setattr("training.baselines.SequenceLoader", one_by_one)
    assert call(monkeypatch, "--data", root, "--model", "lstm", "--epochs", 1, "--output-dir", out) == 0
    assert (out / "metrics.json").exists()
    assert (out / "curves.png").exists()
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0].startswith(f"{out / 'layers.csv'} cannot be made (the 1 rows looked at of split 'train' have")
    assert all(message.endswith("the run goes on without") for message in messages)


def test_a_configuration_file_and_the_flags_that_win(
    make: Callable[..., dp.Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, file = make(60), tmp_path / "run.yaml"
    file.write_text(
        f"data: {data.root}\nmodel: lstm\nepochs: 7\nlayers: 0:2\nbatch_size: 16\ncompile: false\nlr: 1e-2\nseed:\n"
    )
    assert call(monkeypatch, "--config", file, "--epochs", 1, "--print-config") == 0
    printed = capsys.readouterr().out
    shown = yaml.safe_load(printed)
    given = {"data": str(data.root), "model": "lstm", "epochs": 1, "layers": "0:2", "batch-size": 16, "lr": 0.01, "seed": 0}
    assert {name: shown[name] for name in given} == given
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    assert call(monkeypatch, "--config", again, "--print-config") == 0
    assert capsys.readouterr().out == printed
    assert call(monkeypatch, "--config", again, "--output-dir", tmp_path / "out") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["epochs"], config["layers"], config["batch_size"], config["models"]) == (1, "0:2", 16, ["lstm"])
    for text, words in [
        ("epoch: 3", "names 'epoch', which is no flag"),
        ("- 3", "holds no names and values"),
        ("lr: [", "cannot be read as YAML"),
        ("epochs: many", "epochs"),
        ("batch-size: 0", "batch size is 0"),
    ]:
        file.write_text(text)
        capsys.readouterr()
        assert call(monkeypatch, "--config", file, "--data", data.root) == 2
        assert words in capsys.readouterr().err
    assert call(monkeypatch, "--config", tmp_path / "missing.yaml") == 2


def test_help_is_grouped_and_every_flag_has_an_example() -> None:
    shown = CliRunner().invoke(train_module.app, ["--help"], terminal_width=500).stdout
    for group in ("Data", "Model", "Training", "Speed", "Output"):
        assert f"\n{group}:\n" in shown
    flags = [line for line in shown.splitlines() if line.startswith("  --")]
    assert len(flags) > 20
    assert "E.g. --precision bf16" in shown
    assert shown.count("E.g. ") == len(flags)


def fresh(data: dp.Dataset, folder: Path, conduct: Conduct | None = None, **config: Any) -> Trainer:
    folder.mkdir(exist_ok=True)
    settings = TrainConfig(models=("lstm",), **config)
    return Trainer("lstm", data, settings, folder, conduct or Conduct(device="cpu"), Interrupts(ALONE), ALONE)


@pytest.mark.parametrize("model", ["lstm", "gnn_lstm"])
def test_a_record_of_no_numbers_is_named_and_the_checkpoint_of_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    for number in range(120):  # until the record is not in the first step: the order depends on the values too
        records = make_records(120)
        bad = records[number]
        bad.sequence[-1, 3] = np.nan
        bad.graphs.x[0, 1] = np.inf
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        loader: Any = dp.SequenceLoader if model == "lstm" else dp.GraphLoader
        steps = [batch.ids for batch in loader(write(tmp_path / "set", records), batch_size=16)]
        if any(bad.id in ids for ids in steps[2:]):
            break
    out = tmp_path / "out"
    arguments: tuple[Any, ...] = ("--data", tmp_path / "set", "--model", model, "--batch-size", 16)
    arguments += ("--checkpoint-steps", 1, "--output-dir", out)
    arguments += ("--num-partitions", 1)  # as the loader above
    assert call(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "epoch 1, step" in error
    assert f"record {bad.id!r} holds values that are no finite numbers" in error
    state = torch.load(out / f"{model}-last.pt", weights_only=True)
    assert all(torch.isfinite(weight).all() for weight in state["model"].values())
    step = int(error.split("step ")[1].split(" ")[0])
    assert state["loader"]["step"] == step - 1


def test_a_record_of_no_numbers_in_validation_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = make_records(60)
    for batch in dp.SequenceLoader(write(tmp_path / "sound", records), "val", engine="torch"):
        bad = records[int(batch.ids[0].split("-")[1])]
    bad.sequence[0, 0] = np.nan
    data = write(tmp_path / "set", records)
    assert call(monkeypatch, "--data", data.root, "--model", "lstm", "--output-dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"the score of record {bad.id!r} of val" in error
    assert error.count("\n") == 1


def test_predict_refuses_a_checkpoint_of_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write(tmp_path / "set", make_records(60)), tmp_path / "out"
    trainer = fresh(data, out, epochs=1)
    trainer.train_epoch(lambda step, share: None)
    trainer.writer.wait()
    state = torch.load(out / "lstm-best.pt", weights_only=True)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"model": {}}, "holds other weights than lstm has"),
        ({"schema": {"sequence": {"dtype": "float128", "shape": (8,)}}}, "holds a schema that this version does not know"),
        ({"name": "transformer"}, "is of the model 'transformer'"),
    ]
    for change, words in changes:
        torch.save({**state, **change}, out / "other.pt")
        capsys.readouterr()
        assert predict(monkeypatch, "--checkpoint", out / "other.pt", data.root, "--output", tmp_path / "scores.csv") == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert not list(tmp_path.glob("scores*"))


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(make: Callable[..., dp.Dataset], tmp_path: Path) -> None:
    data = make(60)
    trainer = fresh(data, tmp_path / "out", epochs=3)
    trainer.train_epoch(lambda step, share: None)
    trainer.writer.wait()
    before = trainer.last_path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(dp.PipelineError, match=r"-(best|last)\.pt could not be written \(.*\); expected free space"):
            trainer.train_epoch(lambda step, share: trainer.writer.wait())
            trainer.writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert trainer.last_path.read_bytes() == before
    assert {path.name for path in trainer.folder.iterdir()} == {"lstm-best.pt", "lstm-last.pt"}
    again = fresh(data, tmp_path / "out", epochs=3)
    again.restore(again.last_path)
    assert again.epoch == 1


def test_a_checkpoint_is_what_it_was_when_it_was_written(tmp_path: Path) -> None:
    """Though it is written behind the scenes, while training goes on changing the weights."""
    writer, weight = CheckpointWriter(), torch.zeros(1000)
    identity = {"name": "lstm", "config": {}, "schema": {}, "target": {}}
    for number in range(20):
        writer.write(tmp_path / f"{number}.pt", {**identity, "weight": weight, "nest": {"list": [weight, (1, weight)]}})
        weight += 1
    writer.wait()
    for number in range(20):
        state = load_checkpoint(tmp_path / f"{number}.pt", "none")
        assert (state["weight"] == number).all()
        assert (state["nest"]["list"][1][1] == number).all()
    writer.write(tmp_path / "missing" / "one.pt", identity)
    with pytest.raises(dp.PipelineError, match=os.strerror(errno.ENOENT)):
        writer.wait()


def test_checkpoints_by_steps_and_minutes(make: Callable[..., dp.Dataset], tmp_path: Path) -> None:
    data = make(120)
    for number, (conduct, saved) in enumerate(
        [
            (Conduct(device="cpu", checkpoint_steps=2), [2, 4, 6, 7]),
            (Conduct(device="cpu", checkpoint_minutes=1e-9), [1, 2, 3, 4, 5, 6, 7, 7]),
            (Conduct(device="cpu", checkpoint_minutes=0), [7]),
        ]
    ):
        trainer = fresh(data, tmp_path / str(number), conduct, epochs=1, batch_size=data.num_records("train", "graphs") // 6)
        assert trainer.steps_per_epoch == 7
        steps: list[int] = []
        original = trainer.writer.write

        def noted(path: Path, state: Any, steps: list[int] = steps, original: Any = original) -> None:
            if path.name == "lstm-last.pt":
                steps.append(state["loader"]["step"] or 7 * state["epoch"])
            original(path, state)

        trainer.writer.write = noted  # type: ignore[method-assign]
        trainer.train_epoch(lambda step, share: None)
        trainer.writer.wait()
        assert steps == saved


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_what_can_be_learned(make: Callable[..., dp.Dataset], tmp_path: Path, precision: Any) -> None:
    trainer = fresh(make(300), tmp_path / "out", epochs=4, lr=0.01, precision=precision)
    rows = [trainer.train_epoch(lambda step, share: None) for _ in range(4)]
    trainer.writer.wait()
    assert rows[-1]["val_auroc"] > 0.95
    assert {weight.dtype for weight in trainer.model.state_dict().values()} == {torch.float32}


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(make: Callable[..., dp.Dataset], tmp_path: Path) -> None:
    curves, data = [], make(60)
    for compiled in (False, True):
        trainer = fresh(data, tmp_path / str(compiled), epochs=1, dropout=0.0, compile=compiled)
        curves.append(trainer.train_epoch(lambda step, share: None)["train_loss"])
        trainer.writer.wait()
        assert not any("_orig_mod" in name for name in trainer.model.state_dict())
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


def test_shares_that_do_not_work_out_are_refused(make: Callable[..., dp.Dataset], tmp_path: Path) -> None:
    data = make(60)
    options = Options(
        data=data.folder,
        preprocessed_dir=None,
        converted_dir=None,
        output_dir=tmp_path / "out",
        resume="auto",
        seeds=1,
        folds=0,
        conduct=Conduct(device="cpu"),
    )
    for config, world_size, words in [
        (TrainConfig(batch_size=30), 4, "batch size 30 does not divide by 4 processes;"),
        (TrainConfig(batch_size=32, accumulate=5), 2, "does not divide by 2 processes times --accumulate 5"),
        (TrainConfig(batch_size=128), 128, "128 processes share .. training records"),
    ]:
        with pytest.raises(dp.PipelineError, match=words):
            train_module.prepare(options, config, world_size)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_other_data_is_refused(
    make: Callable[..., dp.Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert call(monkeypatch, "--data", make(60).root, "--model", "lstm", "--epochs", 1, "--output-dir", out) == 0
    capsys.readouterr()
    other = ("--data", make(70).root, "--model", "lstm", "--epochs", 1, "--output-dir", tmp_path / "other")
    assert call(monkeypatch, *other, "--resume", out / "lstm-last.pt") == 2
    error = capsys.readouterr().err
    assert "was trained with data of digest" in error
    assert error.count("\n") == 1


def test_the_last_line_says_what_bounds_the_speed() -> None:
    timer = dp.StepTimer()
    timer.records, timer.bytes, timer.wait_seconds, timer.compute_seconds = 3000, 3 * 10**9, 1.0, 2.0
    said = verdict(timer, 2, torch.device("cpu"))
    assert said.startswith("2,000 records/s, 2.00 GB/s, 33% of the time waiting for data (the first batch, 0.0 s, apart)")
    assert ": input-bound: try more --num-workers" in said
    timer.wait_seconds, timer.start_seconds, timer.compute_seconds = 0.7, 0.6, 2.9  # a start that a long run does not notice
    said = verdict(timer, 1, torch.device("cpu"))
    assert "3% of the time waiting for data (the first batch, 0.6 s, apart): not input-bound" in said
    assert "--precision bf16" in verdict(timer, 1, torch.device("cuda"))


def test_noise_is_normal_and_a_function_of_its_keys() -> None:
    keys = torch.arange(4000)
    noise = keyed_normal(keys, 32)
    assert noise.shape == (4000, 32)
    assert torch.isfinite(noise).all()
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01
    assert abs(float((noise**3).mean())) < 0.03
    assert abs(float((noise**4).mean()) - 3) < 0.1
    for one in (noise, noise.T):  # neighbouring keys, and columns, have nothing in common
        assert abs(float((one[1:] * one[:-1]).mean())) < 0.01
    order = torch.randperm(4000)
    assert torch.equal(keyed_normal(keys[order], 32), noise[order])
    assert torch.equal(keyed_normal(keys, 16), noise[:, :16])
