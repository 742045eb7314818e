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
    """Shards of a split that are drawn from together.

    Attributes:
        begin: First shard.
        end: Shard after the last one.
        share: Share of an epoch's draws, 0 to 1.
    """

    begin: int
    end: int
    share: float


class Part(NamedTuple):
    """Records that are drawn from together.

    Attributes:
        times: Draws per epoch.
        records: Number of records.
        passes: Function from the number of a pass to its order.
    """

    times: int
    records: int
    passes: Callable[[int], WindowShuffle]


class DrawnShuffle:
    """Order of one partition in an epoch of draws: parts in turn, evenly spread, each without replacement within its own pass.

    Draw i of part p in epoch e is draw e * times + i of all, so passes continue across the borders of epochs.
    """

    def __init__(self, order: Order, epoch: int, parts: Sequence[Part]) -> None:
        self.num_records = sum(part.times for part in parts)
        self._epoch, self._parts = epoch, parts
        self._first = purpose_key(order, epoch, TURNS)
        self._recent: dict[int, tuple[tuple[int, WindowShuffle], ...]] = {}  # the last two passes of each part

    def positions(self, cursors: Ints) -> Ints:
        """Return the positions of the records at these cursors in the partition's order."""
        positions, rows = np.empty_like(cursors), np.arange(len(cursors))
        left, total = cursors, self.num_records  # cursors among the parts not yet handled
        for number, part in enumerate(self._parts):
            times = part.times
            if not times:
                continue
            # an equal share of any range of cursors: (n * times + offset) // total of the part's draws come before cursor n
            offset = self._first % total
            before, after = (left * times + offset) // total, ((left + 1) * times + offset) // total
            chosen = after > before
            positions[rows[chosen]] = self._drawn(number, self._epoch * times + before[chosen])
            rows, left, total = rows[~chosen], (left - before)[~chosen], total - times
        return positions

    def _drawn(self, number: int, draws: Ints) -> Ints:
        """Return the records of a part's draws, which are numbered from the first draw of the first epoch."""
        positions, records = np.empty_like(draws), self._parts[number].records
        for pass_number in np.unique(draws // records):
            chosen = draws // records == pass_number
            positions[chosen] = self._pass(number, int(pass_number)).positions(draws[chosen] % records)
        return positions

    def _pass(self, part_number: int, pass_number: int) -> WindowShuffle:
        recent = self._recent.get(part_number, ())
        for number, shuffle in recent:
            if number == pass_number:
                return shuffle
        shuffle = self._parts[part_number].passes(pass_number)
        self._recent[part_number] = (*recent[-1:], (pass_number, shuffle))  # replaced, not changed, so threads may share it
        return shuffle


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Split `total` into whole numbers as near to the shares as possible (largest remainders)."""
    exact = total * np.array(shares) / sum(shares)
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]] += 1
    return [int(count) for count in counts]
