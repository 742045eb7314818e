"""Predictions of a split, and the metrics of a detector, computed exactly on all records at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from training.config import Task

Floats = npt.NDArray[Any]
Threshold = float | list[float] | None
CALIBRATION_BINS = 15
RECALL = 0.95  # the share of hits that fpr95 finds


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """Predictions of the R records of a split in file order, without padding; M rows: a record, or each of its steps or nodes.

    Attributes:
        task: The task.
        ids: Ids of the records.
        positions: (R,) int64, the records' numbers in their split.
        counts: (R,) int64, rows of each record.
        scores: (M,) probability of label 1 of two classes, (M, C) of each of several, (M, K) of each label; (M, K) float64
            values.
        labels: (M,) int64 classes, below 0 where not known; (M, K) int64 of labels; (M, K) float64 values, NaN where not known.
        loss: Mean over the records.
        level: What a row is: "record", "step" or "node".
    """

    task: Task
    ids: list[str]
    positions: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    labels: Floats
    loss: float
    level: str = "record"

    @classmethod
    def join(cls, parts: Sequence[Predictions]) -> Predictions:
        """Return the predictions of several batches as one, in their order; the loss stays that of the first."""
        return replace(
            parts[0],
            ids=[id_ for part in parts for id_ in part.ids],
            positions=np.concatenate([part.positions for part in parts]),
            counts=np.concatenate([part.counts for part in parts]),
            scores=np.concatenate([part.scores for part in parts]),
            labels=np.concatenate([part.labels for part in parts]),
        )

    def rows(self, chosen: Sequence[int]) -> Predictions:
        """Return some of the records, in the order given; the loss stays that of all."""
        begins, picked = np.cumsum(self.counts) - self.counts, np.asarray(chosen, np.int64)
        counts = self.counts[picked]
        rows = np.repeat(begins[picked] - np.cumsum(counts) + counts, counts) + np.arange(int(counts.sum()))
        return replace(
            self,
            ids=[self.ids[row] for row in picked.tolist()],
            positions=self.positions[picked],
            counts=counts,
            scores=self.scores[rows],
            labels=self.labels[rows],
        )

    def known(self) -> Predictions:
        """Return the rows whose target is known: no class below 0, no NaN."""
        known_MK: Floats = self.labels >= 0 if self.task != "regression" else np.isfinite(self.labels)
        return self.where(np.all(known_MK, axis=tuple(range(1, known_MK.ndim))))

    def where(self, kept_M: Any) -> Predictions:
        """Return some of the rows, of all records."""
        if kept_M.all():
            return self
        record_M = np.repeat(np.arange(len(self.counts)), self.counts)
        counts = np.bincount(record_M[kept_M], minlength=len(self.counts))
        return replace(self, counts=counts, scores=self.scores[kept_M], labels=self.labels[kept_M])

    def of_rows(self, groups: Sequence[bytes]) -> list[bytes]:
        """Return the group of every row from those of the records."""
        if (self.counts == 1).all():
            return list(groups)
        return [group for group, count in zip(groups, self.counts.tolist(), strict=True) for _ in range(count)]

    def one_against_rest(self) -> tuple[Floats, Floats]:
        """Return scores and 0/1 labels of each class against the rest, or of each label, (M, C); of two classes (M, 1)."""
        if self.task == "binary":
            return self.scores[:, None], self.labels[:, None]
        if self.task == "multilabel":
            return self.scores, self.labels
        return self.scores, np.eye(self.scores.shape[1], dtype=np.int64)[self.labels]

    def chosen(self, threshold: Threshold) -> npt.NDArray[np.int64]:
        """Return the predicted class of each row, (M,): 1 from the threshold on, the highest score; or labels, (M, K)."""
        classes: npt.NDArray[np.int64] = (
            self.scores.argmax(axis=1)
            if self.task == "multiclass"
            else (self.scores >= np.asarray(threshold, np.float64)).astype(np.int64)
        )
        return classes

    def decisions(self, threshold: Threshold) -> tuple[Floats, Floats]:
        """Return what was chosen and what is so, (M, C) bool: of class 1, of each class that occurs or is chosen, or label."""
        chosen, labels = self.chosen(threshold), self.labels
        if self.task == "multilabel":
            return chosen == 1, labels == 1
        classes = [1] if self.task == "binary" else sorted({*labels.tolist(), *chosen.tolist()})
        return (np.stack([given == number for number in classes], axis=1) for given in (chosen, labels))  # type: ignore[return-value]

    def confidence(self) -> tuple[Floats, Floats]:
        """Return the confidence and whether it is right, (M', C) each: of label 1, of the likeliest class, or of each label."""
        if self.task == "multiclass":
            return self.scores.max(axis=1)[:, None], (self.scores.argmax(axis=1) == self.labels).astype(np.int64)[:, None]
        return self.one_against_rest()


def area_under_roc(found: Predictions) -> float:
    """Return the AUROC; for several classes or labels the mean, over those that occur, of each against the rest."""
    scores_MC, hits_MC = found.one_against_rest()
    return _class_mean([float(roc_auc_score(hits_MC[:, one], scores_MC[:, one])) for one in occurring(hits_MC)])


def average_precision(found: Predictions) -> float:
    """Return the average precision; for several classes or labels the mean, like `area_under_roc`."""
    scores_MC, hits_MC = found.one_against_rest()
    return _class_mean([float(average_precision_score(hits_MC[:, one], scores_MC[:, one])) for one in occurring(hits_MC)])


def false_positive_rate(found: Predictions) -> float:
    """Return the share of misses scored as high as the best 95 % of hits; for several classes or labels the mean."""
    scores_MC, hits_MC = found.one_against_rest()
    rates = []
    for one in occurring(hits_MC):
        false, true, _ = roc_curve(hits_MC[:, one], scores_MC[:, one], drop_intermediate=False)
        rates.append(float(false[np.argmax(true >= RECALL)]))
    return _class_mean(rates)


def _class_mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def occurring(hits_MC: Floats) -> list[int]:
    """Return the classes that some rows have and others have not."""
    return [label for label in range(hits_MC.shape[1]) if 0 < hits_MC[:, label].sum() < len(hits_MC)]


def calibration_bins(confidence: Floats) -> npt.NDArray[np.int64]:
    """Return the bin of each confidence; there are CALIBRATION_BINS of equal width from 0 to 1."""
    bins: npt.NDArray[np.int64] = (confidence * CALIBRATION_BINS).astype(np.int64).clip(0, CALIBRATION_BINS - 1)
    return bins


def expected_calibration_error(found: Predictions) -> float:
    """Return the mean of |mean confidence - share of hits| of each one's bin (Guo et al. 2017)."""
    confidence, hits = (values.reshape(-1) for values in found.confidence())
    gaps = np.bincount(calibration_bins(confidence), confidence.astype(np.float64) - hits, CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(hits))


def best_threshold(found: Predictions) -> Threshold:
    """Return the threshold on the score with the highest F1; one for each label of several; None for other tasks."""
    if found.task not in ("binary", "multilabel"):
        return None
    scores_MC, hits_MC = found.one_against_rest()
    best = []
    for scores, hits in zip(scores_MC.T, hits_MC.T, strict=True):
        precisions, recalls, thresholds = precision_recall_curve(hits, scores) if hits.any() else ([1.0, 1], [0.0, 0], [np.inf])
        precisions, recalls = np.asarray(precisions), np.asarray(recalls)
        f1 = 2 * precisions * recalls / (precisions + recalls).clip(1e-12)
        best.append(float(thresholds[f1[:-1].argmax()]))
    return best[0] if found.task == "binary" else best


def measure(found: Predictions, threshold: Threshold = None) -> dict[str, float]:
    """Return all metrics of the task on the rows whose target is known.

    With several classes, the class with the highest score is the prediction. With several classes or labels, every metric
    except accuracy and ece is the mean of the values for each class or label. If a value has several numbers, every metric is
    the mean of the values for each number.
    """
    found = found.known()
    if found.task == "regression":
        return measure_values(found.scores.astype(np.float64), found.labels.astype(np.float64))
    claimed, real = found.decisions(threshold)
    true = (claimed & real).sum(axis=0)
    right = found.chosen(threshold) == found.labels
    return {
        "auroc": area_under_roc(found),
        "average_precision": average_precision(found),
        "f1": float(np.mean(2 * true / (claimed.sum(axis=0) + real.sum(axis=0)).clip(1))),
        "precision": float(np.mean(true / claimed.sum(axis=0).clip(1))),
        "recall": float(np.mean(true / real.sum(axis=0).clip(1))),
        "accuracy": float(right.mean()),
        "ece": expected_calibration_error(found),
        "fpr95": false_positive_rate(found),
    }


def measure_values(values_MK: Floats, true_MK: Floats) -> dict[str, float]:
    """Return VALUE_METRICS, each the mean over the numbers of a value; NaN if nothing varies."""
    errors_MK = values_MK - true_MK
    with np.errstate(invalid="ignore", divide="ignore"):
        shares_K = 1 - (errors_MK**2).sum(axis=0) / ((true_MK - true_MK.mean(axis=0)) ** 2).sum(axis=0)
        correlations = [
            np.corrcoef(ranks(values), ranks(true))[0, 1] for values, true in zip(values_MK.T, true_MK.T, strict=True)
        ]
    return {
        "mae": float(np.abs(errors_MK).mean()),
        "rmse": float(np.sqrt((errors_MK**2).mean(axis=0)).mean()),
        "r2": float(shares_K.mean()),
        "spearman": float(np.mean(correlations)),
    }


def ranks(values_M: Floats) -> Floats:
    """Return the rank of each value, (M,); equal ones share their mean rank."""
    _, inverse_M, counts = np.unique(values_M, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - counts / 2)[inverse_M])


def main_metric(found: Predictions) -> float:
    """Return the metric that chooses the best epoch: AUROC, or of values R squared."""
    found = found.known()
    if found.task == "regression":
        return measure_values(found.scores.astype(np.float64), found.labels.astype(np.float64))["r2"]
    return area_under_roc(found)
