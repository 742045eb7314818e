"""Shuffle: how near an epoch's order comes to a full permutation, beside a shuffle buffer of the same memory.

Two measures of delivered batches, both known exactly for a full permutation:

- same-shard share: of all pairs of records within a batch, the share whose records lie in one shard. A full permutation has
  sum r (r - 1) / (N (N - 1)) over shards of r records. It tells how alike the records of a step are.
- displacement: mean |delivered place - file position| / N. A full permutation has (N^2 - 1) / (3 N^2), a third; no shuffle
  has 0. Shuffling whole shards gives a third too, so what tells orders apart is how far an epoch strays from it.

The rival is the usual shuffle buffer: records enter in the order of their shards (as stored, or the shards shuffled), one of
those inside is drawn at random to leave. It is charged for nothing but its records: not the shard being read, no read-ahead.
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
SAMPLED_RECORDS = 1 << 17  # of an epoch's batches
REPLAYED_RECORDS = 1 << 20  # a buffer over more records than these is sampled, not replayed
SORTED_RECORDS = 1 << 22  # of an epoch, spent on the blocks that the sampled batches lie in
LEAST_SUPERBATCHES = 32  # n evenly spread places miss a third by 1 / (12 n^2), whatever the order
WINDOW_RECORDS = 1 << 16  # in a window with more, records are joined
LEAST_SHARD_RECORDS = 4  # joined records left in a shard, on average
POINTS = 1200  # of a picture


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One method. same_shard, displacement: of each epoch · points: (place, position), of the first epoch, as shares of N."""

    method: Method
    same_shard: tuple[float, ...]
    displacement: tuple[float, ...]
    points: tuple[tuple[float, float], ...]

    def distances(self, quality: Quality) -> tuple[float, float]:
        """Mean over the epochs of |measured - full permutation|, of both measures.

        The mean of distances, not the distance of means: an order that misses by as much to either side is no better for it.
        """
        pairs, moved = self.distances_by_epoch(quality)
        return float(pairs.mean()), float(moved.mean())

    def distances_by_epoch(self, quality: Quality) -> tuple[Floats, Floats]:
        """|measured - full permutation| of each epoch, of both measures."""
        return (
            np.abs(np.array(self.same_shard) - quality.full_same_shard),
            np.abs(np.array(self.displacement) - quality.full_displacement),
        )


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Both measures at one window size.

    window_bytes, window_share: of the split's bytes · capacity: records in a buffer of the same memory · batches: measured an
    epoch, of all_batches · joined: how many records were taken as one where a window has too many to be sorted in seconds;
    shards and windows keep their bytes, and same-shard shares are scaled to those of the true records.
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
        """All of it in JSON types, but the points of the picture; `off` is what `distances` gives."""
        methods = {
            one.method: {"same_shard": one.same_shard, "displacement": one.displacement, "off": one.distances(self)}
            for one in self.methods
        }
        return {name: value for name, value in vars(self).items() if name != "methods"} | {"methods": methods}

    def behind(self) -> list[str]:
        """By which measures dali_pipeline is farther from the full permutation than one of the buffers.

        By more than three standard errors of the difference: two full permutations are not told apart by chance.
        """
        ours, *rivals = [one.distances_by_epoch(self) for one in self.methods if one.method == "dali_pipeline"] + [
            one.distances_by_epoch(self) for one in self.methods if one.method.startswith("buffer")
        ]
        found = []
        for at, name in enumerate(("same-shard pairs", "displacement")):
            for rival in rivals:
                error = np.sqrt((ours[at].var() + rival[at].var()) / len(ours[at]))
                if ours[at].mean() - rival[at].mean() > 3 * error and name not in found:
                    found.append(name)
        return found


def same_shard_share(shards: Ints) -> float:
    """Share of the pairs within a batch that lie in one shard. shards: (batches, B), B of at least 2; O(N log B) or so."""
    batches, size = shards.shape
    ordered, equal = np.sort(shards, axis=1), 0
    for lag in range(1, size):  # in a sorted row equal ones lie side by side: none at this lag, none at a greater one
        found = int(np.count_nonzero(ordered[:, lag:] == ordered[:, :-lag]))
        if not found:
            break
        equal += found
    return float(equal / (batches * size * (size - 1) / 2))


def displacement(places: Ints, positions: Ints, num_records: int) -> float:
    """Mean |delivered place - file position| / N. places, positions: of the same shape, counted from 0."""
    return float(np.abs(places - positions).mean() / num_records)


def full_same_shard_share(records: Ints) -> float:
    """What a full permutation of shards of these sizes has, exactly. records: (S,)."""
    sizes = records.astype(float)
    total = sizes.sum()
    return float((sizes * (sizes - 1)).sum() / (total * (total - 1)))


def full_displacement(num_records: int) -> float:
    """What a full permutation has, exactly: Spearman's footrule, (N^2 - 1) / 3 (Diaconis and Graham 1977), by N^2."""
    return (1 - 1 / num_records**2) / 3


def choose_steps(all_batches: int, batches: int, superbatches: int) -> Ints:
    """Steps to measure, ascending: all, or `superbatches` equal superbatches of neighbours, evenly spread over the epoch."""
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
    """Measures every method at one window size, over epochs 0 to `epochs` - 1; no file is read.

    records, nbytes: (S,) of the shards, in file order. Costs about O(shards + SORTED_RECORDS) an epoch; of long epochs,
    `sampled_records` are measured, evenly spread. Raises UsageError for a batch size below 2, DataError for fewer records.
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
    """The same batches of each method. places: (batches, B) that they are delivered at."""

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
        """File positions (batches, B) that a method delivers at `places` in an epoch."""
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
        entered = self._buffer(rng)  # as numbered in the order of the shuffled shards
        at = np.searchsorted(ends, entered, side="right")
        found: Ints = entered - ends[at] + self.ends[shards[at]]
        return found
