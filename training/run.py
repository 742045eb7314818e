"""One model's run with what people watch: epoch lines, progress bar, TensorBoard; and its evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import TextColumn
from torch.utils.tensorboard import SummaryWriter

from dali_pipeline import Dataset
from dali_pipeline.progress import progress_bar
from training.config import ModelName, TrainConfig
from training.folder import find_checkpoint
from training.interrupt import Interrupts
from training.metrics import Predictions, best_threshold, measure
from training.report import write_history
from training.trainer import HistoryRow, Trainer


def train(
    name: ModelName,
    data: Dataset,
    config: TrainConfig,
    folder: Path,
    device: str,
    resume: str,
    interrupts: Interrupts,
    earlier: Mapping[str, Sequence[HistoryRow]],
) -> Trainer:
    """Trains to the last epoch, going on where `resume` says; history.csv holds `earlier` models' rows and this one's."""
    trainer = Trainer(name, data, config, folder, device, interrupts)
    checkpoint = find_checkpoint(resume, folder, name)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    with SummaryWriter(folder / "tensorboard" / name, purge_step=trainer.epoch) as board, _bar() as bar:
        task = bar.add_task(name, total=config.epochs * trainer.steps_per_epoch, loss=float("nan"))

        def on_step(step: int, steps: int, loss: float) -> None:
            bar.update(task, completed=trainer.epoch * steps + step, loss=loss)

        while not trainer.finished:
            row = trainer.train_epoch(on_step)
            write_history(folder / "history.csv", {**earlier, name: trainer.history})
            for key in ("train_loss", "val_loss", "val_auroc"):
                board.add_scalar(key, row[key], int(row["epoch"]))
            print(
                f"{name} epoch {int(row['epoch']) + 1}/{config.epochs}: training loss {row['train_loss']:.4f}, validation loss "
                f"{row['val_loss']:.4f}, validation AUROC {row['val_auroc']:.3f} ({row['seconds']:.1f} s); {trainer.delivered}",
                flush=True,
            )
    if trainer.timer.steps:
        rate, wait = trainer.timer.records_per_second, trainer.timer.wait_share
        print(f"{name}: {rate:,.0f} records/s, {wait:.0%} of the time waiting for data", flush=True)
    return trainer


def evaluate(trainer: Trainer) -> tuple[dict[str, Any], Predictions]:
    """The best epoch's weights on test, with the threshold from validation: the model's entry of metrics.json."""
    trainer.load_best()
    with trainer.interrupts.deferred():
        val, test = trainer.predict("val"), trainer.predict("test")
    threshold = best_threshold(val)
    best = max(trainer.history, key=lambda row: row["val_auroc"])
    return {
        "test": measure(test, threshold),
        "val": measure(val, threshold),
        "threshold": threshold,
        "best_epoch": int(best["epoch"]),
        "seed": trainer.config.seed,
        "test_records": len(test.ids),
    }, test


def _bar() -> Any:
    return progress_bar(TextColumn("loss {task.fields[loss]:.4f}"))
