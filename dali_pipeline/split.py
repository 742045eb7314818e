"""Split: which of train, val and test a group of records goes to."""

from __future__ import annotations

from dataclasses import dataclass

import xxhash

from dali_pipeline.schema import SPLITS, UsageError


@dataclass(frozen=True, kw_only=True)
class Split:
    """How records are dealt to the splits: by a hash of their group, so that every run and both kinds agree.

    shares: of train, val and test, in per cent; their sum is 100. seed: another seed, another split.
    """

    shares: tuple[float, float, float] = (70, 15, 15)
    seed: int = 0

    def __post_init__(self) -> None:
        if not all(share >= 0 for share in self.shares) or not abs(sum(self.shares) - 100) < 1e-9:
            raise UsageError(f"split {self} does not sum to 100; expected shares of train/val/test such as 70/15/15")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"split seed is {self.seed}; expected 0 to 2**64 - 1")

    def __str__(self) -> str:
        return "/".join(f"{share:g}" for share in self.shares)

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> Split:
        """From `70/15/15`."""
        try:
            train, val, test = (float(share) for share in text.split("/"))
        except ValueError:
            raise UsageError(f"split is {text!r}; expected shares of train/val/test such as 70/15/15") from None
        return cls(shares=(train, val, test), seed=seed)

    def of(self, group: str) -> str:
        """The split of a group: XXH3 of its name as a fraction of 2**64, held against the shares."""
        place = (
            (xxhash.xxh3_64_intdigest(group.encode(), seed=self.seed) >> 11) / 2**53 * 100
        )  # 53 bits: never rounds up to 100
        train, val, _ = self.shares
        return SPLITS[0] if place < train else SPLITS[1] if place < train + val else SPLITS[2]
