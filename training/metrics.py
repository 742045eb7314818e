"""Predictions of a split, and the metrics of a detector, computed exactly on all records at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    precision_recall_curve,
    precision_score,
    recall_score,
    roc_auc_score,
)

Floats = npt.NDArray[Any]
CALIBRATION_BINS = 15


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """Predictions of the R records of a split in file order, without padding.

    Attributes:
        ids: Ids of the records.
        positions: (R,) int64, the records' numbers in their split.
        scores: (R,) probability of label 1 for two classes, otherwise (R, C) float32.
        labels: (R,) int64.
        loss: Mean over the records.
    """

    ids: list[str]
    positions: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    loss: float

    def rows(self, chosen: list[int]) -> Predictions:
        """Return some of the rows; the loss stays that of all."""
        return Predictions(
            ids=[self.ids[row] for row in chosen],
            positions=self.positions[chosen],
            scores=self.scores[chosen],
            labels=self.labels[chosen],
            loss=self.loss,
        )

    @property
    def num_classes(self) -> int:
        """Number of classes: 2 if there is one score per record, otherwise the number of columns."""
        return 2 if self.scores.ndim == 1 else self.scores.shape[1]

    def one_against_rest(self) -> tuple[Floats, Floats]:
        """Return scores and 0/1 labels of each class against the rest, (R, C); for two classes only of class 1, (R, 1)."""
        if self.num_classes == 2:
            return self.scores[:, None], self.labels[:, None]
        return self.scores, np.eye(self.num_classes, dtype=np.int64)[self.labels]

    def chosen(self, threshold: float | None) -> npt.NDArray[np.int64]:
        """Return the predicted class of each record, (R,): 1 from the threshold on; without one, the highest score."""
        classes: npt.NDArray[np.int64] = (
            self.scores.argmax(axis=1) if threshold is None else (self.scores >= threshold).astype(np.int64)
        )
        return classes

    def confidence(self) -> tuple[Floats, Floats]:
        """Return the confidence and whether it is right, (R,) each: of label 1, or of the likeliest of several classes."""
        if self.num_classes == 2:
            return self.scores, self.labels
        return self.scores.max(axis=1), (self.scores.argmax(axis=1) == self.labels).astype(np.int64)


def area_under_roc(found: Predictions) -> float:
    """Return the AUROC; for several classes the mean, over those that occur, of each class against the rest."""
    scores_RC, hits_RC = found.one_against_rest()
    return float(np.mean([roc_auc_score(hits_RC[:, label], scores_RC[:, label]) for label in occurring(hits_RC)]))


def average_precision(found: Predictions) -> float:
    """Return the average precision; for several classes the mean, like `area_under_roc`."""
    scores_RC, hits_RC = found.one_against_rest()
    return float(np.mean([average_precision_score(hits_RC[:, label], scores_RC[:, label]) for label in occurring(hits_RC)]))


def occurring(hits_RC: Floats) -> list[int]:
    """Return the classes that some records have and others have not."""
    return [label for label in range(hits_RC.shape[1]) if 0 < hits_RC[:, label].sum() < len(hits_RC)]


def calibration_bins(confidence_R: Floats) -> npt.NDArray[np.int64]:
    """Return the bin of each record, (R,); there are CALIBRATION_BINS of equal width from 0 to 1."""
    bins: npt.NDArray[np.int64] = (confidence_R * CALIBRATION_BINS).astype(np.int64).clip(0, CALIBRATION_BINS - 1)
    return bins


def expected_calibration_error(found: Predictions) -> float:
    """Return the mean over records of |mean confidence - share of hits| of their bin (Guo et al. 2017)."""
    confidence_R, hits_R = found.confidence()
    gaps = np.bincount(calibration_bins(confidence_R), confidence_R.astype(np.float64) - hits_R, CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(hits_R))


def best_threshold(found: Predictions) -> float | None:
    """Return the threshold on the score with the highest F1; None for more than two classes."""
    if found.num_classes > 2:
        return None
    precisions, recalls, thresholds = precision_recall_curve(found.labels, found.scores)
    f1 = 2 * precisions * recalls / (precisions + recalls).clip(1e-12)
    return float(thresholds[f1[:-1].argmax()])


def measure(found: Predictions, threshold: float | None) -> dict[str, float]:
    """Return all METRICS; for several classes the highest score decides, and all but accuracy and ece are class means."""
    chosen, average = found.chosen(threshold), "macro" if threshold is None else "binary"
    return {
        "auroc": area_under_roc(found),
        "average_precision": average_precision(found),
        "f1": float(f1_score(found.labels, chosen, average=average, zero_division=0)),
        "precision": float(precision_score(found.labels, chosen, average=average, zero_division=0)),
        "recall": float(recall_score(found.labels, chosen, average=average, zero_division=0)),
        "accuracy": float(accuracy_score(found.labels, chosen)),
        "ece": expected_calibration_error(found),
    }
