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

Places = tuple[int, ...]  # of each lane, how many of its records lie behind; () at the start of an epoch
LEAST_LOOK, MOST_LOOK = 256, 8192  # records whose sizes are asked for at a time


class Packed(NamedTuple):
    """A batch as it is packed: places `begin` to `end` in the order of `lane`, or one record of padding; where all lanes stand
    behind it."""

    lane: int
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

    Next-fit in the order of each lane: a batch ends where the next record would go over the budget, so it depends on nothing
    but the order and the place that it begins at. Batch s * world_size + r is what rank r takes at step s; with several lanes
    a lane's batches go to the ranks that read it. A record beyond the budget by itself is a batch alone, or is refused.

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
        counts = [sum(1 for _ in self._ends(lane, 0)) for lane in range(self._plan.order.lanes)]
        return self._last_step(0, counts, world_size)

    def stretches(
        self, step: int, places: Places, rank: int, world_size: int, longest: int, most_records: int
    ) -> Iterator[list[Packed]]:
        """The rest of the epoch from `step` on, where the lanes stand at `places`; 1, 2, 4 … up to `longest` batches at once,
        but no more where they have `most_records` records.

        Sizes are looked at as the batches are asked for; with several lanes first those of the whole rest, for the ranks of one
        lane must know when the others end. Raises DataError for a record over the budget, where such are refused.
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
        lanes = np.repeat([each.lane for each in batches], sizes)
        spans = np.concatenate([np.arange(each.begin, each.end) for each in batches])
        positions = np.empty_like(spans)
        for lane in np.unique(lanes).tolist():
            positions[lanes == lane] = self._plan.at(lane, spans[lanes == lane])
        return Portion(
            shares=Shares(positions=positions, valid=np.repeat([each.valid for each in batches], sizes)),
            sizes=sizes,
            places=tuple(each.places for each in batches),
        )

    def _batches(self, step: int, places: Places, rank: int, world_size: int) -> Iterator[Packed]:
        """What the rank takes at each step."""
        lanes, drop = self._plan.order.lanes, self._plan.order.tail == "drop"
        at = list(places or (0,) * lanes)
        at_once, turns = _turns(lanes, world_size)
        every = [self._ends(lane, place) for lane, place in enumerate(at)]
        last: int | None = None
        if lanes > 1:
            known = [list(ends) for ends in every]
            every, last = [iter(ends) for ends in known], self._last_step(step, [len(ends) for ends in known], world_size)
        begun = step
        while last is None or step < last:
            taken = {lane: list(islice(every[lane], at_once)) for lane in range(step % turns, lanes, turns)}
            lane, which = rank * lanes // world_size + step % turns, rank % at_once
            if last is None and len(taken[lane]) < (at_once if drop else 1):
                break
            borders = [at[lane], *taken[lane]]
            valid = which + 1 < len(borders)
            # padding is the lane's last record
            begin, end = borders[which : which + 2] if valid else (self._plan.length(lane) - 1, self._plan.length(lane))
            for each, ends in taken.items():
                at[each] = ends[-1] if ends else at[each]
            step += 1
            yield Packed(lane, begin, end, valid, tuple(at))
        if drop and begun == step == 0 and self._plan.num_records:
            raise DataError(
                f"split {self._plan.order.split!r} has too few records for a batch on each of {world_size} ranks; "
                "expected more, or tail='pad'"
            )

    def _last_step(self, step: int, counts: Iterable[int], world_size: int) -> int:
        """The step behind the last one, where lanes have so many batches left at `step`."""
        order = self._plan.order
        at_once, turns = _turns(order.lanes, world_size)
        ends = []
        for lane, count in enumerate(counts):
            first = step + (lane - step) % turns  # at which this lane's turn comes
            if order.tail == "drop":
                ends.append(first + count // at_once * turns)
            elif count:
                ends.append(first + (-(-count // at_once) - 1) * turns + 1)
        return min(ends) if order.tail == "drop" else max(ends, default=step)

    def _ends(self, lane: int, place: int) -> Iterator[int]:
        """Behind the last record of each batch, from `place` in the lane's order on."""
        total, look = self._plan.length(lane), min(LEAST_LOOK, self._most_look)
        while place < total:
            stop = min(place + look, total)
            sizes, error = self._look(self._plan.at(lane, np.arange(place, stop)))
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


def _turns(lanes: int, world_size: int) -> tuple[int, int]:
    """Batches that a lane gives whenever it is its turn, and steps from one turn to the next."""
    return max(1, world_size // lanes), max(1, lanes // world_size)
