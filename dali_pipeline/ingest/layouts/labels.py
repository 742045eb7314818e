"""Labels of a foreign source: which kind they are, how one becomes what the writer takes, and tables of labels beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dali_pipeline.errors import DataError, FormatError, UsageError
from dali_pipeline.format.label import Label, LabelKind
from dali_pipeline.ingest.containers.base import Container, open_container
from dali_pipeline.ingest.layouts.parts import stem_of
from dali_pipeline.ingest.layouts.recipe import Recipe, nearest
from dali_pipeline.ingest.readers.traces import TraceOptions
from dali_pipeline.runtime.checks import shown
from dali_pipeline.types import Array

ID_COLUMNS = ("id", "question_id", "ids", "question_ids", "idx", "index", "qid", "uid", "name")
LABEL_COLUMNS = (
    "label",
    "labels",
    "y",
    "target",
    "targets",
    "class",
    "hallucination",
    "is_hallucination",
    "correct",
    "accuracy",
)
TRUTH = {"true": 1, "false": 0}
NO_TEXTS = ("", "nan", "none", "null")


@dataclass(frozen=True, kw_only=True)
class LabelRule:
    """How a label of the source becomes a label of a record.

    Attributes:
        label: What every record's label is.
        threshold: Value that separates 0 and 1, or None.
        above: Whether 1 is above the threshold, instead of below.
    """

    label: Label
    threshold: float | None = None
    above: bool = False

    def of(self, where: str, given: Any) -> Any:
        """Return one record's label; raise FormatError, which names `where`, if there is none or it does not fit."""
        kind = self.label.kind
        if kind == "none":
            return None
        if kind == "class" and self.threshold is None and isinstance(given, int | np.integer) and given >= 0:
            return int(given)  # nearly always
        values = np.asarray(given)
        if given is None or (values.dtype.kind in "US" and str(given).strip().lower() in NO_TEXTS):
            raise FormatError(f"{where} has no label; expected one as every other record")
        if values.dtype.kind in "US":
            return self._of_text(where, str(given))
        if self.threshold is not None:
            return self._of_score(where, values, self.threshold)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise FormatError(f"{where} has the label {shown(values.tolist())}, which is none; expected a finite number")
        if kind == "class":
            return self._class(where, values)
        if values.shape != self.label.shape and values.size == math.prod(self.label.shape):
            values = values.reshape(self.label.shape)
        if values.shape != self.label.shape:
            raise FormatError(f"{where} has a label of shape {values.shape}; expected {self.label.shape} as in the first")
        return values.astype(np.bool_) if kind == "multilabel" and np.isin(values, (0, 1)).all() else values

    def _of_score(self, where: str, values: Array, threshold: float) -> int:
        if values.size != 1 or not np.isfinite(values).all():
            raise FormatError(f"{where} has the score {shown(values.tolist())}; expected one finite number")
        number = float(values.reshape(-1)[0])
        return int(number > threshold if self.above else number < threshold)

    def _class(self, where: str, values: Array) -> int:
        number = values.reshape(-1)[0].item() if values.size == 1 else None
        if number is None or number != number // 1 or number < 0:
            raise FormatError(
                f"{where} has the label {shown(values.tolist())}; expected a whole number of 0 or more, or --label-kind value"
            )
        return int(number)

    def _of_text(self, where: str, text: str) -> Any:
        if text in self.label.names:
            return self.label.names.index(text)
        number = TRUTH.get(text.strip().lower(), _number(text))
        if number is None or self.label.names:
            expected = f"expected one of {', '.join(self.label.names)}" if self.label.names else "expected a number"
            raise FormatError(f"{where} has the label {text!r}; {expected}")
        return self.of(where, number)

    def describe(self) -> str:
        """Return a sentence about what 1 stands for, or an empty text."""
        if self.threshold is None:
            return ""
        return f"label 1, the positive class, is {'above' if self.above else 'below'} {self.threshold:g}, and 0 is the rest"


NO_LABEL = LabelRule(label=Label(kind="none"))


def label_rule(recipe: Recipe, values: Sequence[Any], what: str) -> LabelRule:
    """Return the rule for labels of which some, or all, are known.

    Args:
        recipe: What the user says.
        values: Labels of records: numbers, texts or arrays.
        what: Where they come from, for messages.

    Raises:
        FormatError: They are neither numbers nor texts.
    """
    threshold, above = recipe.threshold, recipe.label_above is not None
    if recipe.label_kind == "none":
        return NO_LABEL
    if threshold is not None:
        return LabelRule(label=Label(), threshold=threshold, above=above)
    given = [np.asarray(value) for value in values if value is not None]
    if not given:
        raise FormatError(f"{what} holds no labels; expected one per record, or give --label-kind none")
    if any(value.dtype.kind in "US" for value in given):
        return _rule_of_texts(recipe, [str(value) for value in values if value is not None], what)
    if any(value.dtype.kind not in "fiub" for value in given):
        raise FormatError(f"{what} holds {given[0].dtype}; expected numbers or texts as labels")
    shape = given[0].shape if given[0].size != 1 else ()
    kind: LabelKind = recipe.label_kind or _kind_of(given, shape)
    if kind == "value" or (kind == "multilabel" and len(shape) == 1):
        return LabelRule(label=Label(kind=kind, shape=shape))
    if shape or kind == "multilabel":
        raise FormatError(
            f"{what} holds labels of shape {shape} of whole numbers; expected one per record, or give --label-kind value or "
            "multilabel, or take them as a field"
        )
    return LabelRule(label=Label())


def _kind_of(given: Sequence[Array], shape: tuple[int, ...]) -> LabelKind:
    if all(value.dtype.kind == "b" for value in given) and len(shape) == 1:
        return "multilabel"
    if all(value.dtype.kind in "iub" for value in given):
        is_zeros_and_ones = len(shape) == 1 and all(np.isin(value, (0, 1)).all() for value in given)
        return "multilabel" if is_zeros_and_ones else "class"
    if shape:
        return "value"
    numbers = np.array([value.reshape(-1)[0] for value in given], np.float64)
    numbers = numbers[np.isfinite(numbers)]
    return "class" if len(numbers) and (numbers == np.floor(numbers)).all() and (numbers >= 0).all() else "value"


def _rule_of_texts(recipe: Recipe, texts: Sequence[str], what: str) -> LabelRule:
    named = [text for text in texts if text.strip().lower() not in NO_TEXTS]
    if all(text.strip().lower() in TRUTH for text in named):
        return LabelRule(label=Label())
    numbers = [_number(text) for text in named]
    if all(number is not None for number in numbers):
        return label_rule(recipe, numbers, what)
    names = tuple(sorted(set(named)))
    if len(names) > max(2, min(10_000, len(named) // 2 + 1)):
        raise FormatError(
            f"{what} holds {len(names):,} different texts for {len(named):,} records, such as {shown(names[0])}; expected the "
            "names of a few classes"
        )
    return LabelRule(label=Label(class_names=names))


def is_settled(values: Sequence[Any]) -> bool:
    """Return whether labels of other files cannot change the kind: whole numbers and bools can, floats and texts may."""
    return all(np.asarray(value).dtype.kind in "iub" for value in values)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def per_record(path: Path, key: str, values: Any) -> list[Any]:
    """Return the labels, ids or the like of stacked records, one entry per record."""
    if isinstance(values, str):
        raise FormatError(f"{path}, {key or 'its array'} is one text; expected one entry per record")
    if isinstance(values, list):
        return values
    array: Array = values
    if array.ndim == 0:
        raise FormatError(f"{path}, {key or 'its array'} is one number; expected one per record")
    array = array.reshape(len(array)) if array.size == len(array) else array
    return list(array.tolist()) if array.ndim == 1 and array.dtype.kind != "f" else list(array)


@dataclass(frozen=True, kw_only=True)
class LabelTable:
    """Labels from another file.

    Attributes:
        path: The file.
        values: Labels, in the file's order.
        rows: Number of the label of each id; None if they go by order.
        digest: Hash of the file's bytes.
        keys: Names of all columns.
        columns: Further columns that records take, in the file's order, by what they become: `group` or `record.NAME`.
    """

    path: Path
    values: list[Any]
    rows: dict[str, int] | None
    digest: str
    keys: tuple[str, ...] = ()
    columns: Mapping[str, list[Any]] = field(default_factory=dict)

    @cached_property
    def by_stem(self) -> dict[str, int]:
        """Number of the label of each id that is the name of a file, without its suffix."""
        return {stem_of(name): row for name, row in (self.rows or {}).items() if stem_of(name) != name}

    def __len__(self) -> int:
        return len(self.values)

    def of(self, where: str, name: str) -> Any:
        """Return the label of an id, or of its last part behind a slash; raise FormatError if there is none."""
        return self.values[self.row(where, name)]

    def row(self, where: str, name: str) -> int:
        """Return the number of an id's row, or of its last part behind a slash; raise FormatError if there is none."""
        assert self.rows is not None
        row = next((self.rows[key] for key in (name, name.rpartition("/")[2]) if key in self.rows), None)
        if row is None and self.by_stem:
            row = next((self.by_stem[key] for key in (name, name.rpartition("/")[2]) if key in self.by_stem), None)
        if row is None:
            raise FormatError(f"{where} has no label in {self.path}; expected its id there, and {nearest(name, self.rows)}")
        return row

    def with_columns(self, wanted: Mapping[str, str]) -> LabelTable:
        """Return the table with further columns. wanted: name of each column, by what it becomes."""
        container = open_container(self.path)
        try:
            columns = {name: _column(container, self.path, key) for name, key in wanted.items()}
        finally:
            container.close()
        return replace(self, columns=columns)


@dataclass(frozen=True, kw_only=True)
class Relabelling:
    """Labels for the records of a data set that has labels of its own.

    Attributes:
        table: The labels, by id.
        rule: How they become labels of records.
        facts: What a restart compares.
    """

    table: LabelTable
    rule: LabelRule
    facts: tuple[Any, ...]

    @classmethod
    def of(cls, recipe: Recipe) -> Relabelling:
        """Return what a recipe says that tells labels alone; raise UsageError if its table has no ids."""
        if recipe.labels_from is None:
            raise UsageError("new labels of a data set come from a table; name it by --labels-from FILE:ID:LABEL")
        table = read_labels(recipe.labels_from)
        if table.rows is None:
            raise UsageError(f"{table.path} has no ids; expected --labels-from {table.path.name}:ID:LABEL for a data set")
        rule = label_rule(recipe, table.values, str(table.path))
        return cls(table=table, rule=rule, facts=(recipe.facts(), table.digest))

    def labels(self, path: Path, ids: Sequence[str]) -> list[Any]:
        """Return the labels of records; raise FormatError, which names `path`, if one has none."""
        places = [(f"{path}, record {name!r}", name) for name in ids]
        return [self.rule.of(where, self.table.of(where, name)) for where, name in places]


def split_reference(text: str) -> tuple[Path, str | None, str | None]:
    """Return file, id column and label column of `FILE[:ID[:LABEL]]`; `FILE:LABEL` and `FILE::LABEL` go by order."""
    if Path(text).exists():
        return Path(text), None, None
    parts = text.rsplit(":", 2)
    if len(parts) == 3 and Path(parts[0]).exists():
        return Path(parts[0]), parts[1], parts[2] or None
    parts = text.rsplit(":", 1)
    if len(parts) == 2 and Path(parts[0]).exists():
        return Path(parts[0]), "", parts[1] or None
    raise UsageError(f"labels are to come from {text!r}, which is no file; expected FILE, FILE::LABEL or FILE:ID:LABEL")


def read_labels(reference: str) -> LabelTable:
    """Read a table of labels: CSV, JSON lines, JSON, `.npy`, Parquet, or any other container.

    Args:
        reference: See `split_reference`. Without columns, the only column that is no id, or one named label.

    Raises:
        UsageError: A column is missing or not said, or an id occurs twice with different labels.
        FormatError: The file cannot be read.
    """
    path, id_column, label_column = split_reference(reference)
    container = open_container(path)
    try:
        keys = [leaf.key for leaf in container.leaves() if leaf.dtype != "object"]
        stem = path.name.split(".")[0]
        if label_column is None:
            label_column = _only_column(path, keys, id_column)
        elif label_column not in keys and label_column == stem and keys == [""]:
            label_column = ""
        if id_column is None:
            id_column = next((name for name in ID_COLUMNS if name in keys and name != label_column), "")
        for column in (id_column, label_column):
            if column and column not in keys:
                raise UsageError(f"{path} has no column {column!r}; {nearest(column, keys)}")
        values = _column(container, path, label_column)
        ids = _column(container, path, id_column) if id_column else None
        if ids is None and container.records is not None and list(container.records) != list(map(str, range(len(values)))):
            ids = list(container.records)
    finally:
        container.close()
    rows = None if ids is None else _by_id(path, [_as_id(entry) for entry in ids], values)
    return LabelTable(path=path, values=values, rows=rows, digest=_digest(path), keys=tuple(keys))


def _only_column(path: Path, keys: Sequence[str], id_column: str | None) -> str:
    others = [key for key in keys if key != id_column and key not in ID_COLUMNS]
    found = next((name for name in LABEL_COLUMNS if name in others), others[0] if len(others) == 1 else None)
    if found is None:
        raise UsageError(
            f"{path} has the columns {', '.join(keys) or '(none)'}; expected the column of labels, as in --labels-from "
            f"{path.name}::{others[0] if others else 'label'}"
        )
    return found


def _column(container: Container, path: Path, key: str) -> list[Any]:
    if container.records is not None:
        return record_entries(container, key)
    return per_record(path, key, container.read(key))


def record_entries(container: Container, key: str) -> list[Any]:
    """Return one entry per record of a file of records; at once, if they have one shape and type."""
    assert container.records is not None
    with suppress(FormatError):
        return per_record(container.path, key, container.read(key))
    return [container.read(key, record=record) for record in range(len(container.records))]


def _as_id(value: Any) -> str:
    entry = value.item() if isinstance(value, np.generic | np.ndarray) and np.size(value) == 1 else value
    return str(int(entry)) if isinstance(entry, float) and entry.is_integer() else str(entry)


def _by_id(path: Path, ids: Sequence[str], values: Sequence[Any]) -> dict[str, int]:
    if len(ids) != len(values):
        raise UsageError(f"{path} has {len(ids)} ids and {len(values)} labels; expected equal numbers")
    rows: dict[str, int] = {}
    for row, name in enumerate(ids):
        before = rows.setdefault(name, row)
        if not np.array_equal(np.asarray(values[before]), np.asarray(values[row])):
            raise UsageError(f"{path}: {name!r} has two labels, {values[before]!r} and {values[row]!r}; expected one")
    return rows


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def scored(options: TraceOptions, recipe: Recipe) -> TraceOptions:
    """Return the options of raw traces with the labels that a recipe names: `--scores` by other words.

    Raises:
        UsageError: The table has no ids, a label is no number, or there are classes besides 0 and 1.
    """
    if recipe.labels_from is None or recipe.label_kind not in (None, "class"):
        raise UsageError("raw traces have classes as labels; expected --labels-from FILE:question_id:COLUMN, or --scores")
    table = read_labels(recipe.labels_from)
    if table.rows is None:
        raise UsageError(f"{table.path} has no ids; expected --labels-from {table.path.name}:question_id:COLUMN for raw traces")
    try:
        scores = {name: float(np.asarray(table.values[row]).reshape(())) for name, row in table.rows.items()}
    except (TypeError, ValueError):
        raise UsageError(f"{table.path} has labels that are no numbers; expected a score per question") from None
    if recipe.label_above is not None:  # scores have label 1 below a threshold
        return replace(options, scores={name: -score for name, score in scores.items()}, score_threshold=-recipe.label_above)
    if recipe.label_threshold is not None:
        return replace(options, scores=scores, score_threshold=recipe.label_threshold)
    if set(scores.values()) - {0.0, 1.0}:
        raise UsageError(f"{table.path} has scores besides 0 and 1; expected --label-threshold or --label-above with them")
    return replace(options, scores={name: 1 - score for name, score in scores.items()}, score_threshold=0.5)


def check_unused(table: LabelTable, names: Iterable[str]) -> None:
    """Raise DataError for an id of the table that no record has."""
    if table.rows is None:
        return
    known = set(names)
    known |= {name.rpartition("/")[2] for name in known}
    unused = [name for name in table.rows if name not in known and stem_of(name) not in known]
    if unused:
        raise DataError(f"{table.path} has labels of {len(unused):,} ids that no record has, such as {unused[0]!r}")
