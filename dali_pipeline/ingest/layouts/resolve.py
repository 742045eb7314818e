"""Resolve a recipe: find the files and keys that it names, and infer what it does not say, from the first part."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dali_pipeline.errors import DataError, FormatError, UsageError
from dali_pipeline.ingest.containers.base import OBJECT, SUFFIXES, TEXT, Leaf, suffix_of
from dali_pipeline.ingest.containers.raw import sidecar_of
from dali_pipeline.ingest.layouts.keyed import PLACEHOLDER
from dali_pipeline.ingest.layouts.labels import (
    LABEL_COLUMNS,
    NO_LABEL,
    LabelRule,
    LabelTable,
    check_unused,
    is_settled,
    label_rule,
    read_labels,
)
from dali_pipeline.ingest.layouts.opening import opened
from dali_pipeline.ingest.layouts.parts import (
    LAYER,
    OpenPart,
    Part,
    Place,
    by_path,
    check_rows,
    files_matching,
    filled,
    has_placeholder,
    layer_places,
    layered_parts,
    layers_of,
    names_of,
    pattern_of,
    stem_of,
)
from dali_pipeline.ingest.layouts.plan import Plan, RecordAxes, count_records, entries_of, open_part, own_name, record_axes
from dali_pipeline.ingest.layouts.recipe import Recipe, nearest

CHEAP_BYTES = 64 << 20  # a pickle of this size is read in a moment
TRIED = 3  # files of a kind that are opened until one is not damaged
SIDECARS = {"dataset_info.json", "dataset_dict.json", "state.json"}
RAW = (".memmap", ".bin", ".dat", ".raw")
TABLES = (".csv", ".json", ".jsonl")  # hold labels rather than sequences, if anything else is there
BY_FLAGS = "files by flags"


@dataclass(frozen=True, kw_only=True)
class Found:
    """The parts that a KEY calls. values: what the placeholders stand for, per part; layers: numbers of stacked layers."""

    parts: list[tuple[Part, dict[str, str]]]
    layers: tuple[int, ...] = ()


def candidates(root: Path, files: Iterable[Path]) -> list[Path]:
    """Return the files that may hold arrays, without hidden ones and those that only describe others."""
    found, prefix = [], len(str(root))  # texts: a folder may have a hundred thousand files
    for path in files:
        text = str(path)
        name = text[text.rfind("/") + 1 :]
        hidden = name.startswith(".") or "/." in text[prefix:]
        cached = name.startswith("cache-") and name.endswith(".arrow")
        if suffix_of(name) in SUFFIXES and not hidden and not cached and name not in SIDECARS:
            found.append(path)
    return found


def by_suffix(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Return files by suffix: the most numerous first, tables of text last."""
    groups: dict[str, list[Path]] = {}
    for path in files:
        groups.setdefault(suffix_of(str(path)), []).append(path)
    return dict(sorted(groups.items(), key=lambda entry: (entry[0] in TABLES, -len(entry[1]))))


def first_leaves(files: Sequence[Path]) -> tuple[Path, list[Leaf], bool]:
    """Return the first file that can be opened, its leaves, and whether it holds records; raise the first file's error."""
    error: FormatError | None = None
    for path in files[:TRIED]:
        try:
            container = opened(path)
        except FormatError as caught:
            error = error or caught
            continue
        try:
            return path, container.leaves(), container.records is not None
        except FormatError as caught:
            error = error or caught
        finally:
            container.close()
    assert error is not None
    raise error


def takeable(leaves: Iterable[Leaf]) -> list[Leaf]:
    """Return the leaves that can be taken."""
    return [leaf for leaf in leaves if leaf.dtype != OBJECT]


def make_plan(root: Path, files: Sequence[Path], recipe: Recipe, what: str = BY_FLAGS, *, skip_bad: bool = False) -> Plan:
    """Apply a recipe to the files of a source.

    Args:
        root: The source.
        files: All its files, in natural order.
        recipe: What the flags or a detector say.
        what: Name of the layout, for messages.
        skip_bad: Whether ids without a partner are told, instead of raised.

    Raises:
        UsageError: A KEY matches nothing, or several things.
        FormatError: A file cannot be read, or a placeholder has a gap.
        DataError: Labels and records do not match.
    """
    table = None if recipe.labels_from is None or recipe.label_kind == "none" else read_labels(recipe.labels_from)
    usable = candidates(root, files)
    if table is not None:
        end = f"/{table.path.name}"
        usable = [path for path in usable if not f"/{path}".endswith(end) or path.resolve() != table.path.resolve()]
    if not usable:
        raise UsageError(f"{root} holds no file of arrays; expected .safetensors, .npy, .npz, .pt, .parquet or the like")
    found, recipe = _sequence_parts(root, usable, recipe)
    notices: list[str] = []
    beside = {} if table is None else _columns_beside(table, recipe, found.parts)
    if table is not None and beside:
        table = table.with_columns(beside)
    parts, recipe, shared = _with_other_keys(root, usable, found, recipe, notices, beside, () if table is None else table.keys)
    if shared is not None and table is None:
        table = read_labels(f"{shared}::")
    first = OpenPart(_reference(parts)[0])
    try:
        per_file = _one_per_file(recipe, first, found.layers, parts, table)
        axes, row_shape, ragged = _axes_of(recipe, first, found.layers, parts, per_file, notices)
        _tell_left_out(first, notices)
    finally:
        first.close()
    recipe = replace(recipe, layout="record-per-file" if per_file else recipe.layout)
    counts: list[int] | None = None
    if (table is not None and table.rows is None) or any(part.row is not None for part, _ in parts):
        counts = [_count(part, per_file, ragged) for part, _ in parts]
        if found.parts[0][0].row is not None:
            check_rows(recipe.sequence or "", parts, counts)
    starts = starts_of(root, parts, counts, table)
    rule = _rule(recipe, parts, table, per_file, notices)
    plan = Plan(
        recipe=recipe,
        what=what,
        parts=by_path([part for part, _ in parts]),
        per_file=per_file,
        axes=axes,
        rule=rule,
        row_shape=row_shape,
        table=table,
        starts=starts,
        ragged=ragged,
        notices=tuple(notices),
        used=(*(() if table is None else (table.path,)), *_sidecars(parts)),
    )
    if table is not None and table.rows is not None:
        _check_ids(root, plan, skip_bad)
    return plan


def _axes_of(
    recipe: Recipe,
    first: OpenPart,
    layers: tuple[int, ...],
    parts: Sequence[tuple[Part, Any]],
    per_file: bool,
    notices: list[str],
) -> tuple[RecordAxes, tuple[int, ...], bool]:
    """Return how the axes of records become steps and rows, the shape of a row, and whether records lie one after the other."""
    leaves = {name: first.leaf(name) for name in first.part.places}
    records = first.container(first.part.places["sequence"][0].file).records is not None
    sequence = leaves["sequence"]
    if sequence.dtype in (TEXT, "bool"):
        raise UsageError(f"{first.path}, {sequence.key!r} is {sequence.dtype}; expected numbers as a sequence")
    padded = "lengths" not in leaves or leaves["lengths"].shape[:1] == sequence.shape[:1]
    ragged = not per_file and not records and not padded
    shape = sequence.shape if per_file or records or ragged else sequence.shape[1:]
    squeeze = _squeezes_first(recipe, leaves, shape, parts, per_file)
    axes, row_shape = record_axes(recipe, shape, layers, squeeze, f"{first.path}, {sequence.key or 'its array'}")
    if len(shape) == 1 and not recipe.axes and not layers:
        notices.append("records have one axis, taken as steps of one number; --axes feature takes each as one step of features")
    return axes, row_shape, ragged


def _sidecars(parts: Sequence[tuple[Part, Any]]) -> list[Path]:
    """Return the files that say shape and type of raw files."""
    raw = [part.path for part, _ in parts if suffix_of(str(part.path)) in RAW]
    return [beside for path in raw if (beside := sidecar_of(path)) is not None]


def _sequence_parts(root: Path, usable: list[Path], recipe: Recipe) -> tuple[Found, Recipe]:
    """Return the parts that the KEY of sequences calls, and the recipe with that KEY."""
    key = recipe.sequence
    groups = by_suffix(usable)
    if key is not None:
        matches = files_matching(root, usable, key)
        if matches:
            single = _single_key(matches[0][0])
            if single is not None:
                found, layers = layered_parts(root, key, matches)
                rekeyed = [
                    (
                        replace(
                            part, places={"sequence": tuple(Place(place.file, single) for place in part.places["sequence"])}
                        ),
                        values,
                    )
                    for part, values in found
                ]
                return Found(parts=rekeyed, layers=layers), recipe
        return _inside(root, groups, key), recipe
    return _guessed(root, groups, recipe)


def _single_key(path: Path) -> str | None:
    """Return the only array of a file that is no file of records; None if there are several."""
    _, leaves, records = first_leaves([path])
    keys = takeable(leaves)
    return keys[0].key if len(keys) == 1 and not records else None


def _inside(root: Path, groups: Mapping[str, list[Path]], key: str) -> Found:
    known: list[str] = []
    error: FormatError | None = None
    for paths in groups.values():
        try:
            path, leaves, _ = first_leaves(paths)
        except FormatError as caught:
            error = error or caught
            continue
        keys = [leaf.key for leaf in leaves]
        known += [name or stem_of(path.name) for name in keys]
        if key in keys:
            shared = {"sequence": (Place(None, key),)}
            return Found(parts=[(Part(path=path, places=shared), {}) for path in paths])
        if (keyed := _keyed(key, keys, str(path))) is not None:
            first_places, layers = keyed
            without_layers = filled(key, {LAYER: str(layers[0])}) if layers else key
            part_of = [Part(path=path, places={"sequence": first_places}, keyed=without_layers) for path in paths]
            return Found(parts=[(part, {}) for part in part_of], layers=layers)
        if has_placeholder(key) and set(PLACEHOLDER.findall(key)) <= {LAYER}:
            with suppress(FormatError):
                places, layers = layer_places(key, keys, str(path))
                return Found(parts=[(Part(path=path, places={"sequence": places}), {}) for path in paths], layers=layers)
            if any(files_matching(Path(), [Path(name)], key) for name in keys if name):
                layer_places(key, keys, str(path))  # raises the error about the gap
    if error is not None and not known:
        raise error
    known += [stem_of(path.name) for paths in groups.values() for path in paths[:5]]
    raise UsageError(f"{root} has no key and no file called {key!r}; {nearest(key, known)}")


def _keyed(key: str, keys: Sequence[str], where: str) -> tuple[tuple[Place, ...], tuple[int, ...]] | None:
    """Return the places of a KEY whose placeholders name records by their keys, and its layers; None for another KEY."""
    names = set(PLACEHOLDER.findall(key))
    pattern = pattern_of(key)
    matches = [match.groupdict() for name in keys if (match := pattern.fullmatch(name))]
    if not matches or not names - {LAYER}:
        return None
    if LAYER not in names:
        return (Place(None, key),), ()
    numbers = layers_of(key, (int(values[LAYER]) for values in matches), where)
    return tuple(Place(None, filled(key, {LAYER: str(number)})) for number in numbers), numbers


def _guessed(root: Path, groups: Mapping[str, list[Path]], recipe: Recipe) -> tuple[Found, Recipe]:
    """Return the parts if exactly one array can be the sequence."""
    paths = next(iter(groups.values()))
    path, leaves, records = first_leaves(paths)
    named = set(recipe.keys.values()) | set(LABEL_COLUMNS)
    others = [leaf for leaf in takeable(leaves) if leaf.key not in named and leaf.dtype != TEXT and (leaf.shape or records)]
    real = [leaf for leaf in others if "float" in leaf.dtype] or others
    widest = [leaf for leaf in real if len(leaf.shape) == max(len(other.shape) for other in real)]
    if len(widest) != 1:
        listed = ", ".join(leaf.key or stem_of(path.name) for leaf in takeable(leaves)) or "nothing that can be taken"
        raise UsageError(f"{path} has {listed}; expected one array of numbers, or its key by --sequence KEY")
    key = widest[0].key
    if key == "":
        taken = {stem for name, stem in recipe.keys.items() if name != "sequence"}
        paths = [path for path in paths if not taken or not taken & set(names_of(root, path))]
        if not paths:
            raise UsageError(f"{root} holds no file besides {', '.join(sorted(taken))}; expected one of sequences")
    place = (Place(None, key),)
    return Found(parts=[(Part(path=path, places={"sequence": place}), {}) for path in paths]), replace(
        recipe, sequence=key or None
    )


def _reference(parts: Sequence[tuple[Part, dict[str, str]]]) -> tuple[Part, dict[str, str]]:
    """Return the part by which the others are judged: the first, unless it cannot be opened or is unlike the next two."""
    seen: list[tuple[int, Any]] = []
    for number, (part, _) in enumerate(parts[:TRIED]):
        opened = OpenPart(part)
        try:
            leaves = opened.leaves(part.places["sequence"][0].file).values()
            key = part.places["sequence"][0].key
            rows = [leaf.shape[1:] if leaf.key == key else leaf.dtype for leaf in leaves]
            seen.append((number, (sorted(leaf.key for leaf in leaves), list(map(str, rows)))))
        except FormatError:
            continue
        finally:
            opened.close()
        if len(parts) < TRIED or part.path.stat().st_size > CHEAP_BYTES:
            break
    if not seen:
        return parts[0]
    if len(seen) == TRIED and seen[0][1] != seen[1][1] == seen[2][1]:
        return parts[1]
    return parts[seen[0][0]]


def _columns_beside(table: LabelTable, recipe: Recipe, parts: Sequence[tuple[Part, dict[str, str]]]) -> dict[str, str]:
    """Return the KEYs of groups and record fields that no array has and a column of the table has, if it has ids."""
    if table.rows is None:
        return {}
    own = _leaves_of(_reference(parts)[0])
    names = (name for name in recipe.keys if name == "group" or name.startswith("record."))
    return {name: key for name in names if (key := recipe.keys[name]) not in own and key in table.keys}


def _with_other_keys(
    root: Path,
    usable: Sequence[Path],
    found: Found,
    recipe: Recipe,
    notices: list[str],
    beside: Collection[str],
    columns: Sequence[str],
) -> tuple[list[tuple[Part, dict[str, str]]], Recipe, Path | None]:
    """Return the parts with the places of all other KEYs, the recipe with the label found, and a file of all labels.

    beside: what comes from columns of the table of labels. columns: names of all of these.
    """
    parts, shared = found.parts, None
    keys = {name: key for name, key in recipe.keys.items() if name != "sequence" and name not in beside}
    first, values = _reference(parts)
    own = _leaves_of(first)
    no_label = "label" not in keys and recipe.labels_from is None and recipe.label_kind != "none"
    sequence = own.get(first.places["sequence"][0].key)
    free = [name for name in LABEL_COLUMNS if name in own and name not in keys.values()]
    one_each = recipe.layout == "record-per-file" or _holds_records(first)
    if no_label and (name := next((name for name in free if _is_label(own[name], sequence, one_each)), None)):
        keys["label"], recipe = name, replace(recipe, label=name)
        notices.append(f"labels are taken from the key {name!r}; --label-kind none leaves them out")
    if first.keyed is None and not any(values for _, values in parts) and all(key in own for key in keys.values()):
        common = {**first.places, **{name: (Place(None, key),) for name, key in keys.items()}}
        made = [(Part(path=part.path, places=common, row=part.row), values) for part, values in parts]  # none is keyed
        return made, recipe, None
    places: list[dict[str, tuple[Place, ...]]] = [dict(part.places) for part, _ in parts]
    index: dict[str, list[Path]] | None = None
    for name, key in keys.items():
        if filled(key, values) in own or (first.keyed is not None and _has_keyed(first, key)):
            for number, (_, part_values) in enumerate(parts):
                places[number][name] = (Place(None, filled(key, part_values)),)
            continue
        index = index or _index(root, usable)
        partners = _partners(parts, key, index, [*(leaf or stem_of(first.path.name) for leaf in own), *columns])
        single = _single_key(partners[0])
        if single is None:
            raise UsageError(f"{partners[0]} holds several arrays; expected one, or its column by --labels-from FILE::KEY")
        if len(set(partners)) == len(partners):
            for number, partner in enumerate(partners):
                places[number][name] = (Place(partner, single),)
        elif name == "label":
            shared = partners[0]
        else:
            raise UsageError(f"{partners[0]} lies beside {len(partners)} files as {name}; expected one for each of them")
    return (
        [(replace(part, places=own_places), values) for (part, values), own_places in zip(parts, places, strict=True)],
        recipe,
        shared,
    )


def _is_label(leaf: Leaf, sequence: Leaf | None, one_each: bool) -> bool:
    """Return whether an array called like a label can be one. one_each: whether it belongs to one record."""
    if leaf.dtype == OBJECT:
        return False
    if leaf.shape in ((), (1,)):
        return True
    return not one_each and sequence is not None and len(leaf.shape) <= 2 and leaf.shape[:1] == sequence.shape[:1]


def _holds_records(part: Part) -> bool:
    opened = OpenPart(part)
    try:
        return opened.container(part.places["sequence"][0].file).records is not None
    finally:
        opened.close()


def _has_keyed(part: Part, key: str) -> bool:
    """Return whether a part whose records have keys of their own has a KEY, with their placeholders or without any."""
    return key in _leaves_of(replace(part, places={**part.places, key: (Place(None, key),)}))


def _leaves_of(part: Part) -> dict[str, Leaf]:
    """Return the leaves of the file that holds a part's sequences."""
    opened = OpenPart(part)
    try:
        return opened.leaves(part.places["sequence"][0].file)
    finally:
        opened.close()


def _index(root: Path, usable: Sequence[Path]) -> dict[str, list[Path]]:
    """Return the files by everything that a KEY may call them."""
    index: dict[str, list[Path]] = {}
    for path in usable:
        for name in dict.fromkeys(names_of(root, path)):
            index.setdefault(name, []).append(path)
    return index


def _partners(
    parts: Sequence[tuple[Part, dict[str, str]]], key: str, index: Mapping[str, list[Path]], own: Sequence[str]
) -> list[Path]:
    """Return the file that a KEY calls for each part; raise an error if there is none for one, or for any."""
    partners = [_beside(part, filled(key, values), index) for part, values in parts]
    if not any(partners):
        taken = {part.path for part, _ in parts}
        others = [stem_of(path.name) for paths in index.values() for path in paths if path not in taken]
        path = parts[0][0].path
        raise UsageError(f"{path} has no key {key!r}, and no file beside it is called so; {nearest(key, [*own, *others[:50]])}")
    for (part, values), partner in zip(parts, partners, strict=True):
        if partner is None:
            raise FormatError(f"{part.path} has no {filled(key, values)!r} beside it, which other files have")
    return [partner for partner in partners if partner is not None]


def _beside(part: Part, key: str, index: Mapping[str, list[Path]]) -> Path | None:
    """Return the file that a KEY calls: in the part's folder, otherwise the only one."""
    matches = [path for path in index.get(key, ()) if path != part.path]
    near = [path for path in matches if path.parent == part.path.parent] or matches
    return near[0] if len(near) == 1 else None


def _one_per_file(
    recipe: Recipe, first: OpenPart, layers: tuple[int, ...], parts: Sequence[Any], table: LabelTable | None
) -> bool:
    """Return whether a file holds one record of everything."""
    places = first.part.places
    if first.container(places["sequence"][0].file).records is not None:
        return False
    if recipe.layout is not None:
        return recipe.layout == "record-per-file"
    shape = first.leaf("sequence").shape
    if len(shape) < 2:
        return True
    for name in ("label", "id", "group", "lengths"):
        if name in places and (told := _told_by(name, first.leaf(name).shape, shape)) is not None:
            return told
    if recipe.axes:
        named = len(recipe.axes) - bool(layers and LAYER in recipe.axes)
        if len(shape) in (named, named + 1):
            return len(shape) == named
    others = (_told_by(name, first.leaf(name).shape, shape) for name in places if "." in name or name == "mask")
    if (told := next((told for told in others if told is not None), None)) is not None:
        return told or (shape[0] == 1 and len(parts) > 1)
    return table is not None and len(parts) > 1 and _told_by_table(table, parts)


def _told_by_table(table: LabelTable, parts: Sequence[Any]) -> bool:
    """Return whether a table of labels has one for every file."""
    if table.rows is None:
        return len(table) == len(parts)
    known = table.rows.keys() | table.by_stem.keys()
    return any(stem_of(part.path.name) in known for part, _ in parts[:TRIED])


def _told_by(name: str, shape: tuple[int, ...], sequence: tuple[int, ...]) -> bool | None:
    """Return whether the shape of another array says that a file holds one record; None if it says neither."""
    if name.startswith("step.") or name == "mask":
        return len(shape) < 2 or shape[0] != sequence[0]
    if shape == () or (shape == (1,) and sequence[0] != 1):
        return True
    return False if name == "lengths" or shape[0] == sequence[0] else None


def _squeezes_first(
    recipe: Recipe, leaves: Mapping[str, Leaf], shape: tuple[int, ...], parts: Sequence[tuple[Part, Any]], per_file: bool
) -> bool:
    """Return whether a leading axis of size 1 is one of a batch: step fields say so, or every file that is looked at has it."""
    if recipe.axes or len(shape) < 2 or shape[0] != 1:
        return False
    steps = [leaf.shape[-1] for name, leaf in leaves.items() if (name.startswith("step.") or name == "mask") and leaf.shape]
    if steps:
        return steps[0] == shape[1] != 1
    if not per_file or len(shape) < 3:
        return False
    for number in sorted({0, len(parts) // 2, len(parts) - 1}):
        part = OpenPart(parts[number][0])
        try:
            if part.leaf("sequence").shape[:1] != (1,):
                return False
        except FormatError:
            continue
        finally:
            part.close()
    return True


def _tell_left_out(first: OpenPart, notices: list[str]) -> None:
    """Add a sentence about the keys of the first file that nothing takes."""
    file = first.part.places["sequence"][0].file
    used = {place.key for places in first.part.places.values() for place in places if place.file == file}
    left = [leaf for leaf in first.leaves(file).values() if leaf.key not in used]
    if left:
        told = ", ".join(f"{leaf.key} ({leaf.why or f'{leaf.dtype} {list(leaf.shape)}'})" for leaf in left[:12])
        more = "" if len(left) <= 12 else f" and {len(left) - 12} more"
        takeable_key = next((leaf.key for leaf in left if leaf.dtype != OBJECT), None)
        hint = (
            "" if takeable_key is None else f"; --field record.NAME={takeable_key} takes one, or step.NAME of one row per step"
        )
        notices.append(f"not taken: {told}{more}{hint}")


def _count(part: Part, per_file: bool, ragged: bool) -> int:
    opened = OpenPart(part)
    try:
        return 1 if per_file else count_records(opened, per_file, ragged)
    finally:
        opened.close()


def starts_of(
    root: Path, parts: Sequence[tuple[Part, Any]], counts: list[int] | None, table: LabelTable | None
) -> dict[Path, int]:
    """Return the number of records before each part, if labels go by order; raise DataError unless the counts agree."""
    if table is None or table.rows is not None:
        return {}
    assert counts is not None
    total = sum(counts)
    if total != len(table):
        files = f" ({len(parts):,} by --layout record-per-file)" if len(parts) not in (1, total) else ""
        raise DataError(
            f"{table.path} has {len(table):,} labels, and {root} {total:,} records{files}; expected equal numbers, by order"
        )
    begins = np.cumsum([0, *counts])[:-1].tolist()
    return {part.path: begin for (part, _), begin in zip(parts, begins, strict=True)}


def _rule(
    recipe: Recipe, parts: Sequence[tuple[Part, Any]], table: LabelTable | None, per_file: bool, notices: list[str]
) -> LabelRule:
    if recipe.label_kind == "none":
        return NO_LABEL
    if table is not None:
        return label_rule(recipe, table.values, str(table.path))
    if "label" not in parts[0][0].places:
        notices.append("no label was found, so records have none; --label KEY or --labels-from FILE gives them")
        return NO_LABEL
    values: list[Any] = []
    for number, (part, _) in enumerate(parts):
        try:
            values += _labels(part, per_file)
        except FormatError:
            if not number and len(parts) == 1:
                raise
            continue
        if recipe.threshold is not None or recipe.label_kind == "value" or is_settled(values):
            break
    return label_rule(recipe, values, f"{parts[0][0].path}, {recipe.label}")


def _labels(part: Part, per_file: bool) -> list[Any]:
    opened = OpenPart(part)
    try:
        return entries_of(opened, "label", per_file)
    finally:
        opened.close()


def _check_ids(root: Path, plan: Plan, skip_bad: bool) -> None:
    """Raise DataError for an id of the table that no record has, unless bad records are left out."""
    assert plan.table is not None
    unlabelled = replace(plan, table=None, rule=NO_LABEL)
    names: list[str] = []
    for part in plan.parts.values():
        name = names_of(root, part.path)[2]
        if plan.is_named_outside:
            names.append(own_name(part.path, name))
            continue
        with suppress(FormatError):
            file = open_part(unlabelled, part, name)
            file.close()
            names += file.ids or file.groups
    try:
        check_unused(plan.table, names)
    except DataError:
        if not skip_bad:
            raise
