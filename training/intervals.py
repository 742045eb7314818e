"""Confidence intervals of the metrics by the bootstrap over groups, computed for all resamples at once.

A resample draws as many groups as there are, with replacement (Efron 1979; by cluster, because the answers to one question are
not independent). It gives each row a weight, how often its group was drawn, and metrics are computed from sums of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from training.config import VALUE_METRICS
from training.metrics import CALIBRATION_BINS, RECALL, Predictions, Threshold, calibration_bins, occurring
from training.randomness import BOOTSTRAP, seed_of

Floats = npt.NDArray[Any]
RESAMPLES, FEWEST = 1000, 100
MOST_WEIGHTS = 200_000_000  # of all resamples together; many rows need fewer resamples, and take a tenth of a second each
LEVEL = 0.95
BLOCK = 1 << 22  # weights in memory at a time


def intervals(found: Predictions, groups: Sequence[bytes], threshold: Threshold) -> dict[str, list[float]]:
    """Return the 95 % interval [low, high] of each metric of the task. groups: (R,) name of each record's group."""
    found = found.known()
    parts = [weighted(found, threshold, weights_SM) for weights_SM in resamples(found.of_rows(groups))]
    return {name: _interval(np.concatenate([part[name] for part in parts])) for name in parts[0]}


def main_interval(found: Predictions, groups: Sequence[bytes]) -> list[float]:
    """Return the 95 % interval of the metric that chooses the best epoch."""
    found = found.known()
    return _interval(np.concatenate([weighted_main(found, weights_SM) for weights_SM in resamples(found.of_rows(groups))]))


def difference(ones: Sequence[Predictions], others: Sequence[Predictions], groups: Sequence[bytes]) -> dict[str, Any]:
    """Return the main metric of one detector minus that of another on the same records, with a 95 % interval.

    Args:
        ones: Predictions of the one, of each training; all on the same records in the same order.
        others: Of the other, of the same trainings; or of one, which then stands beside each.
        groups: (R,) name of each record's group.

    Returns:
        `difference`, the mean over trainings; `interval`, from resamples of the groups, the same for both detectors, and of
        the trainings (with one, of the groups alone); `std` of the differences over trainings, if there are several.
    """
    ones, others = [one.known() for one in ones], [other.known() for other in others]
    pairs = [(one, others[min(number, len(others) - 1)]) for number, one in enumerate(ones)]
    rows = ones[0].of_rows(groups)
    everything = np.ones((1, len(rows)))
    gains_P = np.array([float((weighted_main(one, everything) - weighted_main(other, everything))[0]) for one, other in pairs])
    rng, drawn = np.random.default_rng(seed_of(BOOTSTRAP, len(pairs))), []
    for weights_SM in resamples(rows):
        gains_SP = np.stack([weighted_main(one, weights_SM) - weighted_main(other, weights_SM) for one, other in pairs], axis=1)
        shares_SP = rng.multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), len(weights_SM)) / len(pairs)
        drawn.append((gains_SP * shares_SP).sum(axis=1))
    metric = "R2" if ones[0].task == "regression" else "AUROC"
    found = {"difference": float(gains_P.mean()), "metric": metric, "interval": _interval(np.concatenate(drawn))}
    return found if len(pairs) == 1 else {**found, "std": float(gains_P.std(ddof=1)), "trainings": len(pairs)}


def over_trainings(
    trainings: Sequence[Predictions], groups: Sequence[bytes], metrics: Sequence[str] = ("auroc", "average_precision", "fpr95")
) -> dict[str, dict[str, Any]]:
    """Return metrics as means over several trainings, with 95 % intervals from resamples of the groups and the trainings.

    Args:
        trainings: Predictions of each training; all on the same records in the same order.
        groups: (R,) name of each record's group.
        metrics: Names of metrics of a task with classes that need no threshold.

    Returns:
        By metric `mean`, `interval`, and `std` over trainings, 0 of one.
    """
    known = [training.known() for training in trainings]
    rows = known[0].of_rows(groups)
    compute: dict[str, Callable[[Predictions, Floats], Floats]] = {
        "auroc": weighted_auroc,
        "average_precision": weighted_average_precision,
        "fpr95": weighted_false_positive_rate,
    }
    found: dict[str, dict[str, Any]] = {}
    for metric in metrics:
        values_P = np.array([float(compute[metric](own, np.ones((1, len(rows))))[0]) for own in known])
        rng, drawn = np.random.default_rng(seed_of(BOOTSTRAP, len(known))), []
        for weights_SM in resamples(rows):
            values_SP = np.stack([compute[metric](own, weights_SM) for own in known], axis=1)
            shares_SP = rng.multinomial(len(known), np.full(len(known), 1 / len(known)), len(weights_SM)) / len(known)
            drawn.append((values_SP * shares_SP).sum(axis=1))
        std = float(values_P.std(ddof=1)) if len(known) > 1 else 0.0
        found[metric] = {"mean": float(values_P.mean()), "interval": _interval(np.concatenate(drawn)), "std": std}
    return found


def resamples(groups: Sequence[bytes]) -> Iterator[Floats]:
    """Yield rows of weights (S, M), some at a time; the same for the same groups.

    There are RESAMPLES rows in all, of more than 200,000 rows of scores fewer, at least FEWEST: minutes instead of an hour.
    """
    # not an array of bytes, because NumPy drops trailing NULs and pads every name to the longest
    names = {group: number for number, group in enumerate(sorted(set(groups)))}
    group_M = np.array([names[group] for group in groups])
    rng = np.random.default_rng(seed_of(BOOTSTRAP))
    rows = max(1, BLOCK // len(group_M))
    number = max(FEWEST, min(RESAMPLES, MOST_WEIGHTS // len(group_M)))
    for begin in range(0, number, rows):
        size = min(rows, number - begin)
        drawn_SG = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size)
        yield drawn_SG[:, group_M].astype(np.float64)


def weighted(found: Predictions, threshold: Threshold, weights_SM: Floats) -> dict[str, Floats]:
    """Return each metric of the task for every row of weights, (S,); NaN if a row draws nothing that a metric needs."""
    if found.task == "regression":
        return weighted_values(found.scores.astype(np.float64), found.labels.astype(np.float64), weights_SM)
    claimed_MC, real_MC = found.decisions(threshold)
    true, claimed, real = (weights_SM @ both.astype(np.float64) for both in (claimed_MC & real_MC, claimed_MC, real_MC))
    confidence, hits = found.confidence()
    width = confidence.shape[1]
    bins, gaps_MB = calibration_bins(confidence), np.zeros((len(hits), CALIBRATION_BINS))
    for number in range(width):
        gaps_MB[np.arange(len(hits)), bins[:, number]] += confidence[:, number].astype(np.float64) - hits[:, number]
    total_S = weights_SM.sum(axis=1)
    right_M = (found.chosen(threshold) == found.labels).reshape(len(found.labels), -1).mean(axis=1)
    counted = claimed + real > 0 if found.task == "multiclass" else np.full(true.shape, True)
    return {
        "auroc": weighted_auroc(found, weights_SM),
        "average_precision": weighted_average_precision(found, weights_SM),
        "f1": _mean(2 * true / (claimed + real).clip(1e-12), counted),
        "precision": _mean(true / claimed.clip(1e-12), counted),
        "recall": _mean(true / real.clip(1e-12), counted),
        "accuracy": weights_SM @ right_M / total_S,
        "ece": np.abs(weights_SM @ gaps_MB).sum(axis=1) / (total_S * width),
        "fpr95": weighted_false_positive_rate(found, weights_SM),
    }


def weighted_main(found: Predictions, weights_SM: Floats) -> Floats:
    """Return the metric that chooses the best epoch for every row of weights, (S,)."""
    if found.task == "regression":
        return weighted_values(found.scores.astype(np.float64), found.labels.astype(np.float64), weights_SM, ("r2",))["r2"]
    return weighted_auroc(found, weights_SM)


def weighted_values(
    values_MK: Floats, true_MK: Floats, weights_SM: Floats, names: Sequence[str] = VALUE_METRICS
) -> dict[str, Floats]:
    """Return some of VALUE_METRICS for every row of weights, (S,), each the mean over the numbers of a value."""
    errors_MK, total_S1 = values_MK - true_MK, weights_SM.sum(axis=1, keepdims=True)
    squares_SK = weights_SM @ errors_MK**2
    centred_MK = true_MK - true_MK.mean(axis=0)  # so that squares of large values keep their digits
    spread_SK = weights_SM @ centred_MK**2 - (weights_SM @ centred_MK) ** 2 / total_S1
    found: dict[str, Floats] = {}
    with np.errstate(invalid="ignore", divide="ignore"):
        if "mae" in names:
            found["mae"] = (weights_SM @ np.abs(errors_MK) / total_S1).mean(axis=1)
        if "rmse" in names:
            found["rmse"] = np.sqrt(squares_SK / total_S1).mean(axis=1)
        if "r2" in names:
            found["r2"] = (1 - squares_SK / spread_SK).mean(axis=1)
        if "spearman" in names:
            columns = [
                _correlation(_ranks(values, weights_SM), _ranks(true, weights_SM), weights_SM)
                for values, true in zip(values_MK.T, true_MK.T, strict=True)
            ]
            found["spearman"] = np.mean(columns, axis=0)
    return found


def _ranks(values_M: Floats, weights_SM: Floats) -> Floats:
    """Return the mean rank of each row where it stands as often as its weight says, (S, M)."""
    _, inverse_M = np.unique(values_M, return_inverse=True)
    order = np.argsort(inverse_M, kind="stable")
    first = np.flatnonzero(np.diff(inverse_M[order], prepend=-1))
    weights_SK = np.add.reduceat(weights_SM[:, order], first, axis=1)
    return np.asarray((np.cumsum(weights_SK, axis=1) - weights_SK / 2)[:, inverse_M])


def _correlation(ours_SM: Floats, theirs_SM: Floats, weights_SM: Floats) -> Floats:
    """Return the weighted correlation of two rows each, (S,)."""
    total_S1 = weights_SM.sum(axis=1, keepdims=True)
    ours_SM, theirs_SM = (
        values - (weights_SM * values).sum(axis=1, keepdims=True) / total_S1 for values in (ours_SM, theirs_SM)
    )
    together, own, their = (
        (weights_SM * one * other).sum(axis=1)
        for one, other in ((ours_SM, theirs_SM), (ours_SM, ours_SM), (theirs_SM, theirs_SM))
    )
    return np.asarray(together / np.sqrt(own * their))


def weighted_false_positive_rate(found: Predictions, weights_SM: Floats) -> Floats:
    """Return the share of misses scored as high as the best 95 % of hits, (S,). Mean over classes or labels."""
    scores_MC, hits_MC = found.one_against_rest()
    rates = []
    for label in occurring(hits_MC):
        hits_SK, misses_SK = (weights[:, ::-1] for weights in _by_score(scores_MC[:, label], hits_MC[:, label], weights_SM))
        found_SK, false_SK = np.cumsum(hits_SK, axis=1), np.cumsum(misses_SK, axis=1)
        with np.errstate(invalid="ignore"):
            enough_SK = found_SK >= RECALL * found_SK[:, -1:] * (1 - 1e-12)
            at_S = enough_SK.argmax(axis=1)
            rate_S = false_SK[np.arange(len(at_S)), at_S] / false_SK[:, -1]
        rates.append(np.where(found_SK[:, -1] > 0, rate_S, np.nan))
    return _class_mean(rates, weights_SM)


def weighted_auroc(found: Predictions, weights_SM: Floats) -> Floats:
    """Return the share of pairs of both classes that the score orders correctly, (S,); ties count half. Mean over classes."""
    scores_MC, hits_MC = found.one_against_rest()
    areas = []
    for label in occurring(hits_MC):
        hits_SK, misses_SK = _by_score(scores_MC[:, label], hits_MC[:, label], weights_SM)
        below_SK = np.cumsum(misses_SK, axis=1) - misses_SK / 2
        with np.errstate(invalid="ignore"):
            areas.append((hits_SK * below_SK).sum(axis=1) / (hits_SK.sum(axis=1) * misses_SK.sum(axis=1)))
    return _class_mean(areas, weights_SM)


def weighted_average_precision(found: Predictions, weights_SM: Floats) -> Floats:
    """Return the mean precision at the scores of a class's records, (S,). Mean over classes."""
    scores_MC, hits_MC = found.one_against_rest()
    means = []
    for label in occurring(hits_MC):
        hits_SK, misses_SK = (weights[:, ::-1] for weights in _by_score(scores_MC[:, label], hits_MC[:, label], weights_SM))
        found_SK, all_SK = np.cumsum(hits_SK, axis=1), np.cumsum(hits_SK + misses_SK, axis=1)
        with np.errstate(invalid="ignore"):
            means.append((hits_SK * found_SK / all_SK.clip(1e-12)).sum(axis=1) / hits_SK.sum(axis=1))
    return _class_mean(means, weights_SM)


def _by_score(scores_M: Floats, hits_M: Floats, weights_SM: Floats) -> tuple[Floats, Floats]:
    """Return the weights of hits and of misses at each distinct score, lowest first: (S, K) each."""
    order = np.argsort(scores_M, kind="stable")
    first = np.flatnonzero(np.diff(scores_M[order], prepend=-np.inf))
    sorted_SM, hits = weights_SM[:, order], hits_M[order].astype(np.float64)
    hits_SK, misses_SK = (np.add.reduceat(sorted_SM * members, first, axis=1) for members in (hits, 1 - hits))
    return hits_SK, misses_SK


def _mean(values_SC: Floats, counted_SC: Floats) -> Floats:
    """Return the mean over the classes that count in each row, (S,); NaN if none does."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(counted_SC, values_SC, 0).sum(axis=1) / counted_SC.sum(axis=1))


def _class_mean(values: Sequence[Floats], weights_SM: Floats) -> Floats:
    """Return the mean over classes of what is finite, (S,); NaN if no class occurs beside others."""
    if not values:
        return np.full(len(weights_SM), np.nan)
    values_SC = np.stack(values, axis=1)
    return _mean(values_SC, np.isfinite(values_SC))


def _interval(values_S: Floats) -> list[float]:
    values_S = values_S[np.isfinite(values_S)]
    if not len(values_S):
        return [float("nan")] * 2
    low, high = np.quantile(values_S, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]
