"""Assign the records of a file to splits: by the split in the file's name, or by a hash of each record's group."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dali_pipeline.errors import UsageError
from dali_pipeline.format.schema import SPLITS
from dali_pipeline.format.shard import Hashes, count_shared
from dali_pipeline.writing.filler import Dealer
from dali_pipeline.writing.split import KnownGroups, SplitRule

WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
_ANY_WORD = re.compile("train|val|dev|test")  # part of each of the words, and of EVAL
EVAL = "eval"  # the validation split, or the test split if another name says validation


@dataclass(frozen=True, kw_only=True)
class Alone:
    """Assigns every group to one split."""

    split: str

    def of(self, group: str) -> str:
        """Return the split."""
        return self.split


class Settled:
    """Leaves the groups that a data set has in their splits, and assigns others by a rule.

    Args:
        groups: Hashes of the groups of each split.
        rule: Rule for the others.
    """

    def __init__(self, groups: Mapping[str, Hashes], rule: Dealer) -> None:
        numbers = [np.full(len(hashes), SPLITS.index(split)) for split, hashes in groups.items()]
        hashes = np.concatenate([np.zeros(0, np.uint64), *groups.values()])
        self._rule, self._known = rule, KnownGroups(hashes, np.concatenate([np.zeros(0, np.int64), *numbers]))

    def of(self, group: str) -> str:
        """Return the split of a group."""
        return self._known.of(group) or self._rule.of(group)


@dataclass(frozen=True, kw_only=True)
class TrainAndVal:
    """Assigns groups to train and val, in the proportion that `split` gives these two."""

    split: SplitRule

    def of(self, group: str) -> str:
        """Return the split of a group."""
        train, val, _ = self.split.shares
        return "train" if self.split.place(group) * (train + val) < 100 * train else "val"


@dataclass(frozen=True, kw_only=True)
class OwnSplits:
    """The splits that the source has.

    Attributes:
        homes: Name of the split of each file.
        split: Rule that takes val out of train if the source has no val, otherwise None.
    """

    homes: list[str]
    split: SplitRule | None

    def of_file(self, number: int) -> Dealer:
        """Return the rule that assigns the groups of a file to splits."""
        home = self.homes[number]
        return TrainAndVal(split=self.split) if home == "train" and self.split is not None else Alone(split=home)

    def torn(self, groups: Sequence[Hashes]) -> int:
        """Count the groups that are in several splits. groups: the hashes of each file's groups."""
        seen = [np.unique(np.concatenate([np.zeros(0, np.uint64), *self._of(split, groups)])) for split in SPLITS]
        return count_shared(seen)

    def _of(self, split: str, groups: Sequence[Hashes]) -> list[Hashes]:
        return [hashes for home, hashes in zip(self.homes, groups, strict=True) if home == split]

    def describe(self, named: int) -> str:
        """Return a sentence about the splits that are kept. named: number of files whose names say a split."""
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


def _words(name: str) -> set[str]:
    """Return the whole words in a name, in lower case, that say a split."""
    if not _ANY_WORD.search(name):  # nearly always; a folder may have a million files
        return set()
    return {word for word in re.split("[^a-z]+", name) if word in WORDS or word == EVAL}


def splits_in_names(names: Sequence[str], split: SplitRule) -> tuple[OwnSplits, int] | None:
    """Return the splits that file names say, and the number of such names; None unless they say at least two splits.

    A name says a split by a whole word of the path below the source, for example `train-00000.parquet` or `val/batch_3.npz`.
    If other names say a split, a file whose name says none is training data.

    Raises:
        UsageError: A name says two splits.
    """
    split_words = [_words(name.lower()) for name in names]
    known = {WORDS[word] for words in split_words for word in words if word != EVAL}
    meaning = WORDS | {EVAL: "test" if "val" in known and "test" not in known else "val"}
    file_splits = [{meaning[word] for word in words} for words in split_words]
    if len({split for splits in file_splits for split in splits}) < 2:
        return None
    for name, splits in zip(names, file_splits, strict=True):
        if len(splits) > 1:
            raise UsageError(f"{name} names {' and '.join(sorted(splits))}; rename it, or deal all records anew by --split")
    homes = [next(iter(splits), "train") for splits in file_splits]
    own = OwnSplits(homes=homes, split=split if "train" in homes and "val" not in homes else None)
    return own, sum(map(bool, file_splits))
