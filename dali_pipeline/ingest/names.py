"""Assign the ids of records: the question id if it is unique, otherwise `<question id>#<k>`, alike in sequences and graphs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from dali_pipeline.errors import DataError
from dali_pipeline.format.shard import Hashes, hash_texts
from dali_pipeline.ingest.foreign import ForeignFile
from dali_pipeline.types import KINDS, Ints, Kind

_NUMBERED = re.compile(r"(.*)#(0|[1-9][0-9]{0,17})", re.DOTALL)


@dataclass(frozen=True, kw_only=True, eq=False)
class FileNames:
    """Hashes of the names in one file: 24 bytes per record, whatever the lengths of the names.

    Attributes:
        kinds: Kinds of record in the file.
        explicit: Whether the file has ids.
        texts: Hashes of the ids if the file has them, otherwise of the groups.
        groups: Hashes of the groups.
        labels: Labels of the records; hashes of them, if they are not classes.
        numbered: Names that look numbered; for example, `q#1` is its row, the hash of `q`, and 1.
    """

    kinds: tuple[Kind, ...]
    explicit: bool
    texts: Hashes
    groups: Hashes
    labels: Ints
    numbered: list[tuple[int, int, int]]

    @classmethod
    def empty(cls) -> FileNames:
        """Return the names of a file that is left out."""
        none = np.zeros(0, np.uint64)
        return cls(kinds=(), explicit=False, texts=none, groups=none, labels=none.astype(np.int64), numbered=[])

    @classmethod
    def of_one(cls, kinds: tuple[Kind, ...], name: str, label: Any) -> FileNames:
        """Return the names of a file with one record, which has this id."""
        hashed = np.array([xxhash.xxh3_64_intdigest(name.encode())], np.uint64)
        match = _NUMBERED.fullmatch(name) if "#" in name else None
        numbered = [] if match is None else [(0, xxhash.xxh3_64_intdigest(match[1].encode()), int(match[2]))]
        return cls(kinds=kinds, explicit=True, texts=hashed, groups=hashed, labels=_label_keys([label]), numbered=numbered)

    @classmethod
    def of(cls, file: ForeignFile) -> FileNames:
        """Return the hashes of a file's names."""
        groups = hash_texts(text.encode() for text in file.groups)
        texts = groups if file.ids is None else hash_texts(text.encode() for text in file.ids)
        matches = ((row, _NUMBERED.fullmatch(text)) for row, text in enumerate(file.ids or file.groups) if "#" in text)
        numbered = [(row, xxhash.xxh3_64_intdigest(match[1].encode()), int(match[2])) for row, match in matches if match]
        return cls(
            kinds=file.kinds,
            explicit=file.ids is not None,
            texts=texts,
            groups=groups,
            labels=_label_keys(file.labels),
            numbered=numbered,
        )


def _label_keys(labels: Sequence[Any]) -> Ints:
    """Return a number per label, equal for equal labels: a class itself, or a hash."""
    if all(isinstance(label, int) for label in labels):
        return np.array(labels, np.int64)
    hashed = [0 if label is None else xxhash.xxh3_64_intdigest(np.asarray(label).tobytes()) >> 1 for label in labels]
    return np.array(hashed, np.int64)


class Disagreement(DataError):
    """Names that contradict each other. file, row: position of the record; words: what is wrong with it."""

    def __init__(self, file: int, row: int, words: str) -> None:
        super().__init__(words)
        self.file, self.row, self.words = file, row, words


class Names:
    """Assigns ids to the records of all files. Costs a sort of 8 bytes per record.

    Raises:
        Disagreement: An explicit id occurs twice, a name equals a numbered name of another record, or sequences and graphs
            disagree: a question has different numbers of records, or a record has different labels.
    """

    def __init__(self, files: Sequence[FileNames]) -> None:
        self._numbers: dict[int, Ints] = {}  # k of the records of each file without ids; -1 if the question is unique
        sides = [_Side(files, kind) for kind in KINDS if any(kind in file.kinds for file in files)]
        recurring = np.concatenate([side.distinct[side.counts > 1] for side in sides]) if sides else np.zeros(0, np.uint64)
        for side in sides:
            numbers = np.where(np.isin(side.texts, recurring), side.k, -1)
            for number, begin, end in zip(side.chosen, [0, *side.ends[:-1].tolist()], side.ends.tolist(), strict=True):
                if not files[number].explicit:
                    self._numbers[number] = numbers[begin:end]
        if len(sides) == 2:
            _compare(*sides)

    def ids(self, number: int, file: ForeignFile) -> list[str]:
        """Return the ids of the records of file `number`."""
        if file.ids is not None:
            return file.ids
        numbers = self._numbers[number].tolist()
        return [group if k < 0 else f"{group}#{k}" for group, k in zip(file.groups, numbers, strict=True)]


class _Side:
    """All records of one kind, in file order.

    Attributes:
        chosen: Numbers of the files that have this kind.
        ends: End of each of these files, in records.
        texts, labels: Hash of the name, and label, of each record.
        order: Permutation that sorts by text, then by position.
        distinct, counts: The distinct texts, and how often each occurs.
        k: Number of earlier records with the same text, for each record.
    """

    def __init__(self, files: Sequence[FileNames], kind: Kind) -> None:
        self.chosen = [number for number, file in enumerate(files) if kind in file.kinds]
        own = [files[number] for number in self.chosen]
        self.ends = np.cumsum([len(file.texts) for file in own])
        self.texts = np.concatenate([file.texts for file in own])
        self.labels = np.concatenate([file.labels for file in own])
        self.order = np.argsort(self.texts, kind="stable")
        self.distinct, begins, self.counts = np.unique(self.texts[self.order], return_index=True, return_counts=True)
        self.k = np.empty(len(self.texts), np.int64)
        self.k[self.order] = np.arange(len(self.texts)) - np.repeat(begins, self.counts)
        explicit = np.repeat([file.explicit for file in own], [len(file.texts) for file in own])
        twice = np.flatnonzero(explicit & (self.k > 0))
        if len(twice):
            raise self.disagree(twice[0], "is given to several records; expected each id once")
        for number in self.chosen:
            for row, base, k in files[number].numbered:
                index = int(np.searchsorted(self.distinct, np.uint64(base)))
                if index < len(self.distinct) and self.distinct[index] == base and k < self.counts[index] > 1:
                    raise Disagreement(number, row, "is also what a record of a recurring question is named; rename one")

    def disagree(self, record: np.int64, words: str) -> Disagreement:
        """Return the error that names a record."""
        index = int(np.searchsorted(self.ends, record, side="right"))
        begin = int(self.ends[index - 1]) if index else 0
        return Disagreement(self.chosen[index], int(record) - begin, words)


def _compare(sequences: _Side, graphs: _Side) -> None:
    """Raise Disagreement if sequences and graphs do not agree."""
    shared, ours, theirs = np.intersect1d(sequences.distinct, graphs.distinct, return_indices=True)
    counts = sequences.counts[ours], graphs.counts[theirs]
    unequal = np.flatnonzero(counts[0] != counts[1])
    if len(unequal):
        first = np.flatnonzero(sequences.texts == shared[unequal[0]])[0]
        num_sequences, num_graphs = (int(side_counts[unequal[0]]) for side_counts in counts)
        raise sequences.disagree(
            first, f"recurs, with {num_sequences} sequences and {num_graphs} records of graphs; expected equal numbers"
        )
    # sorted by text, then by k, so that both sides list the same records
    left = sequences.order[np.isin(sequences.texts[sequences.order], shared)]
    right = graphs.order[np.isin(graphs.texts[graphs.order], shared)]
    different = np.flatnonzero(sequences.labels[left] != graphs.labels[right])
    if len(different):
        first = different[left[different].argmin()]  # in file order
        here, there = left[first], right[first]
        label, other_label = int(sequences.labels[here]), int(graphs.labels[there])
        raise sequences.disagree(here, f"has the label {label} as a sequence and {other_label} as graphs; expected the same")
