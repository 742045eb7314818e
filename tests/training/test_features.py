"""Detectors learn from few features, of any size and shape, and carry what they know of them to other sets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch_geometric.data import Batch, Data

import dali_pipeline as dp
import train as train_module
from dali_pipeline.runtime import threads as default_module
from models import FeatureViews, GNNLSTMDetector, set_statistics
from tests.helpers.commands import predict, train
from training import threads as threads_module
from training.build import unfit_records
from training.config import Conduct, TrainConfig
from training.interrupt import Interrupts
from training.processes import Processes
from training.statistics import feature_statistics
from training.trainer import Trainer

ROOT = Path(train_module.__file__).parent

pytestmark = pytest.mark.usefixtures("restored", "no_baselines")


def write(
    root: Path,
    rows: tuple[int, ...] = (1,),
    edge: tuple[int, ...] | None = (),
    *,
    count: int = 400,
    shift: float = 3.0,
    offset: float = 0.0,
    scale: Any = 1.0,
    dtype: str = "float32",
    kinds: str = "both",
) -> dp.Dataset:
    """Records of both kinds, 4 steps and 2 graphs of 3 nodes, whose mean shifts with the label, and nothing else does."""
    rng = np.random.default_rng(0)
    schema = dp.Schema(
        sequence=dp.Field(dtype=dtype, shape=rows) if kinds != "graphs" else None,
        x=dp.Field(dtype=dtype, shape=rows) if kinds != "sequences" else None,
        edge_attr=dp.Field(dtype="float32", shape=edge) if edge is not None and kinds != "sequences" else None,
        step_axis=msgspec.UNSET if kinds == "graphs" else "layer",
    )
    with dp.ShardWriter(root, schema) as writer:
        for number in range(count):
            label = int(rng.integers(2))

            def draw(rows_: int, label: int = label) -> Any:
                return ((rng.normal(size=(rows_, *rows)) + shift * label) * scale + offset).astype(dtype)

            graphs = dp.Graphs(
                x=draw(6),
                edge_index=np.array([[0, 1, 0, 2], [1, 2, 1, 0]]),
                edge_attr=None if edge is None else rng.random((4, *edge)).astype(np.float32),
                node_counts=np.array([3, 3]),
                edge_counts=np.array([2, 2]),
            )
            record = {"id": f"r{number}", "label": label, "sequence": draw(4), "graphs": graphs}
            writer.write({name: value for name, value in record.items() if kinds == "both" or name not in _left(kinds)})
    return dp.open_dataset(root)


def _left(kinds: str) -> str:
    return "graphs" if kinds == "sequences" else "sequence"


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ((1,), {}),
        pytest.param((2,), {"offset": 1000.0}, marks=pytest.mark.slow),
        pytest.param((3,), {"scale": 1e4, "offset": -3e5}, marks=pytest.mark.slow),
        pytest.param((8,), {"scale": np.array([1e-4, *[1.0] * 6, 1e4])}, marks=pytest.mark.slow),
        pytest.param((), {}, marks=pytest.mark.slow),
        pytest.param((2, 3), {"dtype": "float16", "offset": 100.0}, marks=pytest.mark.slow),
    ],
)
def test_few_features_of_any_size_and_shape_are_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: tuple[int, ...], options: dict[str, Any]
) -> None:
    data = write(tmp_path / "set", rows, **options)
    arguments = ("--data", data.root, "--epochs", 5, "--lr", 0.01, "--output-dir", tmp_path / "out")
    assert train(monkeypatch, *arguments) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for name in ("lstm", "gnn_lstm", "gvae_lstm"):
        assert metrics[name]["test"]["auroc"] > 0.97, metrics


@pytest.mark.parametrize("edge", [None, (), (2, 2)])
def test_edges_of_any_shape_train_and_predict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edge: tuple[int, ...] | None
) -> None:
    data = write(tmp_path / "set", (), edge, kinds="graphs", count=120)
    arguments = ("--data", data.root, "--epochs", 1, "--output-dir", tmp_path / "out", "--accumulate", 2)
    assert train(monkeypatch, *arguments, "--model", "gnn_lstm") == 0
    checkpoint = tmp_path / "out" / "gnn_lstm-best.pt"
    assert predict(monkeypatch, "--checkpoint", checkpoint, data.root, "--output", tmp_path / "scores.parquet") == 0
    assert pq.read_table(tmp_path / "scores.parquet").num_rows == 120


def test_the_checkpoints_statistics_are_used_whatever_the_new_sets_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "set", (2,), offset=1000.0)
    assert train(monkeypatch, "--data", data.root, "--epochs", 3, "--lr", 0.01, "--output-dir", tmp_path / "out") == 0
    with dp.ShardWriter(tmp_path / "ones", data.schema, split=dp.SplitRule.parse("100/0/0")) as writer:  # records of one class
        found: dict[str, Any] = {}
        for split in data.splits:
            for batch in dp.SequenceLoader(data, split, engine="torch"):
                for name, label, sequence in zip(batch.ids, batch.labels.tolist(), batch.sequences.numpy(), strict=True):
                    if label == 1 and name not in found:
                        found[name] = sequence
                        writer.write({"id": name, "label": 1, "sequence": sequence})
    scores = []
    for root, output in ((data.root, "a.parquet"), (tmp_path / "ones", "b.parquet")):
        checkpoint = tmp_path / "out" / "lstm-best.pt"
        assert predict(monkeypatch, "--checkpoint", checkpoint, root, "--output", tmp_path / output, "--batch-size", 7) == 0
        table = pq.read_table(tmp_path / output)
        scores.append(dict(zip(table["id"].to_pylist(), table["score"].to_pylist(), strict=True)))
    assert set(scores[1]) == set(found)
    assert all(scores[1][name] == pytest.approx(scores[0][name], abs=1e-5) for name in found)


def test_statistics_are_those_of_what_the_model_sees_of_the_training_split(tmp_path: Path) -> None:
    data = write(tmp_path / "set", (2, 2))
    config = TrainConfig()
    loader = dp.SequenceLoader(data, engine="torch", batch_size=1, dtype=torch.float64)
    rows = [batch.sequences[0].reshape(-1, 4).numpy() for batch in loader]
    whole = feature_statistics("lstm", data, config)
    assert whole.mean == pytest.approx(np.concatenate(rows).mean(axis=0))
    some = feature_statistics("lstm", data, TrainConfig(layers="1,3"))
    assert some.std == pytest.approx(np.concatenate([row[[1, 3]] for row in rows]).std(axis=0), rel=1e-5)
    (fold, *_) = data.folds(3)
    part = feature_statistics("lstm", fold, config)
    assert part.mean == pytest.approx(whole.mean, abs=0.5)
    assert part.mean != whole.mean
    nodes = [batch.graphs.x.reshape(-1, 4).numpy() for batch in dp.GraphLoader(data, batch_size=1, dtype=torch.float64)]
    graphs = feature_statistics("gnn_lstm", data, config)
    assert graphs.mean == pytest.approx(np.concatenate(nodes).mean(axis=0), rel=1e-4)
    assert graphs.std == pytest.approx(np.concatenate(nodes).std(axis=0), rel=1e-4)


def test_views_of_a_constant_feature_and_of_outliers_are_finite() -> None:
    views = FeatureViews(3)
    views.set_statistics(torch.tensor([5.0, 0.0, 1e30]), torch.tensor([0.0, 1.0, 1e30]))
    found = views(torch.tensor([[5.0, 1e6, -1e30], [6.0, -2.0, 0.0]])).detach()
    assert found.shape == (2, 6)
    assert torch.isfinite(found).all()
    assert found[:, 0].tolist() == [0.0, 0.0]
    assert found[1, 1] == pytest.approx(-np.log(3))


@pytest.mark.parametrize("edges", [0, 2])
def test_records_of_no_numbers_are_found_whatever_the_shapes(edges: int) -> None:
    graphs = Batch.from_data_list(
        [
            Data(x=torch.tensor([1.0, value]), edge_index=torch.zeros(2, edges).long(), edge_attr=torch.ones(edges, 2, 2))
            for value in (1.0, np.nan)
        ]
    )
    ones = torch.ones(2, dtype=torch.int64)
    batch = dp.GraphBatch(
        graphs=graphs,
        graphs_per_record=ones,
        layer_index=ones,
        last_node=ones,
        labels=ones,
        valid=ones > 0,
        ids=["a", "b"],
        positions=ones,
    )
    assert unfit_records(batch) == ["b"]


def test_every_part_of_a_detector_gets_the_statistics() -> None:
    model = GNNLSTMDetector(2)
    set_statistics(model, torch.tensor([1.0, 2.0]), torch.tensor([4.0, 8.0]))
    assert model.views.mean.tolist() == [1.0, 2.0]
    assert model.state_dict()["views.inverse"].tolist() == [0.25, 0.125]


def test_a_run_of_older_detectors_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "set", kinds="sequences", count=120)
    arguments = ("--data", data.root, "--epochs", 1, "--output-dir", tmp_path / "out")
    assert train(monkeypatch, *arguments) == 0
    state = torch.load(tmp_path / "out" / "lstm-last.pt", weights_only=True)
    del state["config"]["architecture"]
    torch.save(state, tmp_path / "old.pt")
    other = (*arguments[:-1], tmp_path / "other")
    assert train(monkeypatch, *other, "--resume", tmp_path / "old.pt") == 2
    assert "was trained with architecture None; this run has 3" in capsys.readouterr().err


def test_threads_are_chosen_kept_in_the_checkpoint_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = torch.get_num_threads()
    data = write(tmp_path / "set", kinds="sequences", count=60)
    folder = tmp_path / "out"
    arguments = ("--data", data.root, "--output-dir", folder, "--batch-size", 8)
    try:
        monkeypatch.setattr(threads_module, "thread_counts", lambda: [1, 2])
        assert train(monkeypatch, *arguments, "--epochs", 1, "--threads", "auto") == 0
        chosen = torch.load(folder / "lstm-last.pt", weights_only=True)["threads"]
        assert chosen in (1, 2)
        assert f"lstm: {chosen} threads of torch take a step fastest" in capsys.readouterr().out
        (trainer,) = _trainers(data, tmp_path / "again", threads=None)
        trainer.restore(folder / "lstm-last.pt")
        assert trainer.threads == torch.get_num_threads() == chosen
        (trainer,) = _trainers(data, tmp_path / "again", threads=3)
        trainer.restore(folder / "lstm-last.pt")
        assert trainer.threads == torch.get_num_threads() == 3
        assert f"lstm: goes on with 3 threads instead of {chosen}; the last bits may differ" in caplog.text
        assert train(monkeypatch, *arguments, "--threads", "0") == 2
        assert "threads is '0'; expected auto or a whole number of at least 1" in capsys.readouterr().err
    finally:
        torch.set_num_threads(before)


def _trainers(data: dp.Dataset, folder: Path, threads: int | None) -> list[Trainer]:
    folder.mkdir(exist_ok=True)
    processes = Processes(dp.World())
    config = TrainConfig(models=("lstm",), epochs=1, batch_size=8)
    return [Trainer("lstm", data, config, folder, Conduct(threads=threads), Interrupts(processes), processes)]


@pytest.mark.parametrize(
    ("cores", "told", "processes", "threads"),
    [
        (2, None, 1, 1),
        (8, None, 1, 2),
        (64, None, 1, 4),
        (16, None, 4, 1),
        (0.5, None, 1, 1),
        (16, "3", 1, 3),
        (2, "many", 1, 1),
    ],
)
def test_the_default_is_a_function_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: float, told: str | None, processes: int, threads: int
) -> None:
    monkeypatch.setattr(default_module, "allowed_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    assert default_module.default_threads() == threads


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "told"), [("train.py", None), pytest.param("-m dali_pipeline", "ACTIVE", marks=pytest.mark.slow)]
)
def test_openmp_waits_passively_unless_the_user_says_otherwise(program: str, told: str | None) -> None:
    """Ask OpenMP itself, which reads the variable once, as torch loads."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "true"} | ({} if told is None else {"OMP_WAIT_POLICY": told})
    if program == "train.py":
        begin = "sys.argv = ['train.py', '--replay', '--data', 'nothing']; runpy.run_path('train.py', run_name='__main__')"
    else:
        begin = "sys.argv = ['dali_pipeline', 'doctor', 'nothing']; runpy.run_module('dali_pipeline', run_name='__main__')"
    runner = f"import runpy, sys\ntry:\n    {begin}\nexcept SystemExit:\n    pass\nimport torch\n"
    done = subprocess.run(
        [sys.executable, "-c", runner], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert f"OMP_WAIT_POLICY = '{told or 'PASSIVE'}'" in done.stderr, done.stderr


class _NotCompiled(nn.Module):
    """What torch.compile gives where there is no compiler: it fails when it is called."""

    def __init__(self, model: nn.Module, **_: object) -> None:
        super().__init__()

    def forward(self, *_: object) -> Any:
        try:
            raise RuntimeError("No working C++ compiler found\nadvice")
        except RuntimeError as error:
            raise TorchDynamoException("the backend failed") from error


@pytest.mark.parametrize("flags", [(), pytest.param(("--accumulate", 2), marks=pytest.mark.slow)])
def test_without_a_compiler_training_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, flags: tuple[object, ...]
) -> None:
    data = write(tmp_path / "set", kinds="sequences", count=60)
    monkeypatch.setattr(torch, "compile", _NotCompiled)
    scores = []
    for more in ((), ("--compile",)):
        folder = tmp_path / f"out{len(more)}"
        assert train(monkeypatch, "--data", data.root, "--epochs", 1, "--output-dir", folder, *flags, *more) == 0
        scores.append(json.loads((folder / "metrics.json").read_text())["lstm"]["test"])
    assert scores[0] == scores[1]
    (line,) = [record.getMessage() for record in caplog.records if record.name == "dali_pipeline"]
    reason = "RuntimeError: No working C++ compiler found"
    assert line == f"--compile: the model cannot be compiled here ({reason}); training goes on without"


@pytest.mark.slow
def test_without_a_real_compiler_training_goes_on(tmp_path: Path) -> None:
    data = write(tmp_path / "set", kinds="sequences", count=60)
    environment = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "train.py", "--data", str(data.root), "--epochs", "1", "--output-dir", str(tmp_path / "out")]
    done = subprocess.run([*command, "--compile"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "--compile: the model cannot be compiled here (" in done.stderr
    assert "Traceback" not in done.stderr
