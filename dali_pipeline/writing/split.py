"""Split and FileSplit: which of train, val and test a group of records goes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from dali_pipeline.errors import DataError, UsageError
from dali_pipeline.format.schema import SPLITS
from dali_pipeline.runtime.checks import real, shown, whole


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """How records are dealt to the splits: by a hash of their group, so that every run and both kinds agree.

    shares: of train, val and test, in per cent; their sum is 100. seed: another seed, another split.
    """

    shares: tuple[float, float, float] = (70, 15, 15)
    seed: int = 0

    def __post_init__(self) -> None:
        shares = self.shares if isinstance(self.shares, tuple | list) else ()
        if len(shares) != 3:
            raise UsageError(f"shares are {shown(self.shares)}; expected three numbers, of train, val and test")
        for one in shares:
            real("a share", one, "a number from 0 to 100")
        object.__setattr__(self, "seed", whole("split seed", self.seed, 0, 2**64 - 1, expected="0 to 2**64 - 1"))
        if not all(share >= 0 for share in self.shares) or not abs(sum(self.shares) - 100) < 1e-9:
            raise UsageError(f"split {self} does not sum to 100; expected shares of train/val/test such as 70/15/15")

    def __str__(self) -> str:
        return "/".join(f"{share:g}" for share in self.shares)

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> SplitRule:
        """From `70/15/15`."""
        try:
            train, val, test = (float(share) for share in text.split("/"))
        except (ValueError, AttributeError, TypeError):
            raise UsageError(f"split is {shown(text)}; expected shares of train/val/test such as 70/15/15") from None
        return cls(shares=(train, val, test), seed=seed)

    def of(self, group: str) -> str:
        """The split of a group: XXH3 of its name as a fraction of 2**64, held against the shares."""
        return self.at(self.place(group))

    def place(self, group: str) -> float:
        """Where a group stands between 0 and 100, by its hash."""
        hashed = xxhash.xxh3_64_intdigest(group.encode(), seed=self.seed)
        return (hashed >> 11) / 2**53 * 100  # 53 bits: never rounds up to 100

    def at(self, place: float) -> str:
        """The split that a place between 0 and 100 falls into."""
        train, val, _ = self.shares
        return SPLITS[0] if place < train else SPLITS[1] if place < train + val else SPLITS[2]


class FileSplit:
    """Deals whole files, and every group with the first file that it is in.

    names, groups: of each file, in order; files of one name (the two halves of a trace) are dealt together. In an order drawn
    by the hash of their names, files fill the shares of `split` by their numbers of groups, a file going where its middle lies.
    moved: groups that are also in a file which was dealt elsewhere.
    """

    def __init__(self, split: SplitRule, names: Sequence[str], groups: Sequence[npt.NDArray[np.uint64]]) -> None:
        sizes: dict[str, int] = {}
        for name, found in zip(names, groups, strict=True):
            sizes[name] = sizes.get(name, 0) + len(found)
        total, before = max(1, sum(sizes.values())), 0
        homes: dict[str, int] = {}
        for name in sorted(sizes, key=lambda name: (xxhash.xxh3_64_intdigest(name.encode(), seed=split.seed), name)):
            homes[name] = SPLITS.index(split.at((before + sizes[name] / 2) / total * 100))
            before += sizes[name]
        dealt = np.repeat([homes[name] for name in names], [len(found) for found in groups])
        hashes, first, back = np.unique(np.concatenate(groups), return_index=True, return_inverse=True)
        self._hashes, self._homes = hashes, dealt[first]
        self.moved = len(np.unique(back[dealt != self._homes[back]]))

    def of(self, group: str) -> str:
        """The split of a group; raises DataError for one that no file had."""
        hashed = np.uint64(xxhash.xxh3_64_intdigest(group.encode()))
        at = int(np.searchsorted(self._hashes, hashed))
        if at == len(self._hashes) or self._hashes[at] != hashed:
            raise DataError(f"group {group!r} was in no file when their names were read; a file changed since")
        return SPLITS[self._homes[at]]
