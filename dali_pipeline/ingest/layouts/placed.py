"""Placed: the records of a source whose values stay where they are: which bytes of which file each of them has."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from dali_pipeline.errors import DataError, FormatError, UsageError
from dali_pipeline.format.encoding import storage
from dali_pipeline.format.schema import Schema
from dali_pipeline.ingest.containers.base import extent_of
from dali_pipeline.ingest.containers.source import Extent, Source
from dali_pipeline.ingest.foreign import ForeignFile, real_steps
from dali_pipeline.ingest.layouts.alike import Pattern
from dali_pipeline.ingest.layouts.parts import OpenPart, Part
from dali_pipeline.ingest.layouts.plan import Plan, check_row, columns_beside, where_of, without_batch
from dali_pipeline.storage.files import Files
from dali_pipeline.types import Array
from dali_pipeline.writing.places import Piece, PlacedRecord

if TYPE_CHECKING:
    from dali_pipeline.dataset.dataset import Dataset

COPIED_SHARE = 1000  # a further field is copied if it has at most one byte for so many of the sequence
COPIED_BYTES = 16  # or if a record has at most so many of it
READ_BYTES = 4 << 20  # of neighbouring records that are read at once
AHEAD_BYTES = 8 << 20
MOST_AHEAD_BYTES = 32 << 20  # of the next file


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What stays in place.

    Attributes:
        names: Arrays that stay: `sequence`, and further fields that are not small.
        root: Folder that the names of files begin below.
    """

    names: tuple[str, ...]
    root: Path


class _Values(NamedTuple):
    """Where the values of a part's records lie: first byte and shape of each, and its steps in the file, padding included."""

    path: Path
    size: int
    dtype: str
    begins: list[int]
    shapes: list[tuple[int, ...]]
    steps: list[int]


def placement_of(plan: Plan | None, root: Path, what: str, schema: Schema) -> tuple[Placement, Schema, list[str]]:
    """Return what can stay in place, the schema of such a data set, and sentences for the user.

    Args:
        plan: How the files are taken, or None for those that have a reader of their own.
        root: The source.
        what: What the files are, for messages.
        schema: Schema of a copy.

    Raises:
        UsageError: The values do not lie in their files as a loader reads them.
    """
    if plan is None or schema.sequence is None or schema.x is not None:
        raise _refused(f"{root} holds {what}")
    part, sequence = next(iter(plan.parts.values())), schema.sequence
    if sequence.layout is not None or sequence.scales is not None:
        raise UsageError(f"{root} stays in place, so neither its types nor its order change; leave --dtype and --by-layer out")
    notices = []
    if _is_step_major(plan, part):
        sequence = replace(sequence, step_major=True)
        notices.append(
            "the layers of a step lie together in the files, so that the first epoch of a few layers reads the bytes of all; "
            "convert without --in-place stores each layer apart"
        )
    folder = root if root.is_dir() else root.parent
    names = ("sequence", *_large_fields(plan, part, schema))
    return Placement(names=names, root=folder), replace(schema, sequence=sequence), notices


def _is_step_major(plan: Plan, part: Part) -> bool:
    """Return whether the layers of a step lie together; raise UsageError if records do not lie in one piece."""
    axes = plan.axes
    if axes.layer is not None:
        raise _refused(f"{part.path} is one of several files or keys that are stacked as layers")
    step_major = "layer" in axes.axes and axes.step == 0
    if step_major and axes.axes[0] != "layer":
        raise _refused(f"{part.path} has records with the axes {', '.join((axes.step_axis, *axes.axes))}")
    if axes.step not in (0, None) and not (axes.step == 1 and axes.axes[:1] == ("layer",)):
        raise _refused(f"{part.path} has records whose steps lie along axis {axes.step}")
    return step_major


def _large_fields(plan: Plan, part: Part, schema: Schema) -> Iterator[str]:
    """Yield the further fields that stay too, because copying them would write more than a thousandth of the data."""
    opened = OpenPart(part)
    try:
        nbytes = _extent(opened, "sequence").nbytes
        count = 1 if plan.per_file else max(1, opened.leaf("sequence").shape[0])
        for name, field in (schema.fields or {}).items():
            if name not in part.places:  # it comes from the table of labels
                continue
            leaf, place = opened.leaf(name), part.places[name][0]
            field_bytes = math.prod(leaf.shape) * field.storage.itemsize
            small = field_bytes * COPIED_SHARE <= nbytes or field_bytes <= COPIED_BYTES * count
            if not small and leaf.dtype == field.dtype and extent_of(opened.container(place.file), place.key) is not None:
                yield name
    finally:
        opened.close()


def placed_like(placement: Placement, like: Dataset, root: Path) -> Placement:
    """Return what stays in place of files that are added to a data set in place; raise UsageError if they lie elsewhere."""
    files, folder = like.manifest.files, like.files_root
    assert files is not msgspec.UNSET
    here = placement.root.resolve()
    if not isinstance(folder, Path) or not here.is_relative_to(folder.resolve()):
        raise UsageError(
            f"{root} does not lie below {folder}, where the values of {like.root} lie; move the files there, or make one data "
            "set in place of a folder that holds both"
        )
    for split in like.splits:
        shards = like.shards(split, "sequences")
        if len(shards.table):
            references = shards.open(0, Files(1)).references(files.arrays[0])
            path, size = folder / references.names[0], int(references.sizes[0])
            if not path.is_file() or path.stat().st_size != size:
                raise UsageError(
                    f"{path} is not there as {like.root} refers to it; expected the folder of its values as files_root"
                )
            break
    return Placement(names=files.arrays, root=folder.resolve())


def _refused(why: str) -> UsageError:
    return UsageError(
        f"{why}; --in-place takes uncompressed .safetensors, .npy and raw files whose records lie in one piece, so convert "
        "without it, which copies them"
    )


def _extent(part: OpenPart, name: str) -> Extent:
    place = part.part.places[name][0]
    part.leaf(name)  # raises if it does not exist
    extent = extent_of(part.container(place.file), place.key)
    if extent is None:
        raise _refused(f"{where_of(part, name)} is compressed, pickled, big-endian or strided")
    return extent


def placed_records(
    plan: Plan, path: Path, placement: Placement, schema: Schema, file: ForeignFile, ids: list[str]
) -> Iterator[PlacedRecord]:
    """Yield the records of a part: the places of what stays, the values of the rest.

    Reads every value once, neighbouring records together.

    Raises:
        FormatError: The file does not follow the plan, or its values do not lie in one piece.
    """
    try:
        yield from _placed(plan, path, placement, schema, file, ids)
    except UsageError as error:  # one file among others, which --skip-bad leaves out
        raise FormatError(str(error)) from None


def _placed(
    plan: Plan, path: Path, placement: Placement, schema: Schema, file: ForeignFile, ids: list[str]
) -> Iterator[PlacedRecord]:
    opened = OpenPart(plan.parts[path])
    try:
        count = len(ids)
        lengths = _lengths(plan, opened, count)
        values: dict[str, _Values] = {}
        for name in placement.names:
            values[name] = _values(plan, opened, name, count, lengths, values.get("sequence"))
            _check_type(opened, name, values[name], schema)
        steps_of = values["sequence"].steps
        beside = {} if plan.table is None else columns_beside(plan, opened.part, file.ids or file.groups)
        inside = [name for name in schema.fields or () if name not in placement.names and name not in beside]
        copied = _copied(plan, opened, inside, count, lengths, steps_of)
        copied |= {name: entries for name, entries in beside.items() if name != "group"}
        readers = {name: _Reader(found) for name, found in values.items()}
        try:
            for row in range(count):
                pieces = {}
                for name, found in values.items():
                    data = readers[name].read(row)
                    pieces[name] = Piece(_name(placement.root, found.path), found.size, found.begins[row], data)
                rows = _delivered(plan, opened, pieces["sequence"].data, values["sequence"], row)
                _check_rows(opened, ids[row], values, row, len(rows))
                yield PlacedRecord(
                    id=ids[row],
                    group=file.groups[row],
                    label=file.labels[row],
                    fields={name: entries[row] for name, entries in copied.items()},
                    pieces=pieces,
                    steps=len(rows),
                    values=rows,
                )
        finally:
            for reader in readers.values():
                reader.close()
    finally:
        opened.close()


def placed_alike(
    plan: Plan,
    pattern: Pattern,
    paths: Sequence[Path],
    placement: Placement,
    schema: Schema,
    stored: Array,
    names: Sequence[str],
    labels: Sequence[Any],
) -> Iterator[PlacedRecord]:
    """Yield the records of files that hold one record each and differ in nothing but its values, `stored`.

    Raises:
        DataError, FormatError: They are not of the type, or the shape, of the first record.
    """
    sequence, begin = schema.sequence, pattern.extent.begin
    assert sequence is not None
    if pattern.extent.dtype != sequence.dtype:
        raise DataError(f"{paths[0]} is {pattern.extent.dtype}; expected {sequence.dtype} as in the first file")
    for path, rows, name, label in zip(paths, stored, names, labels, strict=True):
        values = _rows(plan, rows, str(path))
        piece = Piece(_name(placement.root, path), pattern.size, begin, rows.reshape(-1).view(np.uint8))
        yield PlacedRecord(name, name, label, {}, {"sequence": piece}, len(values), values)


def _rows(plan: Plan, rows: Array, where: str) -> Array:
    """Return a record (T, *row), a view; raise FormatError if it is unlike those of the first file."""
    rows = plan.axes.oriented(rows, 0, where)
    check_row(plan, where, rows, 0)
    if not len(rows):
        raise FormatError(f"{where} has a record without steps; expected at least one")
    return rows


def _name(root: Path, path: Path) -> str:
    """Return the name of a file below the folder of files; raise FormatError if it has none."""
    text, folder = str(path), str(root)
    if folder != "." and not text.startswith(f"{folder}/"):
        text = str(path.parent.resolve() / path.name)
        if not text.startswith(f"{folder}/"):
            raise FormatError(f"{path} leads to {text}, which does not lie below {folder}; expected files below it")
    name = text if folder == "." else text[len(folder) + 1 :]
    try:
        name.encode()
    except UnicodeEncodeError:
        raise FormatError(f"{path} has a name that UTF-8 cannot hold; rename it, or convert without --in-place") from None
    return name


def _lengths(plan: Plan, part: OpenPart, count: int) -> list[int] | None:
    """Return the real steps of each record; None if all of a record's steps are real."""
    given = {name: part.read(name) for name in ("lengths", "mask") if name in part.part.places}
    if not given:
        return None
    lengths, mask = given.get("lengths"), given.get("mask")
    if plan.ragged:
        return [int(length) for length in np.asarray(lengths).reshape(-1)]
    if plan.per_file:
        lengths = None if lengths is None else np.asarray(lengths).reshape(-1)
        mask = None if mask is None else [mask]
    real = real_steps(part.path, count, lengths, mask)
    counts = []
    for record, steps in enumerate(real or ()):
        number = int(steps) if np.ndim(steps) == 0 else int(np.count_nonzero(steps))
        if np.ndim(steps) and not np.asarray(steps)[:number].all():
            raise _refused(f"{part.path}: record {record} has real steps behind padding, so they do not lie in one piece")
        counts.append(number)
    return counts


def _values(plan: Plan, part: OpenPart, name: str, count: int, lengths: list[int] | None, sequence: _Values | None) -> _Values:
    """Return where the values of each record lie. sequence: those of the sequence, for a further field."""
    place, extent = part.part.places[name][0], _extent(part, name)
    path, shape = place.file or part.path, extent.shape
    size = path.stat().st_size
    itemsize = storage(extent.dtype).itemsize
    if plan.per_file:
        begins, shapes = [extent.begin], [shape]
    elif plan.ragged and not name.startswith("record."):
        assert lengths is not None
        if sum(lengths) != shape[0] or min(lengths, default=0) < 0:
            raise FormatError(f"{path}, {place.key}: lengths sum to {sum(lengths)} for {shape[0]} rows; expected the same")
        row_bytes = math.prod(shape[1:]) * itemsize
        begins = (np.cumsum([0, *lengths])[:-1] * row_bytes + extent.begin).tolist()
        shapes = [(length, *shape[1:]) for length in lengths]
        return _Values(path, size, extent.dtype, begins, shapes, lengths)
    else:
        if shape[:1] != (count,):
            raise FormatError(f"{path}, {place.key} has {list(shape)} for {count} records; expected one entry per record")
        record_bytes = math.prod(shape[1:]) * itemsize
        begins = [extent.begin + row * record_bytes for row in range(count)]
        shapes = [shape[1:]] * count
    if name.startswith("record."):
        return _Values(path, size, extent.dtype, begins, shapes, [])
    if sequence is None:
        axes = [_step_axis(plan, found) for found in shapes]
    else:
        shapes = [_without_batch(found, steps) for found, steps in zip(shapes, sequence.steps, strict=True)]
        axes = [0] * count
    steps = [1 if axis is None or axis >= len(found) else found[axis] for axis, found in zip(axes, shapes, strict=True)]
    if lengths is not None:
        shapes = [_cut(path, *cut) for cut in zip(shapes, axes, lengths, strict=True)]
    return _Values(path, size, extent.dtype, begins, shapes, steps)


def _step_axis(plan: Plan, shape: tuple[int, ...]) -> int | None:
    """Return which axis of a record in a file is that of the steps; None if the record is one step."""
    if plan.axes.step is None:
        return None
    kept = [axis for axis in range(len(shape)) if axis not in plan.axes.squeezed]
    return kept[plan.axes.step] if plan.axes.step < len(kept) else len(shape)


def _without_batch(shape: tuple[int, ...], steps: int) -> tuple[int, ...]:
    """Return the shape that `without_batch` leaves of an array of this shape."""
    return shape[1:] if len(shape) > 1 and shape[0] == 1 != steps else shape


def _cut(path: Path, shape: tuple[int, ...], axis: int | None, length: int) -> tuple[int, ...]:
    """Return the shape of a record without the steps behind `length`."""
    if axis is None or axis >= len(shape):
        raise FormatError(f"{path}: a record of the shape {shape} has no steps that a length could count")
    if length > shape[axis]:
        raise FormatError(f"{path}: a record has a length of {length} and {shape[axis]} steps; expected {shape[axis]} at most")
    if length < shape[axis] and math.prod(shape[:axis]) != 1:
        raise _refused(f"{path} has padded steps behind another axis, so the real ones do not lie in one piece")
    return (*shape[:axis], length, *shape[axis + 1 :])


def _check_type(part: OpenPart, name: str, values: _Values, schema: Schema) -> None:
    field = schema.sequence if name == "sequence" else (schema.fields or {})[name]
    assert field is not None
    if field.dtype != values.dtype:
        raise DataError(
            f"{where_of(part, name)} is {values.dtype}, and {field.dtype} in the first file; "
            "expected one type, as values that stay in place keep theirs"
        )
    first = 0 if name.startswith("record.") else 1
    for record, shape in enumerate(values.shapes if name != "sequence" else ()):
        if shape[first:] != field.shape:
            raise DataError(
                f"{values.path}, {name}, record {record} has the shape {shape}; expected rows of {field.shape} as in the first"
            )


def _delivered(plan: Plan, part: OpenPart, data: Array, values: _Values, row: int) -> Array:
    """Return a record (T, *row), a view of its bytes; raise FormatError if it is unlike those of the first file."""
    rows = data.view(storage(values.dtype)).reshape(values.shapes[row])
    return _rows(plan, rows, where_of(part, "sequence"))


def _check_rows(part: OpenPart, record: str, values: Mapping[str, _Values], row: int, steps: int) -> None:
    for name, found in values.items():
        if name.startswith("step.") and found.shapes[row][:1] != (steps,):
            raise DataError(
                f"{part.path}: record {record!r}, {name} has shape {found.shapes[row]}; expected {steps} rows, one per step"
            )


def _copied(
    plan: Plan, part: OpenPart, names: list[str], count: int, lengths: list[int] | None, steps: list[int]
) -> dict[str, list[Any]]:
    """Return the values of the fields that are copied, one entry per record. steps: of each record, padding included."""
    copied: dict[str, list[Any]] = {}
    cuts = np.cumsum([0, *(lengths or ())]).tolist()
    for name in names:
        read = part.read(name)
        if plan.per_file:
            entries = [" ".join(read) if isinstance(read, list) else read]
        elif plan.ragged and name.startswith("step."):
            entries = [read[begin:end] for begin, end in itertools.pairwise(cuts)]
        else:
            entries = list(read)
        if name.startswith("step."):
            entries = [without_batch(entry, number) for entry, number in zip(entries, steps, strict=True)]
            if lengths is not None and not plan.ragged:
                entries = [entry[:length] for entry, length in zip(entries, lengths, strict=True)]
        if len(entries) != count:
            raise FormatError(f"{part.path}, {name} has {len(entries)} entries for {count} records; expected one per record")
        copied[name] = entries
    return copied


class _Reader:
    """Reads the bytes of records of one file, neighbours together."""

    def __init__(self, values: _Values) -> None:
        self._values, self._begin, self._data = values, 0, np.zeros(0, np.uint8)
        self._itemsize = storage(values.dtype).itemsize
        self._source = Source(values.path, "numbers")

    def _span(self, row: int) -> tuple[int, int]:
        begin = self._values.begins[row]
        return begin, begin + math.prod(self._values.shapes[row]) * self._itemsize

    def read(self, row: int) -> Array:
        """Return the bytes of a record; rows are asked for in order."""
        begin, end = self._span(row)
        if end > self._begin + len(self._data):
            last = row
            while last + 1 < len(self._values.begins) and self._span(last + 1)[1] - begin <= READ_BYTES:
                last += 1
            self._begin, self._data = begin, self._source.array(begin, self._span(last)[1] - begin)
            if last + 1 < len(self._values.begins):  # the disk reads on while these are hashed
                self._source.read_ahead(self._span(last + 1)[0], AHEAD_BYTES)
        return self._data[begin - self._begin : end - self._begin]

    def close(self) -> None:
        """Close the file."""
        self._source.close()


def read_ahead(path: Path) -> None:
    """Start reading a file that is needed soon; its errors are left to whoever reads it."""
    with suppress(FormatError), closing(Source(path, "numbers")) as source:
        source.read_ahead(0, MOST_AHEAD_BYTES)


def path_to(root: Path, dst: Path) -> str:
    """Return the path from a data set to the folder of files, with `/`."""
    return Path(os.path.relpath(root.resolve(), dst.resolve())).as_posix()
