"""Training on targets of every kind and level: what is learned, what is scored, what is refused."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score, r2_score, roc_auc_score
from torch_geometric.data import Data

import dali_pipeline as dp
from models import Output
from tests.helpers.commands import predict, train
from training.config import METRICS, VALUE_METRICS, TrainConfig
from training.intervals import difference, intervals
from training.metrics import Predictions, best_threshold, measure
from training.objective import Objective
from training.pairs import paired
from training.report import prediction_table, read_predictions, write_predictions
from training.target import Target, find_target

pytestmark = pytest.mark.usefixtures("restored")
LAYERS, FEATURES = 4, 6
FIELDS = {
    "step.wrong": dp.Field(dtype="bool"),
    "step.kind": dp.Field(dtype="int16", pad=7),  # padding that is no class
    "step.risk": dp.Field(dtype="float32"),
    "step.logprob": dp.Field(dtype="float32"),
    "step.entropy": dp.Field(dtype="float16"),
    "record.score": dp.Field(dtype="float32"),
    "record.place": dp.Field(dtype="float64", shape=(2,)),
    "record.tags": dp.Field(dtype="bool", shape=(3,)),
    "record.prompt": dp.Field(dtype="text"),
    "record.lookback_ratio": dp.Field(dtype="float32", shape=(LAYERS, 2)),
}


def token_records(count: int = 200, seed: int = 0) -> list[dict[str, Any]]:
    """Answers of a few tokens with layers, in whose states every target shows."""
    rng = np.random.default_rng(seed)
    records = []
    for number in range(count):
        steps, label = int(rng.integers(2, 7)), number % 2
        states = rng.normal(size=(steps, LAYERS, FEATURES)).astype(np.float32) * 0.1
        wrong, kind, risk = rng.random(steps) < 0.4, rng.integers(0, 3, steps), rng.normal(size=steps)
        kind[0] = -100  # a token of the prompt
        score, tags = rng.normal(), rng.random(3) < 0.5
        states[:, :, 0] += 2 * wrong[:, None]
        states[:, :, 1] += 2 * kind[:, None].clip(0)
        states[:, :, 2] += risk[:, None]
        states[-1, :, 3] += score
        states[-1, 0, 4] += 2 * label
        states[-1, 1:, 4] += 2 * tags
        fields = {
            "step.wrong": wrong,
            "step.kind": kind,
            "step.risk": risk,
            "step.logprob": -rng.random(steps) - label,
            "step.entropy": rng.random(steps) + label,
            "record.score": 1000 + 50 * score,
            "record.place": [score, -score],
            "record.tags": tags,
            "record.prompt": f"why {number}?",
            "record.lookback_ratio": rng.normal(size=(LAYERS, 2)) + label,
        }
        records.append({"id": str(number), "group": f"g{number // 2}", "label": label, "sequence": states, "fields": fields})
    return records


def written(root: Path, records: list[dict[str, Any]], **changes: Any) -> dp.Dataset:
    field = dp.Field(dtype="float32", shape=(LAYERS, FEATURES), axes=("layer", "feature"))
    schema = replace(dp.Schema(sequence=field, step_axis="token", fields=FIELDS, layers=tuple(range(LAYERS))), **changes)
    with dp.ShardWriter(root, schema, split=dp.SplitRule.parse("60/20/20")) as writer:
        for record in records:
            writer.write(record)
    return dp.open_dataset(root)


def molecules(root: Path, count: int = 150) -> dp.Dataset:
    rng = np.random.default_rng(0)
    fields = {"node.on": dp.Field(dtype="bool"), "node.charge": dp.Field(dtype="float32")}
    schema = dp.Schema(
        x=dp.Field(dtype="float32", shape=(4,)),
        edge_attr=dp.Field(dtype="float32", shape=(2,)),
        label=dp.Label(kind="value"),
        fields=fields,
    )
    with dp.ShardWriter(root, schema, split=dp.SplitRule.parse("60/20/20")) as writer:
        for number in range(count):
            nodes = int(rng.integers(2, 7))
            x = torch.tensor(rng.normal(size=(nodes, 4)), dtype=torch.float32)
            edges = torch.tensor(rng.integers(0, nodes, (2, 8)))
            graph = Data(x=x, edge_index=edges, edge_attr=torch.rand(8, 2) * 100, on=x[:, 0] > 0, charge=3 + 2 * x[:, 1])
            writer.write({"id": str(number), "label": float(x[:, 2].sum()), "graphs": [graph]})
    return dp.open_dataset(root)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> dp.Dataset:
    return written(tmp_path_factory.mktemp("tokens") / "set", token_records())


def run(monkeypatch: pytest.MonkeyPatch, data: dp.Dataset, out: Path, *more: object) -> dict[str, Any]:
    given = ("--data", data.root, "--epochs", 12, "--lr", 0.01, "--batch-size", 16, "--dropout", 0.1, "--device", "cpu")
    assert train(monkeypatch, *given, "--output-dir", out, *more) == 0
    found: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return found


CASES = {
    "label": ("binary", "auroc"),
    "record.tags": ("multilabel", "auroc"),
    "record.score": ("regression", "spearman"),
    "record.place": ("regression", "spearman"),
    "step.wrong": ("binary", "auroc"),
    "step.kind": ("multiclass", "auroc"),
    "step.risk": ("regression", "r2"),
}

SLOW = ("record.place", "step.risk", "record.score", "step.wrong")  # like others that are not


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES])
def test_every_target_of_a_sequence_is_learned_and_scored_anew(
    tokens: dp.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """With all files; `predict` gives the run's own numbers again, and its table says so."""
    task, metric = CASES[name]
    found = run(monkeypatch, tokens, tmp_path / "out", "--target", name)
    lstm = found["lstm"]
    assert (lstm["task"], lstm["target"]) == (task, name)
    assert set(lstm["test"]) == set(lstm["test_interval"]) == set(VALUE_METRICS if task == "regression" else METRICS)
    assert lstm["test"][metric] > 0.6, lstm["test"]
    for one, (low, high) in lstm["test_interval"].items():
        assert low <= lstm["test"][one] <= high, one
    assert ("over tokens" if name.startswith("step.") else "over the layers of the last token") in capsys.readouterr().out
    assert (tmp_path / "out" / "curves.png").stat().st_size > 20_000
    baselines = json.loads((tmp_path / "out" / "baselines.json").read_text())
    expected = {"linear_probe", "mlp", "logprob", "entropy"} | (set() if name.startswith("step.") else {"lookback"})
    assert set(baselines) == expected
    assert baselines["linear_probe"]["test"][metric] > 0.6

    own = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()
    own = [row for row in own if (row["model"], row["split"]) == ("lstm", "test")]
    scores = tmp_path / "scores.parquet"
    checkpoint = ("--checkpoint", tmp_path / "out" / "lstm-best.pt", tokens.root, "--device", "cpu")
    assert predict(monkeypatch, *checkpoint, "--split", "test", "--output", scores) == 0
    again = pq.read_table(scores).to_pylist()
    columns = [one for one in again[0] if one.partition("_")[0] in ("score", "prediction")]
    key = "row" if "row" in again[0] else "id"
    for one, other in zip(
        sorted(own, key=lambda row: (row["id"], row[key])), sorted(again, key=lambda row: (row["id"], row[key])), strict=True
    ):
        assert one["label" if "label" in one else "label_0"] == other["label" if "label" in other else "label_0"]
        np.testing.assert_allclose([one[part] for part in columns], [other[part] for part in columns], rtol=1e-4, atol=1e-5)
    said = capsys.readouterr().out
    assert "lstm, its own test split" in said
    ours, theirs = (re.split(r"  +", line.strip())[1:] for line in said.splitlines() if "  lstm, " in line)
    assert ours == theirs
    if name.startswith("step."):
        steps = tokens.select("test", "sequences").num_records
        assert len(again) > 2 * steps
        assert sum(row["label"] is None for row in again) == (steps if name == "step.kind" else 0)


@pytest.mark.parametrize("name", [pytest.param("label", marks=pytest.mark.slow), "node.on", "node.charge"])
def test_graphs_predict_values_and_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    data = molecules(tmp_path / "set")
    found = run(monkeypatch, data, tmp_path / "out", "--target", name)
    metric = "auroc" if name == "node.on" else "r2"
    for model in ("gnn_lstm", "gvae_lstm"):
        assert found[model]["test"][metric] > 0.5, (model, found[model]["test"])
    assert found["gvae_lstm"]["against"]["metric"] == metric.upper()
    for model in ("gnn_lstm", "gvae_lstm"):
        out = tmp_path / f"{model}.parquet"
        assert predict(monkeypatch, "--checkpoint", tmp_path / "out" / f"{model}-best.pt", data.root, "--output", out) == 0
        rows = pq.read_table(out)
        truth, scores = rows["label"].to_numpy(), rows["score" if name == "node.on" else "prediction"].to_numpy()
        assert (roc_auc_score if name == "node.on" else r2_score)(truth, scores) > 0.5


@pytest.mark.parametrize("name", ["step.kind", pytest.param("node.charge", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("no_baselines")
def test_stopped_and_gone_on_with_and_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Gone on with in the middle of an epoch, to the same bits; in pieces to the same numbers."""
    data = molecules(tmp_path / "set") if name.startswith("node.") else written(tmp_path / "set", token_records(120))
    model = "gvae_lstm" if name.startswith("node.") else "lstm"
    flags = ("--target", name, "--model", model, "--checkpoint-steps", 3, "--dropout", 0)
    whole = run(monkeypatch, data, tmp_path / "whole", *flags, "--epochs", 2)
    with monkeypatch.context() as stopped:
        import training.step

        step, taken = training.step.Stepper.step, [0]

        def until(self: Any, *given: Any) -> torch.Tensor:
            taken[0] += 1
            if taken[0] == 6:
                raise KeyboardInterrupt
            return step(self, *given)

        stopped.setattr(training.step.Stepper, "step", until)
        given = ("--data", data.root, "--lr", 0.01, "--batch-size", 16, "--device", "cpu", "--output-dir", tmp_path / "torn")
        assert train(monkeypatch, *given, *flags, "--epochs", 2) != 0
    torn = run(monkeypatch, data, tmp_path / "torn", *flags, "--epochs", 2)
    assert torn[model]["test"] == whole[model]["test"]
    pieces = run(monkeypatch, data, tmp_path / "pieces", *flags, "--epochs", 2, "--accumulate", 4)
    for metric, value in whole[model]["test"].items():
        assert pieces[model]["test"][metric] == pytest.approx(value, abs=1e-3)


@pytest.mark.usefixtures("no_baselines")
def test_over_layers_and_tokens(tokens: dp.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by its name, with the layers asked for."""
    for number, more in enumerate((["--over", "token"], ["--over", "token", "--layers", "1,2"], ["--over", "layer"])):
        run(monkeypatch, tokens, tmp_path / str(number), "--epochs", 1, *more)
        config = torch.load(tmp_path / str(number) / "lstm-best.pt", weights_only=True)["config"]
        assert config["over"] == more[1]
        assert (config["layers"], config["token_layers"]) == [(None, "2"), ("1,2", None), (None, None)][number]
    states = torch.load(tmp_path / "0" / "lstm-best.pt", weights_only=True)["model"]
    assert states["embed.0.mean"].shape == (FEATURES,)
    assert torch.load(tmp_path / "1" / "lstm-best.pt", weights_only=True)["model"]["embed.0.mean"].shape == (2 * FEATURES,)


def changed(records: list[dict[str, Any]], name: str, value: Any) -> list[dict[str, Any]]:
    return [{**record, "fields": {**record["fields"], name: value(record)}} for record in records]


REFUSED = {
    "record.nothing": (
        None,
        "has no target 'record.nothing'; expected one of its labels and fields by level: label, step.",
    ),
    "record.prompt": (None, "has no target 'record.prompt'"),
    "edge.weight": (None, "has no target 'edge.weight'"),
    "record.score": (lambda _: 3.0, "record.score of {root} is constant in split 'train'"),
    "record.place": (lambda _: [1.0, np.nan], "record.place of {root} holds a value that is no finite number in record '"),
    "record.tags": (lambda record: [True, False, int(record["id"]) % 3 == 0], "label 0 of record.tags of {root} is always set"),
    "step.wrong": (lambda record: np.zeros(len(record["sequence"])), "has step.wrong all 0 in its sequences"),
    "step.kind": (lambda record: np.full(len(record["sequence"]), -1), "split 'train' of {root} has no step with step.kind"),
    "step.risk": (
        lambda record: np.full(len(record["sequence"]), np.inf),
        "step.risk of {root} holds a value that is no finite",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_targets_that_cannot_be_learned_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    value, words = REFUSED[name]
    records = token_records(60)
    data = written(tmp_path / "set", records if value is None else changed(records, name, value))
    assert train(monkeypatch, "--data", data.root, "--target", name, "--output-dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert words.format(root=data.root) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


FLAGS = [
    (("--target", "record.score", "--task", "binary"), "task binary on record.score of"),
    (("--target", "record.score", "--task", "multilabel"), "expected (K,) of 0 and 1"),
    (("--target", "step.kind", "--task", "binary"), "whose classes reach 2; expected 0 and 1"),
    (("--target", "step.wrong", "--over", "layer"), "expected --over token"),
    (("--target", "step.wrong", "--model", "gnn_lstm"), "a target per step is of sequences"),
    (("--readout", "sum"), "--readout sum is of graphs"),
    (("--layers", "9"), "layer"),
]


@pytest.mark.parametrize(("flags", "words"), FLAGS, ids=lambda one: " ".join(one) if isinstance(one, tuple) else "")
def test_flags_that_do_not_go_together_are_one_sentence(
    tokens: dp.Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    words: str,
) -> None:
    assert train(monkeypatch, "--data", tokens.root, *flags, "--output-dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_class_that_train_lacks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = token_records(60)
    test = set(written(tmp_path / "first", records).select("test", "sequences").texts("ids"))
    records = [{**record, "label": 2} if record["id"].encode() in test and record["label"] else record for record in records]
    data = written(tmp_path / "set", records)
    assert train(monkeypatch, "--data", data.root, "--output-dir", tmp_path / "out") == 2
    assert "split 'test' has class 2 in label of" in capsys.readouterr().err


def test_whole_numbers_and_floats_become_what_they_are_asked_for(tmp_path: Path) -> None:
    data = written(tmp_path / "set", changed(token_records(60), "record.score", lambda record: float(int(record["id"]) % 3)))
    assert find_target(data, "sequences", "record.score").task == "regression"
    several = find_target(data, "sequences", "record.score", "multiclass")
    assert (several.task, several.classes, several.outputs) == ("multiclass", 3, 3)
    values = find_target(data, "sequences", "step.wrong", "regression")
    assert (values.task, values.outputs) == ("regression", 1)
    stored = [data.record("train", at).fields["step.wrong"] for at in range(data.num_records("train", "sequences"))]
    flat = np.concatenate(stored).astype(float)
    assert values.mean[0] == pytest.approx(flat.mean())
    assert values.spread[0] == pytest.approx(flat.std())


def test_the_loss_of_a_record_is_the_mean_over_its_known_steps(tokens: dp.Dataset) -> None:
    target = find_target(tokens, "sequences", "step.kind")
    batch = next(iter(dp.SequenceLoader(tokens, batch_size=8, layers=[1], engine="torch", device="cpu")))
    logits = torch.randn(*batch.sequences.shape[:2], 3)
    found = Objective(target, torch.device("cpu"))(Output(logits, torch.zeros(8)), batch)
    for row in range(8):
        kinds = batch.fields["kind"][row, : batch.lengths[row]]
        known = kinds >= 0
        expected = torch.nn.functional.cross_entropy(logits[row, : batch.lengths[row]][known], kinds[known])
        assert found[row] == pytest.approx(float(expected), abs=1e-6)


def test_several_labels_at_once_are_measured_as_scikit_learn_does() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (300, 3))
    scores = np.clip(rng.normal(0.3 + 0.3 * labels, 0.25), 0, 1).astype(np.float32)
    found = Predictions(
        task="multilabel",
        ids=[str(at) for at in range(300)],
        positions=np.arange(300),
        counts=np.ones(300, np.int64),
        scores=scores,
        labels=labels,
        loss=0.0,
    )
    threshold = best_threshold(found)
    assert isinstance(threshold, list)
    measured = measure(found, threshold)
    chosen = scores >= np.array(threshold)
    assert measured["auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert measured["average_precision"] == pytest.approx(average_precision_score(labels, scores))
    assert measured["f1"] == pytest.approx(f1_score(labels, chosen, average="macro"))
    assert measured["accuracy"] == pytest.approx((chosen == labels).mean())


def test_a_target_tells_what_it_is() -> None:
    assert Target(name="step.a", task="regression", shape=(2, 3), mean=(0,) * 6, spread=(1,) * 6).outputs == 6
    assert Target(name="label", task="binary", classes=2).outputs == 1
    assert TrainConfig(target="node.charge").level == "node"


def test_the_examples_of_the_documentation_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python block and command of the two sections, in order, in an empty folder."""
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    section = text[text.index("### A value per record") : text.index("## What the detectors read")]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    ran = []
    for block, command in re.findall(r"```python\n(.*?)```|^    (python [^\n]*)$", section, re.DOTALL | re.MULTILINE):
        if block:
            exec(block, names)
            continue
        _, program, *arguments = command.split()
        assert {"train.py": train, "predict.py": predict}[program](monkeypatch, *arguments) == 0
        ran.append(program)
    assert ran == ["train.py", "predict.py"] * 2
    assert json.loads(Path("runs/sensors/metrics.json").read_text())["lstm"]["test"]["r2"] > 0.5
    assert json.loads(Path("runs/spans/metrics.json").read_text())["lstm"]["test"]["auroc"] > 0.8
    assert len(Path("spans.csv").read_text().splitlines()) > 500


@pytest.mark.parametrize("over", ["seeds", pytest.param("folds", marks=pytest.mark.slow)])
def test_several_runs_tell_every_difference_with_its_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], over: str
) -> None:
    data = molecules(tmp_path / "set", 90)
    given = ("--data", data.root, "--target", "node.on", "--epochs", 1, "--device", "cpu", "--output-dir", tmp_path / "out")
    assert train(monkeypatch, *given, f"--{over}", 2) == 0
    said = capsys.readouterr().out
    assert "Differences of AUROC on test, paired by record; intervals over questions and trainings" in said
    with (tmp_path / "out" / "differences.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["model"], row["beside"], row["trainings"]) == ("gvae_lstm", "gnn_lstm", "2")
    folders = [tmp_path / "out" / f"{over[:-1]}-{number}" for number in range(2)]
    gains = []
    for folder in folders:
        metrics = json.loads((folder / "metrics.json").read_text())
        gains.append(metrics["gvae_lstm"]["test"]["auroc"] - metrics["gnn_lstm"]["test"]["auroc"])
    assert float(row["difference"]) == pytest.approx(np.mean(gains), abs=1e-6)
    assert float(row["std"]) == pytest.approx(np.std(gains, ddof=1), abs=1e-6)
    assert float(row["low"]) <= np.mean(gains) <= float(row["high"])
    against = json.loads((tmp_path / "out" / "metrics.json").read_text())["gvae_lstm"]["against"]
    assert against["trainings"] == 2
    assert "knows the questions and not the training" not in said
    assert train(monkeypatch, *given, f"--{over}", 2) == 0  # finished: told again
    assert "Differences of AUROC" in capsys.readouterr().out


def test_a_wide_spread_over_trainings_widens_the_interval() -> None:
    """Two trainings that rank perfectly and at random: no interval of one of them knows that."""
    labels = np.arange(200) % 2
    good, poor = labels * 0.5 + 0.25, np.tile([0.4, 0.6, 0.6, 0.4], 50)
    made = [
        Predictions(
            task="binary",
            ids=[str(at) for at in range(200)],
            positions=np.arange(200),
            counts=np.ones(200, np.int64),
            scores=scores.astype(np.float32),
            labels=labels,
            loss=0.0,
        )
        for scores in (good, poor)
    ]
    groups = [str(at).encode() for at in range(200)]
    one = difference([made[0]], [made[0]], groups)
    assert one["interval"] == [0.0, 0.0]
    both = difference(made, [made[1]], groups)
    assert both["difference"] == pytest.approx(0.25, abs=1e-6)
    assert both["interval"][0] < 0.01
    assert both["interval"][1] > 0.49


def rows_of_groups(counts: list[int], labels: list[int]) -> Predictions:
    return Predictions(
        task="binary",
        level="step",
        ids=[str(at) for at in range(len(counts))],
        positions=np.arange(len(counts)),
        counts=np.array(counts),
        scores=np.linspace(0, 1, sum(counts)).astype(np.float32),
        labels=np.array(labels),
        loss=0.0,
    )


def test_a_row_stays_with_its_record() -> None:
    """Also where as many rows are known as there are records; and where a split has one row per record."""
    found = rows_of_groups([2, 2, 1], [0, 1, -1, -1, 1])
    assert found.known().of_rows([b"A", b"B", b"C"]) == [b"A", b"A", b"C"]
    one, table = rows_of_groups([1, 1, 1], [0, 1, 1]), prediction_table
    assert table(one, [b"A", b"B", b"C"], "val").column_names == table(found, [b"A", b"B", b"C"], "test").column_names


def test_predictions_are_read_as_they_were_written(tmp_path: Path) -> None:
    found = {"test": rows_of_groups([1, 1, 1], [0, 1, -1]), "val": rows_of_groups([2, 1], [0, 1, 1])}
    groups = {"test": [b"A", b"B", b"C"], "val": [b"A", b"B"]}
    write_predictions(tmp_path / "p.parquet", {"lstm": found}, {"lstm": groups})
    for split, expected in found.items():
        read, of_records = read_predictions(tmp_path / "p.parquet", "binary", split)["lstm"]
        assert of_records == groups[split]
        assert read.ids == expected.ids
        for part in ("counts", "scores", "labels"):
            np.testing.assert_array_equal(getattr(read, part), getattr(expected, part))


def test_an_interval_of_labels_that_never_come_holds_what_was_measured() -> None:
    labels = np.stack([np.arange(40) % 2, np.arange(40) % 3 == 0, np.zeros(40)], axis=1).astype(np.int64)
    found = Predictions(
        task="multilabel",
        ids=[str(at) for at in range(40)],
        positions=np.arange(40),
        counts=np.ones(40, np.int64),
        scores=labels.astype(np.float32) * 0.8,
        labels=labels,
        loss=0.0,
    )
    measured = measure(found, [0.5] * 3)
    within = intervals(found, [str(at).encode() for at in range(40)], [0.5] * 3)
    for name, (low, high) in within.items():
        assert low - 1e-9 <= measured[name] <= high + 1e-9, name


def test_values_far_from_zero_and_below_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole numbers with a sign as values, and times in milliseconds, which a float32 cannot tell apart."""
    fields = {"step.delta": dp.Field(dtype="int16"), "record.time": dp.Field(dtype="int64")}
    records = token_records(150)
    for record in records:
        delta = (20 * record["fields"]["step.risk"]).round()
        time = 1_700_000_000_000 + round(100 * float(record["fields"]["record.place"][0]))
        record["fields"] = {"step.delta": delta, "record.time": time}
    data = written(tmp_path / "set", records, fields=fields)
    target = find_target(data, "sequences", "step.delta", "regression")
    truth = np.concatenate(
        [data.record("train", at).fields["step.delta"] for at in range(data.num_records("train", "sequences"))]
    )
    assert (truth < 0).any()
    assert target.mean[0] == pytest.approx(truth.mean())
    assert target.spread[0] == pytest.approx(truth.std())
    found = run(monkeypatch, data, tmp_path / "record.time", "--target", "record.time", "--task", "regression")["lstm"]["test"]
    assert found["r2"] > 0.3, found
    assert found["mae"] > 0.5
    rows = pq.read_table(tmp_path / "record.time" / "predictions.parquet").to_pylist()
    assert {row["label"] for row in rows} <= {float(record["fields"]["record.time"]) for record in records}
    assert find_target(data, "sequences", "step.delta", "regression").task == "regression"
    with pytest.raises(dp.DataError, match=r"has the record\.time 1700000000\d+, and .* or give --task regression"):
        find_target(data, "sequences", "record.time")


def test_one_label_of_several_and_names_that_do_not_occur(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = token_records(120)
    for record in records:
        record["fields"] = {"record.one": [record["fields"]["record.tags"][0]]}
    label = dp.Label(class_names=("no", "yes", "maybe"))
    data = written(tmp_path / "set", records, fields={"record.one": dp.Field(dtype="bool", shape=(1,))}, label=label)
    found = run(monkeypatch, data, tmp_path / "one", "--target", "record.one")
    assert found["lstm"]["task"] == "multilabel"
    baselines = json.loads((tmp_path / "one" / "baselines.json").read_text())
    assert baselines["linear_probe"]["test"]["auroc"] > 0.8
    assert baselines["mlp"]["test"]["auroc"] > 0.6
    named = find_target(data, "sequences")
    assert (named.task, named.classes) == ("multiclass", 3)


def test_layers_by_their_numbers_are_probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set whose steps are layers 3, 7 and 30, the last of which tells the label."""
    rng = np.random.default_rng(0)
    schema = dp.Schema(sequence=dp.Field(dtype="float16", shape=(5,)), step_axis="layer", layers=(3, 7, 30))
    with dp.ShardWriter(tmp_path / "set", schema) as writer:
        for number in range(150):
            rows = rng.normal(size=(3, 5))
            rows[2, 0] += 4 * (number % 2)
            writer.write({"id": number, "label": number % 2, "sequence": rows})
    run(monkeypatch, dp.open_dataset(tmp_path / "set"), tmp_path / "out", "--epochs", 1)
    with (tmp_path / "out" / "layers.csv").open() as file:
        rows_by_layer = {row["layer"]: float(row["test_auroc"]) for row in csv.DictReader(file)}
    assert list(rows_by_layer) == ["3", "7", "30"]
    assert rows_by_layer["30"] > 0.95 > 0.8 > rows_by_layer["3"]
    baselines = json.loads((tmp_path / "out" / "baselines.json").read_text())
    assert baselines["linear_probe"]["test"]["auroc"] == pytest.approx(rows_by_layer["30"])


def test_more_features_than_records_are_probed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    with dp.ShardWriter(
        tmp_path / "set", dp.Schema(sequence=dp.Field(dtype="float16", shape=(150,)), step_axis="layer")
    ) as writer:
        for number in range(60):
            writer.write({"id": number, "label": number % 2, "sequence": rng.normal(size=(2, 150)) + number % 2})
    found = run(monkeypatch, dp.open_dataset(tmp_path / "set"), tmp_path / "out", "--epochs", 1)
    assert list(found) == ["lstm"]
    assert set(json.loads((tmp_path / "out" / "baselines.json").read_text())) == {"linear_probe", "mlp"}
    assert caplog.records == []
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("no_baselines")
def test_the_middle_layer_of_tokens_is_none_of_the_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = token_records(80)
    rng = np.random.default_rng(0)
    for record in records:
        x = torch.tensor(rng.normal(size=(4, 3)) + record["label"], dtype=torch.float32)
        record["graphs"] = [Data(x=x, edge_index=torch.tensor([[0, 1, 2], [1, 2, 3]]))]
    data = written(tmp_path / "set", records, x=dp.Field(dtype="float32", shape=(3,)))
    run(monkeypatch, data, tmp_path / "out", "--over", "token", "--epochs", 1)
    for model, layers in (("lstm", "2"), ("gnn_lstm", "2")):
        config = torch.load(tmp_path / "out" / f"{model}-best.pt", weights_only=True)["config"]
        assert (config["layers"], config["token_layers"], config["readout"]) == (None, layers, "last")


@pytest.mark.usefixtures("no_baselines")
def test_only_the_graphs_that_are_trained_on_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    schema = dp.Schema(x=dp.Field(dtype="float32", shape=(2,)), fields={"node.on": dp.Field(dtype="bool")})
    with dp.ShardWriter(tmp_path / "set", schema) as writer:
        for number in range(60):
            x = torch.tensor(rng.normal(size=(3, 2)), dtype=torch.float32)
            edges = torch.tensor([[0, 1], [1, 2]])
            graphs = [Data(x=x, edge_index=edges, on=(x[:, 0] > 0) & bool(layer)) for layer in range(2)]
            writer.write({"id": number, "label": number % 2, "graphs": graphs})
    data = dp.open_dataset(tmp_path / "set")
    assert find_target(data, "graphs", "node.on", layers="1").task == "binary"
    given = ("--data", data.root, "--target", "node.on", "--model", "gnn_lstm", "--epochs", 1, "--device", "cpu")
    assert train(monkeypatch, *given, "--layers", 0, "--output-dir", tmp_path / "out") == 2
    assert "has node.on all 0 in its graphs" in capsys.readouterr().err
    assert train(monkeypatch, *given, "--layers", 1, "--output-dir", tmp_path / "one") == 0


@pytest.mark.usefixtures("no_baselines")
def test_scores_of_data_whose_targets_are_others(
    tokens: dp.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fractions are no classes, 3 is no label, infinite values are no targets: told, scored all the same."""
    fields = {**FIELDS, "record.tags": dp.Field(dtype="uint8", shape=(3,))}
    whole = changed(token_records(90), "record.score", lambda record: float(int(record["id"]) % 3))
    data = written(tmp_path / "set", whole, fields=fields)
    run(monkeypatch, data, tmp_path / "score", "--target", "record.score", "--task", "multiclass", "--epochs", 1)
    run(monkeypatch, data, tmp_path / "tags", "--target", "record.tags", "--epochs", 1)
    run(monkeypatch, data, tmp_path / "kind", "--target", "step.kind", "--epochs", 1)
    run(monkeypatch, data, tmp_path / "place", "--target", "record.place", "--epochs", 1)
    capsys.readouterr()
    halves = changed(token_records(30), "record.score", lambda record: float(int(record["id"]) % 3) / 2)
    other = written(
        tmp_path / "other", changed(halves, "record.tags", lambda record: [3, 0, int(record["id"]) % 2]), fields=fields
    )

    def scored(name: str, place: object, *more: object) -> str:
        out = tmp_path / f"{name}.parquet"
        assert predict(monkeypatch, "--checkpoint", tmp_path / name / "lstm-best.pt", place, "--output", out, *more) == 0
        return capsys.readouterr().out

    scored("score", other.root)
    labels = [row["label"] for row in pq.read_table(tmp_path / "score.parquet").to_pylist()]
    assert {label for label in labels if label is not None} == {0, 1}
    assert labels.count(None) == 10
    assert "no table" in scored("tags", other.root)
    assert "lstm, set, all splits" in scored("kind", data.root, "--batch-size", 1)
    bad = written(tmp_path / "bad", changed(token_records(30), "record.place", lambda _: [np.inf, 0.0]), fields=fields)
    assert "no table" in scored("place", bad.root)
    flat = dp.Schema(
        sequence=dp.Field(dtype="float32", shape=(LAYERS, FEATURES)), step_axis="token", label=dp.Label(kind="none")
    )
    with dp.ShardWriter(tmp_path / "flat", flat) as writer:
        for record in token_records(9):
            writer.write({"id": record["id"], "sequence": record["sequence"]})
    assert predict(monkeypatch, "--checkpoint", tmp_path / "kind" / "lstm-best.pt", tmp_path / "flat") == 2
    assert "no axis is named layer; expected axis 0 of a step, as in training" in capsys.readouterr().err


def test_a_baseline_that_one_fold_lacks_is_paired_with_its_own_folds(tmp_path: Path) -> None:
    """The middle one of three runs has no probe: the other two are beside their own."""
    rng = np.random.default_rng(0)
    for number in range(3):
        found = {"lstm": rows_of_groups([1] * 40, (rng.random(40) < 0.5).astype(int).tolist())}
        if number != 1:
            found["linear_probe"] = found["lstm"]
        folder = tmp_path / str(number)
        folder.mkdir()
        groups = {model: {"test": [str(at).encode() for at in range(40)]} for model in found}
        write_predictions(folder / "predictions.parquet", {model: {"test": one} for model, one in found.items()}, groups)
    (row,) = paired([tmp_path / str(number) for number in range(3)], "binary")
    assert (row["difference"], row["trainings"]) == (0.0, 2)
