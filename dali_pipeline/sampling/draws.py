"""Draws: epochs in which some records come more often than others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dali_pipeline.sampling.order import TURNS, Order, purpose_key
from dali_pipeline.sampling.shuffle import WindowShuffle
from dali_pipeline.types import Ints


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Shards `begin` to `end` of a split that are drawn from together, for `share` of an epoch's draws."""

    begin: int
    end: int
    share: float


class Part(NamedTuple):
    """So many `records`, drawn `times` an epoch. passes: the order of the pass of this number."""

    times: int
    records: int
    passes: Callable[[int], WindowShuffle]


class DrawnShuffle:
    """An epoch of draws of one partition: parts in turn, evenly spread, each without replacement within its own pass.

    Draw i of part p in epoch e is draw e * times + i of all, so passes run on over the epochs' borders.
    """

    def __init__(self, order: Order, epoch: int, parts: Sequence[Part]) -> None:
        self.num_records = sum(part.times for part in parts)
        self._epoch, self._parts = epoch, parts
        self._first = purpose_key(order, epoch, TURNS)
        self._recent: dict[int, tuple[tuple[int, WindowShuffle], ...]] = {}  # of each part its last two passes

    def positions(self, places: Ints) -> Ints:
        """The records at these places of the partition's order."""
        found, left = np.empty_like(places), np.arange(len(places))
        rest, total = places, self.num_records  # places among the parts that are still to be looked at
        for number, part in enumerate(self._parts):
            times = part.times
            if not times:
                continue
            begun = self._first % total  # the same share of any range of places: (n * times + begun) // total before place n
            before, after = (rest * times + begun) // total, ((rest + 1) * times + begun) // total
            mine = after > before
            found[left[mine]] = self._drawn(number, self._epoch * times + before[mine])
            left, rest, total = left[~mine], (rest - before)[~mine], total - times
        return found

    def _drawn(self, number: int, draws: Ints) -> Ints:
        """Draws of a part, counted from the first epoch's first."""
        found, records = np.empty_like(draws), self._parts[number].records
        for at in np.unique(draws // records):
            mine = draws // records == at
            found[mine] = self._pass(number, int(at)).positions(draws[mine] % records)
        return found

    def _pass(self, number: int, which: int) -> WindowShuffle:
        recent = self._recent.get(number, ())
        for at, partition in recent:
            if at == which:
                return partition
        partition = self._parts[number].passes(which)
        self._recent[number] = (*recent[-1:], (which, partition))  # replaced whole, so threads may share it
        return partition


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers that sum to `total`, as near to the shares as can be (largest remainders)."""
    exact = total * np.array(shares) / sum(shares)
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]] += 1
    return [int(count) for count in counts]
