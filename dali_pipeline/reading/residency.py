"""Residency: which records of a rank's partitions are in a window's memory at each step, and under which numbers.

The memory of a partition has three slots, each for one group of the shuffle (half a window). Group g lies in slot g % 3. Block
b of the shuffle draws from groups b - 1 and b; meanwhile group b + 1 is read into the third slot. So the memory is 1.5 windows.

Time is counted in steps. With a budget, whose steps have no number of records, it is counted in the records of the one
partition there is, in their order: "step" then means a record.

This module is arithmetic on the plan of an epoch: nothing is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dali_pipeline.sampling.plan import EpochPlan
from dali_pipeline.types import Ints

SLOTS = 3
PIECE_BYTES = 8 << 20  # about: what a read costs beside its bytes is 1 to 2 ms of processor time


class Group(NamedTuple):
    """A group of one partition.

    Attributes:
        partition: Number of the partition.
        number: Number of the group within its partition.
        needed: The first step that draws from it.
        last: The first step that does not draw from it any more.
        free: The first step before which its slot must not be written.
        first: Number of its first record in the window.
    """

    partition: int
    number: int
    needed: int
    last: int
    free: int
    first: int


class Piece(NamedTuple):
    """Runs, or a part of one, that are read at once.

    Attributes:
        group: The group that they belong to.
        runs: (first position, records) of each run.
        first: Number of the first record in the window.
    """

    group: Group
    runs: list[tuple[int, int]]
    first: int

    @property
    def num_records(self) -> int:
        """Number of its records."""
        return sum(count for _, count in self.runs)

    @property
    def positions(self) -> Ints:
        """Positions of its records in the split, in the order in which they lie in the window."""
        return np.concatenate([np.arange(start, start + count) for start, count in self.runs])


@dataclass(frozen=True, kw_only=True, eq=False)
class Residency:
    """The groups of an epoch in the order in which they are read, and the size of the window.

    Attributes:
        plan: Order of the epoch.
        groups: Groups in the order in which they are needed.
        slot_records: Records that a slot has room for.
        slot_bytes: Most bytes of records in a slot, with all their fields, approximately.
        num_slots: Number of slots.
        whole: Whether all groups fit at once. They are then in one slot, one behind the other, and stay in memory.
        end: Number of steps of the epoch.
    """

    plan: EpochPlan
    groups: list[Group]
    slot_records: int
    slot_bytes: int
    num_slots: int
    whole: bool
    end: int

    @classmethod
    def of(
        cls,
        plan: EpochPlan,
        rank: int,
        world_size: int,
        least_records: int = 1,
        *,
        at_once: bool = False,
        by_record: bool = False,
    ) -> Residency | None:
        """Return the residency of an epoch; None if a window does not serve it.

        It serves every epoch but one of draws if all records that the rank reads fit at once. Otherwise it does not if the rank
        shares a partition with another, or if a batch needs more groups than the window has slots.

        Args:
            plan: Order of the epoch.
            rank: This process.
            world_size: Number of processes.
            least_records: Records that each of several slots must have room for. Default: 1.
            at_once: Whether records are needed in another order than that of the shuffle, so all must fit. Default: False.
            by_record: Whether time is counted in records of the only partition. Default: False.
        """
        if plan.drawn or not plan.num_steps:
            return None
        partitions = plan.read_by(rank, world_size)
        shared = bool(plan.order.num_partitions % world_size)
        overlaps = False
        groups, sizes, slots = [], [], []
        end = plan.length(0) if by_record else plan.num_steps
        for order, partition in enumerate(partitions):
            blocks = plan.blocks(partition, world_size, by_record=by_record)
            for number, needed in enumerate(blocks.begins[:-1].tolist()):
                last = int(blocks.filled[number + 2]) if number + 2 < len(blocks.filled) else end
                free = int(blocks.filled[number - 1]) if number >= SLOTS else 0
                overlaps |= free > needed
                groups.append(Group(partition, number, needed, last, free, 0))
                slots.append(order * SLOTS + number % SLOTS)
            sizes.append(np.stack([blocks.group_records, blocks.group_bytes]))
        whole = all(records.shape[1] <= SLOTS for records in sizes)
        if not whole and (shared or overlaps or at_once):
            return None
        records, nbytes = np.concatenate(sizes, axis=1)
        if whole:  # one group behind the other
            slot_records, slot_bytes = int(records.sum()), int(nbytes.sum())
            firsts = (np.cumsum(records) - records).tolist()
        else:
            slot_records, slot_bytes = max(least_records, int(records.max())), int(nbytes.max())
            firsts = [slot * slot_records for slot in slots]
        groups = [group._replace(first=first) for group, first in zip(groups, firsts, strict=True)]
        groups.sort(key=lambda group: (group.needed, group.partition))
        if at_once:
            groups = [group._replace(needed=0, last=end, free=0) for group in groups]
        return cls(
            plan=plan,
            groups=groups,
            slot_records=slot_records,
            slot_bytes=slot_bytes,
            num_slots=1 if whole else SLOTS * len(partitions),
            whole=whole,
            end=end,
        )

    @classmethod
    def of_all(cls, plan: EpochPlan, slot_records: int, *, by_record: bool = False) -> Residency:
        """Return the residency of an epoch whose records are all in the window already."""
        end = plan.length(0) if by_record else plan.num_steps
        return cls(plan=plan, groups=[], slot_records=slot_records, slot_bytes=0, num_slots=1, whole=True, end=end)

    @property
    def num_records(self) -> int:
        """Number of records that the window has room for."""
        return self.slot_records * self.num_slots

    def pieces(self, group: Group, record_bytes: float, *, direct: bool = False) -> Iterator[Piece]:
        """Yield the pieces of a group; neighbours in a shard stay neighbours, so that they are read at once.

        Args:
            group: The group.
            record_bytes: Bytes of a record as stored, on average.
            direct: Whether pieces are read straight into the window, so that larger ones take no more memory. Default: False.
        """
        most, first = max(1, int((2 if direct else 1) * PIECE_BYTES // max(1, record_bytes))), group.first
        runs: list[tuple[int, int]] = []
        taken = 0
        for start, count in sorted(self.plan.runs(group.partition, group.number)):
            while count:
                part = min(count, most - taken)
                runs.append((start, part))
                start, count, taken = start + part, count - part, taken + part
                if taken == most:
                    yield Piece(group, runs, first)
                    first, taken, runs = first + taken, 0, []
        if runs:
            yield Piece(group, runs, first)


class RecordNumbers:
    """Numbers in the window of the records that are in it, by their positions in the split."""

    def __init__(self) -> None:
        self._runs: dict[tuple[int, int], list[tuple[int, int, int]]] = {}  # by slot: first position, records, first number
        self._starts = self._counts = self._firsts = np.zeros(0, np.int64)
        self._current = True

    def begin(self, group: Group) -> None:
        """Forget what was in a group's slot before."""
        self._runs[group.partition, group.number % SLOTS] = []
        self._current = False

    def add(self, piece: Piece) -> None:
        """Note that a piece is in the window, whose group has begun."""
        slot = piece.group.partition, piece.group.number % SLOTS
        first = piece.first
        for start, count in piece.runs:
            self._runs[slot].append((start, count, first))
            first += count
        self._current = False

    def of(self, positions: Ints) -> Ints:
        """Return the numbers of the records at these positions, (N,), all of which are in the window."""
        if not self._current:
            table = np.array(sorted(run for runs in self._runs.values() for run in runs), np.int64).reshape(-1, 3)
            self._starts, self._counts, self._firsts = np.ascontiguousarray(table.T)
            self._current = True
        run = np.searchsorted(self._starts, positions, side="right") - 1
        offsets = positions - self._starts[run]
        assert (run >= 0).all()
        assert (offsets < self._counts[run]).all(), "a record that is not in the window"
        numbers: Ints = self._firsts[run] + offsets
        return numbers
