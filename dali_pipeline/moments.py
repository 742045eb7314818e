"""Moments: mean and spread of every feature, in one pass over the rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dali_pipeline.manifest import FeatureStatistics
from dali_pipeline.schema import Array


@dataclass(kw_only=True)
class Moments:
    """Running count, mean and sum of squared deviations of each feature (Chan, Golub and LeVeque 1979, pairwise update).

    NaN and infinities are left out; a feature's count says how many values were taken.
    """

    count: list[int] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)

    def update(self, rows: Array, chunk: int = 4096) -> None:
        """Takes in rows (N, *shape), `chunk` rows at a time in float64."""
        flat = rows.reshape(len(rows), -1)
        width = flat.shape[1]
        count = np.array(self.count or [0] * width)
        mean, squares = np.array(self.mean or [0.0] * width), np.array(self.squares or [0.0] * width)
        for at in range(0, len(flat), chunk):
            part = flat[at : at + chunk].astype(np.float64)
            finite = np.isfinite(part)
            taken = finite.sum(axis=0)
            part[~finite] = 0
            part_mean = part.sum(axis=0) / np.maximum(taken, 1)
            deviations = np.where(finite, part - part_mean, 0)
            total = np.maximum(count + taken, 1)
            delta = part_mean - mean
            squares += (deviations**2).sum(axis=0) + delta**2 * (count * taken / total)
            mean += delta * (taken / total)
            count += taken
        self.count, self.mean, self.squares = count.tolist(), mean.tolist(), squares.tolist()

    def statistics(self) -> FeatureStatistics | None:
        """Mean and population standard deviation, 0 for a feature without a finite value; None before the first row."""
        if not self.count:
            return None
        std = np.sqrt(np.array(self.squares) / np.maximum(self.count, 1))
        return FeatureStatistics(mean=tuple(self.mean), std=tuple(std.tolist()))
