"""SplitRule and FileSplit: which of train, val and test a group of records goes to."""

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
    """Rule that deals records to the splits by a hash of their group, so every run and both kinds of record agree.

    Attributes:
        shares: Shares of train, val and test in per cent; their sum is 100. Default: (70, 15, 15).
        seed: Seed of the hash, 0 to 2**64 - 1; another seed gives another split. Default: 0.

    Raises:
        UsageError: The shares are not three numbers of at least 0 with the sum 100, or the seed is out of range.
    """

    shares: tuple[float, float, float] = (70, 15, 15)
    seed: int = 0

    def __post_init__(self) -> None:
        shares = self.shares if isinstance(self.shares, tuple | list) else ()
        if len(shares) != 3:
            raise UsageError(f"shares are {shown(self.shares)}; expected three numbers, of train, val and test")
        for share in shares:
            real("a share", share, "a number from 0 to 100")
        object.__setattr__(self, "seed", whole("split seed", self.seed, 0, 2**64 - 1, expected="0 to 2**64 - 1"))
        if not all(share >= 0 for share in self.shares) or not abs(sum(self.shares) - 100) < 1e-9:
            raise UsageError(f"split {self} does not sum to 100; expected shares of train/val/test such as 70/15/15")

    def __str__(self) -> str:
        return "/".join(f"{share:g}" for share in self.shares)

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> SplitRule:
        """Read shares from text.

        Args:
            text: Shares of train, val and test, such as `70/15/15`.
            seed: Seed of the hash.

        Returns:
            The `SplitRule`.

        Raises:
            UsageError: The text is not three shares with the sum 100.
        """
        try:
            train, val, test = (float(share) for share in text.split("/"))
        except (ValueError, AttributeError, TypeError):
            raise UsageError(f"split is {shown(text)}; expected shares of train/val/test such as 70/15/15") from None
        return cls(shares=(train, val, test), seed=seed)

    def of(self, group: str) -> str:
        """Return the split of a group: the XXH3-64 of its name, as a fraction of 2**64, compared with the shares.

        Args:
            group: Name of the group.

        Returns:
            "train", "val" or "test".
        """
        return self.at(self.place(group))

    def place(self, group: str) -> float:
        """Return the percentile of a group by its hash.

        Args:
            group: Name of the group.

        Returns:
            A number from 0 to below 100.
        """
        hashed = xxhash.xxh3_64_intdigest(group.encode(), seed=self.seed)
        return (hashed >> 11) / 2**53 * 100  # 53 bits: never rounds up to 100

    def at(self, percentile: float) -> str:
        """Return the split that contains a percentile.

        Args:
            percentile: A number from 0 to below 100.

        Returns:
            "train", "val" or "test".
        """
        train, val, _ = self.shares
        return SPLITS[0] if percentile < train else SPLITS[1] if percentile < train + val else SPLITS[2]


class KnownGroups:
    """The splits of known groups, by the hashes of their names. 16 bytes per group.

    Args:
        hashes: Distinct hashes.
        splits: Number of the split of each, in SPLITS.
    """

    def __init__(self, hashes: npt.NDArray[np.uint64], splits: npt.NDArray[np.int64]) -> None:
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._splits = hashes[order], splits[order]

    def of(self, group: str) -> str | None:
        """Return the split of a group; None for an unknown one."""
        hashed = np.uint64(xxhash.xxh3_64_intdigest(group.encode()))
        row = int(np.searchsorted(self._hashes, hashed))
        known = row < len(self._hashes) and self._hashes[row] == hashed
        return SPLITS[self._splits[row]] if known else None


class FileSplit:
    """Rule that deals whole files to the splits; every group goes with the first file that contains it.

    Files are ordered by the hash of their names. In that order they fill the shares of `split` by their numbers of groups; a
    file goes to the split that contains its middle.

    Args:
        split: Shares and seed.
        names: Name of each file, in order. Files with one name (the two halves of a trace) go to the same split.
        groups: Hashes of the groups in each file, in the same order.

    Attributes:
        moved: Number of groups that are also in a file of another split.
    """

    def __init__(self, split: SplitRule, names: Sequence[str], groups: Sequence[npt.NDArray[np.uint64]]) -> None:
        group_counts: dict[str, int] = {}
        for name, file_groups in zip(names, groups, strict=True):
            group_counts[name] = group_counts.get(name, 0) + len(file_groups)
        total, groups_before = max(1, sum(group_counts.values())), 0
        split_numbers: dict[str, int] = {}
        for name in sorted(group_counts, key=lambda name: (xxhash.xxh3_64_intdigest(name.encode(), seed=split.seed), name)):
            split_numbers[name] = SPLITS.index(split.at((groups_before + group_counts[name] / 2) / total * 100))
            groups_before += group_counts[name]
        split_of_group = np.repeat([split_numbers[name] for name in names], [len(file_groups) for file_groups in groups])
        hashes, first_rows, hash_numbers = np.unique(np.concatenate(groups), return_index=True, return_inverse=True)
        splits = split_of_group[first_rows]
        self._known = KnownGroups(hashes, splits)
        self.moved = len(np.unique(hash_numbers[split_of_group != splits[hash_numbers]]))

    def of(self, group: str) -> str:
        """Return the split of a group; raise DataError for a group that no file had."""
        split = self._known.of(group)
        if split is None:
            raise DataError(f"group {group!r} was in no file when their names were read; a file changed since")
        return split
