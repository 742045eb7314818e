from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

from training.config import METRICS
from training.intervals import RESAMPLES, difference, intervals, resamples, weighted
from training.metrics import Predictions, area_under_roc, best_threshold, measure
from training.trainer import best_row


def predictions(scores: Any, labels: Any) -> Predictions:
    return Predictions(
        task="binary" if np.ndim(scores) == 1 else "multiclass",
        counts=np.ones(len(labels), np.int64),
        ids=[str(at) for at in range(len(labels))],
        positions=np.arange(len(labels)),
        scores=np.asarray(scores),
        labels=np.asarray(labels),
        loss=0.0,
    )


def two_classes(records: int = 200) -> Predictions:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, records)
    return predictions(np.clip(rng.normal(labels * 0.3 + 0.3, 0.3), 0, 1).round(2).astype(np.float32), labels)  # with ties


def three_classes(records: int = 200) -> Predictions:
    rng = np.random.default_rng(1)
    classes = rng.integers(0, 3, records)
    logits = rng.normal(size=(records, 3)) + 2 * np.eye(3)[classes]
    return predictions((np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32), classes)


def test_metrics_are_those_of_scikit_learn() -> None:
    found = two_classes()
    scores, labels = found.scores, found.labels
    threshold = best_threshold(found)
    assert threshold is not None
    measured = measure(found, threshold)
    assert measured["auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    assert measured["f1"] == pytest.approx(f1_score(labels, scores >= threshold), abs=1e-6)
    assert measured["f1"] >= max(f1_score(labels, scores >= other) for other in np.linspace(0.05, 0.95, 19)) - 1e-6
    several = three_classes()
    assert area_under_roc(several) == pytest.approx(roc_auc_score(several.labels, several.scores, multi_class="ovr"), abs=1e-5)
    chosen = several.scores.argmax(1)
    assert measure(several, None)["f1"] == pytest.approx(f1_score(several.labels, chosen, average="macro"), abs=1e-6)


def test_calibration_error_by_hand() -> None:
    """Bins of a fifteenth: 0.9 says three are so and two are, 0.1 says none of two is and one is."""
    found = predictions(np.array([0.9, 0.9, 0.9, 0.1, 0.1], np.float32), np.array([1, 1, 0, 1, 0]))
    assert measure(found, 0.5)["ece"] == pytest.approx((3 * abs(0.9 - 2 / 3) + 2 * abs(0.1 - 1 / 2)) / 5, abs=1e-6)
    sure = predictions(np.array([[0.9, 0.05, 0.05], [0.9, 0.05, 0.05]], np.float32), np.array([0, 1]))
    assert measure(sure, None)["ece"] == pytest.approx(abs(0.9 - 0.5), abs=1e-6)


@pytest.mark.parametrize(("found", "threshold"), [(two_classes(), 0.4), (three_classes(), None)])
def test_weighted_metrics_are_those_of_scikit_learn_on_repeated_records(found: Predictions, threshold: float | None) -> None:
    """A weight of three is a record three times: what the bootstrap computes is what a resample would measure."""
    rng = np.random.default_rng(2)
    weights = rng.integers(0, 4, (5, len(found.labels))).astype(float)
    everything = weighted(found, threshold, np.ones((1, len(found.labels))))
    plain = measure(found, threshold)
    assert set(plain) == set(METRICS) == set(everything)
    for name in METRICS:
        assert everything[name][0] == pytest.approx(plain[name], abs=1e-6), name
    many = weighted(found, threshold, weights)
    for row, weight in enumerate(weights.astype(int)):
        again = found.rows(np.repeat(np.arange(len(weight)), weight).tolist())
        for name, value in measure(again, threshold).items():
            assert many[name][row] == pytest.approx(value, abs=1e-6), name


def test_scikit_learn_takes_the_same_weights() -> None:
    found, weight = two_classes(), np.random.default_rng(3).random(200)
    mine, chosen = {name: values[0] for name, values in weighted(found, 0.4, weight[None]).items()}, found.chosen(0.4)
    options = {"sample_weight": weight}
    assert mine["auroc"] == pytest.approx(roc_auc_score(found.labels, found.scores, **options))
    assert mine["average_precision"] == pytest.approx(average_precision_score(found.labels, found.scores, **options))
    for name, score in (
        ("f1", f1_score),
        ("precision", precision_score),
        ("recall", recall_score),
        ("accuracy", accuracy_score),
    ):
        assert mine[name] == pytest.approx(score(found.labels, chosen, **options)), name


def test_resamples_draw_whole_groups() -> None:
    groups = [b"a", b"b", b"a", b"c", b"c", b"c"]
    weights = np.concatenate(list(resamples(groups)))
    assert weights.shape == (RESAMPLES, 6)
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 3] == weights[:, 5]).all()
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()
    assert set(np.unique(weights)) == {0, 1, 2, 3}


def test_groups_are_told_apart_whatever_their_names() -> None:
    """NumPy's arrays of bytes would drop trailing NULs, and make all names as long as the longest."""
    names = [b"q", b"q\0", b"q\0\0", b"\0", b"", b"q" * 3_000_000, *(b"%d" % number for number in range(200))]
    weights = np.concatenate(list(resamples(names)))
    assert (weights.sum(axis=1) == len(names)).all()  # as many groups are drawn as there are records
    assert len(np.unique(weights, axis=1).T) == len(names)


def test_intervals_hold_the_figure_and_narrow_with_more_groups() -> None:
    found = two_classes()
    by_record = intervals(found, [str(at).encode() for at in range(200)], 0.4)
    by_ten = intervals(found, [str(at // 10).encode() for at in range(200)], 0.4)
    plain = measure(found, 0.4)
    for name in ("auroc", "average_precision", "f1", "precision", "recall", "accuracy"):
        assert by_record[name][0] < plain[name] < by_record[name][1], name
    four_times = found.rows(list(range(200)) * 4)
    narrow = intervals(four_times, [str(at).encode() for at in range(800)], 0.4)["auroc"]
    wide = by_record["auroc"]
    assert (narrow[1] - narrow[0]) == pytest.approx((wide[1] - wide[0]) / 2, rel=0.2)
    # the same records four times under the same names are no more evidence
    same = intervals(four_times, [str(at % 200).encode() for at in range(800)], 0.4)["auroc"]
    assert same == pytest.approx(wide, abs=1e-9)
    assert by_ten["auroc"] != wide
    gain = difference([found], [found], [str(at).encode() for at in range(200)])
    assert gain == {"difference": 0.0, "metric": "AUROC", "interval": [0.0, 0.0]}


def test_the_best_epoch_ranks_best_and_then_loses_least() -> None:
    """An early epoch may rank a few records rightly and call all of them one class."""
    rows = [
        {"epoch": number, "val_auroc": auroc, "val_loss": loss}
        for number, (auroc, loss) in enumerate([(0.9, 0.1), (1.0, 1.06), (1.0, 0.06), (1.0, 0.06), (np.nan, 0.0)])
    ]
    assert best_row(rows)["epoch"] == 2
    assert best_row(rows[:2])["epoch"] == 1
    assert best_row(rows[4:])["epoch"] == 4
