"""Predictions of a split, and the figures by which a detector is judged. Exact: computed on all records at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import accuracy_score, f1_score, precision_recall_curve, precision_score, recall_score, roc_auc_score


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """One row a record, padding left out.

    scores: (R,) P(label 1) for two classes, else (R, C) · labels: (R,) integers · loss: mean over the records.
    """

    ids: list[str]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    loss: float

    @property
    def num_classes(self) -> int:
        """2 for a score a record, else the number of columns."""
        return 2 if self.scores.ndim == 1 else self.scores.shape[1]

    def one_against_rest(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Scores and 0/1 labels of each class against the rest, (R, C); for two classes those of class 1 alone, (R, 1)."""
        if self.num_classes == 2:
            return self.scores[:, None], self.labels[:, None]
        return self.scores, np.eye(self.num_classes, dtype=np.int64)[self.labels]


def area_under_roc(found: Predictions) -> float:
    """AUROC; for more than two classes the mean of each class against the rest, of the classes that occur."""
    scores_RC, hits_RC = found.one_against_rest()
    occur = [at for at in range(hits_RC.shape[1]) if 0 < hits_RC[:, at].sum() < len(hits_RC)]
    return float(np.mean([roc_auc_score(hits_RC[:, at], scores_RC[:, at]) for at in occur]))


def best_threshold(found: Predictions) -> float | None:
    """The score from which a record counts as 1, chosen for the highest F1; None for more than two classes."""
    if found.num_classes > 2:
        return None
    precisions, recalls, thresholds = precision_recall_curve(found.labels, found.scores)
    f1 = 2 * precisions * recalls / (precisions + recalls).clip(1e-12)
    return float(thresholds[f1[:-1].argmax()])


def measure(found: Predictions, threshold: float | None) -> dict[str, float]:
    """All METRICS; for more than two classes the highest score decides, and F1, precision, recall are means over classes."""
    if threshold is None:
        chosen, average = found.scores.argmax(axis=1), "macro"
    else:
        chosen, average = (found.scores >= threshold).astype(np.int64), "binary"
    return {
        "auroc": area_under_roc(found),
        "f1": float(f1_score(found.labels, chosen, average=average, zero_division=0)),
        "precision": float(precision_score(found.labels, chosen, average=average, zero_division=0)),
        "recall": float(recall_score(found.labels, chosen, average=average, zero_division=0)),
        "accuracy": float(accuracy_score(found.labels, chosen)),
    }
