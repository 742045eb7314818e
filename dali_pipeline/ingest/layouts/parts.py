"""Part: the files that hold the same records, and where in them each quantity lies; KEYs with placeholders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dali_pipeline.errors import FormatError, UsageError
from dali_pipeline.ingest.containers.base import GZIP, SUFFIXES, Container, Leaf, suffix_of
from dali_pipeline.ingest.layouts.keyed import PLACEHOLDER, KeyedRecords
from dali_pipeline.ingest.layouts.opening import opened
from dali_pipeline.ingest.layouts.recipe import nearest
from dali_pipeline.types import Array

NUMBERS = ("layer", "row")  # placeholders that stand for a whole number
LAYER, ROW = NUMBERS


class Place(NamedTuple):
    """Where an array lies: a file, or None for the part's own one, and the key in it."""

    file: Path | None
    key: str


@dataclass(frozen=True, kw_only=True)
class Part:
    """The files that hold the same records.

    Attributes:
        path: The part's own file, by which it is named.
        places: Places of each quantity, such as "sequence" or "step.token_ids"; several places are the layers, in order.
        row: Number that {row} stands for, or None.
        listed: Path by which the source lists a file that was fetched; None if it is `path`.
        keyed: KEY whose placeholders name the records of the file, or None.
    """

    path: Path
    places: Mapping[str, tuple[Place, ...]]
    row: int | None = None
    keyed: str | None = None
    listed: Path | None = None

    @property
    def beside(self) -> list[Path]:
        """The files besides the part's own one, each once."""
        files = [place.file for places in self.places.values() for place in places if place.file is not None]
        return [path for path in dict.fromkeys(files) if path != self.path]


class SameParts(Mapping[Path, Part]):
    """Parts that differ in nothing but their own file; each is made when it is asked for.

    Args:
        first: One of them.
        files: Their files, in order.
    """

    def __init__(self, first: Part, files: Iterable[Path | str]) -> None:
        self._first, self._files = first, list(files)

    def __reduce__(self) -> tuple[type[SameParts], tuple[Part, list[str]]]:
        return SameParts, (self._first, list(map(str, self._files)))

    def __getitem__(self, path: Path) -> Part:
        first = self._first
        return Part(path=path, places=first.places, row=first.row, keyed=first.keyed)

    def __iter__(self) -> Iterator[Path]:
        # paths are made here, because a worker process asks for the first of them alone
        return (file if isinstance(file, Path) else Path(file) for file in self._files)

    def __len__(self) -> int:
        return len(self._files)


def by_path(parts: Sequence[Part]) -> Mapping[Path, Part]:
    """Return parts by their own files."""
    first = parts[0]
    plain = all(place.file is None for places in first.places.values() for place in places)
    same = ((part.places, part.row, part.keyed) == (first.places, None, first.keyed) for part in parts)
    return SameParts(first, [part.path for part in parts]) if plain and all(same) else {part.path: part for part in parts}


def moved(part: Part, local: Path) -> Part:
    """Return a part whose own file was fetched to another path; raise FormatError if it has files beside it."""
    if part.beside:
        raise FormatError(f"{part.path} is read with {part.beside[0].name}; expected files that are here: copy them first")
    places = {name: tuple(Place(None, place.key) for place in found) for name, found in part.places.items()}
    return Part(path=local, places=places, row=part.row, keyed=part.keyed, listed=part.path)


class OpenPart:
    """A part whose files are opened when they are first needed."""

    def __init__(self, part: Part) -> None:
        self.part, self.path = part, part.path
        self._containers: dict[Path, Container] = {}
        self._leaves: dict[Path, dict[str, Leaf]] = {}

    def container(self, file: Path | None = None) -> Container:
        """Return one of the part's files, opened; by default its own."""
        path = self.path if file is None else file
        if path not in self._containers:
            container = opened(path)
            if self.part.keyed is not None and path == self.path:
                templates = [place.key for places in self.part.places.values() for place in places if place.file is None]
                container = KeyedRecords(container, pattern_of(self.part.keyed), templates)
            self._containers[path] = container
        return self._containers[path]

    def leaves(self, file: Path | None = None) -> dict[str, Leaf]:
        """Return the leaves of a file by key."""
        path = self.path if file is None else file
        if path not in self._leaves:
            self._leaves[path] = {leaf.key: leaf for leaf in self.container(file).leaves()}
        return self._leaves[path]

    def leaf(self, name: str) -> Leaf:
        """Return the leaf of a quantity, of its first layer if it has several; raise FormatError if it does not exist."""
        place = self.part.places[name][0]
        leaves = self.leaves(place.file)
        if place.key not in leaves:
            path = place.file or self.path
            raise FormatError(f"{path} has no key {place.key!r}; {nearest(place.key, [key or path.stem for key in leaves])}")
        leaf = leaves[place.key]
        if leaf.dtype == "object":
            raise FormatError(f"{place.file or self.path}, {place.key} cannot be taken: {leaf.why}")
        return leaf

    def read(self, name: str, begin: int = 0, end: int | None = None, record: int | None = None, axis: int = 0) -> Any:
        """Return rows of a quantity; its layers are stacked along `axis`."""
        places = self.part.places[name]
        arrays: list[Any] = []
        for place in places:
            record_here = record if self.container(place.file).records is not None else None
            arrays.append(self.container(place.file).read(place.key, begin, end, record_here))
        if len(arrays) == 1 and not self.is_layered(name):
            return arrays[0]
        shapes = {np.shape(array) for array in arrays}
        if len(shapes) > 1:
            odd = next(number for number, array in enumerate(arrays) if np.shape(array) != np.shape(arrays[0]))
            place = places[odd]
            raise FormatError(
                f"{place.file or self.path}, {place.key or 'its array'} has the shape {np.shape(arrays[odd])}, and another "
                f"layer {np.shape(arrays[0])}; expected equal shapes"
            )
        return np.stack(arrays, axis=axis)

    def is_layered(self, name: str) -> bool:
        """Return whether a quantity is stacked of several layers."""
        return len(self.part.places[name]) > 1

    def close(self) -> None:
        """Close the files."""
        for container in self._containers.values():
            container.close()


def has_placeholder(key: str) -> bool:
    """Return whether a KEY holds a placeholder."""
    return bool(PLACEHOLDER.search(key))


def pattern_of(key: str) -> re.Pattern[str]:
    """Return the regular expression that a KEY with placeholders stands for; the same name twice stands for the same text."""
    parts, end, seen = [], 0, set[str]()
    for match in PLACEHOLDER.finditer(key):
        name = match[1]
        group = rf"(?P<{name}>{'[0-9]+' if name in NUMBERS else '.+'})"
        parts += [re.escape(key[end : match.start()]), f"(?P={name})" if name in seen else group]
        seen.add(name)
        end = match.end()
    return re.compile("".join(parts) + re.escape(key[end:]))


def filled(key: str, values: Mapping[str, str]) -> str:
    """Return a KEY with the placeholders that have a value replaced by it."""
    return PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), key)


def stem_of(name: str) -> str:
    """Return a file name without the suffixes of its format: `a.ckpt.gz` is `a`, `a.b.npy` is `a.b`."""
    plain = name[: -len(GZIP)] if name.lower().endswith(GZIP) else name
    suffix = suffix_of(name)
    return plain[: -len(suffix)] if suffix in SUFFIXES else plain


def names_of(root: Path, path: Path) -> tuple[str, str, str, str]:
    """Return what a KEY may call a file: its stem, its name, and both with the folders below the source."""
    text, folder = str(path), str(root)
    relative = (text[len(folder) + 1 :] or path.name) if folder != "." else text
    return stem_of(path.name), path.name, stem_of(relative), relative


def files_matching(root: Path, files: Iterable[Path], key: str) -> list[tuple[Path, dict[str, str]]]:
    """Return the files that a KEY calls, and the text of each placeholder."""
    pattern = pattern_of(key)
    found = []
    for path in files:
        match = next((match for name in names_of(root, path) if (match := pattern.fullmatch(name))), None)
        if match is not None:
            found.append((path, match.groupdict()))
    return found


def layers_of(key: str, found: Iterable[int], where: str) -> tuple[int, ...]:
    """Return layer numbers in order; raise FormatError for a number that is missing among consecutive ones."""
    numbers = sorted(set(found))
    steps = np.diff(numbers)
    if len(steps) and steps.min() == 1 < steps.max():  # 3, 9, 12 are a choice; 3, 4, 6 lack a file
        missing = numbers[int((steps > 1).argmax())] + 1
        raise FormatError(
            f"{where} has no {filled(key, {LAYER: str(missing)})}, but the layers {_listed(numbers)}; expected no gap"
        )
    return tuple(numbers)


def layer_places(key: str, keys: Iterable[str], where: str) -> tuple[tuple[Place, ...], tuple[int, ...]]:
    """Return the keys of a file that a KEY with {layer} calls, and their layer numbers.

    Raises:
        UsageError: The KEY has other placeholders, which are for names of files.
        FormatError: No key matches, or a number is missing.
    """
    others = set(PLACEHOLDER.findall(key)) - {LAYER}
    if others:
        raise UsageError(
            f"{key!r} matches no file of {where}, and {{{min(others)}}} stands in names of files alone; {nearest(key, keys)}"
        )
    pattern = pattern_of(key)
    numbered = {int(match[LAYER]): name for name in keys if (match := pattern.fullmatch(name))}
    if not numbered:
        raise FormatError(f"{where} has no key that {key!r} matches; {nearest(key, keys)}")
    numbers = layers_of(key, numbered, where)
    return tuple(Place(None, numbered[number]) for number in numbers), numbers


def layered_parts(
    root: Path, key: str, matches: Iterable[tuple[Path, dict[str, str]]]
) -> tuple[list[tuple[Part, dict[str, str]]], tuple[int, ...]]:
    """Return the parts that files with {layer} or {row} in their names make, in the order of rows, and the layer numbers.

    Raises:
        FormatError: A part lacks a layer that others have, or a layer number is missing.
    """
    groups: dict[tuple[tuple[str, str], ...], dict[int, Path]] = {}
    for path, values in matches:
        folder = "" if "/" in key else str(path.parent)  # the same name in two folders is two parts
        rest = (("", folder), *sorted((name, text) for name, text in values.items() if name != LAYER))
        layer = int(values.get(LAYER, "0"))
        other = groups.setdefault(rest, {}).setdefault(layer, path)
        if other != path:
            raise FormatError(f"{other} and {path} are both called {filled(key, values)!r}; expected one file")
    has_layers = LAYER in PLACEHOLDER.findall(key)
    numbers = layers_of(key, (layer for files in groups.values() for layer in files), str(root)) if has_layers else ()
    parts = []
    for rest, files in groups.items():
        values = dict(rest)
        missing = [number for number in numbers if number not in files]
        if missing:
            name = filled(key, values | {LAYER: str(missing[0])})
            raise FormatError(f"{root} has no {name}, but other files of layer {missing[0]}; expected no gap")
        paths = [files[number] for number in numbers] or list(files.values())
        places = tuple(Place(path, "") for path in paths)
        row = int(values[ROW]) if ROW in values else None
        parts.append((Part(path=paths[0], places={"sequence": places}, row=row), values))
    if ROW in PLACEHOLDER.findall(key):
        parts.sort(key=lambda entry: ([text for name, text in entry[1].items() if name != ROW], entry[0].row))
    return parts, numbers


def check_rows(key: str, parts: Iterable[tuple[Part, dict[str, str]]], counts: Iterable[int]) -> None:
    """Raise FormatError if a file is missing between two numbers that {row} stands for.

    The numbers count files (0, 1, 2) or are the first record of each file (0, 25, 50).
    """
    before: tuple[Part, dict[str, str], int] | None = None
    for (part, values), count in zip(parts, counts, strict=True):
        if before is not None and part.row is not None and before[0].row is not None:
            rest = {name: text for name, text in values.items() if name != ROW}
            same = rest == {name: text for name, text in before[1].items() if name != ROW}
            step = part.row - before[0].row
            if same and step not in (1, before[2]):
                missing = filled(key, values | {ROW: str(before[0].row + (1 if before[2] == 1 else before[2]))})
                where = f"{before[0].path.name} and {part.path.name}"
                raise FormatError(f"{missing.replace('{layer}', '*')} is missing between {where}; expected no gap")
        before = part, values, count


def _listed(numbers: Iterable[int]) -> str:
    texts = [str(number) for number in numbers]
    return ", ".join(texts) if len(texts) <= 12 else f"{', '.join(texts[:12])} and {len(texts) - 12} more"


def as_array(value: Any) -> Array:
    """Return a value of a container as an array."""
    return np.asarray(value)
