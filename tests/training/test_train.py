from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dali_pipeline as dp
import train as train_module
from dali_pipeline.cli.app import run
from dali_pipeline.format.layers import parse_layers
from tests.helpers.commands import train as call
from tests.helpers.folders import make_folder
from tests.helpers.records import make_records, write
from tests.helpers.traces import read as read_trace
from tests.helpers.traces import within
from training import ceiling
from training.config import METRICS, MODELS, Conduct, TrainConfig
from training.interrupt import Interrupted, Interrupts
from training.processes import Processes
from training.step import Stepper
from training.trainer import Trainer

ROOT = Path(train_module.__file__).parent
ALONE = Processes(dp.World())

pytestmark = pytest.mark.usefixtures("restored", "no_baselines")


def history(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open() as file:
        return list(csv.DictReader(file))


def curve(folder: Path) -> list[tuple[str, str, str, str]]:
    return [(row["model"], row["epoch"], row["train_loss"], row["val_loss"]) for row in history(folder)]


def test_a_folder_of_pt_files_is_converted_once_and_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    src = make_folder(tmp_path / "preprocessed_data", per_file=40)
    before = {path: path.stat().st_mtime_ns for path in src.rglob("*")}
    arguments = ("--preprocessed-dir", src, "--epochs", 2, "--batch-size", 16)
    assert call(monkeypatch, *arguments) == 0
    first = capsys.readouterr()
    assert first.err == ""
    assert "converting" in first.out
    (folder,) = (tmp_path / "runs").iterdir()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics) == list(MODELS)
    for result in metrics.values():
        assert set(METRICS) == set(result["test"]) == set(result["test_interval"])
        assert all(0 <= value <= 1 for value in result["test"].values())
    assert [(row["model"], row["epoch"]) for row in history(folder)] == [
        (name, str(epoch)) for name in MODELS for epoch in range(2)
    ]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    for name in MODELS:
        assert any((folder / "tensorboard" / name).glob("events*"))
        for which in ("best", "last"):
            torch.load(folder / f"{name}-{which}.pt", weights_only=True)
    assert {path: path.stat().st_mtime_ns for path in src.rglob("*")} == before
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*.pt")}
    assert call(monkeypatch, *arguments) == 0
    again = capsys.readouterr()
    assert "epoch" not in again.out
    assert "converting" not in again.out
    table = first.out[first.out.index("Test metrics") :]
    assert again.out.endswith(table)
    assert len(max(table.splitlines(), key=len)) > 60
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.pt")} == written


def test_what_can_be_learned_is_learned(
    make: Callable[..., dp.Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make(400)
    assert call(monkeypatch, "--data", data.root, "--epochs", 8, "--lr", 0.01, "--output-dir", tmp_path / "out") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert all(metrics[name]["test"]["auroc"] > 0.95 for name in MODELS), metrics


def test_more_than_two_classes(make: Callable[..., dp.Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(300, classes=3)
    assert call(monkeypatch, "--data", data.root, "--epochs", 6, "--lr", 0.01, "--output-dir", tmp_path / "out") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert all(metrics[name]["test"]["auroc"] > 0.8 and metrics[name]["threshold"] is None for name in MODELS), metrics


@pytest.mark.parametrize("halves", ["lstm", "gnn"])
def test_half_a_data_set_trains_what_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], halves: str
) -> None:
    src = make_folder(tmp_path / "src", per_file=30, halves=halves)
    arguments = ("--preprocessed-dir", src, "--converted-dir", tmp_path / "elsewhere", "--output-dir", tmp_path / "out")
    assert call(monkeypatch, *arguments, "--epochs", 1) == 0
    expected = ["lstm"] if halves == "lstm" else ["gnn_lstm", "gvae_lstm"]
    assert list(json.loads((tmp_path / "out" / "metrics.json").read_text())) == expected
    assert (tmp_path / "elsewhere" / "manifest.json").exists()
    assert "only: training" in capsys.readouterr().out
    other = "gnn_lstm" if halves == "lstm" else "lstm"
    assert call(monkeypatch, *arguments, "--model", other) == 2
    assert "cannot train" in capsys.readouterr().err


def split_of(data: dp.Dataset) -> dict[str, str]:
    """The split of every record."""
    return {one.decode(): split for split in data.splits for one in data.select(split, "sequences").texts("ids")}


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("lacks", ["a class", "records"])
def test_halves_that_differ_are_looked_at_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], split: str, lacks: str
) -> None:
    """Few graphs beside many sequences: what the graphs' split lacks is said, and the sequences train all the same."""
    splits = split_of(write(tmp_path / "whole", make_records(60)))
    records = [
        replace(record, graphs=None) if splits[record.id] == split and (lacks == "records" or record.label == 0) else record
        for record in make_records(60)
    ]
    root = write(tmp_path / "set", records).root
    arguments = ("--data", root, "--epochs", 1, "--output-dir", tmp_path / "out")
    words = f"split '{split}' of {root} has {'no records of graphs' if lacks == 'records' else 'labels all 1 in its graphs'}"
    for more in ((), ("--model", "gnn_lstm"), ("--model", "gvae_lstm", "--seeds", 2)):
        assert call(monkeypatch, *arguments, *more) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert call(monkeypatch, *arguments, "--model", "lstm") == 0
    if (split, lacks) == ("train", "records"):
        for only in ("--replay", "--doctor"):
            capsys.readouterr()
            assert call(monkeypatch, "--data", root, "--model", "gnn_lstm", only) == 2
            assert "expected some" in capsys.readouterr().err


def test_folds_are_looked_at_for_the_kind_that_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = split_of(write(tmp_path / "whole", make_records(60)))
    left = {"train": 2, "val": 0, "test": 60}  # graphs of each label
    records = []
    for record in make_records(60):
        kept = left[splits[record.id]] > 0 and (record.label == 0 or splits[record.id] == "test" or left["val"] == 0)
        records.append(record if kept else replace(record, graphs=None))
        left[splits[record.id]] -= kept
    data = write(tmp_path / "set", records)
    lacking = [fold for fold in data.folds(3) if len(fold.label_counts("val", "graphs")) < 2]
    assert lacking
    assert all(len(fold.label_counts("val")) == 2 for fold in data.folds(3))
    arguments = ("--data", data.root, "--model", "gnn_lstm", "--folds", 3, "--output-dir", tmp_path / "out")
    assert call(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert "in its graphs" in error or "no records of graphs" in error
    assert not (tmp_path / "out").exists()


def test_classes_are_those_of_both_halves(tmp_path: Path) -> None:
    """A label of the half with fewer records counts."""
    records = make_records(40)
    records[0] = replace(records[0], id="rare", label=4, sequence=None)
    records[1:10] = [replace(record, graphs=None) for record in records[1:10]]
    data = write(tmp_path / "set", records)
    assert data.num_classes == 5
    assert all(fold.num_classes == 5 for fold in data.folds(2))
    assert dp.mix([data], weights=[1.0]).num_classes == 5


@pytest.mark.parametrize("label", [2**40, 10_000_000, 2**63 - 1, 4096])
def test_labels_that_are_no_classes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], label: int
) -> None:
    """Everything that would make a detector for them refuses."""
    root = write(tmp_path / "set", [replace(record, label=record.label * label) for record in make_records(60)]).root
    for application, line in (
        (train_module.app, ["--data", root, "--output-dir", tmp_path / "out"]),
        (train_module.app, ["--data", root, "--replay"]),
        (train_module.app, ["--data", root, "--folds", 2, "--output-dir", tmp_path / "out"]),
        (train_module.app, ["--data", root, "--doctor"]),
    ):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, line)])
        assert run(application, "program") == 2
        error = capsys.readouterr().err
        assert f"has the label {label}, and a detector has an output for every number up to it" in error
        assert "number the classes 0, 1, 2" in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("labels", [(0, 2), (1, 7), (0, 99)])
def test_labels_with_gaps_are_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: tuple[int, int]) -> None:
    root = write(tmp_path / "set", [replace(record, label=labels[record.label]) for record in make_records(120)]).root
    out = tmp_path / "out"
    arguments = ("--data", root, "--model", "lstm", "--epochs", 6, "--lr", 0.01, "--output-dir", out)
    assert call(monkeypatch, *arguments) == 0
    assert json.loads((out / "metrics.json").read_text())["lstm"]["test"]["accuracy"] > 0.8


@pytest.mark.parametrize("model", MODELS)
def test_interrupted_at_any_step_the_curve_is_the_same(make: Callable[..., dp.Dataset], tmp_path: Path, model: Any) -> None:
    """Signals in the first step, mid-epoch, at the last step of an epoch, and in the second epoch; a new Trainer each time."""
    data = make(120)
    config = TrainConfig(models=(model,), epochs=3, batch_size=16)
    codes: list[int] = []

    def trained(folder: Path, stops: list[int]) -> Trainer:
        folder.mkdir()
        done = 0

        def on_step(step: int, share: torch.Tensor) -> None:
            nonlocal done
            done += 1
            if done in stops:
                os.kill(os.getpid(), signal.SIGTERM)

        while True:
            trainer = Trainer(model, data, config, folder, Conduct(device="cpu"), Interrupts(ALONE), ALONE)
            if trainer.last_path.exists():
                trainer.restore(trainer.last_path)
            try:
                while not trainer.finished:
                    trainer.train_epoch(on_step)
            except Interrupted as stop:
                codes.append(stop.exit_code)
                continue
            return trainer

    whole, torn = (
        trained(tmp_path / "whole", []),
        trained(tmp_path / "torn", [1, 3, len(dp.SequenceLoader(data, batch_size=16)), 9]),
    )
    assert codes == [143] * 4
    keys = ("epoch", "train_loss", "val_loss", "val_auroc", "lr")
    assert [[row[key] for key in keys] for row in torn.history] == [[row[key] for key in keys] for row in whole.history]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, torn.model.state_dict()[name]), name


@pytest.mark.slow
def test_sigterm_and_sigkill_from_outside(
    make: Callable[..., dp.Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make(600)
    arguments = ["--data", data.root, "--model", "lstm", "--epochs", 6, "--batch-size", 8]
    command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments), "--output-dir", str(tmp_path / "torn")]

    def stopped_by(number: int) -> int:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if "training loss" in line:
                    break
            time.sleep(0.3)
            began = time.monotonic()
            process.send_signal(number)
            process.stdout.read()
            code = process.wait()
        assert time.monotonic() - began < 20
        return code

    assert stopped_by(signal.SIGTERM) == 143
    assert stopped_by(signal.SIGKILL) == -signal.SIGKILL
    assert not (tmp_path / "torn" / "metrics.json").exists()
    assert 1 <= len(history(tmp_path / "torn")) < 6
    assert call(monkeypatch, *arguments, "--output-dir", tmp_path / "torn") == 0
    assert call(monkeypatch, *arguments, "--output-dir", tmp_path / "whole") == 0
    assert curve(tmp_path / "torn") == curve(tmp_path / "whole")
    assert len(curve(tmp_path / "whole")) == 6
    one, other = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("torn", "whole"))
    assert one == other


def test_a_run_that_goes_on_says_from_where(
    make: Callable[..., dp.Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--data", make(60).root, "--model", "lstm", "--epochs", 2, "--output-dir", tmp_path / "out")

    def fails(_board: Any, _row: Any, trainer: Trainer) -> None:
        trainer.writer.wait()
        raise dp.DataError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr("training.run.note", fails)
        assert call(patched, *arguments) == 2
    assert "continues" not in capsys.readouterr().out
    assert call(monkeypatch, *arguments) == 0
    assert f"lstm: continues from {tmp_path / 'out' / 'lstm-last.pt'} in epoch 2 of 2\n" in capsys.readouterr().out


def test_resume_takes_a_path_and_never_begins_anew(
    make: Callable[..., dp.Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make(120)
    arguments = ("--data", data.root, "--model", "lstm", "--epochs", 2)
    assert call(monkeypatch, *arguments, "--output-dir", tmp_path / "one") == 0
    expected = curve(tmp_path / "one")
    stale = tmp_path / "one" / "stale.txt"
    stale.write_text("of an earlier run")
    assert call(monkeypatch, *arguments, "--output-dir", tmp_path / "one", "--resume", "never") == 0
    assert curve(tmp_path / "one") == expected
    assert stale.exists()
    capsys.readouterr()
    assert call(monkeypatch, *arguments, "--output-dir", tmp_path / "two", "--resume", tmp_path / "one" / "lstm-last.pt") == 0
    assert "epoch" not in capsys.readouterr().out
    assert curve(tmp_path / "two") == expected
    for resume, more, words in [
        (tmp_path / "nothing.pt", (), "is no checkpoint"),
        (tmp_path, (), "nor a folder with lstm-last.pt"),
        (tmp_path / "one" / "metrics.json", (), "is not a checkpoint"),
        (tmp_path / "one" / "lstm-best.pt", (), "holds no best, so nothing can go on from it; expected lstm-last.pt"),
        (tmp_path / "one" / "lstm-last.pt", ("--model", "all"), "is one model's checkpoint"),
        (tmp_path / "one" / "lstm-last.pt", ("--model", "gnn_lstm"), "is a checkpoint of lstm; expected one of gnn_lstm"),
        (tmp_path / "one", ("--seeds", 2), "goes with one run"),
        (tmp_path / "one", ("--lr", 0.5), "was trained with lr 0.001; this run has 0.5"),
    ]:
        assert call(monkeypatch, *arguments, *more, "--output-dir", tmp_path / "bad", "--resume", resume) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "bad").exists()


def test_a_folder_with_one_of_three_checkpoints_can_be_gone_on_from(
    make: Callable[..., dp.Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--data", make(60).root, "--epochs", 1)
    assert call(monkeypatch, *arguments, "--output-dir", tmp_path / "whole") == 0
    shutil.copytree(
        tmp_path / "whole", tmp_path / "torn", ignore=shutil.ignore_patterns("g*.pt", "metrics.json", "config.json")
    )
    capsys.readouterr()
    assert call(monkeypatch, *arguments, "--output-dir", tmp_path / "new", "--resume", tmp_path / "torn") == 0
    lines = [line.split(" epoch")[0] for line in capsys.readouterr().out.splitlines() if " epoch " in line]
    assert lines == ["gnn_lstm", "gvae_lstm"]
    assert curve(tmp_path / "new") == curve(tmp_path / "whole")


def test_a_command_that_is_refused_leaves_folders_as_they_were(
    make: Callable[..., dp.Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--data", make(60).root, "--model", "lstm", "--epochs", 1)
    foreign = tmp_path / "a-language-model"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "llama"}')
    assert call(monkeypatch, *arguments, "--output-dir", tmp_path / "out", "--layers", "40:50") == 2
    assert not (tmp_path / "out").exists()
    assert call(monkeypatch, *arguments, "--output-dir", tmp_path / "out") == 0

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = content()
    for output, more in [
        ("out", ("--resume", "never", "--layers", "40:50")),
        ("out", ("--resume", "never", "--device", "tpu")),
        ("a-language-model", ()),
        ("a-language-model", ("--resume", "never")),
    ]:
        capsys.readouterr()
        assert call(monkeypatch, *arguments, "--output-dir", tmp_path / output, *more) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert content() == before


def test_a_folder_where_nothing_was_trained_yet_takes_another_configuration(
    make: Callable[..., dp.Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--data", make(60).root, "--model", "lstm", "--epochs", 1, "--output-dir", tmp_path / "out")
    with monkeypatch.context() as broken:
        broken.setattr(train_module, "train_runs", lambda *given: (_ for _ in ()).throw(dp.DataError("a damaged shard")))
        assert call(broken, *arguments, "--lr", 0.5) == 2
    assert (tmp_path / "out" / "config.json").exists()
    assert call(monkeypatch, *arguments) == 0


def test_a_folder_is_trained_in_by_one_process_at_a_time(
    make: Callable[..., dp.Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However the other one ends, and whatever it forked; what a killed one left half-written is no obstacle."""
    out = tmp_path / "out"
    arguments = ("--data", make(60).root, "--model", "lstm", "--epochs", 1, "--output-dir", out)
    code = (
        f"from training.folder import FolderLock\nfrom pathlib import Path\nimport os\nFolderLock().take(Path({str(out)!r}))\n"
    )
    code += "os.write(1, b'%d\\n' % os.fork())\nimport time; time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        assert other.stdout is not None
        child = int(max(other.stdout.readline(), other.stdout.readline()))
        for more in ((), ("--resume", "never"), ("--lr", 0.5), ("--seeds", 2)):
            assert call(monkeypatch, *arguments, *more) == 2
            assert f"another process trains in {out}; wait for it" in capsys.readouterr().err
        assert list(out.iterdir()) == []
        other.kill()
        other.wait()
        for name in ("config.json.tmp", "lstm-last.pt.tmp", "metrics.json.tmp"):
            (out / name).write_text("half of it")
        (out / "lstm-last.pt.tmp").unlink()
        assert call(monkeypatch, *arguments) == 0
        os.kill(child, signal.SIGKILL)
    assert not list(out.rglob("*.tmp"))
    assert call(monkeypatch, *arguments) == 0  # nothing is held behind the end


@pytest.mark.parametrize("name", ["config.json", "metrics.json", "lstm-last.pt"])
@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b'{"lstm": 1}'])
def test_a_damaged_run_is_one_sentence(
    make: Callable[..., dp.Dataset],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
) -> None:
    arguments = ("--data", make(60).root, "--model", "lstm", "--epochs", 1, "--output-dir", tmp_path / "out")
    assert call(monkeypatch, *arguments) == 0
    if name.endswith(".pt"):
        (tmp_path / "out" / "metrics.json").unlink()
    (tmp_path / "out" / name).write_bytes(content)
    capsys.readouterr()
    assert call(monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert str(tmp_path / "out") in err


def test_several_seeds_give_mean_and_spread(
    make: Callable[..., dp.Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make(120)
    assert (
        call(monkeypatch, "--data", data.root, "--model", "lstm", "--epochs", 2, "--seeds", 2, "--output-dir", tmp_path / "out")
        == 0
    )
    runs = [json.loads((tmp_path / "out" / f"seed-{seed}" / "metrics.json").read_text())["lstm"]["test"] for seed in range(2)]
    summary = json.loads((tmp_path / "out" / "metrics.json").read_text())["lstm"]
    assert runs[0] != runs[1]
    assert summary["test"]["auroc"] == pytest.approx(np.mean([each["auroc"] for each in runs]))
    assert summary["test_std"]["auroc"] == pytest.approx(np.std([each["auroc"] for each in runs], ddof=1))
    assert "±" in capsys.readouterr().out


def one_class(tmp_path: Path) -> Path:
    records = [
        dp.Record(id=each.id, group=each.group, label=1, sequence=each.sequence, graphs=each.graphs)
        for each in make_records(60)
    ]
    return write(tmp_path / "one-class", records).folder


def no_validation(tmp_path: Path) -> Path:
    return write(tmp_path / "no-val", make_records(60), shares="100/0/0").folder


def without_manifest(tmp_path: Path) -> Path:
    root = write(tmp_path / "unfinished", make_records(60)).folder
    (root / "manifest.json").unlink()
    return root


def damaged(tmp_path: Path) -> Path:
    data = write(tmp_path / "damaged", make_records(60))
    path = data.shard_path("train", "sequences", 0)
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    return Path(data.folder)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "{tmp}/missing"], "is not a folder"),
        (["--data", "{tmp}"], "has no manifest.json"),
        (["--data", without_manifest], "has no manifest.json"),
        (["--data", one_class], "has labels all 1"),
        (["--data", no_validation], "split 'val' of .* has no records"),
        (["--data", damaged], r"train/sequences-00000.safetensors.*damaged"),
        (["--preprocessed-dir", "{tmp}/missing"], "is not a folder"),
        (["--preprocessed-dir", "{tmp}"], "holds no lstm_solo"),
        (["--data", "{tmp}/set", "--preprocessed-dir", "{tmp}"], "exclude each other"),
        (["--data", "{tmp}/set", "--batch-size", "0"], "batch size is 0"),
        (["--data", "{tmp}/set", "--batch-size", "many"], "batch-size"),
        (["--data", "{tmp}/set", "--epochs", "0"], "epochs is 0"),
        (["--data", "{tmp}/set", "--lr", "0"], "lr is 0"),
        (["--data", "{tmp}/set", "--dropout", "1"], "dropout is 1"),
        (["--data", "{tmp}/set", "--seed", "-1"], "seed is -1"),
        (["--data", "{tmp}/set", "--seeds", "0"], "seeds is 0"),
        (["--data", "{tmp}/set", "--model", "transformer"], "--model"),
        (["--data", "{tmp}/set", "--device", "tpu"], "device is 'tpu'"),
        (["--data", "{tmp}/set", "--layers", "all"], "layers are 'all'"),
        (["--data", "{tmp}/set", "--layers", "40:50"], "asked of a record"),
        (["--data", "{tmp}/set", "--output-dir", "{tmp}/file"], "cannot be an output folder"),
        (["--data", "{tmp}/set", "--output-dir", "{tmp}/full"], "is not empty and holds no run"),
        (["--data", "{tmp}/set", "--fast"], "No such option"),
        (["--data", "{tmp}/set", "--trace", "{tmp}"], "expected the name of a file"),
        (["--data", "{tmp}/set", "--trace", ".."], r"^train.py: \.\. cannot be written"),
        (
            ["--data", "{tmp}/set", "--trace", "{tmp}/nowhere/trace.json"],
            "expected the name of a file in a folder that is there",
        ),
        (["--data", "{tmp}/set", "--trace", "{tmp}/file/trace.json"], "expected the name of a file in a folder that is there"),
        (["--data", "{tmp}/set", "--trace", "{tmp}", "--replay"], "expected the name of a file"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[Any], words: str
) -> None:
    if "{tmp}/set" in arguments:
        write(tmp_path / "set", make_records(60))
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.jpg").touch()
    given = [argument(tmp_path) if callable(argument) else argument.format(tmp=tmp_path) for argument in arguments]
    assert call(monkeypatch, *given) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert err.startswith("train.py: ")
    assert err.count("\n") == 1
    import re

    assert re.search(words, err), err
    assert (tmp_path / "full" / "photo.jpg").exists()
    assert out == ""
    assert damaged in arguments or not (tmp_path / "runs").exists()  # damage is found in the first epoch


def test_an_output_folder_of_another_configuration_is_refused(
    make: Callable[..., dp.Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make(60)
    arguments = ("--data", data.root, "--model", "lstm", "--epochs", 1, "--output-dir", tmp_path / "out")
    assert call(monkeypatch, *arguments) == 0
    before = (tmp_path / "out" / "metrics.json").read_bytes()
    capsys.readouterr()
    assert call(monkeypatch, *arguments, "--lr", 0.5) == 2
    assert "holds a run of another configuration" in capsys.readouterr().err
    assert (tmp_path / "out" / "metrics.json").read_bytes() == before


def test_several_processes_come_from_torchrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert call(monkeypatch, "--data", "nowhere") == 2
    assert "start with torchrun" in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_the_run(make: Callable[..., dp.Dataset], tmp_path: Path) -> None:
    trainer = Trainer("lstm", make(60), TrainConfig(lr=1e30), tmp_path, Conduct(device="cpu"), Interrupts(ALONE), ALONE)
    with pytest.raises(dp.PipelineError, match="loss"):
        while not trainer.finished:
            trainer.train_epoch(lambda step, share: None)


def test_layers_are_read_as_people_write_them() -> None:
    assert parse_layers(None) is None
    assert parse_layers("12:20") == slice(12, 20)
    assert parse_layers(":4") == slice(None, 4)
    assert parse_layers("8,16,24") == [8, 16, 24]


def test_folder_names_tell_configurations_apart(data: dp.Dataset) -> None:
    names = {
        TrainConfig(**change).folder_name(data)
        for change in ({}, {"lr": 0.1}, {"seed": 1}, {"layers": "1:2"}, {"models": ("lstm",)})
    }
    assert len(names) == 5
    assert TrainConfig().folder_name(data) == TrainConfig().folder_name(data)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the data take three minutes, the detectors four
def test_the_whole_demonstration(tmp_path: Path) -> None:
    """`python train.py` as a stranger runs it, in a copy of the project: minutes."""
    for name in ("train.py", "training", "models", "dali_pipeline"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    (metrics,) = (tmp_path / "runs").glob("*/metrics.json")
    found = json.loads(metrics.read_text())
    assert all(found[name]["test"]["auroc"] >= 0.76 for name in MODELS)


def test_a_trace_shows_what_a_step_is_made_of(
    make: Callable[..., dp.Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = make(120), tmp_path / "out"
    arguments = ("--data", data.root, "--model", "lstm", "--epochs", 2, "--checkpoint-steps", 3, "--output-dir", out)
    assert call(monkeypatch, *arguments, "--trace", tmp_path / "none" / "trace.json") == 2
    assert "expected the name of a file in a folder that is there" in capsys.readouterr().err
    assert not out.exists()
    assert call(monkeypatch, *arguments, "--trace", tmp_path / "trace.json") == 0
    spans, steps = read_trace(tmp_path / "trace.json"), 2 * len(dp.SequenceLoader(data))
    counts = Counter(one["name"] for one in spans)
    assert all(counts[name] == steps for name in ("step", "forward", "backward", "optimizer"))
    assert {"load", "read piece", "select", "decode", "checkpoint"} <= counts.keys()
    whole = [one for one in spans if one["name"] == "step"]
    for one in spans:
        if one["name"] in ("forward", "backward", "optimizer"):
            assert any(within(one, step) for step in whole)
    assert {one["tid"] for one in spans if one["name"] == "checkpoint"}.isdisjoint(one["tid"] for one in whole)
    before = (tmp_path / "trace.json").read_bytes()
    assert call(monkeypatch, *arguments, "--trace", tmp_path / "trace.json") == 0
    assert (tmp_path / "trace.json").read_bytes() == before, "a finished run has nothing to tell"


def test_replay_tells_the_ceiling_and_writes_nothing(
    data: dp.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ceiling, "SECONDS", 0.0)
    seen: list[list[str]] = []
    step = Stepper.step

    def noting(self: Stepper, batch: Any, *rest: Any) -> torch.Tensor:
        seen.append(batch.ids)
        return step(self, batch, *rest)

    monkeypatch.setattr(Stepper, "step", noting)
    assert call(monkeypatch, "--data", data.root, "--replay", "--batch-size", 16) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == list(MODELS)
    for line in lines:
        assert float(line.split()[1].replace(",", "")) > 0
        assert line.endswith("no loader can make it train faster")
    assert len(seen) == 9 * ceiling.LEAST_STEPS
    for begin in range(0, len(seen), 3 * ceiling.LEAST_STEPS):
        assert all(ids == seen[begin] for ids in seen[begin : begin + 3 * ceiling.LEAST_STEPS])
    assert not (tmp_path / "runs").exists()
    assert call(monkeypatch, "--data", data.root, "--replay", "--batch-size", 15, "--accumulate", 2) == 2
    assert "does not divide" in capsys.readouterr().err


@pytest.mark.slow
def test_replay_on_two_processes_takes_its_steps_together(data: dp.Dataset, tmp_path: Path) -> None:
    arguments = ["--data", str(data.root), "--model", "lstm", "--replay", "--trace", str(tmp_path / "trace.json")]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(ROOT / "train.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no loader can make it train faster") == 1
    first, second = (Counter(one["name"] for one in read_trace(tmp_path / name)) for name in ("trace.json", "trace-1.json"))
    assert first["optimizer"] == second["optimizer"] >= 3 * ceiling.LEAST_STEPS
