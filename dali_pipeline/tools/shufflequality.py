"""Measure how close an epoch's order is to a full permutation, compared with a shuffle buffer of the same memory.

There are two measures of delivered batches, and the exact values for a full permutation are known:

- same-shard share: the share of all pairs of records within a batch whose records are in one shard. A full permutation has
  sum r (r - 1) / (N (N - 1)) over shards of r records. It shows how similar the records of a step are.
- displacement: mean |delivered place - file position| / N. A full permutation has (N^2 - 1) / (3 N^2), about a third; no
  shuffle has 0. Shuffling whole shards gives a third too, so orders differ in how far an epoch deviates from a third.

The comparison is the usual shuffle buffer: records enter in the order of their shards (as stored, or the shards shuffled), and
a record that is drawn at random leaves. Only its records count as its memory, not the shard being read and no read-ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from dali_pipeline.errors import DataError, UsageError
from dali_pipeline.sampling.order import Order
from dali_pipeline.sampling.plan import EpochPlan
from dali_pipeline.tools.buffer import replay_buffer, sample_buffer
from dali_pipeline.types import Ints

Floats = npt.NDArray[np.float64]
Method = Literal["buffer, file order", "buffer, shuffled shards", "dali_pipeline", "full permutation"]
METHODS: tuple[Method, ...] = get_args(Method)
WINDOW_SHARES = (0.01, 0.05, 0.20)
SAMPLED_RECORDS = 1 << 17  # maximum number of records per epoch in the measured batches
REPLAYED_RECORDS = 1 << 20  # a buffer over more records is sampled, not replayed
SORTED_RECORDS = 1 << 22  # records per epoch to sort for the blocks of the sampled batches
LEAST_SUPERBATCHES = 32  # n evenly spread places miss a third by 1 / (12 n^2), whatever the order
WINDOW_RECORDS = 1 << 16  # in a window with more records, several records are taken as one
LEAST_SHARD_RECORDS = 4  # minimum average number of joined records per shard
POINTS = 1200  # number of points in a picture


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measurements of one method.

    Attributes:
        method: The method.
        same_shard: Same-shard share of each epoch.
        displacement: Displacement of each epoch.
        points: (place, position) pairs of the first epoch, as shares of N.
    """

    method: Method
    same_shard: tuple[float, ...]
    displacement: tuple[float, ...]
    points: tuple[tuple[float, float], ...]

    def distances(self, quality: Quality) -> tuple[float, float]:
        """Return the mean over the epochs of |measured - full permutation|, for both measures.

        It is the mean of the distances, not the distance of the mean, so that deviations to both sides do not cancel.
        """
        pairs, moved = self.distances_by_epoch(quality)
        return float(pairs.mean()), float(moved.mean())

    def distances_by_epoch(self, quality: Quality) -> tuple[Floats, Floats]:
        """Return |measured - full permutation| of each epoch, for both measures."""
        return (
            np.abs(np.array(self.same_shard) - quality.full_same_shard),
            np.abs(np.array(self.displacement) - quality.full_displacement),
        )


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Both measures of all methods at one window size.

    Attributes:
        window_bytes: Size of the window in bytes.
        window_share: Size of the window as a share of the split.
        capacity: Number of records in a buffer of the same memory.
        batch_size: Records per batch.
        batches: Number of batches measured per epoch.
        all_batches: Number of batches per epoch.
        joined: Number of records that are taken as one if a window has too many records to sort them in seconds. Shards and
            windows keep their bytes, and same-shard shares are scaled to those of the true records.
        full_same_shard: Exact same-shard share of a full permutation.
        full_displacement: Exact displacement of a full permutation.
        methods: Measurements of each method.
    """

    window_bytes: int
    window_share: float
    capacity: int
    batch_size: int
    batches: int
    all_batches: int
    joined: int
    full_same_shard: float
    full_displacement: float
    methods: tuple[Measured, ...]

    def to_json(self) -> dict[str, object]:
        """Return all values in JSON types, except the points of the picture; `off` is the result of `distances`."""
        methods = {
            measured.method: {
                "same_shard": measured.same_shard,
                "displacement": measured.displacement,
                "off": measured.distances(self),
            }
            for measured in self.methods
        }
        return {name: value for name, value in vars(self).items() if name != "methods"} | {"methods": methods}

    def behind(self) -> list[str]:
        """Return the measures by which dali_pipeline is farther from the full permutation than one of the buffers.

        Counts differences of more than three standard errors, so that chance does not make two full permutations differ.
        """
        distances = {measured.method: measured.distances_by_epoch(self) for measured in self.methods}
        ours = distances["dali_pipeline"]
        buffers = [values for method, values in distances.items() if method.startswith("buffer")]
        names = []
        for index, name in enumerate(("same-shard pairs", "displacement")):
            for buffer in buffers:
                error = np.sqrt((ours[index].var() + buffer[index].var()) / len(ours[index]))
                if ours[index].mean() - buffer[index].mean() > 3 * error and name not in names:
                    names.append(name)
        return names


def same_shard_share(shards: Ints) -> float:
    """Return the share of pairs within a batch that are in one shard; costs about O(N log B).

    shards: (batches, B) shard number of each record, B at least 2.
    """
    batches, size = shards.shape
    ordered, equal = np.sort(shards, axis=1), 0
    for lag in range(
        1, size
    ):  # equal values are adjacent in a sorted row: if none are equal at this lag, none are at a larger lag
        equal_at_lag = int(np.count_nonzero(ordered[:, lag:] == ordered[:, :-lag]))
        if not equal_at_lag:
            break
        equal += equal_at_lag
    return float(equal / (batches * size * (size - 1) / 2))


def displacement(places: Ints, positions: Ints, num_records: int) -> float:
    """Return the mean of |delivered place - file position| / N. places, positions: of one shape, counted from 0."""
    return float(np.abs(places - positions).mean() / num_records)


def full_same_shard_share(records: Ints) -> float:
    """Return the exact same-shard share of a full permutation of shards with these numbers of records, (S,)."""
    sizes = records.astype(float)
    total = sizes.sum()
    return float((sizes * (sizes - 1)).sum() / (total * (total - 1)))


def full_displacement(num_records: int) -> float:
    """Return the exact displacement of a full permutation.

    It is Spearman's footrule, (N^2 - 1) / 3 (Diaconis and Graham 1977), divided by N^2.
    """
    return (1 - 1 / num_records**2) / 3


def choose_steps(all_batches: int, batches: int, superbatches: int) -> Ints:
    """Return the steps to measure, ascending: all, or `superbatches` equal superbatches, evenly spread over the epoch."""
    if batches >= all_batches:
        return np.arange(all_batches)
    superbatches = max(1, min(superbatches, batches))
    length = batches // superbatches
    begins = (np.arange(superbatches) * 2 + 1) * all_batches // (2 * superbatches) - length // 2
    return np.unique(np.clip(begins[:, None] + np.arange(length), 0, all_batches - 1))


def measure(
    records: Ints, nbytes: Ints, *, window_bytes: int, batch_size: int = 32, epochs: int = 5, seed: int = 0, digest: str = "0",
    split: str = "train", sampled_records: int = SAMPLED_RECORDS,
) -> Quality:  # fmt: skip
    """Measure every method at one window size over epochs 0 to `epochs` - 1; reads no file.

    Costs about O(shards + SORTED_RECORDS) per epoch.

    Args:
        records: (S,) number of records of each shard, in file order.
        nbytes: (S,) size of each shard in bytes.
        window_bytes: Size of the window in bytes.
        batch_size: Records per batch, at least 2.
        epochs: Number of epochs.
        seed, digest, split: Like in `Order`.
        sampled_records: Number of records that are measured per epoch, evenly spread, if it has more.

    Raises:
        UsageError: The batch size is below 2.
        DataError: There are fewer records than one batch has.
    """
    total, spread = int(records.sum()), int(nbytes.sum())
    if batch_size < 2:
        raise UsageError(f"batch size is {batch_size}; expected at least 2, as pairs within a batch are counted")
    if not total:
        raise DataError(f"split {split!r} has no records, so no order to measure")
    if batch_size > total:
        raise DataError(f"batch size is {batch_size}; split {split!r} has {total} records, and a whole batch is needed")
    order = Order(
        digest=digest, split=split, seed=seed, shuffle=True, global_batch_size=batch_size, window_bytes=window_bytes,
        num_partitions=1, drop_last=False,
    )  # fmt: skip
    capacity = max(1, min(total, window_bytes * total // spread))
    most_joined = min(total // (len(records) * LEAST_SHARD_RECORDS), total // (4 * batch_size))
    joined = max(1, min(-(-capacity // WINDOW_RECORDS), most_joined))
    thick = np.where(records > 0, np.maximum(1, records // joined), 0)
    trial = _Trial(thick, nbytes, order, max(1, capacity // joined), sampled_records)
    scale = full_same_shard_share(records) / (full_same_shard_share(thick) or 1.0)
    methods = []
    for method in METHODS:
        rows = [trial.run(method, epoch) for epoch in range(epochs)]
        share = [same_shard_share(np.searchsorted(trial.ends, row, side="right")) * scale for row in rows]
        moved = [displacement(trial.places, row, trial.total) for row in rows]
        points = np.stack([trial.places, rows[0]], axis=-1).reshape(-1, 2)[:: max(1, rows[0].size // POINTS)] / trial.total
        pairs = tuple((float(place), float(position)) for place, position in points)
        methods.append(Measured(method=method, same_shard=tuple(share), displacement=tuple(moved), points=pairs))
    return Quality(
        window_bytes=window_bytes,
        window_share=window_bytes / spread,
        capacity=capacity,
        batch_size=batch_size,
        batches=len(trial.steps),
        all_batches=trial.total // batch_size,
        joined=joined,
        full_same_shard=full_same_shard_share(records),
        full_displacement=full_displacement(total),
        methods=tuple(methods),
    )


class _Trial:
    """Delivers the same batches by each method. places: (batches, B) the places in the epoch of the measured records."""

    def __init__(self, records: Ints, nbytes: Ints, order: Order, capacity: int, sampled: int) -> None:
        self._records, self._nbytes, self._order = records, nbytes, order
        self.total, self.ends = int(records.sum()), np.cumsum(records)
        self._capacity = min(capacity, self.total)
        size = order.global_batch_size
        self.steps = choose_steps(
            self.total // size, max(1, sampled // size), max(LEAST_SUPERBATCHES, SORTED_RECORDS // (2 * self._capacity))
        )
        self.places: Ints = self.steps[:, None] * size + np.arange(size)

    def run(self, method: Method, epoch: int) -> Ints:
        """Return the file positions (batches, B) that a method delivers at `places` in an epoch."""
        rng = np.random.default_rng([self._order.seed, epoch, METHODS.index(method)])
        if method == "full permutation":
            return rng.choice(self.total, self.places.size, replace=False).reshape(self.places.shape)
        if method == "dali_pipeline":
            plan = EpochPlan(self._order, epoch, self._records, self._nbytes)
            return np.stack([plan.batch(int(step)).positions for step in self.steps])
        return self._buffer(rng) if method == "buffer, file order" else self._shuffled_shards(rng)

    def _buffer(self, rng: np.random.Generator) -> Ints:
        if self.total <= REPLAYED_RECORDS:
            return replay_buffer(self.total, self._capacity, rng)[self.places]
        return sample_buffer(self.total, self._capacity, self.places[:, 0], self.places.shape[1], rng)

    def _shuffled_shards(self, rng: np.random.Generator) -> Ints:
        shards = rng.permutation(len(self._records))
        ends = np.cumsum(self._records[shards])
        entered = self._buffer(rng)  # numbers in the order of the shuffled shards
        index = np.searchsorted(ends, entered, side="right")
        positions: Ints = entered - ends[index] + self.ends[shards[index]]
        return positions
