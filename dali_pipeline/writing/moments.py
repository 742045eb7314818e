"""Moments: mean and spread of every feature, in one pass over the rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dali_pipeline.format.encoding import BFLOAT16, all_finite, decode
from dali_pipeline.format.manifest import FeatureStatistics
from dali_pipeline.types import Array

CHUNK_BYTES = 1 << 18  # rows in float32 per chunk: fits in a core's cache
SUMMED_TOGETHER = 512  # values per addition: fewer are slow to add
SURE_SQUARES = 2.0**30  # sum of squares below which no float16 was infinite or NaN
LARGEST = float(np.finfo(np.float32).max)
MAX_SHIFT = 2.0**15  # largest shift for which SURE_SQUARES holds


@dataclass(kw_only=True, eq=False)
class Moments:
    """Running count, mean and sum of squared deviations of each feature.

    Pairwise update of Chan, Golub and LeVeque (1979). NaN, infinities and values that float32 cannot hold are left out.

    Attributes:
        count: Number of values taken, per feature: an array, made of any sequence.
        mean: Mean, per feature, the same.
        squares: Sum of squared deviations from the mean, per feature, the same.
    """

    count: Any = ()
    mean: Any = ()
    squares: Any = ()

    def __post_init__(self) -> None:
        self.count = np.array(self.count, np.int64)
        self.mean, self.squares = np.array(self.mean, np.float64), np.array(self.squares, np.float64)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Moments):
            return NotImplemented
        pairs = ((self.count, other.count), (self.mean, other.mean), (self.squares, other.squares))
        return all(np.array_equal(own, theirs) for own, theirs in pairs)

    def update(self, rows: Array, *, bfloat16: bool = False) -> None:
        """Add rows (N, *shape), a chunk at a time: deviations in float32, all else in float64.

        Args:
            rows: The rows.
            bfloat16: Whether they are the bits of bfloat16, in uint16. Default: no.

        Deviations are taken from the mean so far, or from 0 if every mean is so small compared with its spread that no digits
        are lost.
        """
        flat = rows.reshape(len(rows), -1)
        chunk_rows = max(1, CHUNK_BYTES // (4 * flat.shape[1]))
        if not len(self.count) or flat.dtype.itemsize > 4:
            head, flat = (flat, flat[:0]) if flat.dtype.itemsize > 4 else (flat[:chunk_rows], flat[chunk_rows:])
            for begin in range(0, len(head), chunk_rows):
                self._update_exactly(_decoded(head[begin : begin + chunk_rows], bfloat16))
        if not len(flat):
            return
        shift = self._shift()
        buffer = np.empty((chunk_rows, flat.shape[1]), np.float32)
        count, sums, squares = 0, np.zeros(flat.shape[1]), np.zeros(flat.shape[1])
        with np.errstate(over="ignore", invalid="ignore"):
            for begin in range(0, len(flat), chunk_rows):
                chunk = flat[begin : begin + chunk_rows]
                deviations = buffer[: len(chunk)]
                if bfloat16:
                    np.left_shift(chunk, 16, out=deviations.view(np.uint32), dtype=np.uint32, casting="unsafe")
                elif chunk.dtype == np.float16:
                    _widen(chunk, deviations)
                else:
                    deviations[:] = chunk
                if shift is not None:
                    deviations -= shift
                chunk_sums = _sum(deviations)
                np.multiply(deviations, deviations, out=deviations)
                chunk_squares = _sum(deviations)
                if chunk_squares.max() < SURE_SQUARES or (
                    np.isfinite(chunk_squares).all() and all_finite(chunk, BFLOAT16 if bfloat16 else chunk.dtype.name)
                ):
                    count += len(chunk)
                    sums += chunk_sums
                    squares += chunk_squares
                else:
                    self._update_exactly(_decoded(chunk, bfloat16))
        mean = sums / max(count, 1)
        origin = 0.0 if shift is None else shift
        self._merge(np.full(len(sums), count), origin + mean, np.maximum(squares - sums * mean, 0))

    def _shift(self) -> Array | None:
        """Return the value that deviations are taken from, (features,) float32; None for 0."""
        small = self.mean**2 <= 16 * self.squares / np.maximum(self.count, 1)  # then four bits of 24 are lost at most
        return None if small.all() else np.clip(self.mean, -MAX_SHIFT, MAX_SHIFT).astype(np.float32)

    def _update_exactly(self, rows: Array) -> None:
        """Add rows in float64, without the values that are not finite."""
        wide = rows.astype(np.float64)
        finite = np.abs(wide) <= LARGEST  # False for NaN; squares of larger values may be infinite
        counts = finite.sum(axis=0)
        mean = np.where(finite, wide, 0).sum(axis=0) / np.maximum(counts, 1)
        self._merge(counts, mean, (np.where(finite, wide - mean, 0) ** 2).sum(axis=0))

    def extend(self, other: Moments) -> None:
        """Add the values that other moments have counted."""
        if len(other.count):
            self._merge(other.count, other.mean, other.squares)

    def _merge(self, count: Array, mean: Array, squares: Array) -> None:
        if not len(self.count):
            self.count, self.mean, self.squares = np.zeros(len(count), np.int64), np.zeros(len(count)), np.zeros(len(count))
        total = np.maximum(self.count + count, 1)
        delta = mean - self.mean
        self.squares = self.squares + squares + delta**2 * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = self.count + count

    def statistics(self, digits: int | None = None) -> FeatureStatistics | None:
        """Return mean and population standard deviation, 0 for a feature without a finite value; None before the first row.

        Args:
            digits: Significant digits that are kept. Default: all.
        """
        if not len(self.count):
            return None
        std = np.sqrt(self.squares / np.maximum(self.count, 1))
        mean, spread = (
            tuple(column if digits is None else [float(f"{number:.{digits}g}") for number in column])
            for column in (self.mean.tolist(), std.tolist())
        )
        return FeatureStatistics(mean=mean, std=spread, count=tuple(self.count.tolist()))


def _decoded(rows: Array, bfloat16: bool) -> Array:
    return decode(rows, BFLOAT16, None) if bfloat16 else rows


def _sum(rows: Array) -> Array:
    """Sum rows (N, F) to the same bits on every machine, which BLAS does not: the manifest's digest depends on them."""
    count, features = rows.shape
    rows_per_sum = max(1, SUMMED_TOGETHER // features)  # neighbouring rows
    if rows_per_sum == 1:
        return np.add.reduce(rows, axis=0)  # type: ignore[no-any-return]
    even_rows = count - count % rows_per_sum
    sums: Array = rows[:even_rows].reshape(-1, rows_per_sum * features).sum(axis=0).reshape(rows_per_sum, features).sum(axis=0)
    sums += rows[even_rows:].sum(axis=0)
    return sums


def _widen(part: Array, out: Array) -> None:
    """Convert float16 to float32, exactly and three times as fast as a cast; infinities and NaN become 2**16 and more.

    A sign-extended half, shifted by 13 bits, is a float32 whose exponent is 112 too small. Subnormal numbers come out right.
    """
    bits = out.view(np.int32)
    bits[:] = part.view(np.int16)
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, np.int32(-0x70000001), out=bits)  # all but the copies of the sign
    np.multiply(out, np.float32(2.0**112), out=out)
