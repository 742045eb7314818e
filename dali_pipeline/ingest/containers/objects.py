"""Trees of objects, as pickles and JSON hold them: their leaves, their records, and the values of a key."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dali_pipeline.errors import FormatError
from dali_pipeline.ingest.containers.leaf import OBJECT, TEXT, Leaf, check_record, missing_key, not_taken, row_range, stacked
from dali_pipeline.types import Array

MOST_DEPTH = 32
MOST_LEAVES = 200_000
MOST_VISITS = 400_000  # values looked at for one list of leaves
MOST_NUMBERS = (
    1 << 20
)  # in one list of Python numbers, if that is more than the file has bytes: a list may stand in many places
SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test"})
_NUMBERS = {bool: "bool", int: "int64", float: "float64"}


class View:
    """An array, or a text, whose values are read on demand.

    Attributes:
        shape: Its shape.
        dtype: Like in `Leaf`; "text" is possible.
    """

    __slots__ = ("dtype", "shape")

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = shape, dtype

    def rows(self, begin: int, end: int) -> Array | list[str] | str:
        """Return rows; the whole of a scalar. The range has been checked."""
        raise NotImplementedError


Seen = View | dict[Any, Any] | Sequence[Any] | str
Interpret = Callable[[Any], "Seen | None"]  # what an object of a pickle stands for; None for an unknown one


class ObjectContainer:
    """A tree of dicts, lists, numbers, texts and arrays.

    The top level is a list of records if it is a list of mappings, or a dict of at least two mappings with similar keys that
    are not named like splits. Anything else is one mapping.

    Args:
        path: The file.
        content: The tree.
        interpret: Returns what an object that is none of Python's own types stands for; raises FormatError if it is damaged.
        describe: Returns a short description of such an object, for messages.
        nbytes: Size of the file.
    """

    def __init__(
        self,
        path: Path,
        content: Any,
        interpret: Interpret,
        describe: Callable[[Any], str] = lambda value: type(value).__name__,
        nbytes: int = 0,
    ) -> None:
        self.path, self._interpret, self._describe, self._nbytes = path, interpret, describe, nbytes
        self._top = content
        self.records: Sequence[str] | None = None
        self._records: Sequence[Any] = [content]
        if not isinstance(content, dict | list | tuple | str):
            content = self._seen(content)
        if isinstance(content, dict) and self._is_records(list(content.values())) and not self._only_splits(content):
            self.records, self._records = [key_text(key) for key in content], list(content.values())
        elif isinstance(content, Lazy) or (isinstance(content, list) and self._is_list_of_records(content)):
            self.records, self._records = Numbers(len(content)), content

    def leaves(self, record: int = 0) -> list[Leaf]:
        """Return all leaves of the file, or of one of its records."""
        if self.records is not None and not len(self._records):
            return []
        check_record(self.path, self.records, None if self.records is None else record)
        return list(self._walk("", self._records[record], MOST_DEPTH, [MOST_VISITS, MOST_LEAVES], {}))

    def read(self, key: str, begin: int = 0, end: int | None = None, record: int | None = None) -> Array | list[str] | str:
        """Return rows of a leaf of a record; of rows begin to end of all records, stacked, if `record` is None."""
        if self.records is not None and record is None:
            return self._column(key, begin, end)
        number = check_record(self.path, self.records, record)
        where = "" if record is None else f", record {self.records[number] if self.records else number}"
        value = self._resolve(self._records[number], key, MOST_DEPTH)
        if value is _MISSING:
            raise missing_key(self.path, key, (leaf.key for leaf in self.leaves(number)), where)
        return self._values(key, value, begin, end, where)

    def close(self) -> None:
        """Forget the content."""
        self._top, self._records = None, []

    def _column(self, key: str, begin: int, end: int | None) -> Array | list[str]:
        """Return the values of a leaf in records begin to end, stacked."""
        begin, end = row_range(self.path, key, (len(self._records),), begin, end)
        return stacked(self.path, key, [self.read(key, record=record) for record in range(begin, end)])

    def _seen(self, value: Any) -> Any:
        """Return what an object stands for, itself if it is one of Python's own types; None if it is unknown."""
        if value is None or isinstance(value, dict | list | tuple | str | int | float | View):
            return value
        return self._interpret(value)

    def _mapping(self, value: Any) -> dict[Any, Any] | None:
        try:
            value = self._seen(value)
        except FormatError:
            return None
        return value if isinstance(value, dict) else None

    def _is_list_of_records(self, values: list[Any]) -> bool:
        """Return whether all are mappings, or all are tuples (or lists) of equal length, at least 2, with an array in each."""
        if values and all(isinstance(value, list | tuple) for value in values):
            pairs = len({len(value) for value in values}) == 1 and len(values[0]) > 1
            return pairs and any(isinstance(part, View) and part.shape for part in map(self._seen, values[0]))
        return bool(values) and all(self._mapping(value) is not None for value in values)

    def _is_records(self, values: list[Any]) -> bool:
        """Return whether these values of a dict are records: at least two mappings, all with half of the first one's keys."""
        if len(values) < 2:
            return False
        first = self._mapping(values[0])
        if not first:
            return False
        for value in values:
            mapping = self._mapping(value)
            if mapping is None or 2 * len(mapping.keys() & first.keys()) < max(len(first), len(mapping)):
                return False
        return True

    def _only_splits(self, content: dict[Any, Any]) -> bool:
        return all(isinstance(key, str) and key.lower() in SPLITS for key in content)

    def _walk(self, key: str, value: Any, depth: int, left: list[int], known: dict[tuple[int, int], Any]) -> Iterator[Leaf]:
        """Yield the leaves under a value.

        Args:
            key: Key of the value.
            value: The value.
            depth: Levels that may follow.
            left: How many values may still be visited, and how many leaves may follow.
            known: Like in `_shape`.
        """
        left[0] -= 1
        if min(left) <= 0:
            if left[1] > -1:
                left[1] = -1
                yield Leaf(key, (), OBJECT, f"the file has more than {MOST_LEAVES} keys")
            return
        leaf, children = self._leaf(key, value, depth, known)
        if leaf is not None:
            left[1] -= 1
            yield leaf
            return
        for name, child in children:
            if min(left) > -1:
                yield from self._walk(name, child, depth - 1, left, known)

    def _leaf(
        self, key: str, value: Any, depth: int, known: dict[tuple[int, int], Any]
    ) -> tuple[Leaf | None, Iterator[tuple[str, Any]]]:
        """Return the leaf that a value is, or None and the keys and values under it."""
        nothing: Iterator[tuple[str, Any]] = iter(())
        try:
            seen = self._seen(value)
        except FormatError as error:
            return Leaf(key, (), OBJECT, str(error)), nothing
        if isinstance(seen, View):
            return Leaf(key, seen.shape, seen.dtype), nothing
        if isinstance(seen, str):
            return Leaf(key, (), TEXT), nothing
        if seen is None:
            return Leaf(key, (), OBJECT, "it is None" if value is None else f"it is {self._describe(value)}"), nothing
        if isinstance(seen, bool | int | float):
            about = self._numbers(seen, known)
            return (Leaf(key, (), OBJECT, "it is too large a number") if about is None else Leaf(key, *about)), nothing
        if depth <= 0:
            return Leaf(key, (), OBJECT, f"it is nested more than {MOST_DEPTH} levels deep"), nothing
        if isinstance(seen, dict):
            return None, ((joined(key, key_text(name)), child) for name, child in seen.items())
        if all(isinstance(entry, str) for entry in seen) and len(seen):
            return Leaf(key, (len(seen),), TEXT), nothing
        about = self._numbers(seen, known)
        if about is not None:
            return Leaf(key, *about), nothing
        return None, ((f"{key}[{index}]", child) for index, child in enumerate(seen))

    def _numbers(self, value: Any, known: dict[tuple[int, int], Any]) -> tuple[tuple[int, ...], str] | None:
        """Return shape and dtype of a number, or of a nested list of numbers of equal lengths; None for anything else."""
        about = _shape(value, self._scalar, MOST_DEPTH, known)
        return about if about is not None and math.prod(about[0]) <= max(MOST_NUMBERS, self._nbytes) else None

    def _scalar(self, value: Any) -> str | None:
        """Return the dtype of an object that stands for one number; None for anything else."""
        try:
            seen = self._seen(value)
        except FormatError:
            return None
        return seen.dtype if isinstance(seen, View) and not seen.shape and seen.dtype != TEXT else None

    def _resolve(self, value: Any, key: str, depth: int) -> Any:
        """Return the value that a key names; _MISSING if there is none."""
        if not key:
            return value
        seen = self._seen(value)
        if depth <= 0 or seen is None or isinstance(seen, View | str | int | float):
            return _MISSING
        if not isinstance(seen, dict):
            index, bracket, rest = key[1:].partition("]")
            if key[0] != "[" or not bracket or not index.isdecimal() or int(index) >= len(seen):
                return _MISSING
            return self._resolve(seen[int(index)], rest.removeprefix("."), depth - 1)
        child = _child(seen, key)
        if child is not _MISSING:
            return child
        for position, letter in enumerate(key):
            if letter in ".[" and position and (child := _child(seen, key[:position])) is not _MISSING:
                found = self._resolve(child, key[position + (letter == ".") :], depth - 1)
                if found is not _MISSING:
                    return found
        return _MISSING

    def _values(self, key: str, value: Any, begin: int, end: int | None, where: str) -> Array | list[str] | str:
        leaf, children = self._leaf(key, value, MOST_DEPTH, {})
        if leaf is None:
            under = [name for (name, _), _ in zip(children, range(3), strict=False)]
            raise FormatError(
                f"{self.path}{where}, {key or 'its content'} is no array; it holds {', '.join(under) or 'nothing'}"
            )
        if leaf.dtype == OBJECT:
            raise not_taken(f"{self.path}{where}", leaf)
        begin, end = row_range(f"{self.path}{where}", key, leaf.shape, begin, end)
        seen = self._seen(value)
        if isinstance(seen, View):
            return seen.rows(begin, end)
        if isinstance(seen, str):
            return seen
        if leaf.dtype == TEXT:
            return list(seen[begin:end])
        try:
            plain = self._plain(seen[begin:end] if leaf.shape else seen)
            return np.array(plain, leaf.dtype).reshape((end - begin, *leaf.shape[1:]) if leaf.shape else ())
        except (ValueError, TypeError, OverflowError) as error:
            raise FormatError(f"{self.path}{where}, {key} cannot be taken ({error}); expected numbers") from None

    def _plain(self, value: Any) -> Any:
        """Return a nested list of numbers with objects of one number replaced by the number."""
        if isinstance(value, list | tuple):
            if set(map(type, value)) <= _NUMBERS.keys():
                return value
            return [self._plain(entry) for entry in value]
        seen = self._seen(value)
        return seen.rows(0, 1).item() if isinstance(seen, View) else seen  # type: ignore[union-attr]


class Numbers(Sequence[str]):
    """The texts "0", "1", ... up to a count, none of which is stored."""

    def __init__(self, count: int) -> None:
        self._count = range(count)

    def __len__(self) -> int:
        return len(self._count)

    def __getitem__(self, index: Any) -> Any:
        part = self._count[index]
        return [str(number) for number in part] if isinstance(part, range) else str(part)


class Lazy(Sequence[Any]):
    """Records that are made when they are asked for.

    Args:
        count: Number of records.
        make: Returns a record, given its number.
    """

    def __init__(self, count: int, make: Callable[[int], Any]) -> None:
        self._count, self._make = count, make
        self._last: tuple[int, Any] = (-1, None)  # all keys of a record are mostly read before the next

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if self._last[0] != index:
            self._last = index, self._make(index)
        return self._last[1]


_MISSING: Any = object()


def _child(mapping: dict[Any, Any], name: str) -> Any:
    """Return the value of a dict whose key, as text, is a name; _MISSING if there is none."""
    if name in mapping:
        return mapping[name]
    if name.removeprefix("-").isdecimal() and len(name) < 20 and int(name) in mapping and str(int(name)) == name:
        return mapping[int(name)]
    if all(isinstance(key, str | int) for key in mapping):
        return _MISSING
    return next((value for key, value in mapping.items() if key_text(key) == name), _MISSING)


def joined(prefix: str, name: str) -> str:
    """Return the dotted path of a name under a prefix."""
    return f"{prefix}.{name}" if prefix else name


def key_text(key: Any) -> str:
    """Return the key of a dict as text."""
    return key if isinstance(key, str) else str(key) if isinstance(key, int | float) else reprlib.repr(key)


def _shape(value: Any, scalar: Callable[[Any], str | None], depth: int, known: dict[tuple[int, int], Any]) -> Any:
    """Return shape and dtype of a number or a nested list; None for anything else.

    Args:
        value: The number or list.
        scalar: Returns the dtype of an object that stands for one number, or None.
        depth: Levels of lists that are allowed.
        known: Results so far by identity and depth of the list, because one list may stand in many places.
    """
    kind = type(value)
    if kind in _NUMBERS:
        return None if kind is int and not -(2**63) <= value < 2**63 else ((), _NUMBERS[kind])
    if kind is not list and kind is not tuple:
        dtype = scalar(value)
        return None if dtype is None else ((), "float32" if dtype == "bfloat16" else dtype)
    if not len(value):
        return (0,), "float64"
    if depth <= 0:
        return None
    place = id(value), depth
    if place in known:
        return known[place]
    known[place] = None
    kinds = set(map(type, value))
    if kinds <= _NUMBERS.keys():
        dtype = "float64" if float in kinds else "int64" if int in kinds else "bool"
        if dtype == "int64" and not (min(value) >= -(2**63) and max(value) < 2**63):
            return None
        known[place] = (len(value),), dtype
        return known[place]
    parts = [_shape(entry, scalar, depth - 1, known) for entry in value]
    if None in parts or len({shape for shape, _ in parts}) > 1:
        return None
    dtypes = {dtype for shape, dtype in parts if 0 not in shape} or {"float64"}
    known[place] = (len(value), *parts[0][0]), np.result_type(*dtypes).name
    return known[place]
