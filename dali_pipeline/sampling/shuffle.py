"""WindowShuffle: the order of one partition's records in one epoch.

The shuffle of one partition, by index (no buffer, so no state):

1. Cut the partition's shards into runs of consecutive records (an eighth of a shard at most, so that a window mixes four times
   as many shards as a buffer filled from whole ones; some MiB at most) and sort the runs by a hashed key: the *line*, a
   random order of runs from all over the partition.
2. Cut the line into groups of at most half a window. Permute the records within each group (hashed keys, sorted).
3. Permute again within blocks that reach from about the middle of one group to about the middle of the next.

A delivered block draws from two groups, one window in all, and the next block shares one of the two with it, so records
mix across every border; any batch is computed from its two groups alone. A partition that fits in the window is one group, and
the result a full permutation.
"""

from __future__ import annotations

import bisect

import numpy as np
import numpy.typing as npt

from dali_pipeline.sampling.order import ACROSS_GROUPS, RUNS, WITHIN_GROUPS, Order, hashed_keys, purpose_key
from dali_pipeline.types import BLOCK_BYTES, Ints

RUNS_PER_WINDOW, RUNS_PER_SHARD = 64, 8
MAX_RUN_BYTES = 4 << 20  # longer ones are read no faster, and mix less
TOUCHED_BLOCKS = 4  # by a record beside its own bytes: two, and two by its edges
MAX_RUNS = 1 << 22  # of a partition: their order is in memory, some 100 bytes each while it is made


class WindowShuffle:
    """The order of one partition's records.

    starts, records, nbytes: (S,) its shards, by the position of their first record. batch_size: records that the partition
    gives to a global batch.
    """

    def __init__(
        self, order: Order, epoch: int, starts: Ints, records: Ints, nbytes: Ints, window_bytes: int, batch_size: int
    ) -> None:
        self.num_records = int(records.sum())
        self._shuffle = order.shuffle
        self._key = [purpose_key(order, epoch, purpose) for purpose in (RUNS, WITHIN_GROUPS, ACROSS_GROUPS)]
        fits = nbytes.sum() <= window_bytes
        if order.shuffle:
            starts, records, nbytes = _cut_into_runs(starts, records, nbytes, window_bytes, batch_size)
            line = np.argsort(hashed_keys(starts, self._key[RUNS]), kind="stable")
            starts, records, nbytes = starts[line], records[line], nbytes[line]
        self._run_starts = starts  # (runs,) first record of each run, as a position in the split
        self._run_ends = np.cumsum(records)  # (runs,) where each run ends in the line
        # group_ends: (groups,) where each group ends in the line
        group_bytes = window_bytes if fits else window_bytes // 2
        self._last_runs = _group_last(nbytes, group_bytes)  # (groups,) of each group
        self._group_ends = self._run_ends[self._last_runs]
        group_starts = np.concatenate([[0], self._group_ends[:-1]]).astype(np.int64)
        # block_ends: (groups + 1,) from the middle of a group to the middle of the next, between two batches where it can be,
        # so that no batch needs three groups
        middles = (group_starts + self._group_ends) // 2
        between = middles // batch_size * batch_size
        self._block_ends = np.concatenate([np.where(between > group_starts, between, middles), self._group_ends[-1:]])
        self._by_start: Ints | None = None  # the runs in the order of the split, once asked for
        # the last two blocks computed, and the half group that begins the next; replaced whole, so threads may share them
        self._recent: tuple[tuple[int, Ints], ...] = ()
        self._half: tuple[int, Ints] | None = None

    def positions(self, places: Ints) -> Ints:
        """The records at these places of the partition's order."""
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
        found: Ints = self._run_starts[run] + into
        return found

    def group(self, place: int) -> int:
        """The later one of the two groups that the records around this place come from."""
        return min(bisect.bisect_right(self._block_ends, place), len(self._group_ends) - 1)

    def runs(self, group: int) -> list[tuple[int, int]]:
        """First position and number of records of each run of a group; none beyond the last group."""
        if group >= len(self._last_runs):
            return []
        chosen = slice(int(self._last_runs[group - 1]) + 1 if group else 0, int(self._last_runs[group]) + 1)
        records = np.diff(self._run_ends, prepend=0)[chosen]
        return list(zip(self._run_starts[chosen].tolist(), records.tolist(), strict=True))

    def turns(self, starts: Ints) -> npt.NDArray[np.float64]:
        """Of runs, by their first positions, the part of the partition that is over when they come; 0 to below 1."""
        if self._by_start is None:
            self._by_start = np.argsort(self._run_starts)
        at = self._by_start[np.searchsorted(self._run_starts, starts, sorter=self._by_start)]
        found: npt.NDArray[np.float64] = at / len(self._run_starts)
        return found

    def _block_start(self, block: int) -> int:
        return int(self._block_ends[block - 1]) if block else 0

    def _block(self, block: int) -> Ints:
        """Places in the line of the block's records, in delivered order: (records of the block,)."""
        for number, places in self._recent:
            if number == block:
                return places
        half = self._half
        parts = [half[1] if half is not None and half[0] == block - 1 else self._halves(block - 1)[1]] if block else []
        if block < len(self._group_ends):
            before, behind = self._halves(block)
            parts.append(before)
            self._half = block, behind
        members = np.concatenate(parts)
        places = members[np.argsort(hashed_keys(members, self._key[ACROSS_GROUPS]), kind="stable")]
        self._recent = (*self._recent[-1:], (block, places))
        return places

    def _halves(self, group: int) -> tuple[Ints, Ints]:
        """The group's places in the line, permuted, as the half before its middle and the half behind."""
        begin = int(self._group_ends[group - 1]) if group else 0
        line = np.arange(begin, int(self._group_ends[group]))
        line = line[np.argsort(hashed_keys(line, self._key[WITHIN_GROUPS]), kind="stable")]
        middle = int(self._block_ends[group]) - begin
        return line[:middle], line[middle:]


def _cut_into_runs(starts: Ints, records: Ints, nbytes: Ints, window_bytes: int, batch_size: int) -> tuple[Ints, Ints, Ints]:
    """Shards cut into runs of at least one record: their starts, records and bytes.

    A run that is cut off inside a shard touches a hash block more than it fills. Where the blocks of a batch's records alone
    could fill the window, its bytes count that block, so that a resume still reads one window at most.
    """
    run_bytes = np.minimum(min(max(window_bytes // RUNS_PER_WINDOW, BLOCK_BYTES), MAX_RUN_BYTES), nbytes // RUNS_PER_SHARD)
    pieces = np.clip(-(-nbytes // np.maximum(run_bytes, 1)), 1, np.maximum(records, 1))
    if pieces.sum() > MAX_RUNS:
        pieces = np.maximum(1, pieces * MAX_RUNS // pieces.sum())
    record_bytes = int((nbytes // np.maximum(records, 1)).max(initial=0))
    tight = batch_size * (record_bytes + TOUCHED_BLOCKS * BLOCK_BYTES) > window_bytes
    shard = np.repeat(np.arange(len(records)), pieces)
    piece = np.arange(len(shard)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    cut = piece * records[shard] // pieces[shard]
    run_records = (piece + 1) * records[shard] // pieces[shard] - cut
    filled = nbytes[shard] // pieces[shard]
    return starts[shard] + cut, run_records, filled + (np.minimum(BLOCK_BYTES, nbytes[shard] - filled) if tight else 0)


def _group_last(nbytes: Ints, limit: int) -> Ints:
    """Index of the last run of each group: as many runs as fit in `limit` bytes, at least one.

    Where a group begun at any run would end is found for all runs at once; what is left is a step a group.
    """
    ends = np.cumsum(nbytes)
    # behind the last run of the group that would begin at each run; then from group to group
    behind = np.maximum(np.searchsorted(ends, ends - nbytes + limit, side="right"), np.arange(1, len(ends) + 1))
    step, at = behind.data, 0  # a look into it costs a third of one into an array
    last: list[int] = []
    while at < len(step):
        at = step[at]
        last.append(at - 1)
    return np.array(last, np.int64)
