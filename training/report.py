"""What a run leaves for people: history.csv and curves.png."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from dali_pipeline.shard import write_whole
from training.metrics import Predictions
from training.trainer import HistoryRow

HISTORY_COLUMNS = ("model", "epoch", "train_loss", "val_loss", "val_auroc", "lr", "seconds")


def write_history(path: Path, histories: Mapping[str, Sequence[HistoryRow]]) -> None:
    """history.csv: a row a model and epoch, written anew each time, so none is ever lost or doubled."""
    text = io.StringIO()
    rows = csv.DictWriter(text, HISTORY_COLUMNS)
    rows.writeheader()
    for model, history in histories.items():
        rows.writerows({"model": model, **row} for row in history)
    write_whole(path, text.getvalue().encode())


def draw_curves(
    path: Path, histories: Mapping[str, Sequence[HistoryRow]], tests: Mapping[str, Predictions], title: str
) -> None:
    """curves.png: loss and validation AUROC by epoch; ROC and precision-recall on test, micro-averaged for several classes."""
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    figure.suptitle(title)
    (loss, auroc), (roc, pr) = figure.subplots(2, 2)
    for number, (model, history) in enumerate(histories.items()):
        color, epochs = f"C{number}", [row["epoch"] + 1 for row in history]
        loss.plot(epochs, [row["train_loss"] for row in history], color=color, marker=".", label=f"{model}, training")
        loss.plot(
            epochs, [row["val_loss"] for row in history], color=color, marker=".", linestyle="--", label=f"{model}, validation"
        )
        scores = [row["val_auroc"] for row in history]
        auroc.plot(epochs, scores, color=color, marker=".", label=model)
        best = int(np.argmax(scores))
        auroc.plot(epochs[best], scores[best], color=color, marker="o", markersize=10, fillstyle="none")
    for number, (model, found) in enumerate(tests.items()):
        scores_R, hits_R = (part.flatten() for part in found.one_against_rest())
        false_rate, true_rate, _ = roc_curve(hits_R, scores_R)
        precision, recall, _ = precision_recall_curve(hits_R, scores_R)
        roc.plot(false_rate, true_rate, color=f"C{number}", label=f"{model}, area {roc_auc_score(hits_R, scores_R):.3f}")
        area = average_precision_score(hits_R, scores_R)
        pr.plot(recall, precision, color=f"C{number}", label=f"{model}, average precision {area:.3f}")
        pr.axhline(hits_R.mean(), color="0.7", linestyle=":")
    roc.plot([0, 1], [0, 1], color="0.7", linestyle=":")
    loss.set(title="Loss by epoch (gvae_lstm: with reconstruction)", xlabel="epoch", ylabel="loss")
    auroc.set(title="Validation AUROC by epoch (circle: the epoch kept)", xlabel="epoch", ylabel="AUROC")
    roc.set(title="ROC on test", xlabel="false positive rate", ylabel="true positive rate")
    pr.set(title="Precision and recall on test", xlabel="recall", ylabel="precision", ylim=(0, 1.02))
    for axes in (loss, auroc, roc, pr):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    for axes in (loss, auroc):
        axes.xaxis.get_major_locator().set_params(integer=True)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    temporary.replace(path)
