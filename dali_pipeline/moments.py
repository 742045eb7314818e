"""Moments: mean and spread of every feature, in one pass over the rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dali_pipeline.manifest import FeatureStatistics
from dali_pipeline.schema import Array


@dataclass(kw_only=True)
class Moments:
    """Running mean and sum of squared deviations of each feature (Chan, Golub and LeVeque 1979, pairwise update)."""

    count: int = 0
    mean: list[float] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)

    def update(self, rows: Array, chunk: int = 4096) -> None:
        """Takes in rows (N, *shape), `chunk` rows at a time in float64."""
        flat = rows.reshape(len(rows), -1)
        mean, squares = np.array(self.mean or 0.0), np.array(self.squares or 0.0)
        for at in range(0, len(flat), chunk):
            part = flat[at : at + chunk].astype(np.float64)
            total, part_mean = self.count + len(part), part.mean(axis=0)
            delta = part_mean - mean
            squares = squares + ((part - part_mean) ** 2).sum(axis=0) + delta**2 * (self.count * len(part) / total)
            mean = mean + delta * (len(part) / total)
            self.count = total
        self.mean, self.squares = mean.tolist(), squares.tolist()

    def statistics(self) -> FeatureStatistics | None:
        """Mean and population standard deviation, or None before the first row."""
        if not self.count:
            return None
        std = np.sqrt(np.array(self.squares) / self.count)
        return FeatureStatistics(mean=tuple(self.mean), std=tuple(std.tolist()))
