"""Field and Schema: what all records of a data set have in common."""

from __future__ import annotations

import dataclasses
import keyword
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from dali_pipeline.errors import UsageError
from dali_pipeline.format.encoding import BFLOAT16, TEXT, Scale, decode, encode, scale_for, storage
from dali_pipeline.format.label import Label
from dali_pipeline.format.layout import ByLayer
from dali_pipeline.runtime.checks import MOST, real, shown, whole
from dali_pipeline.types import KINDS, Array, Kind

SPLITS = ("train", "val", "test")
LEVELS = ("node", "edge", "graph")
SEQUENCE_LEVELS = ("step", "record")  # of further fields that are not of graphs; a record field goes with both kinds
# A PyG batch gives TAKEN a meaning of its own, and joins names with TAKEN_PARTS in another way. Shards use some as suffixes.
TAKEN = {"x", "edge_attr", "ptr", "face", "num_nodes", "num_edges", "num_graphs", "counts", "offsets"}
TAKEN_PARTS = ("index", "batch", "adj")
NAMED_DTYPES = ("bool", TEXT)  # of further fields alone; text of records alone
FIELD_DTYPES = ("float16", BFLOAT16, "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")
_CLASS = Label()  # one for every record that is written


def _is_free(name: str) -> bool:
    plain = name.isidentifier() and not keyword.iskeyword(name) and not name.startswith("_")
    return plain and name not in TAKEN and not any(part in name for part in TAKEN_PARTS)


def level_of(name: str) -> str:
    """Return what an array of graphs has one row for: `node`, `edge` or `graph`."""
    return {"x": "node", "edge_attr": "edge", "edge_index": "edge"}.get(name) or name.partition(".")[0]


def a_or_an(level: str) -> str:
    """Return `a node`, `an edge` or `a graph`."""
    return f"{'an' if level == 'edge' else 'a'} {level}"


@dataclass(frozen=True, kw_only=True)
class Field:
    """One array of a record, with one row per step, node, edge or graph.

    Attributes:
        dtype: Name of the stored type: float16, bfloat16, float32, float64, int8, int16, int32, int64, uint8, uint16 or uint32;
            of further fields also bool, and of records text.
        shape: Shape of one row: (F,) for a feature vector, () for a scalar. Default: ().
        scale: Scale of an int8 field that stands for real numbers: stored = round(number / scale). One flat row per step, or
            one row for all steps. Default: none.
        by_layer: Layout of rows that are stored layer by layer. Default: none, stored record by record.
        axes: Names of the row's axes, such as ("layer", "feature"). Default: none.
        pad: Value behind the end of a shorter record, of step fields. Default: 0.
        step_major: Whether the layers of one step lie together, although an axis is named layer; only of values that were left
            in place. Default: no, the steps of one layer do.

    Raises:
        UsageError: The type is none of these, a size is below 1, or the scale does not fit type and shape.
    """

    dtype: str
    shape: tuple[int, ...] = ()
    scale: Scale | msgspec.UnsetType = dataclasses.field(default=msgspec.UNSET, repr=False)  # not written to JSON if unset
    by_layer: ByLayer | msgspec.UnsetType = msgspec.UNSET
    axes: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    pad: int | float | msgspec.UnsetType = msgspec.UNSET
    step_major: bool | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, str) or self.dtype not in (*FIELD_DTYPES, *NAMED_DTYPES):
            raise UsageError(f"field dtype {shown(self.dtype)} cannot be stored; expected one of {', '.join(FIELD_DTYPES)}")
        if not isinstance(self.shape, tuple | list):
            raise UsageError(f"field shape is {shown(self.shape)}; expected whole numbers such as (1024,), () for a scalar")
        object.__setattr__(self, "shape", tuple(whole("a size of a field's shape", size, -MOST) for size in self.shape))
        if any(size < 1 for size in self.shape):
            raise UsageError(f"field shape {self.shape} has a size below 1")
        self._check_names()
        if self.by_layer is not msgspec.UNSET and not isinstance(self.by_layer, ByLayer):
            raise UsageError(f"by_layer is {shown(self.by_layer)}; expected a ByLayer")
        if self.by_layer and min(self.by_layer.steps, self.by_layer.records) < 1:
            raise UsageError(f"{self.by_layer}; expected at least 1 of each")
        self._check_scale()
        if self.step_major and not (self.axes and self.axes[0] == "layer"):
            raise UsageError(f"step_major with the axes {shown(self.axis_names)}; expected layer as the first axis of a row")

    def _check_names(self) -> None:
        if self.dtype == TEXT and self.shape:
            raise UsageError(f"a text field has the shape {self.shape}; expected (), one text per record")
        if self.axes is not msgspec.UNSET:
            object.__setattr__(self, "axes", _axis_names(self.axes, len(self.shape)))
        if self.pad is not msgspec.UNSET:
            self._check_pad()

    def _check_scale(self) -> None:
        if self.scale is msgspec.UNSET:
            return
        try:
            sound = bool(self.scale) and all(0 < number < np.inf for row in self.scale for number in row)
        except (TypeError, ValueError, RuntimeError):  # not rows of numbers
            sound = False
        if self.dtype != "int8" or not sound or {len(row) for row in self.scale} != {math.prod(self.shape)}:
            raise UsageError(
                f"a scale for {self.dtype} in rows of {self.shape}; expected int8, and rows of as many numbers above 0"
            )

    @classmethod
    def scaled(cls, greatest: npt.ArrayLike) -> Field:
        """Make an int8 field for real numbers of bounded magnitude.

        Args:
            greatest: Largest magnitude of each value: (T, *row) for records of T steps each, (1, *row) for records of any
                length.

        Returns:
            The `Field`, with a scale by which these values fit.

        Raises:
            UsageError: The magnitudes are not rows of finite numbers of 0 or more.
        """
        try:
            limits = np.asarray(greatest)
        except (TypeError, ValueError, RuntimeError):  # ragged, or a tensor without values
            limits = np.zeros(0)
        if (
            limits.dtype.kind not in "fiu"
            or limits.ndim < 1
            or not limits.size
            or not (limits >= 0).all()
            or not np.isfinite(limits).all()
        ):
            raise UsageError(f"greatest has the shape {limits.shape}; expected rows of finite numbers of 0 or more")
        return cls(dtype="int8", shape=limits.shape[1:], scale=scale_for(limits))

    def _check_pad(self) -> None:
        real_type = self.dtype.startswith(("float", "bfloat"))
        given = int(self.pad) if isinstance(self.pad, bool) and self.dtype == "bool" else self.pad
        pad = real("pad", given, "a finite number")
        if self.dtype == TEXT or (encode(np.array([pad]), self.dtype, None)[1] if self.dtype != TEXT else True):
            raise UsageError(f"pad is {shown(self.pad)} for {self.dtype}; expected a value of that type")
        object.__setattr__(self, "pad", pad if real_type else int(pad))

    @property
    def axis_names(self) -> tuple[str, ...]:
        """The names of the row's axes, or ()."""
        return self.axes or ()

    @property
    def scales(self) -> Scale | None:
        """The scale, or None."""
        return self.scale or None

    @cached_property
    def scale_rows(self) -> Array | None:
        """The scale as a float32 array, or None. Cached, because it may have as many numbers as a record."""
        return np.array(self.scale, np.float32) if self.scale else None

    @property
    def layout(self) -> ByLayer | None:
        """The layout of rows stored layer by layer, or None."""
        return self.by_layer or None

    @property
    def storage(self) -> np.dtype[Any]:
        """The NumPy type of stored rows; uint16 for bfloat16, which NumPy lacks."""
        return storage(self.dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as stored."""
        return int(self.storage.itemsize * np.prod(self.shape, dtype=np.int64))

    def values(self, rows: Array, first: int = 0) -> Array:
        """Decode stored rows.

        Args:
            rows: (R, *shape) in the stored type.
            first: Number of steps of the same record before these rows. Default: 0.

        Returns:
            The same array if the field is not encoded; otherwise float32 of the same shape.
        """
        return decode(rows, self.dtype, self.scale_rows, first)


def _check_name(key: str, field: Field) -> None:
    """Raise UsageError unless a further field has a level, a name that can be used at it, and a type that the level takes."""
    level, _, name = key.partition(".")
    if level in SEQUENCE_LEVELS and (not name.isidentifier() or name in ("offsets", "counts")):
        raise UsageError(f"fields has {key!r}; expected {level}. and a name that Python takes as one")
    if level not in SEQUENCE_LEVELS and (level not in LEVELS or not _is_free(name)):
        raise UsageError(
            f"fields has {key!r}; expected step., record., node., edge. or graph. and a name of its own, nothing to Python "
            f"or PyG: none of {', '.join(sorted(TAKEN))}, and without {', '.join(TAKEN_PARTS)} in it"
        )
    if field.dtype == TEXT and level != "record":
        raise UsageError(f"fields has {key!r} as text; expected text of records alone")


def _axis_names(axes: Any, count: int) -> tuple[str, ...]:
    """Return the names of a row's axes; raise UsageError unless there is one name for each of `count` axes, all different."""
    if not isinstance(axes, tuple | list) or not all(isinstance(name, str) and name.isidentifier() for name in axes):
        raise UsageError(f'axes are {shown(axes)}; expected names such as ("layer", "feature")')
    if len(axes) != count or len(set(axes)) < len(axes):
        raise UsageError(f"axes are {shown(axes)} for rows with {count} axes; expected one name for each, all different")
    return tuple(axes)


def unit_field(field: Field, layer_axis: int) -> Field:
    """Return the field of one layer of one step: a sequence with a layer axis is stored layer by layer within a record."""
    rest = tuple(size for axis, size in enumerate(field.shape) if axis != layer_axis)
    return Field(dtype=field.dtype, shape=rest)


@dataclass(frozen=True, kw_only=True)
class Schema:
    """Fields of every record of a data set; it has sequences, graphs, or both.

    A schema with `x` has graphs. Their `edge_index` (2, E) is always stored as well, in the narrowest unsigned type.

    Attributes:
        sequence: Rows of a sequence (T, *shape). Default: None.
        x: Node features (N, *shape). Default: None.
        edge_attr: Edge features (E, *shape). Default: None.
        fields: Further arrays, by level and name. `step.token_ids` has one row per step of the sequence, `record.score` one per
            record of either kind; a batch has them in its `fields`, by the name after the dot. `node.pos`, `edge.kind` and
            `graph.energy` have one row per node, edge or graph; a batch has them as PyG attributes `pos`, `kind` and `energy`.
            A name is used at one level only. Default: none.
        step_axis: Name of the axis along which a sequence's rows lie, such as "layer" or "token". Default: "step".
        layers: Number of every entry along the axis named layer: 0 for the embeddings, l for the output of block l. Default:
            0, 1, 2 and so on.
        label: What a record's label is. Default: a class.

    Raises:
        UsageError: Neither `sequence` nor `x` is given, or a field has a wrong type or a name that cannot be used.
    """

    sequence: Field | None = None
    x: Field | None = None
    edge_attr: Field | None = None
    fields: dict[str, Field] | msgspec.UnsetType = msgspec.UNSET
    step_axis: str | msgspec.UnsetType = msgspec.UNSET
    layers: tuple[int, ...] | msgspec.UnsetType = msgspec.UNSET
    label: Label | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        for name in ("sequence", "x", "edge_attr"):
            if not isinstance(getattr(self, name), Field | None):
                raise UsageError(f"{name} is {shown(getattr(self, name))}; expected a Field or None")
        fields = {} if self.fields is msgspec.UNSET else self.fields
        if not isinstance(fields, dict) or not all(
            isinstance(name, str) and isinstance(fields[name], Field) for name in fields
        ):
            raise UsageError(f"fields are {shown(fields)}; expected names and a Field for each")
        if self.sequence is None and self.x is None:
            raise UsageError("a schema needs `sequence`, `x` (node features), or both")
        if self.edge_attr is not None and self.x is None:
            raise UsageError("a schema with `edge_attr` needs `x` (node features)")
        if any(field.dtype in NAMED_DTYPES for field in (self.sequence, self.x, self.edge_attr) if field is not None):
            raise UsageError("sequence, x or edge_attr is bool or text; expected a number type, as those are of `fields` alone")
        self._check_fields(fields)
        self._check_axes()
        if self.label is not msgspec.UNSET and not isinstance(self.label, Label):
            raise UsageError(f"label is {shown(self.label)}; expected a Label")

    def _check_fields(self, fields: dict[str, Field]) -> None:
        if any(field.scales or field.layout for field in (*self.of_graphs.values(), *fields.values())):
            raise UsageError("a scale or by_layer stands at a field of graphs; expected them for `sequence` alone")
        if self.named and self.x is None:
            raise UsageError("a schema with `fields` needs `x` (node features)")
        if self.step_fields and self.sequence is None:
            raise UsageError("a schema with step fields needs `sequence`")
        names = [name.partition(".")[2] for name in fields]
        for key, name in zip(fields, names, strict=True):
            if names.count(name) > 1:
                raise UsageError(f"fields has {key!r} at two levels; expected a name at one level only")
            _check_name(key, fields[key])

    def _check_axes(self) -> None:
        if self.step_axis is not msgspec.UNSET:
            if not isinstance(self.step_axis, str) or not self.step_axis.isidentifier() or self.sequence is None:
                raise UsageError(
                    f"step_axis is {shown(self.step_axis)}; expected the name of the sequence's steps, such as token"
                )
            if self.step_axis in self.sequence.axis_names:
                raise UsageError(f"step_axis is {self.step_axis!r}, which is an axis of a row too; expected another name")
        if self.layers is msgspec.UNSET:
            return
        if isinstance(self.layers, range):
            object.__setattr__(self, "layers", tuple(self.layers))
        if not isinstance(self.layers, tuple | list) or not self.layers:
            raise UsageError(f"layers are {shown(self.layers)}; expected the number of each layer, such as range(33)")
        numbers = tuple(whole("a layer", number) for number in self.layers)
        if len(set(numbers)) < len(numbers):
            raise UsageError(f"layers are {shown(self.layers)}; expected each number once")
        size = self.sequence.shape[self.layer_axis] if self.sequence is not None and self.layer_axis is not None else None
        if size is not None and size != len(numbers):
            raise UsageError(f"layers has {len(numbers)} numbers for a layer axis of {size}; expected one for each")
        object.__setattr__(self, "layers", numbers)

    @property
    def labels(self) -> Label:
        """What a record's label is."""
        return self.label or _CLASS

    @property
    def steps(self) -> str:
        """The name of the axis along which a sequence's rows lie."""
        by_layer = self.sequence is not None and self.sequence.layout is not None
        return self.step_axis or ("layer" if by_layer else "step")

    @property
    def layer_axis(self) -> int | None:
        """Which axis of a sequence's row is named layer; None if none is."""
        names = () if self.sequence is None else self.sequence.axis_names
        return names.index("layer") if "layer" in names else None

    @property
    def stored_layers(self) -> int:
        """Number of stored rows per step of a sequence: the layers, if one of its axes is named so, otherwise 1."""
        axis = self.layer_axis
        return 1 if axis is None or self.sequence is None else self.sequence.shape[axis]

    @property
    def stored_sequence(self) -> Field:
        """The field of a stored row of a sequence: of one layer of a step, if an axis is named layer."""
        assert self.sequence is not None
        return self.sequence if self.layer_axis is None else unit_field(self.sequence, self.layer_axis)

    @property
    def named(self) -> dict[str, Field]:
        """The further fields of graphs, by name."""
        return {name: field for name, field in (self.fields or {}).items() if name.partition(".")[0] in LEVELS}

    @property
    def step_fields(self) -> dict[str, Field]:
        """The further fields with one row per step, by names such as `step.token_ids`."""
        return {name: field for name, field in (self.fields or {}).items() if name.startswith("step.")}

    @property
    def record_fields(self) -> dict[str, Field]:
        """The further fields with one row per record, by names such as `record.score`."""
        return {name: field for name, field in (self.fields or {}).items() if name.startswith("record.")}

    @property
    def of_graphs(self) -> dict[str, Field]:
        """All fields of graphs, by name: `x`, `edge_attr` if there is one, and the further ones."""
        own = {"x": self.x, "edge_attr": self.edge_attr}
        return {name: field for name, field in own.items() if field is not None} | self.named

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of record that the schema has fields for: `sequences`, `graphs`, or both."""
        return tuple(kind for kind, field in zip(KINDS, (self.sequence, self.x), strict=True) if field is not None)
