"""ForeignFile: what every reader makes of one file, whatever its format."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dali_pipeline.record import Graphs
from dali_pipeline.schema import Array, FormatError, Kind


class Values(NamedTuple):
    """One record's values; None for a kind that the file does not have."""

    sequence: Array | None
    graphs: Graphs | None


class Block(NamedTuple):
    """The values of several records at once: sequences (N, T, *row), all of one length."""

    sequences: Array


@dataclass(frozen=True, kw_only=True)
class ForeignFile:
    """One file, opened as far as its names and labels.

    ids: of the records, None where `groups` (question ids) are to be numbered. values: reads the records in order, one or a
    block of them when it is asked for; raises FormatError or DataError for one that is not what the format says.
    """

    path: Path
    kinds: tuple[Kind, ...]
    ids: list[str] | None
    groups: list[str]
    labels: list[int]
    values: Callable[[], Iterator[Values | Block]]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One format.

    find: the files of a folder, or the file itself, in order, none where they are of another format · open: a file, with a
    name for records that have none.
    """

    what: str
    find: Callable[[Path], list[Path]]
    open: Callable[[Path, str], ForeignFile]


def files_named(root: Path, patterns: Sequence[str], skip: str = "(?!)") -> list[Path]:
    """The files under `root` that match, batch_2 before batch_10; `root` itself where it is one that does."""
    if root.is_file():
        return [root] if any(root.match(pattern) for pattern in patterns) else []
    found = {path for pattern in patterns for path in root.rglob(pattern) if not re.match(skip, path.name)}
    return in_natural_order(root, found)


def in_natural_order(root: Path, paths: Iterable[Path]) -> list[Path]:
    """batch_2 before batch_10; folders left out."""
    names = {path.relative_to(root).as_posix(): path for path in paths if not path.is_dir()}
    return [names[name] for name in sorted(names, key=lambda name: (natural(name), name))]


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts numbers by their value."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def as_text(path: Path, name: str, value: Any) -> str:
    """An id or a group, from a text, bytes in UTF-8 or a whole number; raises FormatError for anything else."""
    value = value.item() if isinstance(value, np.generic) else value
    try:
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, str):
            value.encode()  # a lone surrogate is no text
            return value
    except UnicodeError:
        pass
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise FormatError(f"{path}, {name} holds {reprlib.repr(value)}; expected texts in UTF-8 or whole numbers")


def whole_numbers(path: Path, name: str, values: Iterable[Any]) -> list[int]:
    """Labels as int, from whole int, bool or float; raises FormatError, naming the first that is not."""
    found = []
    for value in values:
        number = value.item() if isinstance(value, np.generic) else value
        if not (isinstance(number, int | float) and 0 <= number < 2**63 and number == int(number)):
            raise FormatError(f"{path}, {name} holds {reprlib.repr(number)}; expected whole numbers of 0 or more")
        found.append(int(number))
    return found


def check_counts(path: Path, **counts: int) -> None:
    """Raises FormatError unless all counts are equal."""
    if len(set(counts.values())) > 1:
        *listed, last = (f"{count} {name}" for name, count in counts.items())
        raise FormatError(f"{path} has {', '.join(listed)} and {last}; expected equal numbers")


def rows_at_a_time(row_bytes: int) -> int:
    """Stacked records that are read together: about 1 MiB of them."""
    return max(1, (1 << 20) // max(1, row_bytes))
