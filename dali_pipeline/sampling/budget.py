"""BudgetPlan: batches that end before the record that would exceed a budget, instead of after a number of records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np

from dali_pipeline.errors import DataError, PipelineError
from dali_pipeline.sampling.plan import EpochPlan, Shares
from dali_pipeline.types import Ints

Cursors = tuple[int, ...]  # records of each partition already delivered; () at the start of an epoch
LEAST_LOOK, MOST_LOOK = 256, 8192  # records whose sizes are read at a time


class Packed(NamedTuple):
    """One packed batch: a range of one partition's order, or one record of padding.

    Attributes:
        partition: Number of the partition.
        begin: Cursor of the first record in the partition's order.
        end: Cursor after the last record.
        valid: False for padding.
        cursors: Cursor of each partition after the batch.
    """

    partition: int
    begin: int
    end: int
    valid: bool
    cursors: Cursors


@dataclass(frozen=True, kw_only=True, eq=False)
class Portion:
    """Several batches of one rank.

    Attributes:
        shares: Records of all batches.
        sizes: (batches,) number of records per batch.
        cursors: Cursors of all partitions after each batch; empty if there is no budget.
    """

    shares: Shares
    sizes: Ints
    cursors: tuple[Cursors, ...] = ()

    def cut(self) -> Iterator[Portion]:
        """Yield each batch on its own."""
        ends = np.concatenate([[0], np.cumsum(self.sizes)]).tolist()
        for batch, (begin, end) in enumerate(pairwise(ends)):
            shares = Shares(positions=self.shares.positions[begin:end], valid=self.shares.valid[begin:end])
            yield Portion(shares=shares, sizes=self.sizes[batch : batch + 1], cursors=self.cursors[batch : batch + 1])


class BudgetPlan:
    """The batches of one epoch, each with as many nodes and edges, or steps, as its order allows.

    Next-fit in the order of each partition: a batch ends where the next record would exceed the budget, so it depends only on
    the order and on the cursor that it begins at. Batch s * world_size + r belongs to rank r at step s; with several
    partitions, a partition's batches go to the ranks that read it. A record that exceeds the budget on its own is a batch of
    its own, or is refused.

    Args:
        plan: Order of the epoch.
        sizes: Function from positions (N,) to their nodes and edges, or their steps and 0, (N, 2). It costs a read of that part
            of the index of their shards, which the loader needs anyway.
        name: Function from a position to the record in words, for errors.
        alone: Whether records over the budget are delivered.
    """

    def __init__(self, plan: EpochPlan, sizes: Callable[[Ints], Ints], name: Callable[[int], str], *, alone: bool) -> None:
        self._plan, self._sizes, self._name, self._alone = plan, sizes, name, alone
        order = plan.order
        limits = enumerate((order.max_steps or order.max_nodes, order.max_edges))  # a sequence's steps stand for nodes
        self._limits = [(axis, limit) for axis, limit in limits if limit is not None]
        self._pads = order.max_steps is not None and order.count_padding
        mean_bytes = plan.nbytes // max(1, plan.num_records)
        self._most_look = max(16, min(MOST_LOOK, order.window_bytes // 4 // max(1, mean_bytes)))

    def num_steps(self, world_size: int) -> int:
        """Return the steps of the epoch, the same on every rank. Costs a pass over the index of all shards."""
        counts = [sum(1 for _ in self._ends(partition, 0)) for partition in range(self._plan.order.num_partitions)]
        return self._last_step(0, counts, world_size)

    def superbatches(
        self, step: int, cursors: Cursors, rank: int, world_size: int, longest: int, most_records: int
    ) -> Iterator[list[Packed]]:
        """Yield the rest of the epoch from `step` on, with the partitions at `cursors`.

        Batches come 1, 2, 4 … up to `longest` at once; a superbatch also ends once it has `most_records` records. Sizes are
        read as the batches are asked for. With several partitions, the sizes of the whole rest are read first, because the
        ranks of one partition must know when the others end. Raises DataError for a record over the budget if such records are
        refused.
        """
        length, superbatch = 1, list[Packed]()
        failure: PipelineError | None = None
        try:
            for batch in self._batches(step, cursors, rank, world_size):
                superbatch.append(batch)
                if len(superbatch) >= length or sum(packed.end - packed.begin for packed in superbatch) >= most_records:
                    yield superbatch
                    length, superbatch = min(2 * length, longest), []
        except PipelineError as error:
            failure = error
        if superbatch:
            yield superbatch
        if failure is not None:
            raise failure

    def portion(self, batches: list[Packed]) -> Portion:
        """Return the records of these batches."""
        sizes = np.array([batch.end - batch.begin for batch in batches], np.int64)
        partitions = np.repeat([batch.partition for batch in batches], sizes)
        spans = np.concatenate([np.arange(batch.begin, batch.end) for batch in batches])
        positions = np.empty_like(spans)
        for partition in np.unique(partitions).tolist():
            positions[partitions == partition] = self._plan.positions(partition, spans[partitions == partition])
        return Portion(
            shares=Shares(positions=positions, valid=np.repeat([batch.valid for batch in batches], sizes)),
            sizes=sizes,
            cursors=tuple(batch.cursors for batch in batches),
        )

    def _batches(self, step: int, cursors: Cursors, rank: int, world_size: int) -> Iterator[Packed]:
        """Yield the batches of the rank, one per step."""
        num_partitions, drop = self._plan.order.num_partitions, self._plan.order.drop_last
        partition_cursors = list(cursors or (0,) * num_partitions)
        per_turn, turns = _turns(num_partitions, world_size)
        batch_ends = [self._ends(partition, cursor) for partition, cursor in enumerate(partition_cursors)]
        last: int | None = None
        if num_partitions > 1:
            all_ends = [list(ends) for ends in batch_ends]
            batch_ends = [iter(ends) for ends in all_ends]
            last = self._last_step(step, [len(ends) for ends in all_ends], world_size)
        first_step = step
        while last is None or step < last:
            taken = {
                partition: list(islice(batch_ends[partition], per_turn))
                for partition in range(step % turns, num_partitions, turns)
            }
            partition, index = rank * num_partitions // world_size + step % turns, rank % per_turn
            if last is None and len(taken[partition]) < (per_turn if drop else 1):
                break
            bounds = [partition_cursors[partition], *taken[partition]]
            valid = index + 1 < len(bounds)
            # Padding repeats the partition's last record.
            begin, end = (
                bounds[index : index + 2] if valid else (self._plan.length(partition) - 1, self._plan.length(partition))
            )
            for number, ends in taken.items():
                partition_cursors[number] = ends[-1] if ends else partition_cursors[number]
            step += 1
            yield Packed(partition, begin, end, valid, tuple(partition_cursors))
        if drop and first_step == step == 0 and self._plan.num_records:
            raise DataError(
                f"split {self._plan.order.split!r} has too few records for a batch on each of {world_size} ranks; "
                "expected more, or drop_last=False"
            )

    def _last_step(self, step: int, counts: Iterable[int], world_size: int) -> int:
        """Return the step after the last one, from the number of batches that each partition has left at `step`."""
        order = self._plan.order
        per_turn, turns = _turns(order.num_partitions, world_size)
        ends = []
        for partition, count in enumerate(counts):
            first = step + (partition - step) % turns  # the partition's next turn
            if order.drop_last:
                ends.append(first + count // per_turn * turns)
            elif count:
                ends.append(first + (-(-count // per_turn) - 1) * turns + 1)
        return min(ends) if order.drop_last else max(ends, default=step)

    def _ends(self, partition: int, cursor: int) -> Iterator[int]:
        """Yield the cursor after the last record of each batch, from `cursor` in the partition's order on."""
        total, num_looked = self._plan.length(partition), min(LEAST_LOOK, self._most_look)
        while cursor < total:
            look_end = min(cursor + num_looked, total)
            sizes, error = self._read_sizes(self._plan.positions(partition, np.arange(cursor, look_end)))
            totals = np.concatenate([np.zeros((1, 2), np.int64), np.cumsum(sizes, axis=0)])
            begin = 0
            while begin < len(sizes):
                end = max(self._fitting(sizes, totals, begin), begin + 1)
                if end == len(sizes) and (look_end < total or error is not None):
                    break  # the batch may continue after the records whose sizes are known
                yield cursor + end
                begin = end
            if error is not None:
                raise error
            num_looked = min(2 * num_looked, self._most_look) if begin else 2 * num_looked
            cursor += begin

    def _fitting(self, sizes: Ints, totals: Ints, begin: int) -> int:
        """Return the row after the last record that still fits in a batch that begins at row `begin`."""
        if not self._pads:
            return min(
                int(np.searchsorted(totals[:, axis], totals[begin, axis] + limit, "right")) - 1 for axis, limit in self._limits
            )
        ((_, limit),) = self._limits  # padded steps: as many records as fit, times the longest of them
        steps = sizes[begin : begin + limit, 0]
        padded = np.maximum.accumulate(steps) * np.arange(1, len(steps) + 1)
        return begin + int(np.searchsorted(padded, limit, "right"))

    def _read_sizes(self, positions: Ints) -> tuple[Ints, PipelineError | None]:
        """Return the sizes of the records before the first refused one, and the reason for that refusal."""
        try:
            sizes = self._sizes(positions)
            if not self._alone:
                self._check(positions, sizes)
            return sizes, None
        except PipelineError as error:
            if len(positions) == 1:
                return np.zeros((0, 2), np.int64), error
        half = len(positions) // 2
        sizes, failure = self._read_sizes(positions[:half])
        if failure is not None:
            return sizes, failure
        rest, failure = self._read_sizes(positions[half:])
        return np.concatenate([sizes, rest]), failure

    def _check(self, positions: Ints, sizes: Ints) -> None:
        for axis, limit in self._limits:
            over = np.flatnonzero(sizes[:, axis] > limit)
            if len(over):
                unit, count = ("nodes", "edges")[axis], sizes[over[0], axis]
                raise DataError(
                    f"{self._name(int(positions[over[0]]))} has {count:,} {unit}; expected at most max_{unit}={limit:,}, "
                    "or oversize='alone', which delivers it as a batch of its own"
                )


def _turns(num_partitions: int, world_size: int) -> tuple[int, int]:
    """Return the batches that a partition gives per turn, and the steps from one turn to the next."""
    return max(1, world_size // num_partitions), max(1, num_partitions // world_size)
