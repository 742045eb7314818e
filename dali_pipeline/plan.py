"""EpochPlan: which record stands where in an epoch. Pure arithmetic on shard sizes; no I/O, nothing to remember.

The shuffle of one lane, by index (no buffer, so no state):

1. Cut the lane's shards into runs of consecutive records (at most 1/64 of the window each, at least a hash block) and
   sort the runs by a hashed key: the *line*, a random order of runs from all over the lane.
2. Cut the line into groups of at most half a window. Permute the records within each group (hashed keys, sorted).
3. Permute again within blocks that reach from the middle of one group to the middle of the next.

A delivered block draws from two groups, one window in all, and the next block shares one of the two with it, so records
mix across every border; any batch is computed from its two groups alone. A lane that fits in the window is one group, and
the result a full permutation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import xxhash

from dali_pipeline.schema import DataError, UsageError
from dali_pipeline.shard import BLOCK_BYTES

Tail = Literal["pad", "drop"]
TAILS: tuple[Tail, ...] = get_args(Tail)
WINDOW_BYTES = 256 << 20
RUNS_PER_WINDOW = 64
Ints = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]
_RUNS, _WITHIN_GROUPS, _ACROSS_GROUPS = range(3)  # purposes of a key


@dataclass(frozen=True, kw_only=True)
class Order:
    """All that the order of a split depends on. The same Order and the same shards give the same epochs, for ever.

    digest: of the manifest · window_bytes: of shards open at a time · lanes: disjoint sets of shards, each with a window of
    its own; a global batch takes equal shares of every lane. Lanes differ by a shard or so: tail "pad" fills the shorter
    ones up, "drop" leaves the rest of the longer ones out.
    """

    digest: str
    split: str
    seed: int
    shuffle: bool
    global_batch_size: int
    window_bytes: int
    lanes: int
    tail: Tail

    def __post_init__(self) -> None:
        limits = {"seed": (0, 2**64 - 1), "global_batch_size": (1, 2**31), "window_bytes": (1, 2**62), "lanes": (1, 2**31)}
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise UsageError(f"{name} is {value!r}; expected a whole number from {least} to {most}")
        if self.tail not in TAILS:
            raise UsageError(f"tail is {self.tail!r}; expected {' or '.join(map(repr, TAILS))}")
        if self.global_batch_size % self.lanes:
            raise UsageError(f"the global batch size {self.global_batch_size} does not divide by {self.lanes} lanes")


@dataclass(frozen=True, kw_only=True, eq=False)
class Shares:
    """Rows of one rank's batch. positions: (B,) int64, record numbers in the split · valid: (B,) bool, False for padding."""

    positions: Ints
    valid: npt.NDArray[np.bool_]


class EpochPlan:
    """The batches of one epoch, for every rank.

    shard_records, shard_bytes: (S,) sizes of the split's shards in file order. Costs O(shards + runs) to make and
    O(window) a batch, most of it cached between neighbouring batches.
    """

    def __init__(self, order: Order, epoch: int, shard_records: npt.ArrayLike, shard_bytes: npt.ArrayLike) -> None:
        self.order = order
        self.epoch = epoch
        records, nbytes = np.asarray(shard_records, np.int64), np.asarray(shard_bytes, np.int64)
        if len(records) and order.lanes > len(records):
            raise DataError(
                f"split {order.split!r} has {len(records)} shards; expected at least one for each of {order.lanes} lanes"
            )
        starts = np.cumsum(records) - records
        lane_of_shard = deal_shards(records, order.lanes)
        self._lanes = [
            _Lane(order, epoch, starts[mine], records[mine], nbytes[mine])
            for mine in (np.flatnonzero(lane_of_shard == lane) for lane in range(order.lanes))
        ]
        share = order.global_batch_size // order.lanes
        lengths = [lane.num_records for lane in self._lanes]
        self.num_steps: int = min(n // share for n in lengths) if order.tail == "drop" else max(-(-n // share) for n in lengths)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Shares:
        """What `rank` takes at `step`: its equal part of the global batch, lane after lane."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        size, share = self.order.global_batch_size, self.order.global_batch_size // self.order.lanes
        begin, end = rank * size // world_size, (rank + 1) * size // world_size
        parts = [
            self._lanes[lane].take(step * share + max(begin - lane * share, 0), step * share + min(end - lane * share, share))
            for lane in range(begin // share, -(-end // share))
        ]
        return Shares(
            positions=np.concatenate([part.positions for part in parts]), valid=np.concatenate([part.valid for part in parts])
        )


class _Lane:
    """The order of one lane's records."""

    def __init__(self, order: Order, epoch: int, starts: Ints, records: Ints, nbytes: Ints) -> None:
        self.num_records = int(records.sum())
        self._shuffle = order.shuffle
        self._key = [_key(order, epoch, purpose) for purpose in (_RUNS, _WITHIN_GROUPS, _ACROSS_GROUPS)]
        fits = nbytes.sum() <= order.window_bytes
        if order.shuffle:
            starts, records, nbytes = _cut_into_runs(
                starts, records, nbytes, max(BLOCK_BYTES, order.window_bytes // RUNS_PER_WINDOW)
            )
            line = np.argsort(hashed_keys(starts, self._key[_RUNS]), kind="stable")
            starts, records, nbytes = starts[line], records[line], nbytes[line]
        self._run_starts = starts  # (runs,) first record of each run, as a position in the split
        self._run_ends = np.cumsum(records)  # (runs,) where each run ends in the line
        # group_ends: (groups,) where each group ends in the line
        group_bytes = order.window_bytes if fits else order.window_bytes // 2
        self._group_ends = self._run_ends[_group_last(nbytes, group_bytes)]
        group_starts = np.concatenate([[0], self._group_ends[:-1]]).astype(np.int64)
        # block_ends: (groups + 1,) from the middle of a group to the middle of the next
        self._block_ends = np.concatenate([(group_starts + self._group_ends) // 2, self._group_ends[-1:]])
        self._recent: tuple[tuple[int, Ints], ...] = ()  # the last two blocks computed; replaced whole, so threads may share it

    def take(self, begin: int, end: int) -> Shares:
        """Places begin to end of the lane's order; beyond its last record that record again, not valid."""
        places = np.arange(begin, end)
        valid = places < self.num_records
        places = np.minimum(places, self.num_records - 1)
        if self._shuffle:
            blocks = np.searchsorted(self._block_ends, places, side="right")
            line = np.empty_like(places)
            for block in np.unique(blocks):
                at = blocks == block
                line[at] = self._block(int(block))[places[at] - self._block_start(int(block))]
        else:
            line = places
        run = np.searchsorted(self._run_ends, line, side="right")
        into = line - np.where(run > 0, self._run_ends[run - 1], 0)
        return Shares(positions=self._run_starts[run] + into, valid=valid)

    def _block_start(self, block: int) -> int:
        return int(self._block_ends[block - 1]) if block else 0

    def _block(self, block: int) -> Ints:
        """Places in the line of the block's records, in delivered order: (records of the block,)."""
        for number, places in self._recent:
            if number == block:
                return places
        parts = [self._group(block - 1)[1]] if block else []
        if block < len(self._group_ends):
            parts.append(self._group(block)[0])
        members = np.concatenate(parts)
        places = members[np.argsort(hashed_keys(members, self._key[_ACROSS_GROUPS]), kind="stable")]
        self._recent = (*self._recent[-1:], (block, places))
        return places

    def _group(self, group: int) -> tuple[Ints, Ints]:
        """The group's places in the line, permuted, as the half before its middle and the half behind."""
        begin = int(self._group_ends[group - 1]) if group else 0
        line = np.arange(begin, int(self._group_ends[group]))
        line = line[np.argsort(hashed_keys(line, self._key[_WITHIN_GROUPS]), kind="stable")]
        middle = int(self._block_ends[group]) - begin
        return line[:middle], line[middle:]


def deal_shards(shard_records: Ints, lanes: int) -> Ints:
    """The lane of every shard: largest first, to and fro, so that lanes differ by about one shard. The same every epoch."""
    places = np.arange(len(shard_records)) % (2 * lanes)
    lane = np.empty(len(shard_records), np.int64)
    lane[np.argsort(-shard_records, kind="stable")] = np.minimum(places, 2 * lanes - 1 - places)
    return lane


def hashed_keys(index: Ints, key: int) -> Keys:
    """A 64-bit key for every index: SplitMix64's finaliser (Steele, Lea and Flood 2014), twice, the second time keyed."""
    return _mix(_mix(index.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(key))


def _mix(z: Keys) -> Keys:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _key(order: Order, epoch: int, purpose: int) -> int:
    seed_low, seed_high, split = order.seed & 0xFFFFFFFF, order.seed >> 32, xxhash.xxh32_intdigest(order.split.encode())
    words = [seed_low, seed_high, epoch, purpose, split, int(order.digest, 16)]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def _cut_into_runs(starts: Ints, records: Ints, nbytes: Ints, run_bytes: int) -> tuple[Ints, Ints, Ints]:
    """Shards cut into runs of at most about `run_bytes` and at least one record: their starts, records and bytes.

    A run that is cut off inside a shard touches one hash block more than it fills, and its bytes count that.
    """
    pieces = np.clip(-(-nbytes // run_bytes), 1, np.maximum(records, 1))
    shard = np.repeat(np.arange(len(records)), pieces)
    piece = np.arange(len(shard)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    cut = piece * records[shard] // pieces[shard]
    run_records = (piece + 1) * records[shard] // pieces[shard] - cut
    return starts[shard] + cut, run_records, nbytes[shard] // pieces[shard] + np.where(pieces[shard] > 1, BLOCK_BYTES, 0)


def _group_last(nbytes: Ints, limit: int) -> Ints:
    """Index of the last run of each group: as many runs as fit in `limit` bytes, at least one."""
    ends = np.cumsum(nbytes)
    last, spent = [], 0
    at = 0
    while at < len(nbytes):
        at = max(int(np.searchsorted(ends, spent + limit, side="right")), at + 1)
        last.append(at - 1)
        spent = int(ends[at - 1])
    return np.array(last, np.int64)
