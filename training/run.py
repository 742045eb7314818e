"""Run: train the models one after the other, show the progress, and write the results to the folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dali_pipeline import Dataset
from dali_pipeline.runtime.outside import readable
from training.config import Conduct, ModelName, TrainConfig, kind_of
from training.extras import Board, extra
from training.folder import CURVES_NAME, HISTORY_NAME, METRICS_NAME, PREDICTIONS_NAME, find_checkpoint
from training.interrupt import Interrupts
from training.intervals import auroc_difference, intervals
from training.layers import LayerScores, layers_of, probe_layers, write_layers
from training.metrics import Predictions, best_threshold, measure
from training.pictures import draw_curves
from training.processes import Processes
from training.report import write_history, write_predictions
from training.results import ADDS, write_metrics
from training.trainer import HistoryRow, Trainer, best_row
from training.watch import Watch, verdict


@dataclass(frozen=True, kw_only=True)
class Job:
    """Data, settings, folder and processes of a run. probes: whether to probe each layer."""

    data: Dataset
    config: TrainConfig
    folder: Path
    resume: str
    conduct: Conduct
    interrupts: Interrupts
    processes: Processes
    probes: bool = True


Splits = dict[str, Predictions]


def carry_out(job: Job) -> None:
    """Train every model; write metrics.json and, if possible, history.csv, predictions.parquet, layers.csv and curves.png."""
    histories: dict[str, list[HistoryRow]] = {}
    predictions: dict[str, Splits] = {}
    epochs: dict[str, int] = {}
    for name in job.config.models:
        trainer = train(job, name, histories)
        histories[name] = trainer.history
        trainer.load_best()
        with job.interrupts.deferred():
            predictions[name] = {split: trainer.predict(split) for split in ("val", "test")}
        epochs[name] = int(best_row(trainer.history)["epoch"])
    if job.processes.is_first:
        report(job, histories, predictions, epochs)


def train(job: Job, name: ModelName, earlier: Mapping[str, Sequence[HistoryRow]]) -> Trainer:
    """Train a model to the last epoch, from the checkpoint that `resume` says; history.csv also keeps `earlier` models."""
    first, epochs = job.processes.is_first, job.config.epochs
    trainer = Trainer(name, job.data, job.config, job.folder, job.conduct, job.interrupts, job.processes)
    checkpoint = job.processes.first(lambda: find_checkpoint(job.resume, job.folder, name))
    if checkpoint is not None:
        trainer.restore(checkpoint)
        if first and not trainer.finished:
            print(f"{name}: continues from {checkpoint} in epoch {trainer.epoch + 1} of {epochs}", flush=True)
    else:
        trainer.measure_threads()
        if first and job.conduct.threads == "auto":
            print(f"{name}: {trainer.threads} threads of torch take a step fastest", flush=True)
    steps, world_size = trainer.steps_per_epoch, job.processes.world_size
    board = Board(job.folder / "tensorboard" / name, trainer.epoch) if first else None
    try:
        with Watch(name, epochs * steps, trainer.timer, trainer.device, world_size, show=first) as watch:
            while not trainer.finished:
                before = trainer.epoch * steps
                row = trainer.train_epoch(partial(watch.step, before))
                if board is not None:
                    keep_history(job.folder, {**earlier, name: trainer.history})
                    note(board, row, trainer)
                    print_epoch(name, row, epochs, trainer.delivered)
        trainer.writer.wait()
    finally:
        if board is not None:
            board.close()
    if trainer.timer.steps and first:
        print(f"{name}: {verdict(trainer.timer, world_size, trainer.device)}", flush=True)
    return trainer


def note(board: Board, row: HistoryRow, trainer: Trainer) -> None:
    """Write the figures of an epoch for TensorBoard."""
    figures = {key: row[key] for key in ("train_loss", "val_loss", "val_auroc", "lr", "seconds")}
    figures["records_per_second"] = trainer.timer.records_per_second * trainer.processes.world_size
    figures["share_of_time_waiting_for_data"] = trainer.timer.wait_share
    figures["share_of_time_between_steps"] = trainer.timer.gap_share
    board.note(int(row["epoch"]), figures)


def keep_history(folder: Path, histories: Mapping[str, Sequence[HistoryRow]]) -> None:
    """Write history.csv if possible."""
    with extra(folder / HISTORY_NAME):
        write_history(folder / HISTORY_NAME, histories)


def print_epoch(name: str, row: HistoryRow, epochs: int, delivered: str) -> None:
    """Print one line for an epoch."""
    print(
        f"{name} epoch {int(row['epoch']) + 1}/{epochs}: training loss {row['train_loss']:.4f}, validation loss "
        f"{row['val_loss']:.4f}, validation AUROC {row['val_auroc']:.3f} ({row['seconds']:.1f} s); {delivered}",
        flush=True,
    )


def report(
    job: Job, histories: Mapping[str, Sequence[HistoryRow]], predictions: Mapping[str, Splits], epochs: Mapping[str, int]
) -> None:
    """Write all results: the metrics first, then the files that may fail without harm."""
    kinds = {name: kind_of(name) for name in predictions}
    texts = {
        (kind, split): job.data.select(split, kind).texts("groups") for kind in set(kinds.values()) for split in ("val", "test")
    }
    groups = {
        name: {split: [texts[kinds[name], split][row] for row in scored.positions] for split, scored in splits.items()}
        for name, splits in predictions.items()
    }
    results: dict[str, Any] = {}
    for name, splits in predictions.items():
        results[name] = evaluate(splits, groups[name]["test"]) | {"best_epoch": epochs[name], "seed": job.config.seed}
        adds, other = ADDS.get(name, ("", ""))
        if other in predictions and (gain := compare(splits["test"], predictions[other]["test"], groups[name]["test"])):
            results[name]["against"] = {"adds": adds, "model": other, **gain}
    write_metrics(job.folder / METRICS_NAME, results)
    keep_history(job.folder, histories)
    with extra(job.folder / PREDICTIONS_NAME):
        write_predictions(job.folder / PREDICTIONS_NAME, predictions, groups)
    layers = probed(job) if job.probes and "lstm" in predictions else None
    tests = {name: splits["test"] for name, splits in predictions.items()}
    title = f"{readable(job.data.root.resolve().name)}: {max(len(test.ids) for test in tests.values()):,} test records"
    with extra(job.folder / CURVES_NAME):
        draw_curves(job.folder / CURVES_NAME, histories, tests, results, layers, title)


def probed(job: Job) -> LayerScores | None:
    """Probe the layers and write layers.csv; return None if there are no layers, or probing fails."""
    layers = None
    with extra(job.folder / "layers.csv"):
        if steps := layers_of(job.data, job.config.layers):
            layers = probe_layers(job.data, steps, job.config.seed)
            write_layers(job.folder / "layers.csv", layers)
    if layers is not None:
        print(
            f"a linear probe on one layer: test AUROC {layers.test[layers.best]:.3f} on layer {layers.layers[layers.best]}, "
            f"chosen on validation from {len(layers.layers)}"
        )
    return layers


def evaluate(splits: Splits, groups: Sequence[bytes]) -> dict[str, Any]:
    """Return a model's entry of metrics.json: the metrics, with intervals on test, at the threshold from validation."""
    threshold = best_threshold(splits["val"])
    return {
        "test": measure(splits["test"], threshold),
        "test_interval": intervals(splits["test"], groups, threshold),
        "val": measure(splits["val"], threshold),
        "threshold": threshold,
        "test_records": len(splits["test"].ids),
        "test_groups": len(set(groups)),
    }


def compare(one: Predictions, other: Predictions, groups: Sequence[bytes]) -> dict[str, Any]:
    """Return the AUROC of `one` minus that of `other` on the records that both have; empty if these have one class."""
    rows = {id_: number for number, id_ in enumerate(other.ids)}
    ours = [number for number, id_ in enumerate(one.ids) if id_ in rows]
    theirs = [rows[one.ids[number]] for number in ours]
    if len(set(one.labels[ours].tolist())) < 2:
        return {}
    return auroc_difference(one.rows(ours), other.rows(theirs), [groups[number] for number in ours])
