"""ForeignFile: one opened file of any format, with the types and helpers that all readers share."""

from __future__ import annotations

import fnmatch
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dali_pipeline.errors import FormatError
from dali_pipeline.format.label import Label
from dali_pipeline.format.record import Graphs
from dali_pipeline.types import Array, Kind

_NUMBER = re.compile("[0-9]+")


class Values(NamedTuple):
    """Values of one record; None for a kind that the file does not have.

    bfloat16: names of the arrays that are bfloat16 in the file; they are float32 here, because NumPy has no bfloat16. fields:
    further fields by names such as `step.token_ids` and `record.score`.
    """

    sequence: Array | None
    graphs: Graphs | None
    bfloat16: tuple[str, ...] = ()
    fields: Mapping[str, Any] = {}


class Block(NamedTuple):
    """Values of several records: sequences (N, T, *row), all of one length. bfloat16, fields: like in `Values`, stacked."""

    sequences: Array
    bfloat16: tuple[str, ...] = ()
    fields: Mapping[str, Any] = {}


def _nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True, kw_only=True)
class ForeignFile:
    """One file whose names and labels have been read.

    Attributes:
        path: The file.
        kinds: Kinds of record in the file.
        ids: Ids of the records, or None if they are made by numbering `groups`.
        groups: Groups (question ids) of the records.
        labels: Labels of the records.
        label: What a label is. Default: a class.
        step_axis: Name of the axis along which the rows of a sequence lie; "layer" becomes "step" if records differ in length.
        axes: Names of a row's axes. Default: none.
        layers: Layer numbers along the axis named layer. Default: none known.
        values: Returns an iterator that reads the records in order, one or a block at a time. The iterator raises FormatError
            or DataError for a record that does not have the format.
        close: Closes what is open until `values` is called. Who does not call that calls this.
        not_taken: Names of other parts of the file, which are not converted.
    """

    path: Path
    kinds: tuple[Kind, ...]
    ids: list[str] | None
    groups: list[str]
    labels: Sequence[Any]
    values: Callable[[], Iterator[Values | Block]]
    close: Callable[[], None] = _nothing
    not_taken: tuple[str, ...] = ()
    label: Label = field(default_factory=Label)
    step_axis: str = "step"
    axes: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A format.

    Attributes:
        what: Description for messages.
        find: Returns the files of this format in order, given the source (a folder or a file) and all its files.
        open: Opens a file, given its path and a name for records that have none.
    """

    what: str
    find: Callable[[Path, list[Path]], list[Path]]
    open: Callable[[Path, str], ForeignFile]


def list_files(root: Path) -> tuple[list[Path], list[Path]]:
    """Return the files under `root`, batch_2 before batch_10, and the links to files that are listed already.

    Follows links. A folder or file that several links reach is listed once. A broken link is listed, and opening it raises the
    error. If `root` is a file, it is listed itself.
    """
    if not root.is_dir():
        return ([root] if root.exists() else []), []
    files, again, linked_files, linked_folders = list[Path](), list[Path](), list[Path](), [root]
    visited, seen = 0, set[tuple[int, int]]()  # device and number of every folder and file
    while linked_folders:
        folders = [linked_folders.pop(0)]
        while folders:
            folder = folders.pop(0)
            about = folder.stat()
            if (about.st_dev, about.st_ino) in seen:
                continue
            seen.add((about.st_dev, about.st_ino))
            visited += 1
            for entry in sorted(os.scandir(folder), key=lambda entry: (natural(entry.name), entry.name)):
                path = folder / entry.name
                if entry.is_symlink():
                    (linked_folders if path.is_dir() else linked_files if path.exists() else files).append(path)
                elif entry.is_dir():
                    folders.append(path)
                else:
                    files.append(path)
                    seen.add((about.st_dev, entry.inode()))
    for path in linked_files:
        about = path.stat()
        (again if (about.st_dev, about.st_ino) in seen else files).append(path)
        seen.add((about.st_dev, about.st_ino))
    return (files if visited == 1 and not linked_files else in_natural_order(root, files)), again


def files_named(root: Path, files: Iterable[Path], patterns: Sequence[str], skip: str = "(?!)") -> list[Path]:
    """Return the files whose names match one of the patterns, and do not match the regular expression `skip`."""
    named = re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns))
    names = ((path, path.name) for path in files)
    return [path for path, name in names if named.match(name) and not re.match(skip, name)]


def in_natural_order(root: Path, paths: Iterable[Path]) -> list[Path]:
    """Sort files under `root`: batch_2 before batch_10."""
    folder = len(str(root)) + 1  # texts: a folder may have a hundred thousand files
    names = {str(path)[folder:] if root != Path() else str(path): path for path in paths}
    return [names[name] for name in sorted(names, key=lambda name: (natural(name), name))]


def natural(name: str) -> str:
    """Return a sort key that sorts numbers in a name by their value."""
    return _NUMBER.sub(_as_key, name)


def _as_key(number: re.Match[str]) -> str:
    digits = number[0].lstrip("0")
    return f"\0{len(digits):04}{digits}"  # a text ends before its first number; of two numbers the longer one is greater


def as_text(path: Path, name: str, value: Any) -> str:
    """Return an id or a group as a text, from a text, bytes in UTF-8 or a whole number; raise FormatError for anything else."""
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
    """Return labels as ints, from whole numbers of any type; raise FormatError, which names the first value that is not one."""
    numbers = []
    for value in values:
        number = value.item() if isinstance(value, np.generic) else value
        if not (isinstance(number, int | float) and 0 <= number < 2**63 and number == int(number)):
            raise FormatError(f"{path}, {name} holds {reprlib.repr(number)}; expected whole numbers of 0 or more")
        numbers.append(int(number))
    return numbers


def edges_of(path: Path, adjacency: Array, nodes: int) -> tuple[Array, Array | None]:
    """Return the edges of a dense adjacency matrix: edge_index (2, E) int64, and the values (E,) if they are real numbers.

    An entry that is not 0 is an edge from its row to its column, like in PyG's `dense_to_sparse`.

    Args:
        path: File, for messages.
        adjacency: (nodes, nodes), or (1, nodes, nodes).
        nodes: Number of nodes.

    Raises:
        FormatError: The matrix has another shape.
    """
    square = adjacency[0] if adjacency.ndim == 3 and len(adjacency) == 1 else adjacency
    if square.shape != (nodes, nodes):
        raise FormatError(f"{path}: adj is {list(adjacency.shape)} for {nodes} nodes; expected [{nodes}, {nodes}]")
    source, target = np.nonzero(square)
    values = square[source, target] if square.dtype.kind == "f" else None
    return np.stack([source, target]).astype(np.int64), values


def check_counts(path: Path, **counts: int) -> None:
    """Raise FormatError unless all counts are equal."""
    if len(set(counts.values())) > 1:
        *listed, last = (f"{count} {name}" for name, count in counts.items())
        raise FormatError(f"{path} has {', '.join(listed)} and {last}; expected equal numbers")


def rows_at_a_time(row_bytes: int) -> int:
    """Return how many stacked records to read together: about 4 MiB."""
    return max(1, (1 << 22) // max(1, row_bytes))


LENGTHS = ("lengths", "length", "seq_lengths", "seq_lens", "sequence_lengths")
MASKS = ("attention_mask", "mask")


def real_steps(path: Path, records: int, lengths: Any, mask: Any) -> list[Array] | None:
    """Return the real steps of each padded sequence: (T,) bool, or the number of leading steps; None if all steps are real.

    Args:
        path: File, for messages.
        records: Number of records, N.
        lengths: (N,) whole numbers, or None.
        mask: (N, T), or N rows of any length, nonzero for real steps; or None.

    Raises:
        FormatError: `lengths` or `mask` has another form, or they disagree.
    """
    counts = None if lengths is None else np.asarray(lengths).reshape(-1)
    rows = None if mask is None else [np.asarray(row).reshape(-1) for row in mask]
    for name, entries in (("lengths", counts), ("the mask", rows)):
        if entries is not None and len(entries) != records:
            raise FormatError(f"{path}: {name} has {len(entries)} entries for {records} records; expected one per record")
    if counts is not None and (
        counts.dtype.kind not in "iuf" or (counts != counts.astype(np.int64)).any() or (counts < 0).any()
    ):
        raise FormatError(
            f"{path}: lengths are {counts.dtype} {reprlib.repr(counts.tolist())}; expected whole numbers of 0 or more"
        )
    if rows is not None and not all(row.dtype.kind in "iufb" for row in rows):
        raise FormatError(f"{path}: the mask holds {rows[0].dtype}; expected 0 or 1 per step")
    if counts is None:
        return None if rows is None else [row != 0 for row in rows]
    if rows is not None:
        for record, (row, count) in enumerate(zip(rows, counts.tolist(), strict=True)):
            if np.count_nonzero(row) != count:
                raise FormatError(
                    f"{path}: record {record} has a length of {count} and a mask of {np.count_nonzero(row)} steps; expected one"
                )
        return [row != 0 for row in rows]
    return [np.int64(count) for count in counts.tolist()]  # type: ignore[misc]


def cut_padding(path: Path, record: int, sequence: Array, real: Array) -> Array:
    """Return the real steps of one sequence; raise FormatError if `real`, an entry of `real_steps`, does not fit it."""
    steps = sequence.shape[0] if sequence.ndim else 0
    if real.ndim == 0:
        if real > steps:
            raise FormatError(f"{path}: record {record} has a length of {real} and {steps} steps; expected {steps} at most")
        return sequence[: int(real)]
    if len(real) != steps:
        raise FormatError(f"{path}: record {record} has a mask of {len(real)} and {steps} steps; expected one entry per step")
    return sequence[real]


def without_padding(path: Path, values: Iterable[Values | Block], real: list[Array] | None) -> Iterator[Values | Block]:
    """Yield the records with only their real steps. real: from `real_steps`; None leaves the values unchanged."""
    if real is None:
        yield from values
        return
    record = 0
    for part in values:
        sequences = part.sequences if isinstance(part, Block) else [part.sequence]
        for number, sequence in enumerate(sequences):
            assert sequence is not None
            graphs = None if isinstance(part, Block) else part.graphs
            fields = {name: rows[number] for name, rows in part.fields.items()} if isinstance(part, Block) else part.fields
            cut = {
                name: cut_padding(path, record, rows, real[record]) if name.startswith("step.") else rows
                for name, rows in fields.items()
            }
            yield Values(cut_padding(path, record, sequence, real[record]), graphs, part.bfloat16, cut)
            record += 1
