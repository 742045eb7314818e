"""Predictions of a split, and the figures by which a detector is judged. Exact: computed on all records at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.metrics import precision_recall_curve
from torchmetrics.functional.classification import auroc, f1_score, precision, recall


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """One row a record, padding left out. scores: (R,) P(label 1) for two classes, else (R, C) · labels: (R,) int64."""

    ids: list[str]
    scores: torch.Tensor
    labels: torch.Tensor
    loss: float

    @property
    def num_classes(self) -> int:
        """2 for a score a record, else the number of columns."""
        return 2 if self.scores.ndim == 1 else self.scores.shape[1]


def area_under_roc(found: Predictions) -> float:
    """AUROC; for more than two classes the mean of each class against the rest (classes that do not occur left out)."""
    if found.num_classes == 2:
        return float(auroc(found.scores, found.labels, task="binary"))
    each = auroc(found.scores, found.labels, task="multiclass", num_classes=found.num_classes, average="none")
    occurs = torch.bincount(found.labels, minlength=found.num_classes) > 0
    return float(each[occurs].mean())


def best_threshold(found: Predictions) -> float | None:
    """The score from which a record counts as 1, chosen for the highest F1; None for more than two classes."""
    if found.num_classes > 2:
        return None
    precisions, recalls, thresholds = precision_recall_curve(found.labels.numpy(), found.scores.numpy())
    f1 = 2 * precisions * recalls / (precisions + recalls).clip(1e-12)
    return float(thresholds[f1[:-1].argmax()])


def measure(found: Predictions, threshold: float | None) -> dict[str, float]:
    """All METRICS; for more than two classes the highest score decides, and F1, precision, recall are means over classes."""
    if threshold is None:
        classes = {"task": "multiclass", "num_classes": found.num_classes, "average": "macro"}
        chosen = found.scores.argmax(dim=1)
    else:
        classes = {"task": "binary"}
        chosen = (found.scores >= threshold).long()
    return {
        "auroc": area_under_roc(found),
        "f1": float(f1_score(chosen, found.labels, **classes)),
        "precision": float(precision(chosen, found.labels, **classes)),
        "recall": float(recall(chosen, found.labels, **classes)),
        "accuracy": float((chosen == found.labels).float().mean()),
    }
