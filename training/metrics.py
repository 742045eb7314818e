"""Predictions of a split, and the figures by which a detector is judged. Exact: computed on all records at once."""

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
    """One row a record, padding left out, in file order.

    positions: (R,) the records' numbers in their split · scores: (R,) P(label 1) for two classes, else (R, C) · labels: (R,)
    integers · loss: mean over the records.
    """

    ids: list[str]
    positions: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    loss: float

    def rows(self, chosen: list[int]) -> Predictions:
        """These rows alone; the loss stays that of all."""
        return Predictions(
            ids=[self.ids[at] for at in chosen],
            positions=self.positions[chosen],
            scores=self.scores[chosen],
            labels=self.labels[chosen],
            loss=self.loss,
        )

    @property
    def num_classes(self) -> int:
        """2 for a score a record, else the number of columns."""
        return 2 if self.scores.ndim == 1 else self.scores.shape[1]

    def one_against_rest(self) -> tuple[Floats, Floats]:
        """Scores and 0/1 labels of each class against the rest, (R, C); for two classes those of class 1 alone, (R, 1)."""
        if self.num_classes == 2:
            return self.scores[:, None], self.labels[:, None]
        return self.scores, np.eye(self.num_classes, dtype=np.int64)[self.labels]

    def chosen(self, threshold: float | None) -> npt.NDArray[np.int64]:
        """The class that each record is taken for, (R,): 1 from the threshold on; the highest score where there is none."""
        found: npt.NDArray[np.int64] = (
            self.scores.argmax(axis=1) if threshold is None else (self.scores >= threshold).astype(np.int64)
        )
        return found

    def confidence(self) -> tuple[Floats, Floats]:
        """What calibration compares, (R,) each: P(label 1) and whether it is; for several classes P(the likeliest) likewise."""
        if self.num_classes == 2:
            return self.scores, self.labels
        return self.scores.max(axis=1), (self.scores.argmax(axis=1) == self.labels).astype(np.int64)


def area_under_roc(found: Predictions) -> float:
    """AUROC; for more than two classes the mean of each class against the rest, of the classes that occur."""
    scores_RC, hits_RC = found.one_against_rest()
    return float(np.mean([roc_auc_score(hits_RC[:, at], scores_RC[:, at]) for at in occurring(hits_RC)]))


def average_precision(found: Predictions) -> float:
    """Average precision, likewise."""
    scores_RC, hits_RC = found.one_against_rest()
    return float(np.mean([average_precision_score(hits_RC[:, at], scores_RC[:, at]) for at in occurring(hits_RC)]))


def occurring(hits_RC: Floats) -> list[int]:
    """The classes of which there are records, and records that are not."""
    return [at for at in range(hits_RC.shape[1]) if 0 < hits_RC[:, at].sum() < len(hits_RC)]


def calibration_bins(confidence_R: Floats) -> npt.NDArray[np.int64]:
    """The bin of each record, (R,): CALIBRATION_BINS of equal width from 0 to 1."""
    found: npt.NDArray[np.int64] = (confidence_R * CALIBRATION_BINS).astype(np.int64).clip(0, CALIBRATION_BINS - 1)
    return found


def expected_calibration_error(found: Predictions) -> float:
    """Mean over records of |mean confidence - share of hits| of their bin (Guo et al. 2017)."""
    confidence_R, hits_R = found.confidence()
    gaps = np.bincount(calibration_bins(confidence_R), confidence_R.astype(np.float64) - hits_R, CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(hits_R))


def best_threshold(found: Predictions) -> float | None:
    """The score from which a record counts as 1, chosen for the highest F1; None for more than two classes."""
    if found.num_classes > 2:
        return None
    precisions, recalls, thresholds = precision_recall_curve(found.labels, found.scores)
    f1 = 2 * precisions * recalls / (precisions + recalls).clip(1e-12)
    return float(thresholds[f1[:-1].argmax()])


def measure(found: Predictions, threshold: float | None) -> dict[str, float]:
    """All METRICS; for more than two classes the highest score decides, and all but accuracy and ece are means over classes."""
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
