"""Recipe: which keys of the files become which part of a record, as flags or a YAML file say it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from dali_pipeline.errors import UsageError
from dali_pipeline.format.label import LabelKind
from dali_pipeline.format.schema import LEVELS, SEQUENCE_LEVELS
from dali_pipeline.runtime.checks import one_of, real, shown

Layout = Literal["record-per-file", "stacked"]
RECIPE_BYTES = 1 << 16  # a file of some lines; anything larger is no recipe
MOST_BRACKETS = 500  # the time that YAML takes grows with the cube of their depth
STEP_AXES = ("token", "step", "time")  # an axis with one of these names becomes the steps


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Which keys become which part of a record.

    A KEY is a key, a dotted path, or `[0]` for an item of a tuple or list; for `.npy` and raw files it is the file's stem. It
    may hold placeholders such as `{layer}`.

    Attributes:
        sequence: KEY of the sequences.
        label: KEY of the labels.
        id: KEY of the ids.
        group: KEY of the groups, which are kept in one split.
        fields: LEVEL.NAME and KEY of every further field.
        lengths: KEY of the number of real steps of each padded sequence.
        mask: KEY of the mask of real steps.
        axes: Names of one record's axes, in the file's order.
        layout: "record-per-file", "stacked" (several records along the first axis), or None to infer it.
        labels_from: FILE, FILE:LABEL, FILE::LABEL or FILE:ID:LABEL; a table of labels, by order or by id.
        label_kind: Kind of label, or None to infer it.
        label_threshold: Label 1 is given below this value.
        label_above: Label 1 is given above this value.

    Raises:
        UsageError: A value is not one of those above.
    """

    sequence: str | None = None
    label: str | None = None
    id: str | None = None
    group: str | None = None
    fields: tuple[tuple[str, str], ...] = ()
    lengths: str | None = None
    mask: str | None = None
    axes: tuple[str, ...] = ()
    layout: Layout | None = None
    labels_from: str | None = None
    label_kind: LabelKind | None = None
    label_threshold: float | None = None
    label_above: float | None = None

    def __post_init__(self) -> None:
        for name in ("sequence", "label", "id", "group", "lengths", "mask", "labels_from"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise UsageError(f"{name} is {shown(value)}; expected a KEY as text")
        for entry, _ in self.fields:
            _check_entry(entry)
        if not all(isinstance(axis, str) and axis.isidentifier() for axis in self.axes) or len(set(self.axes)) < len(self.axes):
            raise UsageError(
                f"axes are {','.join(map(str, self.axes))!r}; expected different names such as token,layer,feature"
            )
        if self.layout is not None:
            one_of("layout", self.layout, get_args(Layout))
        if self.label_kind is not None:
            one_of("label kind", self.label_kind, get_args(LabelKind))
        self._check_labels()

    def _check_labels(self) -> None:
        for name in ("label_threshold", "label_above"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, real(name, getattr(self, name), "a number"))
        if self.label_threshold is not None and self.label_above is not None:
            raise UsageError("a label is 1 below label_threshold or above label_above; expected one of them")
        if self.label is not None and self.labels_from is not None:
            raise UsageError(f"labels come from the key {self.label!r} and from {self.labels_from!r}; expected one of them")

    @property
    def keys(self) -> dict[str, str]:
        """Return the KEYs that are named, by the name of what they become."""
        named = {name: getattr(self, name) for name in ("sequence", "label", "id", "group", "lengths", "mask")}
        return {name: key for name, key in named.items() if key is not None} | dict(self.fields)

    @property
    def threshold(self) -> float | None:
        """Return the value that separates the labels 0 and 1, or None."""
        return self.label_threshold if self.label_above is None else self.label_above

    @property
    def tells_labels_alone(self) -> bool:
        """Whether nothing is said but where labels come from and what they mean."""
        return self.facts().keys() <= {"labels_from", "label_kind", "label_threshold", "label_above"}

    def __bool__(self) -> bool:
        return self != Recipe()

    def facts(self) -> dict[str, Any]:
        """Return what differs from an empty recipe, in JSON types."""
        empty = Recipe()
        return {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if getattr(self, each.name) != getattr(empty, each.name)
        }

    def flags(self) -> list[str]:
        """Return the recipe as arguments of the command line."""
        arguments: list[str] = []
        for name, value in self.facts().items():
            if name == "fields":
                arguments += [part for entry, key in value for part in ("--field", f"{entry}={key}")]
            else:
                arguments += [f"--{name.replace('_', '-')}", ",".join(value) if isinstance(value, tuple) else str(value)]
        return arguments

    def over(self, other: Recipe) -> Recipe:
        """Return this recipe, completed by what `other` says and this one does not."""
        mine = self.facts()
        given = other.facts() | mine
        given["fields"] = tuple((dict(other.fields) | dict(self.fields)).items())
        if {"label", "labels_from", "label_threshold", "label_above"} & mine.keys():
            given["label_kind"] = self.label_kind  # whoever names labels wants some
        for names in (("label", "labels_from"), ("label_threshold", "label_above")):
            if any(name in mine for name in names):
                given |= {name: mine.get(name) for name in names}
        return Recipe(**given)


def _check_entry(entry: str) -> None:
    """Raise UsageError unless a field has a level and a name."""
    level, _, name = entry.partition(".")
    if level not in (*SEQUENCE_LEVELS, *LEVELS) or not name.isidentifier():
        raise UsageError(
            f"field {entry!r} has no such level; expected {', '.join((*SEQUENCE_LEVELS, *LEVELS))}, a dot and a name, "
            "for example step.token_ids=token_ids"
        )


NAMES = {"field" if each.name == "fields" else each.name.replace("_", "-"): each.name for each in fields(Recipe)}


def parse_fields(given: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Return LEVEL.NAME and KEY of every `LEVEL.NAME=KEY`; raise UsageError for another text."""
    pairs = []
    for text in given:
        entry, equals, key = text.partition("=")
        if not equals or not entry or not key:
            raise UsageError(f"field is {text!r}; expected LEVEL.NAME=KEY, for example step.token_ids=token_ids")
        pairs.append((entry, key))
    if len(dict(pairs)) < len(pairs):
        raise UsageError(f"fields are {', '.join(entry for entry, _ in pairs)}; expected each once")
    return tuple(pairs)


def parse_axes(text: str | None) -> tuple[str, ...]:
    """Return the names in a text such as `token,layer,feature`."""
    return () if text is None else tuple(part.strip() for part in text.split(","))


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from a YAML file with the names of the flags.

    A relative path in `labels-from` is looked up beside the file first.

    Raises:
        UsageError: The file cannot be read, is larger than 64 KiB, uses aliases or tags, or has a name that is not known.
    """
    content = _parsed(path)
    given: dict[str, Any] = {}
    for written, value in content.items():
        name = str(written).replace("_", "-")
        if name == "fields":
            name = "field"
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, 1, 0.0)[0]
            raise UsageError(f"{path} has the unknown name {written!r}; the nearest is {near!r}, of {', '.join(sorted(NAMES))}")
        if value not in ("", "null", "~"):
            given[NAMES[name]] = _value(path, name, value)
    try:
        recipe = Recipe(**given)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    if recipe.labels_from is not None:
        file_name = recipe.labels_from.split(":")[0]
        if file_name and not Path(file_name).is_absolute() and (path.parent / file_name).exists():
            recipe = replace(recipe, labels_from=str(path.parent / file_name) + recipe.labels_from[len(file_name) :])
    return recipe


def _parsed(path: Path) -> Mapping[Any, Any]:
    """Return the names and values of a YAML file, every scalar as text."""
    import yaml  # few conversions have a recipe in a file

    try:
        with path.open("rb") as file:
            data = file.read(RECIPE_BYTES + 1)
        if len(data) > RECIPE_BYTES:
            raise UsageError(f"{path} is larger than {RECIPE_BYTES >> 10} KiB; expected a recipe of some lines")
        text = data.decode()
        if (brackets := text.count("[") + text.count("{")) > MOST_BRACKETS:
            raise UsageError(f"{path} cannot be read as YAML ({brackets} brackets); expected at most {MOST_BRACKETS}")
        if any(isinstance(token, yaml.AliasToken | yaml.AnchorToken | yaml.TagToken) for token in yaml.scan(text)):
            raise UsageError(f"{path} uses anchors, aliases or tags of YAML; expected plain names and values")
        content = yaml.load(text, Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:99]
        raise UsageError(f"{path} cannot be read as YAML ({reason}); expected lines such as `sequence: acts`") from None
    if not isinstance(content, Mapping):
        raise UsageError(f"{path} holds no names and values; expected lines such as `sequence: acts`")
    return content


def _value(path: Path, name: str, value: Any) -> Any:
    """Return a value of a YAML file as `Recipe` takes it."""
    if name == "field":
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value.values()):
            return parse_fields(f"{entry}={key}" for entry, key in value.items())
        if isinstance(value, list) and all(isinstance(text, str) for text in value):
            return parse_fields(value)
        raise UsageError(f"{path}: field is {shown(value)}; expected lines such as `step.token_ids: token_ids` below it")
    if name == "axes":
        names = value if isinstance(value, list) else str(value).split(",")
        if all(isinstance(axis, str) for axis in names):
            return tuple(axis.strip() for axis in names)
    if not isinstance(value, str):
        raise UsageError(f"{path}: {name} is {shown(value)}; expected one text")
    if name in ("label-threshold", "label-above"):
        try:
            return float(value)
        except ValueError:
            raise UsageError(f"{path}: {name} is {value!r}; expected a number") from None
    return value


def nearest(key: str, known: Iterable[str]) -> str:
    """Return a sentence's end that names the keys nearest to `key` of those that exist."""
    names = list(dict.fromkeys(known))
    if not names:
        return "there are no keys"
    near = difflib.get_close_matches(key, names, 3, 0.5)
    if not near:
        tail = re.split(r"[./]", key)[-1].lower()
        near = [name for name in names if tail and tail in name.lower()][:3]
    rest = ", ".join(names[:12]) + ("" if len(names) <= 12 else f" and {len(names) - 12} more")
    return f"the nearest is {near[0]!r}, of {rest}" if near else f"there are {rest}"
