"""Plan: a recipe applied to the files of a source, and the reader of one part of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from dali_pipeline.errors import FormatError, UsageError
from dali_pipeline.ingest.containers.base import BFLOAT16, TEXT, Leaf
from dali_pipeline.ingest.foreign import (
    Block,
    ForeignFile,
    Values,
    as_text,
    check_counts,
    real_steps,
    rows_at_a_time,
    without_padding,
)
from dali_pipeline.ingest.layouts.labels import LabelRule, LabelTable, per_record, record_entries
from dali_pipeline.ingest.layouts.parts import OpenPart, Part, Place, SameParts, moved, stem_of
from dali_pipeline.ingest.layouts.recipe import Recipe
from dali_pipeline.types import Array


@dataclass(frozen=True, kw_only=True)
class RecordAxes:
    """How the axes of a record in a file become steps and axes of a row.

    Attributes:
        squeezed: Axes of size 1 that are removed, in the file's order.
        step: Axis that becomes the steps, after the removal; None makes one step of the whole record.
        step_axis: Name of the steps.
        axes: Names of a row's axes; () if they have none.
        layer: Where the layers of several keys or files are stacked; None if there are none.
        layers: Their numbers.
    """

    squeezed: tuple[int, ...] = ()
    step: int | None = 0
    step_axis: str = "step"
    axes: tuple[str, ...] = ()
    layer: int | None = None
    layers: tuple[int, ...] = ()

    def oriented(self, rows: Array, first: int, where: str) -> Array:
        """Return records with their steps in front.

        Args:
            rows: Records; their own axes begin at axis `first`, 0 for one record and 1 for stacked ones.
            first: See above.
            where: File and key, for messages.

        Raises:
            FormatError: An axis that should be removed has a size above 1.
        """
        for axis in reversed(self.squeezed):
            if rows.ndim <= axis + first or rows.shape[axis + first] != 1:
                raise FormatError(f"{where} has records of the shape {rows.shape[first:]}; expected axis {axis} of size 1")
            rows = rows.reshape(rows.shape[: axis + first] + rows.shape[axis + first + 1 :])
        if self.step is None:
            return np.expand_dims(rows, first)
        if rows.ndim <= first + self.step:
            raise FormatError(f"{where} has records of the shape {rows.shape[first:]}; expected at least {self.step + 1} axes")
        return rows if not self.step else np.moveaxis(rows, first + self.step, first)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe applied to the files of a source.

    Attributes:
        recipe: The recipe, with everything that was inferred.
        what: Name of the layout or format, for messages.
        parts: The parts in order.
        per_file: Whether a file holds one record of everything.
        axes: How axes become steps and rows.
        rule: How a label becomes one.
        table: Labels from another file, or None.
        starts: Number of records before each part, if labels go by order; otherwise empty.
        ragged: Whether the records lie one after the other, as `lengths` says.
        row_shape: Shape of a row of the first record, which every record must have.
        notices: Sentences for the user.
        used: Files that belong to no part and are used.
    """

    recipe: Recipe
    what: str
    parts: Mapping[Path, Part]
    per_file: bool
    axes: RecordAxes
    rule: LabelRule
    row_shape: tuple[int, ...]
    table: LabelTable | None = None
    starts: Mapping[Path, int] = field(default_factory=dict)
    ragged: bool = False
    notices: tuple[str, ...] = ()
    used: tuple[Path, ...] = ()

    @cached_property
    def has_beside(self) -> bool:
        """Whether any part has files besides its own one."""
        return not isinstance(self.parts, SameParts) and any(part.beside for part in self.parts.values())

    @cached_property
    def is_named_outside(self) -> bool:
        """Whether names and labels of the records lie in no part: a file is one record, named by itself."""
        same = isinstance(self.parts, SameParts)
        parts = itertools.islice(self.parts.values(), 1 if same else None)
        places = (part.places.keys() for part in parts)
        inside = {"label", "id", "group"}
        beside = self.table is not None and bool(self.table.columns)
        return self.per_file and not beside and all("sequence" in names and not names & inside for names in places)

    def outside(self, path: Path, name: str) -> tuple[str, Any]:
        """Return the name and the label of the one record of a part, without opening it; raise FormatError for no label."""
        own = own_name(path, name)
        given = None if self.table is None else from_table(self, path, [own])[0]
        return own, self.rule.of(str(path), given)

    @property
    def facts(self) -> tuple[Any, ...]:
        """What a restart compares: the recipe, and the contents of the table of labels."""
        return self.recipe.facts(), "" if self.table is None else self.table.digest

    def part(self, path: Path, local: Path | None) -> Part:
        """Return the part of a file; `local` is where the file was fetched to, or None."""
        return self.parts[path] if local is None else moved(self.parts[path], local)

    def open(self, path: Path, name: str, local: Path | None = None) -> ForeignFile:
        """Read names and labels of a part; raise FormatError if it does not follow the recipe."""
        return open_part(self, self.part(path, local), own_name(path, name))


def own_name(path: Path, name: str) -> str:
    """Return the name of a part, given its path below the source without its last suffix: without a second one too."""
    return stem_of(name) if path.name.lower().endswith(".gz") else name


def count_records(part: OpenPart, plan_per_file: bool, ragged: bool) -> int:
    """Return the number of records of a part."""
    records = part.container(part.part.places["sequence"][0].file).records
    if records is not None:
        return len(records)
    if plan_per_file:
        return 1
    shape = part.leaf("lengths" if ragged else "sequence").shape
    if not shape:
        raise FormatError(f"{part.path}, {part.part.places['sequence'][0].key or 'its array'} is one number; expected records")
    return shape[0]


def open_part(plan: Plan, part: Part, name: str) -> ForeignFile:
    """Read names and labels of a part; raise FormatError if it does not follow the recipe.

    A file with one record, whose name and label lie elsewhere, is not opened before its values are read. Another is open until
    then, or until `ForeignFile.close`, as opening is most of the work for a small file.
    """
    kept: list[OpenPart] = []
    try:
        return _opened(plan, part, name, kept)
    except BaseException:
        _close(kept)
        raise


def _opened(plan: Plan, part: Part, name: str, kept: list[OpenPart]) -> ForeignFile:
    inside = {"label", "id", "group"} & part.places.keys()
    if plan.per_file and not inside:
        texts: dict[str, list[str]] = {"id": [name]}
        given: list[Any] = [None]
    else:
        opened = OpenPart(part)
        kept.append(opened)
        count = count_records(opened, plan.per_file, plan.ragged)
        texts = {what: _texts(opened, what, count, plan.per_file) for what in ("id", "group") if what in inside}
        records = opened.container(part.places["sequence"][0].file).records
        if not texts:
            own = [str(record) for record in records or ()]
            if part.keyed is not None and all(text.isdecimal() for text in own):
                own = [f"{name}-{text}" for text in own]
            named = own if own and own != [str(row) for row in range(len(own))] else None
            texts["id"] = [name] if plan.per_file else named or [f"{name}-{row}" for row in range(count)]
        given = _entries(opened, "label", count, plan.per_file) if "label" in inside else [None] * count
    ids, groups = texts.get("id"), texts.get("group") or texts["id"]
    beside: dict[str, list[Any]] = {}
    if plan.table is not None:
        given = from_table(plan, part.path, ids or groups, part.listed)
        beside = columns_beside(plan, part, ids or groups)
        if "group" in beside:
            entries = beside.pop("group")
            groups = [as_text(plan.table.path, "group", entry if isinstance(entry, str) else entry[()]) for entry in entries]
    where = f"{part.path}, record {{}}" if len(given) > 1 else str(part.path)
    labels = [plan.rule.of(where.format(repr(key)), label) for key, label in zip(ids or groups, given, strict=True)]
    return ForeignFile(
        path=part.path,
        kinds=("sequences",),
        ids=ids,
        groups=groups,
        labels=labels,
        label=plan.rule.label,
        values=partial(_values_beside, plan, part, len(labels), kept, beside)
        if beside
        else partial(_values, plan, part, len(labels), kept),
        close=partial(_close, kept),
        step_axis=plan.axes.step_axis,
        axes=plan.axes.axes,
        layers=plan.axes.layers,
    )


def _close(kept: list[OpenPart]) -> None:
    while kept:
        kept.pop().close()


def from_table(plan: Plan, path: Path, names: Sequence[str], listed: Path | None = None) -> list[Any]:
    """Return the labels of a part's records from the table: by id, or by order. listed: its path in the plan, if another."""
    table = plan.table
    assert table is not None
    if table.rows is None:
        begin = plan.starts[listed or path]
        return table.values[begin : begin + len(names)]
    rows = map(table.rows.get, names)
    return [
        table.of(f"{path}: record {name!r}", name) if row is None else table.values[row]
        for name, row in zip(names, rows, strict=True)
    ]


def columns_beside(plan: Plan, part: Part, names: Sequence[str]) -> dict[str, list[Any]]:
    """Return what the columns of the table of labels hold for a part's records, by what they become."""
    assert plan.table is not None
    if not plan.table.columns:
        return {}
    rows = [plan.table.row(f"{part.path}: record {name!r}", name) for name in names]
    columns = {name: [column[row] for row in rows] for name, column in plan.table.columns.items()}
    return {
        name: [entry if isinstance(entry, str) else np.asarray(entry) for entry in entries] for name, entries in columns.items()
    }


def _values_beside(
    plan: Plan, part: Part, count: int, kept: list[OpenPart], beside: Mapping[str, list[Any]]
) -> Iterator[Values | Block]:
    """Yield the values of a part's records with the fields that the table of labels has for them."""
    begin = 0
    for values in _values(plan, part, count, kept):
        if isinstance(values, Block):
            end = begin + len(values.sequences)
            fields = {name: stacked(column[begin:end]) for name, column in beside.items()}
        else:
            end = begin + 1
            fields = {name: column[begin] for name, column in beside.items()}
        yield values._replace(fields={**values.fields, **fields})
        begin = end


def stacked(entries: list[Any]) -> Any:
    """Return numbers as an array, texts as they are."""
    return entries if any(isinstance(entry, str) for entry in entries) else np.asarray(entries)


def entries_of(part: OpenPart, name: str, per_file: bool) -> list[Any]:
    """Return one entry per record of a quantity such as the label."""
    return _entries(part, name, count_records(part, per_file, "lengths" in part.part.places and _is_ragged(part)), per_file)


def _is_ragged(part: OpenPart) -> bool:
    return part.leaf("lengths").shape[:1] != part.leaf("sequence").shape[:1]


def _entries(part: OpenPart, name: str, count: int, per_file: bool) -> list[Any]:
    """Return one entry per record of a quantity such as the label."""
    place = part.part.places[name][0]
    if part.container(place.file).records is not None:
        return record_entries(part.container(place.file), place.key)
    part.leaf(name)
    values = part.read(name)
    if per_file:
        return [values]
    entries = per_record(place.file or part.path, place.key, values)
    if len(entries) != count:
        check_counts(place.file or part.path, **{"records": count, f"entries of {place.key or name}": len(entries)})
    return entries


def _texts(part: OpenPart, name: str, count: int, per_file: bool) -> list[str]:
    entries = _entries(part, name, count, per_file)
    flat = [entry.reshape(-1)[0] if isinstance(entry, np.ndarray) and entry.size == 1 else entry for entry in entries]
    flat = [entry[0] if isinstance(entry, list) and len(entry) == 1 else entry for entry in flat]
    return [as_text(part.path, part.part.places[name][0].key, entry) for entry in flat]


def _values(plan: Plan, part: Part, count: int, kept: list[OpenPart]) -> Iterator[Values | Block]:
    """Yield the values of a part's records; `kept` holds the part if it is open already, and does not afterwards."""
    opened = kept.pop() if kept else OpenPart(part)
    try:
        records = opened.container(part.places["sequence"][0].file).records
        if records is not None or plan.per_file:
            rows = range(count) if records is not None else [None]
            yield from (_record(plan, opened, row) for row in rows)
            return
        names = [name for name in ("sequence", "lengths", "mask", *_fields(part)) if name in part.places]
        leaves = {name: opened.leaf(name) for name in names}
        if plan.ragged:
            yield from _ragged(plan, opened, leaves, count)
            return
        real = real_steps(part.path, count, *(opened.read(name) if name in leaves else None for name in ("lengths", "mask")))
        yield from without_padding(part.path, _blocks(plan, opened, leaves, count), real)
    finally:
        opened.close()


def _fields(part: Part) -> list[str]:
    return [name for name in part.places if "." in name]


def _narrow(leaves: Mapping[str, Leaf]) -> tuple[str, ...]:
    return tuple(name for name, leaf in leaves.items() if leaf.dtype == BFLOAT16)


def check_row(plan: Plan, where: str, rows: Array, first: int) -> None:
    """Raise FormatError if the rows of a record have another shape than those of the first record of the source."""
    if rows.shape[first + 1 :] != plan.row_shape:
        raise FormatError(
            f"{where} has rows of the shape {rows.shape[first + 1 :]}; expected {plan.row_shape} as in the first file"
        )


def where_of(part: OpenPart, name: str) -> str:
    """Return file and key of a quantity, for messages."""
    place = part.part.places[name][0]
    return f"{place.file or part.path}, {place.key or 'its array'}"


def _blocks(plan: Plan, part: OpenPart, leaves: Mapping[str, Leaf], count: int) -> Iterator[Block]:
    """Yield stacked records, about 4 MiB at a time."""
    for name, leaf in leaves.items():
        if not leaf.shape or leaf.shape[0] != count:
            entries = leaf.shape[0] if leaf.shape else 0
            raise FormatError(f"{where_of(part, name)} has {entries} entries for {count} records; expected one per record")
    sequence = leaves["sequence"]
    row_bytes = math.prod(sequence.shape[1:]) * _itemsize(sequence) * max(1, len(plan.axes.layers))
    step = rows_at_a_time(row_bytes)
    narrow, layer = _narrow(leaves), plan.axes.layer
    for begin in range(0, count, step):
        end = min(begin + step, count)
        rows = part.read("sequence", begin, end, axis=1 + (layer or 0))
        rows = plan.axes.oriented(rows, 1, where_of(part, "sequence"))
        check_row(plan, where_of(part, "sequence"), rows, 1)
        fields = {name: part.read(name, begin, end) for name in _fields(part.part)}
        yield Block(rows, narrow, {name: _stacked_field(plan, name, values) for name, values in fields.items()})


def _itemsize(leaf: Leaf) -> int:
    return 4 if leaf.dtype == BFLOAT16 else np.dtype(leaf.dtype).itemsize if leaf.dtype != TEXT else 64


def _stacked_field(plan: Plan, name: str, values: Any) -> Any:
    if (
        isinstance(values, np.ndarray)
        and name.startswith("step.")
        and plan.axes.squeezed
        and values.ndim > 2
        and values.shape[1] == 1
    ):
        return values[:, 0]
    return values


def without_batch(values: Any, steps: int) -> Any:
    """Return a step field of a record of so many steps without a leading axis of size 1 of a batch."""
    return values[0] if isinstance(values, np.ndarray) and values.ndim > 1 and len(values) == 1 != steps else values


def _record(plan: Plan, part: OpenPart, record: int | None) -> Values:
    """Return one record: of a file that holds one, or of a file of records."""
    names = [name for name in ("sequence", "lengths", "mask", *_fields(part.part)) if name in part.part.places]
    leaves = {name: part.leaf(name) for name in names if record is None or not record or name == "sequence"}
    where = where_of(part, "sequence") if record is None else f"{where_of(part, 'sequence')}, record {record}"
    rows = np.asarray(part.read("sequence", record=record, axis=plan.axes.layer or 0))
    rows = plan.axes.oriented(rows, 0, where)
    check_row(plan, where_of(part, "sequence"), rows, 0)
    fields: dict[str, Any] = {}
    for name in _fields(part.part):
        values = part.read(name, record=record)
        if isinstance(values, list):
            values = values[0] if len(values) == 1 else " ".join(values)
        fields[name] = without_batch(values, len(rows)) if name.startswith("step.") else values
    value = Values(rows, None, _narrow({name: part.leaf(name) for name in leaves}), fields)
    if not {"lengths", "mask"} & part.part.places.keys():
        return value
    lengths, mask = (part.read(name, record=record) if name in part.part.places else None for name in ("lengths", "mask"))
    real = real_steps(
        part.path, 1, None if lengths is None else np.asarray(lengths).reshape(-1), None if mask is None else [mask]
    )
    (cut,) = without_padding(part.path, [value], real)
    assert isinstance(cut, Values)
    return cut


def _ragged(plan: Plan, part: OpenPart, leaves: Mapping[str, Leaf], count: int) -> Iterator[Values]:
    """Yield records that lie one after the other along the first axis, as `lengths` says."""
    lengths = np.asarray(part.read("lengths")).reshape(-1)
    if lengths.dtype.kind not in "iu" or (lengths < 0).any() or lengths.sum() != leaves["sequence"].shape[0]:
        raise FormatError(
            f"{where_of(part, 'lengths')} sums to {lengths.sum()}, and {where_of(part, 'sequence')} has "
            f"{leaves['sequence'].shape[0]} rows; expected the same"
        )
    narrow = _narrow(leaves)
    for row, (begin, end) in enumerate(itertools.pairwise([0, *np.cumsum(lengths).tolist()])):
        rows = plan.axes.oriented(part.read("sequence", begin, end), 0, where_of(part, "sequence"))
        check_row(plan, where_of(part, "sequence"), rows, 0)
        fields = {
            name: part.read(name, begin, end) if name.startswith("step.") else part.read(name, row, row + 1)[0]
            for name in _fields(part.part)
        }
        yield Values(rows, None, narrow, fields)


def record_axes(
    recipe: Recipe, shape: tuple[int, ...], layers: tuple[int, ...], squeeze_first: bool, where: str
) -> tuple[RecordAxes, tuple[int, ...]]:
    """Return how a record's axes become steps and rows, and the shape of a row.

    Args:
        recipe: Names the axes, or not.
        shape: Shape of a record in the file, without the layers that are stacked.
        layers: Numbers of the layers that are stacked; () if there are none.
        squeeze_first: Whether a leading axis of size 1 is one of a batch.
        where: File and key, for messages.

    Raises:
        UsageError: There are more or fewer axes than names.
    """
    names, inner = recipe.axes, list(shape)
    layer: int | None = None
    if layers:
        defaults = {0: ("layer",), 1: ("layer", "feature"), 2: ("layer", "token", "feature")}
        if "layer" not in names:
            names = ("layer", *names) if names else defaults.get(len(inner), ())
        layer = names.index("layer") if names else 0
        inner.insert(layer, len(layers))
    squeezed: list[int] = []
    if names:
        for axis, size in enumerate(inner):
            if len(inner) - len(squeezed) > len(names) and size == 1 and axis != layer:
                squeezed.append(axis)
        if len(inner) - len(squeezed) != len(names):
            raise UsageError(
                f"{where} has records of the shape {tuple(inner)}, and --axes names {len(names)} ({','.join(names)}); expected "
                "one name per axis"
            )
    elif squeeze_first and len(inner) > 1 and inner[0] == 1 and not layers:
        squeezed.append(0)
    sizes = [size for axis, size in enumerate(inner) if axis not in squeezed]
    if not sizes:
        raise UsageError(f"{where} has one number per record; expected at least one axis of steps")
    step: int | None = next((axis for axis, name in enumerate(names) if name in ("token", "step", "time")), 0)
    if len(names) == 1 and names[0] not in ("token", "step", "time", "layer"):
        return RecordAxes(squeezed=tuple(squeezed), step=None, axes=names), tuple(sizes)
    assert step is not None
    rest = tuple(name for axis, name in enumerate(names) if axis != step)
    row = tuple(size for axis, size in enumerate(sizes) if axis != step)
    step_axis = names[step] if names else "step"
    return (
        RecordAxes(squeezed=tuple(squeezed), step=step, step_axis=step_axis, axes=rest, layer=layer, layers=layers),
        row,
    )


def own_places(keys: Mapping[str, str]) -> dict[str, tuple[Place, ...]]:
    """Return places in a part's own file."""
    return {name: (Place(None, key),) for name, key in keys.items()}
