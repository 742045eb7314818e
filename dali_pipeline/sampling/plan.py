"""EpochPlan: which record stands where in an epoch. Pure arithmetic on shard sizes; no I/O, nothing to remember."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from dali_pipeline.errors import DataError
from dali_pipeline.sampling.draws import DrawnShuffle, Draws, Part, apportion
from dali_pipeline.sampling.order import BUCKETS, Order, hashed_keys, purpose_key
from dali_pipeline.sampling.shuffle import WindowShuffle
from dali_pipeline.types import Ints

POOL_STEPS = 64  # batches that exchange records to be of like length, at most


@dataclass(frozen=True, kw_only=True, eq=False)
class Shares:
    """Rows of one rank's batch. positions: (B,) int64, record numbers in the split · valid: (B,) bool, False for padding."""

    positions: Ints
    valid: npt.NDArray[np.bool_]


class EpochPlan:
    """The batches of one epoch, for every rank.

    shard_records, shard_bytes: (S,) sizes of the split's shards in file order · draws: where given, the epoch is `num_draws`
    draws rather than every record once · lengths: of records by position, asked for where the order has `bucket_by_length`.
    Costs a sort of the shards to make, O(runs) for the first batch of a partition and O(window) for any other, most of it
    cached between neighbouring batches.
    """

    def __init__(
        self,
        order: Order,
        epoch: int,
        shard_records: npt.ArrayLike,
        shard_bytes: npt.ArrayLike,
        draws: Sequence[Draws] = (),
        num_draws: int = 0,
        lengths: Callable[[Ints], Ints] | None = None,
    ) -> None:
        self._arguments = order, epoch, shard_records, shard_bytes, draws, num_draws, lengths
        self.order, self.epoch, self._num_draws, self._lengths = order, epoch, num_draws, lengths
        self._records, self._nbytes = np.asarray(shard_records, np.int64), np.asarray(shard_bytes, np.int64)
        self._starts = np.cumsum(self._records) - self._records
        self._drawn = bool(draws)
        self._parts = draws or (Draws(begin=0, end=len(self._records), share=1.0),)
        fewest = min(each.end - each.begin for each in self._parts)
        if len(self._records) and order.num_partitions > fewest:
            raise DataError(
                f"split {order.split!r} has {fewest} shards{' of a kind that is drawn' if draws else ''}; "
                f"expected at least one for each of {order.num_partitions} partitions"
            )
        # of each part: the partition of every shard
        self._partition_of = [deal_shards(self._records[each.begin : each.end], order.num_partitions) for each in self._parts]
        self._partitions: dict[
            int, WindowShuffle | DrawnShuffle
        ] = {}  # made when first asked for: `len` needs none, a node its own alone
        self._share = order.global_batch_size // order.num_partitions
        sizes = [self.length(partition) for partition in range(order.num_partitions)]
        self.num_steps: int = (
            min(n // self._share for n in sizes) if order.drop_last else max(-(-n // self._share) for n in sizes)
        )
        self._longest_partition = max(sizes)
        self.nbytes, self.num_records = int(self._nbytes.sum()), int(self._records.sum())
        batch_bytes = self._share * self.nbytes // max(1, self.num_records)
        self._pool_steps = max(1, min(POOL_STEPS, order.window_bytes // 2 // max(1, batch_bytes)))
        self._later: EpochPlan | None = None
        self._pools: dict[tuple[int, int], Ints] = {}  # the last ones, by partition and number

    def __reduce__(self) -> tuple[type[EpochPlan], tuple[Any, ...]]:
        return EpochPlan, self._arguments  # what was computed so far is left: other threads add to it meanwhile

    def length(self, partition: int) -> int:
        """Records, or draws, of a partition."""
        if self._drawn:
            return (
                self._num_draws * (partition + 1) // self.order.num_partitions
                - self._num_draws * partition // self.order.num_partitions
            )
        return int(self._records[self._partition_of[0] == partition].sum())

    def num_valid(self, step: int) -> int:
        """Rows of the global batch at a step that are not padding."""
        left = (self.length(partition) - step * self._share for partition in range(self.order.num_partitions))
        return sum(min(self._share, max(0, each)) for each in left)

    def at(self, partition: int, places: Ints) -> Ints:
        """The records at these places of a partition's order."""
        return self._shuffle_of(partition).positions(places)

    def _shuffle_of(self, partition: int) -> WindowShuffle | DrawnShuffle:
        found = self._partitions.get(partition)
        if found is None:  # two threads may make it at once, and make the same
            found = self._partitions[partition] = self._make(partition)
        return found

    def _make(self, partition: int) -> WindowShuffle | DrawnShuffle:
        window_bytes, own = self.order.window_bytes, self.length(partition)
        shards = [
            each.begin + np.flatnonzero(of == partition) for each, of in zip(self._parts, self._partition_of, strict=True)
        ]
        if not self._drawn:
            return self._pass(shards[0], window_bytes, self._share, self.epoch)
        counts = apportion(own, [each.share for each in self._parts])
        return DrawnShuffle(
            self.order,
            self.epoch,
            [
                Part(
                    times=times,
                    records=int(self._records[mine].sum()),
                    passes=partial(self._pass, mine, max(1, window_bytes * times // max(own, 1)), 1),
                )
                for times, mine in zip(counts, shards, strict=True)
            ],
        )

    def _pass(self, shards: Ints, window_bytes: int, batch_size: int, number: int) -> WindowShuffle:
        """The order of some shards, in the epoch or pass of this number."""
        starts, records, nbytes = (each[shards] for each in (self._starts, self._records, self._nbytes))
        return WindowShuffle(self.order, number, starts, records, nbytes, window_bytes, batch_size)

    def rows(self, world_size: int = 1) -> int:
        """Rows of each rank's batch: its part of the global batch size, but no more than the epoch's only batch needs."""
        order = self.order
        unit = math.lcm(order.num_partitions, world_size)
        needed = max(1, -(-order.num_partitions * self._longest_partition // unit)) * unit
        return min(order.global_batch_size, order.global_batch_size if order.drop_last else needed) // world_size

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Shares:
        """What `rank` takes at `step`: its equal part of the global batch, partition after partition."""
        return self.batches(range(step, step + 1), rank, world_size)

    def batches(self, steps: range, rank: int = 0, world_size: int = 1) -> Shares:
        """What `rank` takes at these steps, one after the other."""
        if not 0 <= steps[0] <= steps[-1] < self.num_steps:
            raise IndexError(f"steps {steps[0]} to {steps[-1]} of {self.num_steps}")
        size = self.rows(world_size) * world_size
        share = size // self.order.num_partitions
        begin, end = rank * size // world_size, (rank + 1) * size // world_size
        parts = [
            _take(
                self._shuffle_of(partition),
                self._places(partition, steps, share)[:, max(begin, first) - first : min(end, first + share) - first],
            )
            for partition, first in enumerate(range(0, size, share))
            if begin < first + share and first < end
        ]
        positions, valid = (np.concatenate(each, axis=1).reshape(-1) for each in zip(*parts, strict=True))
        return Shares(positions=positions, valid=valid)

    def groups(self, step: int, rank: int = 0, world_size: int = 1, places: Sequence[int] = ()) -> list[tuple[int, int]]:
        """Return the partitions that `rank` reads from, each with the group of runs that it has come to.

        That is at `step`, or at `places` if given; there are none for draws.
        """
        size, share = self.order.global_batch_size, self._share
        partitions = range(rank * size // world_size // share, -(-(rank + 1) * size // world_size // share))
        found = [(number, self._shuffle_of(number)) for number in partitions]
        place = min(step, self.num_steps - 1) * share
        return [
            (number, shuffle.group(places[number] if places else place))
            for number, shuffle in found
            if isinstance(shuffle, WindowShuffle)
        ]

    def runs(self, partition: int, group: int) -> list[tuple[int, int]]:
        """First position and number of records of each run of a partition's group: what is read together."""
        found = self._shuffle_of(partition)
        return found.runs(group) if isinstance(found, WindowShuffle) else []

    def turns(self, partition: int, group: int, after: int = 0) -> npt.NDArray[np.float64]:
        """Return when each run of a group is next needed, as epoch plus the fraction of it that is over."""
        found, later = self._shuffle_of(partition), self._following(after)._shuffle_of(partition)
        assert isinstance(found, WindowShuffle)
        assert isinstance(later, WindowShuffle)
        starts = np.array([start for start, _ in found.runs(group)], np.int64)
        return self.epoch + after + later.turns(starts)

    def _following(self, after: int) -> EpochPlan:
        if after and self._later is None:
            self._later = EpochPlan(self.order, self.epoch + after, self._records, self._nbytes, lengths=self._lengths)
        return self._later if after and self._later is not None else self

    def _places(self, partition: int, steps: range, share: int) -> Ints:
        """Places (steps, share) in a partition's order."""
        places: Ints = np.array(steps)[:, None] * share + np.arange(share)
        if self.order.bucket_by_length:
            whole = self.length(partition) // self._share  # batches without padding, which stays behind them
            for at, step in enumerate(steps):
                if step < whole:
                    places[at] = self._pool(partition, step // self._pool_steps, whole)[step % self._pool_steps]
        return places

    def _pool(self, partition: int, number: int, whole: int) -> Ints:
        """Places (steps, share) of neighbouring batches, of the first `whole` ones, cut anew by length, in a random order."""
        found = self._pools.get((partition, number))
        if found is None:
            assert self._lengths is not None
            first = number * self._pool_steps
            steps = range(first, min(first + self._pool_steps, whole))
            places = np.arange(first * self._share, steps.stop * self._share)
            by_length = places[np.argsort(self._lengths(_take(self._shuffle_of(partition), places)[0]), kind="stable")]
            turns = np.array(steps)
            if self.order.shuffle:
                turns = hashed_keys(turns, purpose_key(self.order, self.epoch, BUCKETS))
            found = by_length.reshape(len(steps), -1)[np.argsort(turns, kind="stable")]
            kept = [key for key in self._pools if key[0] == partition][-1:]
            self._pools = {key: pool for key, pool in self._pools.items() if key[0] != partition or key in kept}
            self._pools[partition, number] = found
        return found


def _take(partition: WindowShuffle | DrawnShuffle, places: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Places (steps, n) of a partition's order; beyond its last record that record again, not valid."""
    found = partition.positions(np.minimum(places, partition.num_records - 1).reshape(-1))
    return found.reshape(places.shape), places < partition.num_records


def deal_shards(shard_records: Ints, num_partitions: int) -> Ints:
    """Return the partition of every shard, the same in every epoch.

    Shards are dealt largest first, to and fro, so that partitions differ by about one shard.
    """
    places = np.arange(len(shard_records)) % (2 * num_partitions)
    partition = np.empty(len(shard_records), np.int64)
    partition[np.argsort(-shard_records, kind="stable")] = np.minimum(places, 2 * num_partitions - 1 - places)
    return partition
