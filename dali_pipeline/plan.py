"""EpochPlan: which record stands where in an epoch. Pure arithmetic on shard sizes; no I/O, nothing to remember."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dali_pipeline.draws import DrawnLane, Draws, Part, apportion
from dali_pipeline.lane import Lane
from dali_pipeline.order import Ints, Order
from dali_pipeline.schema import DataError


@dataclass(frozen=True, kw_only=True, eq=False)
class Shares:
    """Rows of one rank's batch. positions: (B,) int64, record numbers in the split · valid: (B,) bool, False for padding."""

    positions: Ints
    valid: npt.NDArray[np.bool_]


class EpochPlan:
    """The batches of one epoch, for every rank.

    shard_records, shard_bytes: (S,) sizes of the split's shards in file order · draws: where given, the epoch is `num_draws`
    draws rather than every record once. Costs O(shards + runs) to make and O(window) a batch, most of it cached between
    neighbouring batches.
    """

    def __init__(
        self,
        order: Order,
        epoch: int,
        shard_records: npt.ArrayLike,
        shard_bytes: npt.ArrayLike,
        draws: Sequence[Draws] = (),
        num_draws: int = 0,
    ) -> None:
        self.order = order
        self.epoch = epoch
        records, nbytes = np.asarray(shard_records, np.int64), np.asarray(shard_bytes, np.int64)
        fewest = min((each.end - each.begin for each in draws), default=len(records))
        if len(records) and order.lanes > fewest:
            raise DataError(
                f"split {order.split!r} has {fewest} shards{' of a kind that is drawn' if draws else ''}; "
                f"expected at least one for each of {order.lanes} lanes"
            )
        starts = np.cumsum(records) - records

        share = order.global_batch_size // order.lanes

        def passes(begin: int, end: int, lane: int, window_bytes: int, batch_size: int) -> Callable[[int], Lane]:
            mine = begin + np.flatnonzero(deal_shards(records[begin:end], order.lanes) == lane)
            return lambda number: Lane(order, number, starts[mine], records[mine], nbytes[mine], window_bytes, batch_size)

        self._lanes: list[Lane | DrawnLane] = []
        for lane in range(order.lanes):
            if not draws:
                self._lanes.append(passes(0, len(records), lane, order.window_bytes, share)(epoch))
                continue
            own = num_draws * (lane + 1) // order.lanes - num_draws * lane // order.lanes
            counts = apportion(own, [each.share for each in draws])
            parts = [
                Part(count, passes(each.begin, each.end, lane, max(1, order.window_bytes * count // max(own, 1)), 1))
                for each, count in zip(draws, counts, strict=True)
            ]
            self._lanes.append(DrawnLane(order, epoch, parts))
        lengths = [lane.num_records for lane in self._lanes]
        self.num_steps: int = min(n // share for n in lengths) if order.tail == "drop" else max(-(-n // share) for n in lengths)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Shares:
        """What `rank` takes at `step`: its equal part of the global batch, lane after lane."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        size, share = self.order.global_batch_size, self.order.global_batch_size // self.order.lanes
        begin, end = rank * size // world_size, (rank + 1) * size // world_size
        parts = [
            _take(self._lanes[lane], step * share + max(begin - lane * share, 0), step * share + min(end - lane * share, share))
            for lane in range(begin // share, -(-end // share))
        ]
        return Shares(
            positions=np.concatenate([part.positions for part in parts]), valid=np.concatenate([part.valid for part in parts])
        )


def _take(lane: Lane | DrawnLane, begin: int, end: int) -> Shares:
    """Places begin to end of a lane's order; beyond its last record that record again, not valid."""
    places = np.arange(begin, end)
    return Shares(positions=lane.positions(np.minimum(places, lane.num_records - 1)), valid=places < lane.num_records)


def deal_shards(shard_records: Ints, lanes: int) -> Ints:
    """The lane of every shard: largest first, to and fro, so that lanes differ by about one shard. The same every epoch."""
    places = np.arange(len(shard_records)) % (2 * lanes)
    lane = np.empty(len(shard_records), np.int64)
    lane[np.argsort(-shard_records, kind="stable")] = np.minimum(places, 2 * lanes - 1 - places)
    return lane
