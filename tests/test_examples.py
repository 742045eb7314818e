"""The examples run; and through each foreign trainer, both loaders resume to the bit wherever they are cut off."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import dali_pipeline as dp
from dali_pipeline.loaders.loader import Loader
from tests.helpers.batches import assert_same, content

ROOT = Path(__file__).parents[1]
Contents = list[dict[str, Any]]


@pytest.fixture(params=["sequences", "graphs"])
def fresh(request: pytest.FixtureRequest, data: dp.Dataset) -> Callable[[], Loader[Any]]:
    """Makes a loader of 6 or 7 steps that knows nothing of any other."""
    return lambda: {"sequences": dp.SequenceLoader, "graphs": dp.GraphLoader}[request.param](data, batch_size=32, seed=3)


@pytest.fixture
def epochs(fresh: Callable[[], Loader[Any]]) -> list[Contents]:
    """Three undisturbed epochs, whose first two differ."""
    loader = fresh()
    found = [[content(batch) for batch in loader] for _ in range(3)]
    assert len(found[0]) > 5
    assert found[0][0]["ids"] != found[1][0]["ids"]
    return found


def same_or_both_empty(ours: Contents, theirs: Contents) -> None:
    assert len(ours) == len(theirs)
    if theirs:
        assert_same(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["with_torchdata", "with_lightning", "with_accelerate"])
def test_example(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-4:] == [
        "cut off after batch 7 of 18 in epoch 1, resumed from fresh objects",
        "the same ids in the same order: True",
        "the same weights to the bit: True",
        "before + after: 143 of 143 records, each once",
    ]


def test_gin_learns_what_atoms_cannot_see_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "gin_on_molecules.py"))
    main = example["main"]
    monkeypatch.setitem(main.__globals__, "RECORDS", 1500)
    monkeypatch.setitem(main.__globals__, "EPOCHS", 5)
    main(tmp_path)
    told = capsys.readouterr().out.splitlines()
    assert all("each once" in line for line in told[:5])
    assert float(told[-1].split()[-1]) > 0.85
    assert int(told[-3].split()[-1]) <= 1500 < int(told[-2].split()[-1])


def test_a_sparse_autoencoder_and_a_probe_per_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "sparse_autoencoder.py"))
    main = example["main"]
    for name, value in {"RECORDS": 300, "EPOCHS": 5}.items():
        monkeypatch.setitem(main.__globals__, name, value)
    main(tmp_path)
    told = capsys.readouterr().out.splitlines()
    assert all("each once" in line for line in told[:5])
    variance, live, accuracy = (float(line.split()[-1]) for line in told[-3:])
    assert variance > 0.8
    assert 0.5 < live <= 1
    assert accuracy > 0.9
    main(tmp_path, str(tmp_path / "states"), 2)  # a set that is there already
    assert len(capsys.readouterr().out.splitlines()) == 7


@pytest.mark.parametrize("stop", [0, 1, 4, "last", "end"])
def test_torchdata_resumes(stop: int | str, fresh: Callable[[], Loader[Any]], epochs: list[Contents], tmp_path: Path) -> None:
    """stop: batches of epoch 1 delivered; 0 is behind iter(), "last" before the loop has ended, "end" behind it."""
    steps = len(epochs[1]) if isinstance(stop, str) else stop
    before = StatefulDataLoader(fresh(), batch_size=None, num_workers=0)
    assert len(before) == len(epochs[0])
    assert_same(before, epochs[0])
    batches = iter(before)
    same_or_both_empty([content(next(batches)) for _ in range(steps)], epochs[1][:steps])
    if stop == "end":
        assert list(batches) == []
    torch.save(before.state_dict(), tmp_path / "state.pt")

    after = StatefulDataLoader(fresh(), batch_size=None, num_workers=0)
    after.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    if stop != "end":
        same_or_both_empty([content(batch) for batch in after], epochs[1][steps:])
    assert_same(after, epochs[2])


@pytest.mark.parametrize("kind", [StatefulDataLoader, pytest.param(DataLoader, marks=pytest.mark.slow)])
def test_more_workers_are_refused_in_one_sentence(kind: Any, fresh: Callable[[], Loader[Any]]) -> None:
    with pytest.raises(dp.UsageError) as refused:
        next(iter(kind(fresh(), batch_size=None, num_workers=2, multiprocessing_context="fork")))
    assert str(refused.value) == (
        "this loader has workers of its own; wrap it with DataLoader(loader, batch_size=None, num_workers=0)"
    )


class Cut(Exception):
    pass


class Watched(lightning.LightningModule):
    """Notes each batch and trains on its labels; cut: after how many steps, and where, it saves this checkpoint and fails."""

    def __init__(self, loader: Loader[Any], checkpoint: Path | None = None, cut: int = 0, hook: str = "batch") -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.loader = loader
        self.seen: Contents = []
        self.checkpoint, self.cut, self.hook = checkpoint, cut, hook

    def on_train_start(self) -> None:
        self.loader.set_epoch(self.current_epoch)

    def training_step(self, batch: Any) -> torch.Tensor:
        self.seen.append(content(batch))
        loss: torch.Tensor = ((self.weight - batch.labels) ** 2).mean()
        return loss

    def on_train_batch_end(self, *_: object) -> None:
        self._cut("batch")

    def on_train_epoch_end(self) -> None:
        self._cut("epoch")

    def _cut(self, hook: str) -> None:
        if self.checkpoint and self.hook == hook and self.global_step == self.cut:
            self.trainer.save_checkpoint(self.checkpoint, weights_only=False)
            raise Cut

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def fit(module: Watched, resume: Path | None = None) -> None:
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = lightning.Trainer(max_epochs=3, accelerator="cpu", **quiet)
    trainer.fit(module, train_dataloaders=module.loader, ckpt_path=resume, weights_only=True)


@pytest.mark.parametrize(
    ("epoch", "stop", "hook"),
    [
        (0, 1, "batch"),
        pytest.param(1, 4, "batch", marks=pytest.mark.slow),
        pytest.param(1, -1, "batch", marks=pytest.mark.slow),
        (1, -1, "epoch"),
    ],
)
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")  # they are the loader's own
def test_lightning_resumes(
    epoch: int, stop: int, hook: str, fresh: Callable[[], Loader[Any]], epochs: list[Contents], tmp_path: Path
) -> None:
    """stop: batches of the epoch, -1 all; saved where ModelCheckpoint would, behind a batch or behind the epoch."""
    every = [batch for batches in epochs for batch in batches]
    undisturbed = Watched(fresh())
    fit(undisturbed)
    assert_same(undisturbed.seen, every)

    cut = epoch * len(epochs[0]) + (stop if stop > 0 else len(epochs[0]))
    first = Watched(fresh(), tmp_path / "cut.ckpt", cut, hook)
    with pytest.raises(Cut):
        fit(first)
    assert_same(first.seen, every[:cut])

    second = Watched(fresh())
    fit(second, resume=tmp_path / "cut.ckpt")
    assert_same(second.seen, every[cut:])
    assert torch.equal(second.weight, undisturbed.weight)


@pytest.mark.parametrize("stop", [1, 4, "last", "end"])
def test_accelerate_resumes(stop: int | str, fresh: Callable[[], Loader[Any]], epochs: list[Contents], tmp_path: Path) -> None:
    steps = len(epochs[1]) if isinstance(stop, str) else stop
    before, after = fresh(), fresh()
    saving, loading = Accelerator(cpu=True), Accelerator(cpu=True)
    saving.register_for_checkpointing(before)
    loading.register_for_checkpointing(after)
    list(before)
    batches = iter(before)
    assert_same([next(batches) for _ in range(steps)], epochs[1][:steps])
    if stop == "end":
        assert list(batches) == []
    saving.save_state(str(tmp_path))

    loading.load_state(str(tmp_path))
    if stop != "end":
        same_or_both_empty([content(batch) for batch in after], epochs[1][steps:])
    assert_same(after, epochs[2])


def test_what_accelerate_prepares(fresh: Callable[[], Loader[Any]]) -> None:
    """Why the example registers the loader alone: prepare() leaves it as it is, and cannot be given a DataLoader around it."""
    loader = fresh()
    assert Accelerator(cpu=True).prepare(loader) is loader
    with pytest.raises(TypeError, match="batch size of tensors"):
        next(iter(Accelerator(cpu=True).prepare(DataLoader(loader, batch_size=None))))
    sharded = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=False))
    next(iter(sharded.prepare(DataLoader(loader, batch_size=None))))
    assert loader.state_dict()["step"] == 2  # of one that was delivered


def test_accelerate_accumulates_across_the_end_of_an_epoch(fresh: Callable[[], Loader[Any]]) -> None:
    """What the example says of a loader that is not prepared; with a prepared one the last batch of an epoch would step."""
    accelerator, loader = Accelerator(cpu=True, gradient_accumulation_steps=4), fresh()
    model = accelerator.prepare(torch.nn.Linear(1, 1))
    stepped = []
    for _ in [*loader, *loader]:
        with accelerator.accumulate(model):
            stepped.append(accelerator.sync_gradients)
    assert len(loader) % 4
    assert [number for number, did in enumerate(stepped, start=1) if did] == list(range(4, 2 * len(loader) + 1, 4))


def test_batches_move_whole(fresh: Callable[[], Loader[Any]]) -> None:
    """`to`, which Lightning calls: nothing copied where it is there already, and the batch itself never written to."""
    batch = next(iter(fresh()))
    held = content(batch)
    here, moved = batch.to("cpu"), batch.to("meta")
    assert_same([batch, here], [held, held])
    assert {tensor.device.type for tensor in (moved.labels, moved.valid)} == {"meta"}
    assert moved.positions.device.type == "cpu"
    if isinstance(batch, dp.SequenceBatch):
        assert here.sequences is batch.sequences
        assert (moved.sequences.device.type, moved.lengths.device.type) == ("meta", "cpu")
    else:
        assert here.graphs.x.data_ptr() == batch.graphs.x.data_ptr()
        assert {moved.graphs[name].device.type for name in ("x", "edge_index", "edge_attr", "batch", "ptr")} == {"meta"}
        assert here.graphs.to_data_list()[1].x.equal(batch.graphs.to_data_list()[1].x)
