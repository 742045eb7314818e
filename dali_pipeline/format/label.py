"""Label: what a record's label is: a class, several labels, a value, or nothing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

import msgspec
import numpy as np

from dali_pipeline.errors import DataError, UsageError
from dali_pipeline.format.arrays import as_array, masked_values
from dali_pipeline.runtime.checks import MOST, one_of, shown, whole
from dali_pipeline.types import Array

LabelKind = Literal["class", "multilabel", "value", "none"]
DTYPES: dict[str, str] = {"class": "int64", "multilabel": "bool", "value": "float32"}


@dataclass(frozen=True, kw_only=True)
class Label:
    """The kind of label that every record of a data set has.

    Attributes:
        kind: "class", one whole number of 0 or more per record (the default; 1 is the positive class of two); "multilabel",
            K bools; "value", float32 of any shape; or "none".
        shape: Shape of one record's label: (K,) of several labels, any shape of a value, () of a class. Default: ().
        class_names: Name of every class, in the order of their numbers; a class may then be written by its name. Default: none.

    Raises:
        UsageError: The kind is none of these, or the shape or the names do not fit it.
    """

    kind: LabelKind = "class"
    shape: tuple[int, ...] = ()
    class_names: tuple[str, ...] | msgspec.UnsetType = dataclasses.field(default=msgspec.UNSET)

    def __post_init__(self) -> None:
        one_of("label kind", self.kind, get_args(LabelKind))
        if not isinstance(self.shape, tuple | list):
            raise UsageError(f"label shape is {shown(self.shape)}; expected whole numbers such as (3,), () for a scalar")
        object.__setattr__(self, "shape", tuple(whole("a size of a label's shape", size, 1, MOST) for size in self.shape))
        lengths = {"class": (0,), "none": (0,), "multilabel": (1,)}.get(self.kind)
        if lengths is not None and len(self.shape) not in lengths:
            expected = "(K,) for K labels" if self.kind == "multilabel" else "()"
            raise UsageError(f"a label of kind {self.kind!r} has the shape {self.shape}; expected {expected}")
        if self.class_names is msgspec.UNSET:
            return
        names = self.class_names
        if not isinstance(names, tuple | list) or not names or not all(isinstance(name, str) for name in names):
            raise UsageError(f"class_names are {shown(names)}; expected texts, one per class")
        if len(set(names)) < len(names) or self.kind not in ("class", "multilabel"):
            raise UsageError(
                f"class_names are {shown(names)} for labels of kind {self.kind!r}; expected each once, for classes"
            )
        if self.kind == "multilabel" and len(names) != self.shape[0]:
            raise UsageError(f"class_names has {len(names)} names for {self.shape[0]} labels; expected one for each")
        object.__setattr__(self, "class_names", tuple(names))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, or ()."""
        return self.class_names or ()

    @property
    def dtype(self) -> str | None:
        """The NumPy type of stored labels; None if there are none."""
        return DTYPES.get(self.kind)

    def stored(self, record_id: str, label: Any) -> Array | None:
        """Return a record's label in the stored type, (*shape); None for kind "none".

        Raises:
            DataError: The label does not fit, named by its record.
        """
        if self.kind == "none":
            if label is not None:
                raise DataError(f"record {record_id!r} has the label {shown(label)}, and this data set none; expected None")
            return None
        if self.kind == "class":
            return self._class(record_id, label)
        where = f"record {record_id!r}"
        if label is None:
            raise DataError(f"{where} has no label; expected {self.kind} of shape {self.shape}")
        try:
            given = as_array("the label", label)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        if given.shape != self.shape:
            raise DataError(f"{where}: the label has shape {given.shape}; expected {self.shape}")
        if self.kind == "multilabel":
            if not np.isin(given, (0, 1)).all():
                raise DataError(f"{where} has the label {shown(given.tolist())}; expected {self.shape[0]} of 0 or 1")
            return given.astype(np.bool_)
        with np.errstate(over="ignore"):
            value = given.astype(np.float32)
        if not np.isfinite(value).all():
            raise DataError(f"{where} has the label {shown(given.tolist())}; expected finite numbers that float32 can hold")
        return value

    def _class(self, record_id: str, label: Any) -> Array:
        if isinstance(label, str) and label in self.names:
            return np.array(self.names.index(label))
        number = whole_label(record_id, label)
        if self.names and number >= len(self.names):
            expected = f"expected one below {len(self.names)}, as class_names"
            raise DataError(f"record {record_id!r} has the label {number}; {expected}")
        return np.array(number, np.int64)

    def counted(self, label: Array | None) -> tuple[int, ...]:
        """Return the classes that a stored label counts for in the manifest; none for a value."""
        if self.kind == "class" and label is not None:
            return (int(label),)
        if self.kind == "multilabel" and label is not None:
            return tuple(np.flatnonzero(label).tolist())
        return ()


def whole_label(record_id: str, label: Any) -> int:
    """Return a class as an int, whatever number it came as; raise DataError if it is not whole, or below 0."""
    if type(label) is int and 0 <= label < 2**63:  # nearly always
        return label
    try:
        number = int(label)
        is_whole = not masked_values(label) and number == label and 0 <= number < 2**63
    except (TypeError, ValueError, OverflowError, RuntimeError, np.ma.MaskError):  # of a meta tensor, RuntimeError
        is_whole = False
    if not is_whole:
        text = " ".join(repr(label).split())  # an array's has several lines
        raise DataError(f"record {record_id!r} has the label {text}; expected a whole number of 0 or more")
    return number
