"""Which split a file's records go to: as its owner named it, or by a hash of each record's group."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dali_pipeline.errors import UsageError
from dali_pipeline.format.schema import SPLITS
from dali_pipeline.format.shard import Hashes
from dali_pipeline.writing.filler import Dealer
from dali_pipeline.writing.split import SplitRule

WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
EVAL = "eval"  # validation to most, and the test where there is a validation split beside it


@dataclass(frozen=True, kw_only=True)
class Alone:
    """Deals every group to one split."""

    split: str

    def of(self, group: str) -> str:
        """Return the split."""
        return self.split


@dataclass(frozen=True, kw_only=True)
class TrainAndVal:
    """Deals groups to train and val, in the proportion that `split` gives these two."""

    split: SplitRule

    def of(self, group: str) -> str:
        """Return the split of a group."""
        train, val, _ = self.split.shares
        return "train" if self.split.place(group) * (train + val) < 100 * train else "val"


@dataclass(frozen=True, kw_only=True)
class OwnSplits:
    """The splits that the owner made, by the number of the file. split: deals val out of train, where the owner has no val."""

    homes: list[str]
    split: SplitRule | None

    def of_file(self, number: int) -> Dealer:
        """Return what deals the groups of a file."""
        home = self.homes[number]
        return TrainAndVal(split=self.split) if home == "train" and self.split is not None else Alone(split=home)

    def torn(self, groups: Sequence[Hashes]) -> int:
        """Count the groups that are in several splits. groups: the hashes of each file's groups."""
        seen = [np.unique(np.concatenate([np.zeros(0, np.uint64), *self._of(split, groups)])) for split in SPLITS]
        return int((np.unique(np.concatenate(seen), return_counts=True)[1] > 1).sum())

    def _of(self, split: str, groups: Sequence[Hashes]) -> list[Hashes]:
        return [hashes for home, hashes in zip(self.homes, groups, strict=True) if home == split]

    def describe(self, named: int) -> str:
        """Say what is kept. named: the number of files whose names tell."""
        counts = Counter(self.homes)
        kept = ", ".join(f"{split} ({counts[split]:,} files)" for split in SPLITS if counts[split])
        words = [f"the splits in the files' names are kept: {kept}"]
        if named < len(self.homes):
            words.append(f"{len(self.homes) - named:,} files name none, and are in train")
        if self.split is not None:
            words.append("val is dealt out of train by group")
        if not counts["test"]:
            words.append("there is no test split")
        return f"{'; '.join(words)}; --split deals all records anew"


def splits_in_names(names: Sequence[str], split: SplitRule) -> tuple[OwnSplits, int] | None:
    """Return the splits that files' names tell, and how many names do; None where these are not two splits at least.

    A split is told by a whole word of the path below the source, such as `train-00000.parquet` or `val/batch_3.npz`. Files
    without one are training data, where others tell.

    Raises:
        UsageError: A name tells two.
    """
    found = [{word for word in re.split("[^a-z]+", name.lower()) if word in WORDS or word == EVAL} for name in names]
    known = {WORDS[word] for words in found for word in words if word != EVAL}
    meaning = WORDS | {EVAL: "test" if "val" in known and "test" not in known else "val"}
    told = [{meaning[word] for word in words} for words in found]
    if len({split for splits in told for split in splits}) < 2:
        return None
    for name, splits in zip(names, told, strict=True):
        if len(splits) > 1:
            raise UsageError(f"{name} names {' and '.join(sorted(splits))}; rename it, or deal all records anew by --split")
    homes = [next(iter(splits), "train") for splits in told]
    own = OwnSplits(homes=homes, split=split if "train" in homes and "val" not in homes else None)
    return own, sum(map(bool, told))
