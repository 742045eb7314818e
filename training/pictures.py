"""Draw curves.png: the course of a training, and the quality of the detectors, in six panels."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import precision_recall_curve, roc_curve

from dali_pipeline.storage.whole import write_whole
from dali_pipeline.tools.picture import entitle
from training.baselines import LayerScores
from training.metrics import Predictions, calibration_bins
from training.trainer import HistoryRow, best_row, score_of

POINTS = 5000  # of a model, in the picture of predicted beside true values
FEWEST = 10  # minimum number of records per point of the calibration curve
Results = Mapping[str, Mapping[str, Any]]


def draw_curves(
    path: Path,
    histories: Mapping[str, Sequence[HistoryRow]],
    tests: Mapping[str, Predictions],
    results: Results,
    layers: LayerScores | None,
    title: str,
) -> None:
    """Draw loss and AUROC by epoch; ROC, precision-recall and calibration on test; AUROC by layer if there are layers."""
    figure = Figure(figsize=(16, 9), layout="constrained")
    entitle(figure, title, fontsize=14)
    panels = list(figure.subplots(2, 3).flat)
    colors = {model: f"C{number}" for number, model in enumerate(histories)}
    _losses(panels[0], histories, colors)
    _scores(panels[1], histories, colors)
    if next(iter(tests.values())).task == "regression":
        _values(panels[2], tests, results, colors)
        _errors(panels[3], tests, results, colors)
        _bias(panels[4], tests, colors)
    else:
        _roc(panels[2], tests, results, colors)
        _precision_recall(panels[3], tests, results, colors)
        _calibration(panels[4], tests, results, colors)
    if layers is None:
        panels[5].set_visible(False)
    else:
        _layers(panels[5], layers, results, colors)
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, dpi=100, format="png")
    write_whole(path, content.getvalue())


def _losses(axes: Axes, histories: Mapping[str, Sequence[HistoryRow]], colors: Mapping[str, str]) -> None:
    for model, history in histories.items():
        epochs = [row["epoch"] + 1 for row in history]
        axes.plot(epochs, [row["train_loss"] for row in history], color=colors[model], marker=".", label=f"{model}, training")
        axes.plot(epochs, [row["val_loss"] for row in history], color=colors[model], ls="--", label="validation")
    noted = " (gvae_lstm: with reconstruction)" if "gvae_lstm" in histories else ""
    axes.set(title=f"Loss by epoch{noted}", xlabel="epoch", ylabel="loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8, ncols=2)


def _scores(axes: Axes, histories: Mapping[str, Sequence[HistoryRow]], colors: Mapping[str, str]) -> None:
    metric = "R2" if any("val_r2" in row for history in histories.values() for row in history) else "AUROC"
    for model, history in histories.items():
        epochs, scores = [row["epoch"] + 1 for row in history], [score_of(row) for row in history]
        best = history.index(best_row(history))
        axes.plot(epochs, scores, color=colors[model], marker=".", label=model)
        axes.plot(epochs[best], scores[best], color=colors[model], marker="o", markersize=11, fillstyle="none")
    axes.set(title=f"Validation {metric} by epoch (circle: the epoch kept)", xlabel="epoch", ylabel=metric)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8)


def _with_interval(results: Results, model: str, metric: str) -> str:
    low, high = results[model]["test_interval"][metric]
    return f"{results[model]['test'][metric]:.3f} [{low:.3f}, {high:.3f}]"


def _roc(axes: Axes, tests: Mapping[str, Predictions], results: Results, colors: Mapping[str, str]) -> None:
    for model, found in tests.items():
        scores, hits = (values.reshape(-1) for values in found.one_against_rest())
        false_rate, true_rate, _ = roc_curve(hits, scores)
        axes.plot(false_rate, true_rate, color=colors[model], label=f"{model}, AUROC {_with_interval(results, model, 'auroc')}")
    axes.plot([0, 1], [0, 1], color="0.6", ls=":")
    axes.set(title="ROC on test (with 95 % intervals, by group)", xlabel="false positive rate", ylabel="true positive rate")
    axes.legend(fontsize=8, loc="lower right")


def _precision_recall(axes: Axes, tests: Mapping[str, Predictions], results: Results, colors: Mapping[str, str]) -> None:
    for model, found in tests.items():
        scores, hits = (values.reshape(-1) for values in found.one_against_rest())
        precision, recall, _ = precision_recall_curve(hits, scores)
        label = f"{model}, average precision {_with_interval(results, model, 'average_precision')}"
        axes.plot(recall, precision, color=colors[model], label=label)
        if found.task == "binary":
            at = results[model]["test"]
            axes.plot(at["recall"], at["precision"], color=colors[model], marker="o", ls="none")
        axes.axhline(hits.mean(), color="0.6", ls=":")
    binary = all(found.task == "binary" for found in tests.values())
    noted = " (dot: the threshold)" if binary else ""
    axes.set(title=f"Precision and recall on test{noted}", xlabel="recall", ylabel="precision", ylim=(0, 1.03))
    axes.legend(fontsize=8, loc="lower left")


def _calibration(axes: Axes, tests: Mapping[str, Predictions], results: Results, colors: Mapping[str, str]) -> None:
    axes.plot([0, 1], [0, 1], color="0.6", ls=":")
    for model, found in tests.items():
        confidence, hits = (values.reshape(-1) for values in found.confidence())
        bins = calibration_bins(confidence)
        counts = np.bincount(bins)
        filled = counts >= FEWEST
        said, true = (np.bincount(bins, sums)[filled] / counts[filled] for sums in (confidence, hits))
        label = f"{model}, expected error {_with_interval(results, model, 'ece')}"
        axes.plot(said, true, color=colors[model], lw=1, alpha=0.7, label=label)
        axes.scatter(said, true, s=400 * counts[filled] / len(bins), color=colors[model], alpha=0.6, lw=0)
    axes.set(
        title=f"Calibration on test (size: records, {FEWEST} at least)",
        xlabel="score",
        ylabel="share that is so",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    axes.legend(fontsize=8, loc="lower right")


def _values(axes: Axes, tests: Mapping[str, Predictions], results: Results, colors: Mapping[str, str]) -> None:
    every = np.concatenate([found.labels.reshape(-1) for found in tests.values()])
    bounds = [float(every.min()), float(every.max())]
    axes.plot(bounds, bounds, color="0.6", ls=":")
    for model, found in tests.items():
        true, predicted = (values.reshape(-1)[:POINTS] for values in (found.labels, found.scores))
        label = f"{model}, R2 {_with_interval(results, model, 'r2')}"
        axes.plot(true, predicted, color=colors[model], marker=".", ls="none", ms=3, alpha=0.4, label=label)
    axes.set(title="Predicted beside true values on test", xlabel="true value", ylabel="predicted value")
    axes.legend(fontsize=8, loc="upper left")


def _errors(axes: Axes, tests: Mapping[str, Predictions], results: Results, colors: Mapping[str, str]) -> None:
    for model, found in tests.items():
        errors = np.sort(np.abs(found.scores - found.labels).reshape(-1))
        label = f"{model}, mean {_with_interval(results, model, 'mae')}"
        axes.plot(errors, np.arange(1, len(errors) + 1) / len(errors), color=colors[model], label=label)
    axes.set(title="Absolute error on test", xlabel="error", ylabel="share with an error up to it", ylim=(0, 1.03))
    axes.legend(fontsize=8, loc="lower right")


def _bias(axes: Axes, tests: Mapping[str, Predictions], colors: Mapping[str, str]) -> None:
    axes.axhline(0, color="0.6", ls=":")
    for model, found in tests.items():
        true, errors = found.labels.reshape(-1), (found.scores - found.labels).reshape(-1)
        parts = [part for part in np.array_split(np.argsort(true, kind="stable"), 10) if len(part)]
        axes.plot(
            [true[part].mean() for part in parts],
            [errors[part].mean() for part in parts],
            color=colors[model],
            marker="o",
            label=model,
        )
    axes.set(title="Mean error by tenth of the true values", xlabel="true value", ylabel="predicted less true")
    axes.legend(fontsize=8, loc="upper right")


def _layers(axes: Axes, layers: LayerScores, results: Results, colors: Mapping[str, str]) -> None:
    axes.fill_between(
        layers.layers,
        [low for low, _ in layers.intervals],
        [high for _, high in layers.intervals],
        color="0.5",
        alpha=0.2,
        lw=0,
        label="95 % of it, by group",
    )
    axes.plot(layers.layers, layers.test, color="0.2", marker=".", label="linear probe on one layer, test")
    axes.plot(layers.layers, layers.val, color="0.2", ls="--", lw=1, label="validation")
    for model, result in results.items():
        if model in colors:
            axes.axhline(result["test"][layers.metric], color=colors[model], lw=1, label=model)
    metric = "R2" if layers.metric == "r2" else "AUROC"
    axes.set(title=f"Test {metric} by layer, beside the detectors", xlabel="layer", ylabel=metric)
    axes.legend(fontsize=8, loc="lower right")
