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
from dali_pipeline.sampling.draws import DrawnLane, Draws, Part, apportion
from dali_pipeline.sampling.lane import Lane
from dali_pipeline.sampling.order import BUCKETS, Order, hashed_keys, purpose_key
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
    Costs a sort of the shards to make, O(runs) for the first batch of a lane and O(window) for any other, most of it cached
    between neighbouring batches.
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
        if len(self._records) and order.lanes > fewest:
            raise DataError(
                f"split {order.split!r} has {fewest} shards{' of a kind that is drawn' if draws else ''}; "
                f"expected at least one for each of {order.lanes} lanes"
            )
        # of each part: the lane of every shard
        self._lane_of = [deal_shards(self._records[each.begin : each.end], order.lanes) for each in self._parts]
        self._lanes: dict[int, Lane | DrawnLane] = {}  # made when first asked for: `len` needs none, a node its own alone
        self._share = order.global_batch_size // order.lanes
        sizes = [self.length(lane) for lane in range(order.lanes)]
        self.num_steps: int = (
            min(n // self._share for n in sizes) if order.tail == "drop" else max(-(-n // self._share) for n in sizes)
        )
        self._longest_lane = max(sizes)
        self.nbytes, self.num_records = int(self._nbytes.sum()), int(self._records.sum())
        batch_bytes = self._share * self.nbytes // max(1, self.num_records)
        self._pool_steps = max(1, min(POOL_STEPS, order.window_bytes // 2 // max(1, batch_bytes)))
        self._later: EpochPlan | None = None
        self._pools: dict[tuple[int, int], Ints] = {}  # the last ones, by lane and number

    def __reduce__(self) -> tuple[type[EpochPlan], tuple[Any, ...]]:
        return EpochPlan, self._arguments  # what was computed so far is left: other threads add to it meanwhile

    def length(self, lane: int) -> int:
        """Records, or draws, of a lane."""
        if self._drawn:
            return self._num_draws * (lane + 1) // self.order.lanes - self._num_draws * lane // self.order.lanes
        return int(self._records[self._lane_of[0] == lane].sum())

    def num_valid(self, step: int) -> int:
        """Rows of the global batch at a step that are not padding."""
        left = (self.length(lane) - step * self._share for lane in range(self.order.lanes))
        return sum(min(self._share, max(0, each)) for each in left)

    def at(self, lane: int, places: Ints) -> Ints:
        """The records at these places of a lane's order."""
        return self._lane(lane).positions(places)

    def _lane(self, lane: int) -> Lane | DrawnLane:
        found = self._lanes.get(lane)
        if found is None:  # two threads may make it at once, and make the same
            found = self._lanes[lane] = self._make(lane)
        return found

    def _make(self, lane: int) -> Lane | DrawnLane:
        window_bytes, own = self.order.window_bytes, self.length(lane)
        shards = [each.begin + np.flatnonzero(of == lane) for each, of in zip(self._parts, self._lane_of, strict=True)]
        if not self._drawn:
            return self._pass(shards[0], window_bytes, self._share, self.epoch)
        counts = apportion(own, [each.share for each in self._parts])
        return DrawnLane(
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

    def _pass(self, shards: Ints, window_bytes: int, batch_size: int, number: int) -> Lane:
        """The order of some shards, in the epoch or pass of this number."""
        starts, records, nbytes = (each[shards] for each in (self._starts, self._records, self._nbytes))
        return Lane(self.order, number, starts, records, nbytes, window_bytes, batch_size)

    def rows(self, world_size: int = 1) -> int:
        """Rows of each rank's batch: its part of the global batch size, but no more than the epoch's only batch needs."""
        order = self.order
        unit = math.lcm(order.lanes, world_size)
        needed = max(1, -(-order.lanes * self._longest_lane // unit)) * unit
        return min(order.global_batch_size, needed if order.tail == "pad" else order.global_batch_size) // world_size

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Shares:
        """What `rank` takes at `step`: its equal part of the global batch, lane after lane."""
        return self.batches(range(step, step + 1), rank, world_size)

    def batches(self, steps: range, rank: int = 0, world_size: int = 1) -> Shares:
        """What `rank` takes at these steps, one after the other."""
        if not 0 <= steps[0] <= steps[-1] < self.num_steps:
            raise IndexError(f"steps {steps[0]} to {steps[-1]} of {self.num_steps}")
        size = self.rows(world_size) * world_size
        share = size // self.order.lanes
        begin, end = rank * size // world_size, (rank + 1) * size // world_size
        parts = [
            _take(
                self._lane(lane),
                self._places(lane, steps, share)[:, max(begin, first) - first : min(end, first + share) - first],
            )
            for lane, first in enumerate(range(0, size, share))
            if begin < first + share and first < end
        ]
        positions, valid = (np.concatenate(each, axis=1).reshape(-1) for each in zip(*parts, strict=True))
        return Shares(positions=positions, valid=valid)

    def groups(self, step: int, rank: int = 0, world_size: int = 1, places: Sequence[int] = ()) -> list[tuple[int, int]]:
        """The lanes that `rank` reads from, with the group of runs that each has come to at `step`, or where the lanes are at
        `places`; none of draws."""
        size, share = self.order.global_batch_size, self._share
        lanes = range(rank * size // world_size // share, -(-(rank + 1) * size // world_size // share))
        found = [(number, self._lane(number)) for number in lanes]
        place = min(step, self.num_steps - 1) * share
        return [(number, lane.group(places[number] if places else place)) for number, lane in found if isinstance(lane, Lane)]

    def runs(self, lane: int, group: int) -> list[tuple[int, int]]:
        """First position and number of records of each run of a lane's group: what is read together."""
        found = self._lane(lane)
        return found.runs(group) if isinstance(found, Lane) else []

    def turns(self, lane: int, group: int, after: int = 0) -> npt.NDArray[np.float64]:
        """When each run of a lane's group comes in the epoch so many later: the epoch, and which part of it is over then."""
        found, later = self._lane(lane), self._following(after)._lane(lane)
        assert isinstance(found, Lane)
        assert isinstance(later, Lane)
        starts = np.array([start for start, _ in found.runs(group)], np.int64)
        return self.epoch + after + later.turns(starts)

    def _following(self, after: int) -> EpochPlan:
        if after and self._later is None:
            self._later = EpochPlan(self.order, self.epoch + after, self._records, self._nbytes, lengths=self._lengths)
        return self._later if after and self._later is not None else self

    def _places(self, lane: int, steps: range, share: int) -> Ints:
        """Places (steps, share) in a lane's order."""
        places: Ints = np.array(steps)[:, None] * share + np.arange(share)
        if self.order.bucket_by_length:
            whole = self.length(lane) // self._share  # batches without padding, which stays behind them
            for at, step in enumerate(steps):
                if step < whole:
                    places[at] = self._pool(lane, step // self._pool_steps, whole)[step % self._pool_steps]
        return places

    def _pool(self, lane: int, number: int, whole: int) -> Ints:
        """Places (steps, share) of neighbouring batches, of the first `whole` ones, cut anew by length, in a random order."""
        found = self._pools.get((lane, number))
        if found is None:
            assert self._lengths is not None
            first = number * self._pool_steps
            steps = range(first, min(first + self._pool_steps, whole))
            places = np.arange(first * self._share, steps.stop * self._share)
            by_length = places[np.argsort(self._lengths(_take(self._lane(lane), places)[0]), kind="stable")]
            turns = np.array(steps)
            if self.order.shuffle:
                turns = hashed_keys(turns, purpose_key(self.order, self.epoch, BUCKETS))
            found = by_length.reshape(len(steps), -1)[np.argsort(turns, kind="stable")]
            kept = [key for key in self._pools if key[0] == lane][-1:]
            self._pools = {key: pool for key, pool in self._pools.items() if key[0] != lane or key in kept}
            self._pools[lane, number] = found
        return found


def _take(lane: Lane | DrawnLane, places: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Places (steps, n) of a lane's order; beyond its last record that record again, not valid."""
    found = lane.positions(np.minimum(places, lane.num_records - 1).reshape(-1))
    return found.reshape(places.shape), places < lane.num_records


def deal_shards(shard_records: Ints, lanes: int) -> Ints:
    """The lane of every shard: largest first, to and fro, so that lanes differ by about one shard. The same every epoch."""
    places = np.arange(len(shard_records)) % (2 * lanes)
    lane = np.empty(len(shard_records), np.int64)
    lane[np.argsort(-shard_records, kind="stable")] = np.minimum(places, 2 * lanes - 1 - places)
    return lane
