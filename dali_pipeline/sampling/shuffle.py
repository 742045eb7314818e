"""WindowShuffle: the order of one partition's records in one epoch.

The shuffle of one partition, by index (no buffer, so no state):

1. Cut the partition's shards into runs of consecutive records (an eighth of a shard at most, so that a window mixes four times
   as many shards as a buffer filled from whole ones; some MiB at most) and sort the runs by a hashed key: the *line*, a
   random order of runs from the whole partition.
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

from dali_pipeline.sampling.order import ACROSS_GROUPS, RUNS, WITHIN_GROUPS, Order, hashed_keys, hashed_order, purpose_key
from dali_pipeline.types import Ints

RUNS_PER_WINDOW, RUNS_PER_SHARD = 64, 8
LEAST_RUN_BYTES = 1 << 20  # of a run, if the window allows; a hash block of version 1, so that orders stay
MAX_RUN_BYTES = 4 << 20  # longer runs are read no faster, and mix less
TOUCHED_BLOCKS = 4  # hash blocks touched by a record beside its own bytes: two, and two by its edges
MAX_RUNS = 1 << 22  # per partition: their order is in memory, some 100 bytes each while it is computed


class WindowShuffle:
    """Order of one partition's records.

    Args:
        order: Everything that the order depends on.
        epoch: Number of the epoch.
        starts: (S,) position of the first record of each shard of the partition.
        records: (S,) records of each shard.
        nbytes: (S,) bytes of each shard.
        window_bytes: Bytes that are shuffled together at a time.
        batch_size: Records that the partition gives to a global batch.
    """

    def __init__(
        self, order: Order, epoch: int, starts: Ints, records: Ints, nbytes: Ints, window_bytes: int, batch_size: int
    ) -> None:
        self.num_records = int(records.sum())
        self._shuffle = order.shuffle
        self._key = [purpose_key(order, epoch, purpose) for purpose in (RUNS, WITHIN_GROUPS, ACROSS_GROUPS)]
        fits = nbytes.sum() <= window_bytes
        if order.shuffle:
            read_at_once = batch_size if order.unit == "record" else 0  # a window of single steps is read run by run
            starts, records, nbytes = _cut_into_runs(starts, records, nbytes, window_bytes, read_at_once)
            # stable, because an empty shard begins where the next one does
            line = np.argsort(hashed_keys(starts, self._key[RUNS]), kind="stable")
            starts, records, nbytes = starts[line], records[line], nbytes[line]
        self._run_starts = starts  # (runs,) first record of each run, as a position in the split
        self._run_bytes = nbytes  # (runs,) bytes of each run, approximately
        self._run_ends = np.cumsum(records)  # (runs,) where each run ends in the line
        # group_ends: (groups,) where each group ends in the line
        group_bytes = window_bytes if fits else window_bytes // 2
        self._last_runs = _group_last(nbytes, group_bytes)  # (groups,) last run of each group
        self._group_ends = self._run_ends[self._last_runs]
        group_starts = np.concatenate([[0], self._group_ends[:-1]]).astype(np.int64)
        # block_ends: (groups + 1,) from the middle of a group to the middle of the next, between two batches if possible,
        # so that no batch needs three groups
        middles = (group_starts + self._group_ends) // 2
        between = middles // batch_size * batch_size
        self._block_ends = np.concatenate([np.where(between > group_starts, between, middles), self._group_ends[-1:]])
        self._by_start: Ints | None = None  # the runs in the order of the split, computed on first use
        # The last two blocks, and the half group that begins the next, as indices in the line and positions. Replaced, not
        # changed, so threads may share them.
        self._recent: tuple[tuple[int, Ints], ...] = ()
        self._half: tuple[int, Ints] | None = None

    def positions(self, cursors: Ints) -> Ints:
        """Return the positions of the records at these cursors in the partition's order."""
        if not self._shuffle:
            run = np.searchsorted(self._run_ends, cursors, side="right")
            in_order: Ints = self._run_starts[run] + cursors - np.where(run > 0, self._run_ends[run - 1], 0)
            return in_order
        blocks = np.searchsorted(self._block_ends, cursors, side="right")
        first, last = (int(blocks.min()), int(blocks.max())) if len(blocks) else (0, 0)
        if first == last:
            alone: Ints = self._block(first)[cursors - self._block_start(first)]
            return alone
        positions = np.empty_like(cursors)
        for block in range(first, last + 1):
            in_block = blocks == block
            positions[in_block] = self._block(block)[cursors[in_block] - self._block_start(block)]
        return positions

    def group(self, cursor: int) -> int:
        """Return the later one of the two groups that the records around this cursor come from."""
        return min(bisect.bisect_right(self._block_ends, cursor), len(self._group_ends) - 1)

    @property
    def group_records(self) -> Ints:
        """(G,) records of each group."""
        return np.diff(self._group_ends, prepend=0)

    @property
    def group_bytes(self) -> Ints:
        """(G,) bytes of each group, approximately."""
        return np.add.reduceat(self._run_bytes, np.concatenate([[0], self._last_runs[:-1] + 1]))

    @property
    def block_starts(self) -> Ints:
        """(G + 1,) cursor at which each block begins; block b draws from groups b - 1 and b, as far as these exist."""
        return np.concatenate([[0], self._block_ends[:-1]]).astype(np.int64)

    def runs(self, group: int) -> list[tuple[int, int]]:
        """Return first position and number of records of each run of a group; none beyond the last group."""
        if group >= len(self._last_runs):
            return []
        chosen = slice(int(self._last_runs[group - 1]) + 1 if group else 0, int(self._last_runs[group]) + 1)
        records = np.diff(self._run_ends, prepend=0)[chosen]
        return list(zip(self._run_starts[chosen].tolist(), records.tolist(), strict=True))

    def fractions(self, starts: Ints) -> npt.NDArray[np.float64]:
        """Return the fraction of the partition, 0 to below 1, that is over when each run, by its first position, comes."""
        if self._by_start is None:
            self._by_start = np.argsort(self._run_starts)
        ranks = self._by_start[np.searchsorted(self._run_starts, starts, sorter=self._by_start)]
        fractions: npt.NDArray[np.float64] = ranks / len(self._run_starts)
        return fractions

    def _block_start(self, block: int) -> int:
        return int(self._block_ends[block - 1]) if block else 0

    def _block(self, block: int) -> Ints:
        """Return the positions of the block's records, in delivered order, (records of the block,)."""
        for number, recent in self._recent:
            if number == block:
                return recent
        half = self._half
        parts = [half[1] if half is not None and half[0] == block - 1 else self._halves(block - 1)[1]] if block else []
        if block < len(self._group_ends):
            before, behind = self._halves(block)
            parts.append(before)
            self._half = block, behind
        # members: (2, records), index in the line and position
        members = np.concatenate(parts, axis=1)
        positions: Ints = members[1][hashed_order(members[0], self._key[ACROSS_GROUPS])]
        self._recent = (*self._recent[-1:], (block, positions))
        return positions

    def _halves(self, group: int) -> tuple[Ints, Ints]:
        """Return the group's records, permuted, as the half before its middle and the half after it.

        Each half is (2, records): indices in the line, and positions.
        """
        begin, end = int(self._group_ends[group - 1]) if group else 0, int(self._group_ends[group])
        runs = slice(int(self._last_runs[group - 1]) + 1 if group else 0, int(self._last_runs[group]) + 1)
        run_begins = np.concatenate([[begin], self._run_ends[runs][:-1]])
        line = np.arange(begin, end)
        positions = line + np.repeat(self._run_starts[runs] - run_begins, np.diff(run_begins, append=end))
        order = hashed_order(line, self._key[WITHIN_GROUPS])
        members, middle = np.stack([line[order], positions[order]]), int(self._block_ends[group]) - begin
        return members[:, :middle], members[:, middle:]


def _cut_into_runs(starts: Ints, records: Ints, nbytes: Ints, window_bytes: int, batch_size: int) -> tuple[Ints, Ints, Ints]:
    """Cut shards into runs of at least one record; return their starts, records and bytes.

    A run that is cut inside a shard touches one hash block more than it fills. If the blocks of one batch's records alone could
    fill the window, its bytes include that block, so that a resume still reads at most one window.
    """
    run_bytes = np.minimum(min(max(window_bytes // RUNS_PER_WINDOW, LEAST_RUN_BYTES), MAX_RUN_BYTES), nbytes // RUNS_PER_SHARD)
    run_counts = np.clip(-(-nbytes // np.maximum(run_bytes, 1)), 1, np.maximum(records, 1))
    if run_counts.sum() > MAX_RUNS:
        run_counts = np.maximum(1, run_counts * MAX_RUNS // run_counts.sum())
    record_bytes = int((nbytes // np.maximum(records, 1)).max(initial=0))
    blocks_fill_window = batch_size * (record_bytes + TOUCHED_BLOCKS * LEAST_RUN_BYTES) > window_bytes
    shard = np.repeat(np.arange(len(records)), run_counts)
    run = np.arange(len(shard)) - np.repeat(np.cumsum(run_counts) - run_counts, run_counts)
    begin = run * records[shard] // run_counts[shard]
    run_records = (run + 1) * records[shard] // run_counts[shard] - begin
    run_nbytes = nbytes[shard] // run_counts[shard]
    return (
        starts[shard] + begin,
        run_records,
        run_nbytes + (np.minimum(LEAST_RUN_BYTES, nbytes[shard] - run_nbytes) if blocks_fill_window else 0),
    )


def _group_last(nbytes: Ints, limit: int) -> Ints:
    """Return the index of the last run of each group: as many runs as fit in `limit` bytes, at least one.

    The end of a group that begins at any run is computed for all runs at once. What remains is one step per group.
    """
    ends = np.cumsum(nbytes)
    # Index after the last run of a group that begins at each run, then from group to group.
    group_ends = np.maximum(np.searchsorted(ends, ends - nbytes + limit, side="right"), np.arange(1, len(ends) + 1))
    next_begin, begin = group_ends.data, 0  # an access costs a third of one to an array
    last: list[int] = []
    while begin < len(next_begin):
        begin = next_begin[begin]
        last.append(begin - 1)
    return np.array(last, np.int64)
