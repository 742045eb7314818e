"""Moments: mean and spread of every feature, in one pass over the rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dali_pipeline.format.encoding import all_finite
from dali_pipeline.format.manifest import FeatureStatistics
from dali_pipeline.types import Array

CHUNK_BYTES = 1 << 18  # of rows in float32 at a time: within a core's cache
SUMMED_TOGETHER = 512  # values: less is slow to add
SURE_SQUARES = 2.0**30  # of deviations: less, and no float16 was infinite or NaN
LARGEST = float(np.finfo(np.float32).max)
MAX_SHIFT = 2.0**15  # for that to hold


@dataclass(kw_only=True)
class Moments:
    """Running count, mean and sum of squared deviations of each feature (Chan, Golub and LeVeque 1979, pairwise update).

    NaN, infinities and whatever float32 cannot hold are left out; a feature's count says how many values were taken.
    """

    count: list[int] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)

    def update(self, rows: Array) -> None:
        """Takes in rows (N, *shape), some at a time: their deviations in float32, all else in float64.

        Deviations from the mean so far, or from 0 where every mean is so small beside its spread that no digits are lost.
        """
        flat = rows.reshape(len(rows), -1)
        step = max(1, CHUNK_BYTES // (4 * flat.shape[1]))
        if not self.count or flat.dtype.itemsize > 4:
            head, flat = (flat, flat[:0]) if flat.dtype.itemsize > 4 else (flat[:step], flat[step:])
            for at in range(0, len(head), step):
                self._update_exactly(head[at : at + step])
        if not len(flat):
            return
        shift = self._shift()
        buffer = np.empty((step, flat.shape[1]), np.float32)
        count, sums, squares = 0, np.zeros(flat.shape[1]), np.zeros(flat.shape[1])
        with np.errstate(over="ignore", invalid="ignore"):
            for at in range(0, len(flat), step):
                part = flat[at : at + step]
                deviations = buffer[: len(part)]
                if part.dtype == np.float16:
                    _widen(part, deviations)
                else:
                    deviations[:] = part
                if shift is not None:
                    deviations -= shift
                part_sums = _sum(deviations)
                np.multiply(deviations, deviations, out=deviations)
                part_squares = _sum(deviations)
                if part_squares.max() < SURE_SQUARES or (np.isfinite(part_squares).all() and all_finite(part, part.dtype.name)):
                    count, sums, squares = count + len(part), sums + part_sums, squares + part_squares
                else:
                    self._update_exactly(part)
        mean = sums / max(count, 1)
        origin = 0.0 if shift is None else shift
        self._merge(np.full(len(sums), count), origin + mean, np.maximum(squares - sums * mean, 0))

    def _shift(self) -> Array | None:
        """What deviations are taken from, (features,) float32; None for 0."""
        mean, squares = np.array(self.mean), np.array(self.squares)
        small = mean**2 <= 16 * squares / np.maximum(self.count, 1)  # costs four bits of 24
        return None if small.all() else np.clip(mean, -MAX_SHIFT, MAX_SHIFT).astype(np.float32)

    def _update_exactly(self, part: Array) -> None:
        """In float64, leaving out what is not finite."""
        wide = part.astype(np.float64)
        finite = np.abs(wide) <= LARGEST  # False for NaN; squares of larger ones may be infinite
        taken = finite.sum(axis=0)
        mean = np.where(finite, wide, 0).sum(axis=0) / np.maximum(taken, 1)
        self._merge(taken, mean, (np.where(finite, wide - mean, 0) ** 2).sum(axis=0))

    def extend(self, other: Moments) -> None:
        """Takes in what other moments have seen."""
        if other.count:
            self._merge(np.array(other.count), np.array(other.mean), np.array(other.squares))

    def _merge(self, count: Array, mean: Array, squares: Array) -> None:
        if not self.count:
            self.count, self.mean, self.squares = [0] * len(count), [0.0] * len(count), [0.0] * len(count)
        ours, our_mean = np.array(self.count), np.array(self.mean)
        total = np.maximum(ours + count, 1)
        delta = mean - our_mean
        self.squares = (np.array(self.squares) + squares + delta**2 * (ours * count / total)).tolist()
        self.mean = (our_mean + delta * (count / total)).tolist()
        self.count = (ours + count).tolist()

    def statistics(self) -> FeatureStatistics | None:
        """Mean and population standard deviation, 0 for a feature without a finite value; None before the first row."""
        if not self.count:
            return None
        std = np.sqrt(np.array(self.squares) / np.maximum(self.count, 1))
        return FeatureStatistics(mean=tuple(self.mean), std=tuple(std.tolist()))


def _sum(rows: Array) -> Array:
    """Over the rows (N, F), to the same bits on every machine, which BLAS's are not: the manifest's digest depends on them."""
    count, features = rows.shape
    together = max(1, SUMMED_TOGETHER // features)  # neighbouring rows
    even = count - count % together
    sums: Array = rows[:even].reshape(-1, together * features).sum(axis=0).reshape(together, features).sum(axis=0)
    sums += rows[even:].sum(axis=0)
    return sums


def _widen(part: Array, out: Array) -> None:
    """float16 into float32, exactly, three times as fast as a cast; infinities and NaN become 2**16 and more.

    A sign-extended half, shifted by 13 bits, is a float32 whose exponent is 112 too small; subnormal numbers come out right.
    """
    bits = out.view(np.int32)
    bits[:] = part.view(np.int16)
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, np.int32(-0x70000001), out=bits)  # all but the copies of the sign
    np.multiply(out, np.float32(2.0**112), out=out)
