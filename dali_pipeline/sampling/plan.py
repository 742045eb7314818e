"""EpochPlan: which record comes where in an epoch. Arithmetic on shard sizes; no I/O and no state."""

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

POOL_STEPS = 64  # most batches that exchange records so that lengths are alike


@dataclass(frozen=True, kw_only=True, eq=False)
class Shares:
    """Rows of one rank's batch.

    Attributes:
        positions: (B,) int64, positions of the records in the split.
        valid: (B,) bool, False for padding.
    """

    positions: Ints
    valid: npt.NDArray[np.bool_]

    def cut(self, rows: int) -> tuple[Shares, Shares]:
        """Return the first rows, and the rest."""
        first, rest = slice(rows), slice(rows, None)
        return (
            Shares(positions=self.positions[first], valid=self.valid[first]),
            Shares(positions=self.positions[rest], valid=self.valid[rest]),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Blocks:
    """The blocks of a partition's shuffle, (G + 1,), in steps or records; and its groups, (G,). Block b draws from groups b - 1
    and b.

    Attributes:
        begins: The step in which each block begins, or its first record in the partition's order.
        filled: The first step that lies wholly behind the begin; the same one if the block begins between two batches.
        group_records: Records of each group.
        group_bytes: Bytes of each group, approximately.
    """

    begins: Ints
    filled: Ints
    group_records: Ints
    group_bytes: Ints


class EpochPlan:
    """The batches of one epoch, for every rank.

    Costs a sort of the shards to make, O(runs) for the first batch of a partition, and O(window) for any other, most of it
    cached between neighbouring batches.

    Args:
        order: Everything that the order depends on.
        epoch: Number of the epoch.
        shard_records: (S,) records of the split's shards, in file order.
        shard_bytes: (S,) bytes of the same shards.
        draws: Parts of an epoch of draws. Default: none, every record comes once.
        num_draws: Number of draws, if there are any.
        lengths: Function from positions to the lengths of records, for an order with `bucket_by_length`.
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
        fewest = min(part.end - part.begin for part in self._parts)
        if len(self._records) and order.num_partitions > fewest:
            raise DataError(
                f"split {order.split!r} has {fewest} shards{' of a kind that is drawn' if draws else ''}; "
                f"expected at least one for each of {order.num_partitions} partitions"
            )
        # Partition of every shard, per part.
        self._partition_of = [deal_shards(self._records[part.begin : part.end], order.num_partitions) for part in self._parts]
        # made on first use: `len` needs none, a node only its own
        self._partitions: dict[int, WindowShuffle | DrawnShuffle] = {}
        self._share = order.global_batch_size // order.num_partitions
        sizes = [self.length(partition) for partition in range(order.num_partitions)]
        self.num_steps: int = (
            min(n // self._share for n in sizes) if order.drop_last else max(-(-n // self._share) for n in sizes)
        )
        self._longest_partition = max(sizes)
        self.nbytes, self.num_records = int(self._nbytes.sum()), int(self._records.sum())
        batch_bytes = self._share * self.nbytes // max(1, self.num_records)
        self._pool_steps = max(1, min(POOL_STEPS, order.window_bytes // 2 // max(1, batch_bytes)))
        self._following_plan: EpochPlan | None = None
        self._pools: dict[tuple[int, int], Ints] = {}  # the last two per partition, by partition and number

    def __reduce__(self) -> tuple[type[EpochPlan], tuple[Any, ...]]:
        return EpochPlan, self._arguments  # without the caches, which other threads may be changing

    def length(self, partition: int) -> int:
        """Return the number of records, or draws, of a partition."""
        if self._drawn:
            return (
                self._num_draws * (partition + 1) // self.order.num_partitions
                - self._num_draws * partition // self.order.num_partitions
            )
        return int(self._records[self._partition_of[0] == partition].sum())

    def num_valid(self, step: int) -> int:
        """Return the number of rows of the global batch at a step that are not padding."""
        left = (self.length(partition) - step * self._share for partition in range(self.order.num_partitions))
        return sum(min(self._share, max(0, records)) for records in left)

    def positions(self, partition: int, cursors: Ints) -> Ints:
        """Return the positions of the records at these cursors in a partition's order."""
        return self._shuffle_of(partition).positions(cursors)

    def _shuffle_of(self, partition: int) -> WindowShuffle | DrawnShuffle:
        shuffle = self._partitions.get(partition)
        if shuffle is None:  # two threads may compute it at once, with the same result
            shuffle = self._partitions[partition] = self._make(partition)
        return shuffle

    def _make(self, partition: int) -> WindowShuffle | DrawnShuffle:
        window_bytes, length = self.order.window_bytes, self.length(partition)
        shards = [
            part.begin + np.flatnonzero(partition_of == partition)
            for part, partition_of in zip(self._parts, self._partition_of, strict=True)
        ]
        if not self._drawn:
            return self._pass(shards[0], window_bytes, self._share, self.epoch)
        counts = apportion(length, [part.share for part in self._parts])
        return DrawnShuffle(
            self.order,
            self.epoch,
            [
                Part(
                    times=times,
                    records=int(self._records[part_shards].sum()),
                    passes=partial(self._pass, part_shards, max(1, window_bytes * times // max(length, 1)), 1),
                )
                for times, part_shards in zip(counts, shards, strict=True)
            ],
        )

    def _pass(self, shards: Ints, window_bytes: int, batch_size: int, number: int) -> WindowShuffle:
        """Return the order of some shards, in the epoch or pass of this number."""
        starts, records, nbytes = (column[shards] for column in (self._starts, self._records, self._nbytes))
        return WindowShuffle(self.order, number, starts, records, nbytes, window_bytes, batch_size)

    def rows(self, world_size: int = 1) -> int:
        """Return the rows of each rank's batch: its part of the global batch size, or fewer if an epoch is one batch."""
        order = self.order
        unit = math.lcm(order.num_partitions, world_size)
        needed = max(1, -(-order.num_partitions * self._longest_partition // unit)) * unit
        return min(order.global_batch_size, order.global_batch_size if order.drop_last else needed) // world_size

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Shares:
        """Return the records of `rank` at `step`: its equal part of the global batch, partition after partition."""
        return self.batches(range(step, step + 1), rank, world_size)

    def batches(self, steps: range, rank: int = 0, world_size: int = 1) -> Shares:
        """Return the records of `rank` at these steps, one step after the other."""
        if not 0 <= steps[0] <= steps[-1] < self.num_steps:
            raise IndexError(f"steps {steps[0]} to {steps[-1]} of {self.num_steps}")
        size = self.rows(world_size) * world_size
        share = size // self.order.num_partitions
        begin, end = rank * size // world_size, (rank + 1) * size // world_size
        parts = [
            _take(
                self._shuffle_of(partition),
                self._cursors(partition, steps, share)[:, max(begin, first) - first : min(end, first + share) - first],
            )
            for partition, first in enumerate(range(0, size, share))
            if begin < first + share and first < end
        ]
        positions, valid = (np.concatenate(column, axis=1).reshape(-1) for column in zip(*parts, strict=True))
        return Shares(positions=positions, valid=valid)

    def groups(self, step: int, rank: int = 0, world_size: int = 1, cursors: Sequence[int] = ()) -> list[tuple[int, int]]:
        """Return the partitions that `rank` reads from, each with its current group of runs.

        Current is at `step`, or at `cursors` if given. An epoch of draws has no groups.
        """
        shuffles = [(number, self._shuffle_of(number)) for number in self.read_by(rank, world_size)]
        cursor = min(step, self.num_steps - 1) * self._share
        return [
            (number, shuffle.group(cursors[number] if cursors else cursor))
            for number, shuffle in shuffles
            if isinstance(shuffle, WindowShuffle)
        ]

    def read_by(self, rank: int = 0, world_size: int = 1) -> range:
        """Return the partitions that `rank` delivers records of."""
        size, share = self.order.global_batch_size, self._share
        return range(rank * size // world_size // share, -(-(rank + 1) * size // world_size // share))

    @property
    def drawn(self) -> bool:
        """Whether the epoch consists of draws, which have no groups."""
        return self._drawn

    def blocks(self, partition: int, world_size: int = 1, *, by_record: bool = False) -> Blocks:
        """Return the blocks and groups of a partition's shuffle, in steps, or in its records; not for an epoch of draws."""
        shuffle = self._shuffle_of(partition)
        assert isinstance(shuffle, WindowShuffle)
        share = 1 if by_record else max(1, self.rows(world_size) * world_size // self.order.num_partitions)
        return Blocks(
            begins=shuffle.block_starts // share,
            filled=-(-shuffle.block_starts // share),
            group_records=shuffle.group_records,
            group_bytes=shuffle.group_bytes,
        )

    def runs(self, partition: int, group: int) -> list[tuple[int, int]]:
        """Return first position and number of records of each run of a partition's group, which are read together."""
        shuffle = self._shuffle_of(partition)
        return shuffle.runs(group) if isinstance(shuffle, WindowShuffle) else []

    def next_needed(self, partition: int, group: int, after: int = 0) -> npt.NDArray[np.float64]:
        """Return when each run of a group is next needed, as epoch plus the fraction of it that is over."""
        shuffle, later_shuffle = self._shuffle_of(partition), self._following(after)._shuffle_of(partition)
        assert isinstance(shuffle, WindowShuffle)
        assert isinstance(later_shuffle, WindowShuffle)
        starts = np.array([start for start, _ in shuffle.runs(group)], np.int64)
        return self.epoch + after + later_shuffle.fractions(starts)

    def _following(self, after: int) -> EpochPlan:
        """Return the plan of a later epoch, made once; the plan itself for 0. `after` is 0 or 1."""
        if after and self._following_plan is None:
            self._following_plan = EpochPlan(self.order, self.epoch + after, self._records, self._nbytes, lengths=self._lengths)
        return self._following_plan if after and self._following_plan is not None else self

    def _cursors(self, partition: int, steps: range, share: int) -> Ints:
        """Return cursors (steps, share) in a partition's order."""
        cursors: Ints = np.array(steps)[:, None] * share + np.arange(share)
        if self.order.bucket_by_length:
            full_batches = self.length(partition) // self._share  # batches without padding; the padded one stays last
            for row, step in enumerate(steps):
                if step < full_batches:
                    cursors[row] = self._pool(partition, step // self._pool_steps, full_batches)[step % self._pool_steps]
        return cursors

    def _pool(self, partition: int, number: int, full_batches: int) -> Ints:
        """Return cursors (steps, share) of neighbouring full batches, regrouped by length, in random order."""
        pool = self._pools.get((partition, number))
        if pool is None:
            assert self._lengths is not None
            first = number * self._pool_steps
            steps = range(first, min(first + self._pool_steps, full_batches))
            cursors = np.arange(first * self._share, steps.stop * self._share)
            by_length = cursors[np.argsort(self._lengths(_take(self._shuffle_of(partition), cursors)[0]), kind="stable")]
            order_keys = np.array(steps)
            if self.order.shuffle:
                order_keys = hashed_keys(order_keys, purpose_key(self.order, self.epoch, BUCKETS))
            pool = by_length.reshape(len(steps), -1)[np.argsort(order_keys, kind="stable")]
            kept_keys = [key for key in self._pools if key[0] == partition][-1:]
            self._pools = {key: pool for key, pool in self._pools.items() if key[0] != partition or key in kept_keys}
            self._pools[partition, number] = pool
        return pool


def _take(shuffle: WindowShuffle | DrawnShuffle, cursors: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Return the records at cursors (steps, n) and their validity; after the last record it is repeated, not valid."""
    positions = shuffle.positions(np.minimum(cursors, shuffle.num_records - 1).reshape(-1))
    return positions.reshape(cursors.shape), cursors < shuffle.num_records


def deal_shards(shard_records: Ints, num_partitions: int) -> Ints:
    """Return the partition of every shard, the same in every epoch.

    Shards are dealt largest first, to and fro, so that partitions differ by about one shard.
    """
    turns = np.arange(len(shard_records)) % (2 * num_partitions)
    partition = np.empty(len(shard_records), np.int64)
    partition[np.argsort(-shard_records, kind="stable")] = np.minimum(turns, 2 * num_partitions - 1 - turns)
    return partition
