"""Confidence intervals of the metrics by the bootstrap over groups, computed for all resamples at once.

A resample draws as many groups as there are, with replacement (Efron 1979; by cluster, because the answers to one question are
not independent). It gives each record a weight, how often its group was drawn, and metrics are computed from sums of weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from training.metrics import CALIBRATION_BINS, Predictions, calibration_bins, occurring
from training.randomness import BOOTSTRAP, seed_of

Floats = npt.NDArray[Any]
RESAMPLES = 1000
LEVEL = 0.95
BLOCK = 1 << 22  # weights in memory at a time


def intervals(found: Predictions, groups: Sequence[bytes], threshold: float | None) -> dict[str, list[float]]:
    """Return the 95 % interval [low, high] of each of METRICS. groups: (R,) name of each record's group."""
    parts = [weighted(found, threshold, weights_SR) for weights_SR in resamples(groups)]
    return {name: _interval(np.concatenate([part[name] for part in parts])) for name in parts[0]}


def auroc_interval(found: Predictions, groups: Sequence[bytes]) -> list[float]:
    """Return the 95 % interval of AUROC."""
    return _interval(np.concatenate([weighted_auroc(found, weights_SR) for weights_SR in resamples(groups)]))


def auroc_difference(one: Predictions, other: Predictions, groups: Sequence[bytes]) -> dict[str, Any]:
    """Return the AUROC of `one` minus that of `other` on the same records, with a 95 % interval from the same resamples."""
    everything = np.ones((1, len(groups)))
    point = weighted_auroc(one, everything) - weighted_auroc(other, everything)
    drawn = [weighted_auroc(one, weights) - weighted_auroc(other, weights) for weights in resamples(groups)]
    return {"difference": float(point[0]), "interval": _interval(np.concatenate(drawn))}


def resamples(groups: Sequence[bytes]) -> Iterator[Floats]:
    """Yield RESAMPLES rows of weights (S, R), some at a time; the same for the same groups."""
    # not an array of bytes, because NumPy drops trailing NULs and pads every name to the longest
    names = {group: number for number, group in enumerate(sorted(set(groups)))}
    group_R = np.array([names[group] for group in groups])
    rng = np.random.default_rng(seed_of(BOOTSTRAP))
    rows = max(1, BLOCK // len(group_R))
    for begin in range(0, RESAMPLES, rows):
        size = min(rows, RESAMPLES - begin)
        drawn_SG = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size)
        yield drawn_SG[:, group_R].astype(np.float64)


def weighted(found: Predictions, threshold: float | None, weights_SR: Floats) -> dict[str, Floats]:
    """Return each of METRICS for every row of weights, (S,); NaN if a row draws no record of a class."""
    chosen_R, labels_R = found.chosen(threshold), found.labels
    classes = [1] if threshold is not None else sorted({*labels_R.tolist(), *chosen_R.tolist()})
    true, claimed, real = (
        np.stack([weights_SR @ member.astype(np.float64) for member in members], axis=1)
        for members in (
            [(chosen_R == label) & (labels_R == label) for label in classes],
            [chosen_R == label for label in classes],
            [labels_R == label for label in classes],
        )
    )
    confidence_R, hits_R = found.confidence()
    gaps_RB = np.zeros((len(hits_R), CALIBRATION_BINS))
    gaps_RB[np.arange(len(hits_R)), calibration_bins(confidence_R)] = confidence_R.astype(np.float64) - hits_R
    total_S = weights_SR.sum(axis=1)
    counted = np.full(true.shape, True) if threshold is not None else claimed + real > 0
    return {
        "auroc": weighted_auroc(found, weights_SR),
        "average_precision": weighted_average_precision(found, weights_SR),
        "f1": _mean(2 * true / (claimed + real).clip(1e-12), counted),
        "precision": _mean(true / claimed.clip(1e-12), counted),
        "recall": _mean(true / real.clip(1e-12), counted),
        "accuracy": weights_SR @ (chosen_R == labels_R) / total_S,
        "ece": np.abs(weights_SR @ gaps_RB).sum(axis=1) / total_S,
    }


def weighted_auroc(found: Predictions, weights_SR: Floats) -> Floats:
    """Return the share of pairs of both classes that the score orders correctly, (S,); ties count half. Mean over classes."""
    scores_RC, hits_RC = found.one_against_rest()
    areas = []
    for label in occurring(hits_RC):
        hits_SK, misses_SK = _by_score(scores_RC[:, label], hits_RC[:, label], weights_SR)
        below_SK = np.cumsum(misses_SK, axis=1) - misses_SK / 2
        with np.errstate(invalid="ignore"):
            areas.append((hits_SK * below_SK).sum(axis=1) / (hits_SK.sum(axis=1) * misses_SK.sum(axis=1)))
    areas_SC = np.stack(areas, axis=1)
    return _mean(areas_SC, np.isfinite(areas_SC))


def weighted_average_precision(found: Predictions, weights_SR: Floats) -> Floats:
    """Return the mean precision at the scores of a class's records, (S,). Mean over classes."""
    scores_RC, hits_RC = found.one_against_rest()
    means = []
    for label in occurring(hits_RC):
        hits_SK, misses_SK = (weights[:, ::-1] for weights in _by_score(scores_RC[:, label], hits_RC[:, label], weights_SR))
        found_SK, all_SK = np.cumsum(hits_SK, axis=1), np.cumsum(hits_SK + misses_SK, axis=1)
        with np.errstate(invalid="ignore"):
            means.append((hits_SK * found_SK / all_SK.clip(1e-12)).sum(axis=1) / hits_SK.sum(axis=1))
    means_SC = np.stack(means, axis=1)
    return _mean(means_SC, np.isfinite(means_SC))


def _by_score(scores_R: Floats, hits_R: Floats, weights_SR: Floats) -> tuple[Floats, Floats]:
    """Return the weights of hits and of misses at each distinct score, lowest first: (S, K) each."""
    order = np.argsort(scores_R, kind="stable")
    first = np.flatnonzero(np.diff(scores_R[order], prepend=-np.inf))
    sorted_SR, hits = weights_SR[:, order], hits_R[order].astype(np.float64)
    hits_SK, misses_SK = (np.add.reduceat(sorted_SR * members, first, axis=1) for members in (hits, 1 - hits))
    return hits_SK, misses_SK


def _mean(values_SC: Floats, counted_SC: Floats) -> Floats:
    """Return the mean over the classes that count in each row, (S,); NaN if none does."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(counted_SC, values_SC, 0).sum(axis=1) / counted_SC.sum(axis=1))


def _interval(values_S: Floats) -> list[float]:
    values_S = values_S[np.isfinite(values_S)]
    if not len(values_S):
        return [float("nan")] * 2
    low, high = np.quantile(values_S, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]
