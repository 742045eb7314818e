"""Budgets: batches that end where the next record would be too much, rather than at a number of records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np

from dali_pipeline.errors import DataError, PipelineError
from dali_pipeline.sampling.plan import EpochPlan, Shares
from dali_pipeline.types import Ints

Places = tuple[int, ...]  # of each partition, how many of its records lie behind; () at the start of an epoch
LEAST_LOOK, MOST_LOOK = 256, 8192  # records whose sizes are asked for at a time


class Packed(NamedTuple):
    """One packed batch: places `begin` to `end` in the order of `partition`, or one record of padding.

    places: where all partitions stand behind it.
    """

    partition: int
    begin: int
    end: int
    valid: bool
    places: Places


@dataclass(frozen=True, kw_only=True, eq=False)
class Portion:
    """Several batches of one rank. sizes: records of each · places: behind each, where all ranks stand then; or none."""

    shares: Shares
    sizes: Ints
    places: tuple[Places, ...] = ()

    def cut(self) -> Iterator[Portion]:
        """Each batch alone."""
        ends = np.concatenate([[0], np.cumsum(self.sizes)]).tolist()
        for at, (begin, end) in enumerate(pairwise(ends)):
            shares = Shares(positions=self.shares.positions[begin:end], valid=self.shares.valid[begin:end])
            yield Portion(shares=shares, sizes=self.sizes[at : at + 1], places=self.places[at : at + 1])


class BudgetPlan:
    """The batches of one epoch, each of as many nodes and edges as its order allows.

    Next-fit in the order of each partition: a batch ends where the next record would go over the budget, so it depends on
    nothing but the order and the place that it begins at. Batch s * world_size + r is what rank r takes at step s; with several
    partitions a partition's batches go to the ranks that read it. A record beyond the budget by itself is a batch alone, or is
    refused.

    sizes: positions (N,) to their nodes and edges (N, 2), which costs a look at the index of their shards; the loader has just
    that part of it at hand anyway · name: a position in words · alone: whether records beyond the budget are delivered.
    """

    def __init__(self, plan: EpochPlan, sizes: Callable[[Ints], Ints], name: Callable[[int], str], *, alone: bool) -> None:
        self._plan, self._sizes, self._name, self._alone = plan, sizes, name, alone
        order = plan.order
        self._limits = [(axis, limit) for axis, limit in enumerate((order.max_nodes, order.max_edges)) if limit is not None]
        mean_bytes = plan.nbytes // max(1, plan.num_records)
        self._most_look = max(16, min(MOST_LOOK, order.window_bytes // 4 // max(1, mean_bytes)))

    def num_steps(self, world_size: int) -> int:
        """Of the whole epoch, the same on every rank. Costs a pass over the index of all shards."""
        counts = [sum(1 for _ in self._ends(partition, 0)) for partition in range(self._plan.order.num_partitions)]
        return self._last_step(0, counts, world_size)

    def superbatches(
        self, step: int, places: Places, rank: int, world_size: int, longest: int, most_records: int
    ) -> Iterator[list[Packed]]:
        """Yield the rest of the epoch from `step` on, if the partitions stand at `places`.

        Batches come 1, 2, 4 … up to `longest` at once, but no more than hold `most_records` records. Sizes are looked at as the
        batches are asked for; with several partitions those of the whole rest come first, as the ranks of one partition must
        know when the others end. Raises DataError for a record over the budget, where such are refused.
        """
        length, held = 1, list[Packed]()
        failure: PipelineError | None = None
        try:
            for batch in self._batches(step, places, rank, world_size):
                held.append(batch)
                if len(held) >= length or sum(each.end - each.begin for each in held) >= most_records:
                    yield held
                    length, held = min(2 * length, longest), []
        except PipelineError as error:
            failure = error
        if held:
            yield held
        if failure is not None:
            raise failure

    def portion(self, batches: list[Packed]) -> Portion:
        """Of these batches, the records that lie at their places."""
        sizes = np.array([each.end - each.begin for each in batches], np.int64)
        partitions = np.repeat([each.partition for each in batches], sizes)
        spans = np.concatenate([np.arange(each.begin, each.end) for each in batches])
        positions = np.empty_like(spans)
        for partition in np.unique(partitions).tolist():
            positions[partitions == partition] = self._plan.at(partition, spans[partitions == partition])
        return Portion(
            shares=Shares(positions=positions, valid=np.repeat([each.valid for each in batches], sizes)),
            sizes=sizes,
            places=tuple(each.places for each in batches),
        )

    def _batches(self, step: int, places: Places, rank: int, world_size: int) -> Iterator[Packed]:
        """What the rank takes at each step."""
        num_partitions, drop = self._plan.order.num_partitions, self._plan.order.drop_last
        at = list(places or (0,) * num_partitions)
        at_once, turns = _turns(num_partitions, world_size)
        every = [self._ends(partition, place) for partition, place in enumerate(at)]
        last: int | None = None
        if num_partitions > 1:
            known = [list(ends) for ends in every]
            every, last = [iter(ends) for ends in known], self._last_step(step, [len(ends) for ends in known], world_size)
        begun = step
        while last is None or step < last:
            taken = {
                partition: list(islice(every[partition], at_once)) for partition in range(step % turns, num_partitions, turns)
            }
            partition, which = rank * num_partitions // world_size + step % turns, rank % at_once
            if last is None and len(taken[partition]) < (at_once if drop else 1):
                break
            borders = [at[partition], *taken[partition]]
            valid = which + 1 < len(borders)
            # padding is the partition's last record
            begin, end = (
                borders[which : which + 2] if valid else (self._plan.length(partition) - 1, self._plan.length(partition))
            )
            for each, ends in taken.items():
                at[each] = ends[-1] if ends else at[each]
            step += 1
            yield Packed(partition, begin, end, valid, tuple(at))
        if drop and begun == step == 0 and self._plan.num_records:
            raise DataError(
                f"split {self._plan.order.split!r} has too few records for a batch on each of {world_size} ranks; "
                "expected more, or drop_last=False"
            )

    def _last_step(self, step: int, counts: Iterable[int], world_size: int) -> int:
        """The step behind the last one, where partitions have so many batches left at `step`."""
        order = self._plan.order
        at_once, turns = _turns(order.num_partitions, world_size)
        ends = []
        for partition, count in enumerate(counts):
            first = step + (partition - step) % turns  # at which this partition's turn comes
            if order.drop_last:
                ends.append(first + count // at_once * turns)
            elif count:
                ends.append(first + (-(-count // at_once) - 1) * turns + 1)
        return min(ends) if order.drop_last else max(ends, default=step)

    def _ends(self, partition: int, place: int) -> Iterator[int]:
        """Behind the last record of each batch, from `place` in the partition's order on."""
        total, look = self._plan.length(partition), min(LEAST_LOOK, self._most_look)
        while place < total:
            stop = min(place + look, total)
            sizes, error = self._look(self._plan.at(partition, np.arange(place, stop)))
            spent = np.concatenate([np.zeros((1, 2), np.int64), np.cumsum(sizes, axis=0)])
            begin = 0
            while begin < len(sizes):
                fit = min(
                    int(np.searchsorted(spent[:, axis], spent[begin, axis] + most, "right")) for axis, most in self._limits
                )
                end = max(fit - 1, begin + 1)
                if end == len(sizes) and (stop < total or error is not None):
                    break  # the batch may go on behind what was looked at
                yield place + end
                begin = end
            if error is not None:
                raise error
            look = min(2 * look, self._most_look) if begin else 2 * look
            place += begin

    def _look(self, positions: Ints) -> tuple[Ints, PipelineError | None]:
        """Sizes of the records before the first that is refused, and why that is."""
        try:
            sizes = self._sizes(positions)
            if not self._alone:
                self._check(positions, sizes)
            return sizes, None
        except PipelineError as error:
            if len(positions) == 1:
                return np.zeros((0, 2), np.int64), error
        half = len(positions) // 2
        sizes, found = self._look(positions[:half])
        if found is not None:
            return sizes, found
        more, found = self._look(positions[half:])
        return np.concatenate([sizes, more]), found

    def _check(self, positions: Ints, sizes: Ints) -> None:
        for axis, limit in self._limits:
            over = np.flatnonzero(sizes[:, axis] > limit)
            if len(over):
                what, found = ("nodes", "edges")[axis], sizes[over[0], axis]
                raise DataError(
                    f"{self._name(int(positions[over[0]]))} has {found:,} {what}; expected at most max_{what}={limit:,}, "
                    "or oversize='alone', which delivers it as a batch of its own"
                )


def _turns(num_partitions: int, world_size: int) -> tuple[int, int]:
    """Batches that a partition gives whenever it is its turn, and steps from one turn to the next."""
    return max(1, world_size // num_partitions), max(1, num_partitions // world_size)
