"""The id of every record of a folder: the question id where it is unique, else `<question id>#<k>`, alike in both halves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from dali_pipeline.errors import DataError
from dali_pipeline.format.shard import Hashes, hash_texts
from dali_pipeline.ingest.foreign import ForeignFile
from dali_pipeline.types import KINDS, Ints, Kind

_NUMBERED = re.compile(r"(.*)#(0|[1-9][0-9]{0,17})", re.DOTALL)


@dataclass(frozen=True, kw_only=True, eq=False)
class FileNames:
    """What is remembered of one file's names: 24 bytes a record, whatever the names' lengths.

    texts: hashes of its explicit ids, or of its groups · groups: hashes of its groups · labels · numbered: of names that
    look like numbered ones, as `q#1`, the row, the hash of `q`, and 1.
    """

    kinds: tuple[Kind, ...]
    explicit: bool
    texts: Hashes
    groups: Hashes
    labels: Ints
    numbered: list[tuple[int, int, int]]

    @classmethod
    def empty(cls) -> FileNames:
        """Of a file that is left out."""
        none = np.zeros(0, np.uint64)
        return cls(kinds=(), explicit=False, texts=none, groups=none, labels=none.astype(np.int64), numbered=[])

    @classmethod
    def of(cls, file: ForeignFile) -> FileNames:
        """Hashes a file's names."""
        groups = hash_texts(text.encode() for text in file.groups)
        texts = groups if file.ids is None else hash_texts(text.encode() for text in file.ids)
        found = ((row, _NUMBERED.fullmatch(text)) for row, text in enumerate(file.ids or file.groups) if "#" in text)
        numbered = [(row, xxhash.xxh3_64_intdigest(each[1].encode()), int(each[2])) for row, each in found if each]
        return cls(
            kinds=file.kinds,
            explicit=file.ids is not None,
            texts=texts,
            groups=groups,
            labels=np.array(file.labels, np.int64),
            numbered=numbered,
        )


class Disagreement(DataError):
    """Names that cannot be. file, row: where the record is; words: what is wrong with it."""

    def __init__(self, file: int, row: int, words: str) -> None:
        super().__init__(words)
        self.file, self.row, self.words = file, row, words


class Names:
    """Numbers the records of all files.

    Raises Disagreement where an explicit id is given twice, a name is what another's number makes of it, or the halves do not
    agree: a question with different numbers of records, a record with different labels. Costs a sort of 8 bytes a record.
    """

    def __init__(self, files: Sequence[FileNames]) -> None:
        self._numbers: dict[int, Ints] = {}  # of each file, k of its records, -1 where the question is unique
        sides = [_Side(files, kind) for kind in KINDS if any(kind in each.kinds for each in files)]
        recurring = np.concatenate([side.distinct[side.counts > 1] for side in sides]) if sides else np.zeros(0, np.uint64)
        for side in sides:
            numbers = np.where(np.isin(side.texts, recurring), side.k, -1)
            self._numbers |= dict(zip(side.chosen, np.split(numbers, side.ends[:-1]), strict=True))
        if len(sides) == 2:
            _compare(*sides)

    def ids(self, number: int, file: ForeignFile) -> list[str]:
        """The ids of the records of file `number`."""
        if file.ids is not None:
            return file.ids
        numbers = self._numbers[number].tolist()
        return [group if k < 0 else f"{group}#{k}" for group, k in zip(file.groups, numbers, strict=True)]


class _Side:
    """All records of one kind, in file order.

    chosen: the files that have it · ends: of each, in records · order: sorts by text, then by place · distinct, counts: the
    texts and how often each occurs · k: of each record, how many of its text came before.
    """

    def __init__(self, files: Sequence[FileNames], kind: Kind) -> None:
        self.chosen = [number for number, each in enumerate(files) if kind in each.kinds]
        own = [files[at] for at in self.chosen]
        self.ends = np.cumsum([len(each.texts) for each in own])
        self.texts = np.concatenate([each.texts for each in own])
        self.labels = np.concatenate([each.labels for each in own])
        self.order = np.argsort(self.texts, kind="stable")
        self.distinct, begins, self.counts = np.unique(self.texts[self.order], return_index=True, return_counts=True)
        self.k = np.empty(len(self.texts), np.int64)
        self.k[self.order] = np.arange(len(self.texts)) - np.repeat(begins, self.counts)
        explicit = np.repeat([each.explicit for each in own], [len(each.texts) for each in own])
        twice = np.flatnonzero(explicit & (self.k > 0))
        if len(twice):
            raise self.disagree(twice[0], "is given to several records; expected each id once")
        for number in self.chosen:
            for row, base, k in files[number].numbered:
                at = int(np.searchsorted(self.distinct, np.uint64(base)))
                if at < len(self.distinct) and self.distinct[at] == base and k < self.counts[at] > 1:
                    raise Disagreement(number, row, "is also what a record of a recurring question is named; rename one")

    def disagree(self, record: np.int64, words: str) -> Disagreement:
        """The error that names a record."""
        at = int(np.searchsorted(self.ends, record, side="right"))
        begin = int(self.ends[at - 1]) if at else 0
        return Disagreement(self.chosen[at], int(record) - begin, words)


def _compare(sequences: _Side, graphs: _Side) -> None:
    """Raises Disagreement where the halves do not agree."""
    shared, ours, theirs = np.intersect1d(sequences.distinct, graphs.distinct, return_indices=True)
    counts = sequences.counts[ours], graphs.counts[theirs]
    unequal = np.flatnonzero(counts[0] != counts[1])
    if len(unequal):
        first = np.flatnonzero(sequences.texts == shared[unequal[0]])[0]
        one, other = (int(each[unequal[0]]) for each in counts)
        raise sequences.disagree(first, f"recurs, with {one} sequences and {other} records of graphs; expected equal numbers")
    # by text, then by k: both halves list the same records
    left = sequences.order[np.isin(sequences.texts[sequences.order], shared)]
    right = graphs.order[np.isin(graphs.texts[graphs.order], shared)]
    different = np.flatnonzero(sequences.labels[left] != graphs.labels[right])
    if len(different):
        first = different[left[different].argmin()]  # in file order
        here, there = left[first], right[first]
        one, other = int(sequences.labels[here]), int(graphs.labels[there])
        raise sequences.disagree(here, f"has the label {one} as a sequence and {other} as graphs; expected the same")
