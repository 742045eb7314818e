"""Run: train the models one after the other, show the progress, and write the results to the folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dali_pipeline import Dataset
from dali_pipeline.runtime.outside import readable
from dali_pipeline.types import Kind
from training.baselines import BASELINES, LayerScores, Splits, baseline, layers_of, probe_layers, readings, write_layers
from training.config import Conduct, ModelName, TrainConfig, kind_of
from training.extras import Board, extra
from training.folder import BASELINES_NAME, CURVES_NAME, HISTORY_NAME, METRICS_NAME, PREDICTIONS_NAME, find_checkpoint
from training.interrupt import Interrupts
from training.intervals import difference, intervals
from training.metrics import Predictions, best_threshold, main_metric, measure
from training.pictures import draw_curves
from training.processes import Processes
from training.report import write_history, write_predictions
from training.results import ADDS, write_metrics
from training.target import Target
from training.trainer import HistoryRow, Trainer, best_row, score_of
from training.watch import Watch, verdict


@dataclass(frozen=True, kw_only=True)
class Job:
    """Data, settings, folder and processes of a run.

    probes: whether to fit the baselines. chosen: sentences on what "auto" stands for, printed with the first epoch.
    """

    data: Dataset
    config: TrainConfig
    folder: Path
    resume: str
    conduct: Conduct
    interrupts: Interrupts
    processes: Processes
    probes: bool = True
    chosen: Sequence[str] = ()


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
        report(job, trainer.target, histories, predictions, epochs)


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
                    if name == job.config.models[0] and trainer.epoch == 1:
                        print(*job.chosen, sep="\n", end="\n" if job.chosen else "", flush=True)
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
    figures = {key: value for key, value in row.items() if key != "epoch"}
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
    metric = "R2" if "val_r2" in row else "AUROC"
    print(
        f"{name} epoch {int(row['epoch']) + 1}/{epochs}: training loss {row['train_loss']:.4f}, validation loss "
        f"{row['val_loss']:.4f}, validation {metric} {score_of(row):.3f} ({row['seconds']:.1f} s); {delivered}",
        flush=True,
    )


def report(
    job: Job,
    target: Target,
    histories: Mapping[str, Sequence[HistoryRow]],
    predictions: Mapping[str, Splits],
    epochs: Mapping[str, int],
) -> None:
    """Write all results: the detectors' metrics first, then baselines and the files that may fail without harm."""
    groups = {name: groups_of(job.data, kind_of(name), splits) for name, splits in predictions.items()}
    results: dict[str, Any] = {}
    for name, splits in predictions.items():
        results[name] = evaluate(splits, groups[name]["test"]) | {"best_epoch": epochs[name], "seed": job.config.seed}
        results[name]["target"] = target.name
        adds, other = ADDS.get(name, ("", ""))
        if other in predictions and (gain := compare(splits["test"], predictions[other]["test"], groups[name]["test"])):
            results[name]["against"] = {"adds": adds, "model": other, **gain}
    write_metrics(job.folder / METRICS_NAME, results)
    keep_history(job.folder, histories)
    layers: LayerScores | None = None
    everything, fitted = dict(predictions), dict[str, Any]()
    if job.probes:
        layers, found = fitted_baselines(job, target)
        for name, (kind, splits) in found.items():
            groups[name] = groups_of(job.data, kind, splits)
            with extra(job.folder / BASELINES_NAME):
                fitted[name] = evaluate(splits, groups[name]["test"]) | {"target": target.name}
                everything[name] = splits
        with extra(job.folder / BASELINES_NAME):
            write_metrics(job.folder / BASELINES_NAME, fitted)
    with extra(job.folder / PREDICTIONS_NAME):
        write_predictions(job.folder / PREDICTIONS_NAME, everything, groups)
    tests = {name: splits["test"].known() for name, splits in predictions.items()}
    rows = {"record": "records", "step": "steps", "node": "nodes"}[target.level]
    title = f"{readable(job.data.root.resolve().name)}: {max(len(test.scores) for test in tests.values()):,} test {rows}"
    title += "" if target.name == "label" else f", {target.name}"
    with extra(job.folder / CURVES_NAME):
        draw_curves(job.folder / CURVES_NAME, histories, tests, results, layers, title)


def groups_of(data: Dataset, kind: Kind, splits: Splits) -> dict[str, list[bytes]]:
    """Return the group of each record of predictions, by split."""
    texts = {split: data.select(split, kind).texts("groups") for split in splits}
    return {split: [texts[split][row] for row in found.positions.tolist()] for split, found in splits.items()}


def fitted_baselines(job: Job, target: Target) -> tuple[LayerScores | None, dict[str, tuple[Kind, Splits]]]:
    """Fit the baselines and write layers.csv; one that fails is left out, with a line in the log."""
    layers: LayerScores | None = None
    found: dict[str, tuple[Kind, Splits]] = {}
    data, seed = job.data, job.config.seed
    by_layer = target.level == "record" or (target.level == "step" and data.schema.layer_axis is not None)
    # never of something else under the same name, if there are layers that cannot be probed
    left_out: tuple[str, ...] = ("linear_probe", "mlp") if by_layer else ()
    with extra(job.folder / "layers.csv"):
        if by_layer and (numbers := layers_of(data, asked_layers(job.config, data))):
            layers, splits = probe_layers(data, target, numbers, seed)
            found["linear_probe"] = "sequences", splits
            write_layers(job.folder / "layers.csv", layers)
        left_out = ()
    best = None if layers is None else layers.layers[layers.best]
    if layers is not None:
        print(
            f"a linear probe on one layer: test {layers.metric.upper()} {layers.test[layers.best]:.3f} on layer {best}, "
            f"chosen on validation from {len(layers.layers)}",
            flush=True,
        )
    for name, reading in readings(data, target, job.config, best).items():
        if name in left_out:
            continue
        with extra(job.folder / f"baseline {name}"):
            found[name] = "graphs" if reading.graphs else "sequences", baseline(name, reading, seed)
    return layers, {name: found[name] for name in BASELINES if name in found}


def asked_layers(config: TrainConfig, data: Dataset) -> str | None:
    """Return the layers to probe: those asked for; all where tokens have layers and the run reads one of them."""
    return None if data.schema.layer_axis is not None and config.over == "token" else config.layers


def evaluate(splits: Splits, groups: Sequence[bytes]) -> dict[str, Any]:
    """Return a model's entry of metrics.json: the metrics, with intervals on test, at the threshold from validation."""
    threshold = best_threshold(splits["val"].known())
    test = splits["test"]
    rows = {} if len(test.scores) == len(test.ids) else {"test_rows": len(test.known().scores)}
    return {
        "task": test.task,
        "test": measure(test, threshold),
        "test_interval": intervals(test, groups, threshold),
        "val": measure(splits["val"], threshold),
        "threshold": threshold,
        "test_records": len(test.ids),
        "test_groups": len(set(groups)),
        **rows,
    }


def compare(one: Predictions, other: Predictions, groups: Sequence[bytes]) -> dict[str, Any]:
    """Return the main metric of `one` minus that of `other` on the records that both have; empty if it is undefined there."""
    rows = {id_: number for number, id_ in enumerate(other.ids)}
    ours = [number for number, id_ in enumerate(one.ids) if id_ in rows]
    theirs = [rows[one.ids[number]] for number in ours]
    first, second = one.rows(ours), other.rows(theirs)
    if not ours or not np.array_equal(first.counts, second.counts) or not np.isfinite(main_metric(first)):
        return {}
    return difference([first], [second], [groups[number] for number in ours])
