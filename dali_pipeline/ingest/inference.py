"""Infer the schema of a source, the numbers of its layers, and the size of the data set, from its first records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import msgspec
import numpy as np

from dali_pipeline.dataset.dataset import Dataset
from dali_pipeline.errors import DataError, FormatError, UsageError
from dali_pipeline.format.encoding import BFLOAT16, TEXT
from dali_pipeline.format.label import Label
from dali_pipeline.format.layers import Layers, select, to_positions
from dali_pipeline.format.layout import ByLayer
from dali_pipeline.format.record import Graphs
from dali_pipeline.format.schema import Field, Schema, level_of
from dali_pipeline.ingest.config import FIELDS, ConvertConfig
from dali_pipeline.ingest.foreign import Block, ForeignFile, Values
from dali_pipeline.ingest.names import FileNames
from dali_pipeline.ingest.readers.traces import TRACES
from dali_pipeline.types import Array, Kind

if TYPE_CHECKING:
    from dali_pipeline.ingest.sources import Source

Kept = TypeVar("Kept", Array, Graphs)
MEASURED_RECORDS, MEASURED_BYTES, NAME_BYTES = 64, 8 << 20, 40  # for the estimate of the disk space


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """The layers of each record that are kept.

    Attributes:
        layers: Layers that the user asked for.
        numbers: Layer number of each step (sequences) and each graph (graphs) of a record, if the layers have numbers.
    """

    layers: Layers
    numbers: dict[Kind, list[int]]

    def of(self, kind: Kind, count: int) -> list[int]:
        """Return the positions of the kept layers among the `count` steps or graphs of a record; raise DataError if one is
        missing."""
        numbers = self.numbers.get(kind)
        if numbers is None or len(numbers) != count:
            return select(self.layers, count)
        return to_positions(self.layers, numbers)

    @property
    def kept_numbers(self) -> dict[str, list[int]]:
        """Numbers of the kept layers, by their key in a manifest's `source`."""
        names: dict[Kind, str] = {"sequences": "layers", "graphs": "graph_layers"}
        return {
            names[kind]: [numbers[position] for position in to_positions(self.layers, numbers)]
            for kind, numbers in self.numbers.items()
        }


def infer_schema(
    source: Source, file_names: Sequence[FileNames], config: ConvertConfig, notices: list[str]
) -> tuple[Schema, LayerChoice]:
    """Return the schema from the first sequence and the first graphs that have edges; the writer checks all other records.

    If the source is a data set of ours, its schema stays, except for what the settings change. Appends sentences for the user
    to `notices`.
    """
    if source.own is not None:
        schema, choice = _own_schema(source.own, config)
        if source.relabelling is not None:
            label = source.relabelling.rule.label
            schema = replace(schema, label=msgspec.UNSET if label == Label() else label)
        return schema, choice
    sequence, graphs = _first_records(source, file_names, config)
    if sequence is None and graphs is None:
        raise DataError(f"{source.root} holds no records that can be taken in; expected at least one")
    counts = {
        "sequences": 0 if sequence is None else len(sequence.values),
        "graphs": 0 if graphs is None else len(graphs.values.node_counts),
    }
    own_layers: dict[Kind, list[int]] = {}
    if sequence is not None and sequence.file.layers:
        own_layers = {"sequences": list(sequence.file.layers)}
    choice = LayerChoice(layers=config.layers, numbers=own_layers or _layer_numbers(source, counts, notices))
    fields: dict[str, Field] = {}
    if sequence is not None:
        rows = sequence.values
        dtype = BFLOAT16 if "sequence" in sequence.bfloat16 else rows.dtype.name
        steps = len(choice.of("sequences", len(rows))) if config.by_layer else 0
        row = _kept_row(rows.shape[1:], sequence.file.axes, choice)
        fields["sequence"] = _field(sequence.file.path, "sequence", dtype, row, config, steps)
    if graphs is not None:
        arrays = {"x": graphs.values.x, "edge_attr": graphs.values.edge_attr, **graphs.values.fields}
        for name, array in arrays.items():
            if array is not None:
                dtype = BFLOAT16 if name in graphs.bfloat16 else array.dtype.name
                fields[name] = _field(graphs.file.path, name, dtype, array.shape[1:], config)
    firsts = [first for first in (sequence, graphs) if first is not None]
    narrow = {name for first in firsts for name in first.bfloat16}
    for name, rows in firsts[0].fields.items():
        fields[name] = _further_field(firsts[0].file.path, name, rows, name in narrow, config)
    own: dict[str, Any] = {name: fields.pop(name, None) for name in FIELDS}
    return _described(Schema(**own, fields=fields or msgspec.UNSET), firsts[0].file, choice), choice


def fitted(given: Schema, schema: Schema, what: str, where: str, dtypes: Mapping[str, str]) -> Schema:
    """Return the schema of a data set for records that are added to it.

    Args:
        given: What the records have.
        schema: What the data set has.
        what: Where the records come from, for messages.
        where: The data set, for messages.
        dtypes: Types that the user allows to lose digits.

    Raises:
        UsageError: They differ in a field, a shape, an axis or the kind of label.
    """
    for name, own, other in _compared(given, schema):
        if own != other:
            raise UsageError(f"{what} has {name} {own}, and {where} {other}; expected records like those of the data set")
    for name, dtype in dtypes.items():
        field = {**{key: getattr(schema, key) for key in FIELDS}, **(schema.fields or {})}.get(name)
        if field is not None and field.dtype != dtype:
            raise UsageError(
                f"--dtype is {dtype} for {name}, which {where} stores as {field.dtype}; leave it out, or name that"
            )
    return schema


def _compared(given: Schema, schema: Schema) -> Iterator[tuple[str, Any, Any]]:
    """Yield what two schemas must have in common: a name, and the value of each."""
    yield "kinds", " and ".join(given.kinds), " and ".join(schema.kinds)
    yield "the further fields", sorted(given.fields or {}), sorted(schema.fields or {})
    for name in (*FIELDS, *(schema.fields or {})):
        own, other = (getattr(each, name) if name in FIELDS else (each.fields or {})[name] for each in (given, schema))
        yield f"{name} in rows of", None if own is None else own.shape, None if other is None else other.shape
        if own is not None and other is not None:
            yield f"{name} with axes", own.axis_names, other.axis_names
            yield f"{name} with the layers of a step together", bool(own.step_major), bool(other.step_major)
            yield f"{name} as text", own.dtype == TEXT, other.dtype == TEXT
    if schema.steps == "layer" or given.layers or schema.layers:
        yield "steps named", given.steps, schema.steps
        yield "the layers", given.layers or (), schema.layers or ()
    yield "labels of kind", given.labels.kind, schema.labels.kind
    yield "labels of shape", given.labels.shape, schema.labels.shape
    yield "classes named", given.labels.names, schema.labels.names


def _kept_row(shape: tuple[int, ...], axes: tuple[str, ...], choice: LayerChoice) -> tuple[int, ...]:
    """Return the shape of a row with the layers that are kept, if one of its axes is named layer."""
    if "layer" not in axes or choice.layers is None:
        return shape
    axis = axes.index("layer")
    return (*shape[:axis], len(choice.of("sequences", shape[axis])), *shape[axis + 1 :])


def _further_field(path: Path, name: str, rows: Array | str, narrow: bool, config: ConvertConfig) -> Field:
    """Return a step or record field as stored. narrow: whether it is bfloat16 in the file."""
    if isinstance(rows, str):
        return Field(dtype=TEXT)
    row = rows.shape[1:] if name.startswith("step.") else rows.shape
    return _field(path, name, BFLOAT16 if narrow else rows.dtype.name, row, config)


def _described(schema: Schema, file: ForeignFile, choice: LayerChoice) -> Schema:
    """Return the schema with the names of axes, the layer numbers and the kind of label that a file tells."""
    sequence = schema.sequence
    if sequence is not None and file.axes:
        sequence = replace(sequence, axes=file.axes)
    return replace(
        schema,
        sequence=sequence,
        step_axis=msgspec.UNSET if sequence is None else file.step_axis,
        layers=tuple(choice.kept_numbers["layers"]) if file.layers else msgspec.UNSET,
        label=msgspec.UNSET if file.label == Label() else file.label,
    )


class _First(NamedTuple, Generic[Kept]):
    """The first sequence or graphs, their file, and their further fields. bfloat16: arrays that are bfloat16 in the file."""

    file: ForeignFile
    values: Kept
    bfloat16: tuple[str, ...]
    fields: Mapping[str, Any]


def _first_records(
    source: Source, file_names: Sequence[FileNames], config: ConvertConfig
) -> tuple[_First[Array] | None, _First[Graphs] | None]:
    """Return the first sequence, and the first graphs that have edges, or the first graphs if none has edges."""
    sequence: _First[Array] | None = None
    graphs: _First[Graphs] | None = None
    for number, names in enumerate(file_names):
        missing = {"sequences": sequence is None, "graphs": graphs is None or not graphs.values.edge_index.size}
        if not len(names.labels) or not any(missing[kind] for kind in names.kinds):
            continue
        try:
            file = source.open(number)
            for values in file.values():
                rows, first = (values.sequences[0], None) if isinstance(values, Block) else values[:2]
                if rows is not None and sequence is None:
                    sequence = _First(file, rows, values.bfloat16, _first_fields(values))
                if first is not None and (graphs is None or first.edge_index.size):
                    graphs = _First(file, first, values.bfloat16, _first_fields(values))
                if first is None or first.edge_index.size:
                    break
        except (FormatError, DataError):
            if not config.skip_bad:
                raise
    return sequence, graphs


def _first_fields(values: Values | Block) -> dict[str, Any]:
    """Return the further fields of the first record, as arrays or texts."""
    fields = {name: rows[0] for name, rows in values.fields.items()} if isinstance(values, Block) else values.fields
    return {name: rows if isinstance(rows, str) else np.asarray(rows) for name, rows in fields.items()}


def _own_schema(data: Dataset, config: ConvertConfig) -> tuple[Schema, LayerChoice]:
    """Return the schema of a data set of ours, with the types of the settings."""
    numbers = {kind: layer_numbers for kind in data.schema.kinds if (layer_numbers := data.layer_numbers(kind)) is not None}
    choice = LayerChoice(layers=config.layers, numbers=numbers)
    retyped = {
        name: field if name not in config.dtypes else replace(field, dtype=config.dtypes[name])
        for name, field in {**data.schema.of_graphs, **data.schema.step_fields, **data.schema.record_fields}.items()
    }
    sequence = data.schema.sequence
    has_layers = data.schema.layer_axis is not None or data.schema.steps == "layer" or data.manifest.version == 1
    if sequence is not None and config.layers is not None and not has_layers:
        raise UsageError(f"{data.root} has no axis named layer: its steps are named {data.schema.steps!r}; leave --layers out")
    if sequence is not None and config.by_layer and data.schema.layer_axis is not None:
        raise UsageError(f"{data.root} has an axis named layer, so its layers lie apart already; leave --by-layer out")
    if sequence is not None:
        lengths = [table.rows["step"] for split in data.splits if len(table := data.table(split, "sequences"))]
        steps = max((longest for _, longest in lengths), default=0)
        layer_axis = data.schema.layer_axis
        kept = 0
        shape = sequence.shape
        if layer_axis is not None:
            layers = len(choice.of("sequences", shape[layer_axis]))
            shape = (*shape[:layer_axis], layers, *shape[layer_axis + 1 :])
        elif steps:
            kept = len(choice.of("sequences", steps))
        scale = sequence.scales
        if scale is not None and len(scale) > 1:
            scale = tuple(scale[position] for position in choice.of("sequences", len(scale)))
        by_layer = bool(sequence.layout) if config.by_layer is None else config.by_layer
        dtype = config.dtypes.get("sequence", sequence.dtype)
        plain = Field(dtype=dtype, shape=shape)
        sequence = Field(
            dtype=dtype,
            shape=shape,
            axes=sequence.axes,
            scale=scale if scale is not None and "sequence" not in config.dtypes else msgspec.UNSET,
            by_layer=ByLayer.of(kept, plain.row_bytes) if by_layer and kept else msgspec.UNSET,
        )
    own: dict[str, Any] = {name: retyped.pop(name, None) for name in FIELDS[1:]}
    own |= {"step_axis": data.schema.step_axis, "label": data.schema.label}
    if sequence is not None and data.manifest.version == 1 and choice.numbers.get("sequences"):
        own["step_axis"] = "layer"
    if data.schema.layers:
        own["layers"] = tuple(choice.kept_numbers["layers"])
    return Schema(sequence=sequence, **own, fields=retyped or msgspec.UNSET), choice


def _layer_numbers(source: Source, counts: dict[str, int], notices: list[str]) -> dict[Kind, list[int]]:
    """Return the layer number of each step and each graph, if they are apparently the layers of a language model.

    Traces have one hidden state per block and perhaps one for the embeddings (0); each graph belongs to a block. Records of
    other sources are taken for such traces if they have one step more than graphs.
    """
    steps, graphs = counts["sequences"], counts["graphs"]
    traces = source.reader.what == TRACES
    if not graphs or steps - graphs not in ((0, 1) if traces else (1,)):
        return {}
    if not traces:
        notices.append(f"records have {steps} steps and {graphs} graphs: taken as layers 0 to {graphs}, and 1 to {graphs}")
    return {"sequences": list(range(graphs + 1 - steps, graphs + 1)), "graphs": list(range(1, graphs + 1))}


def written_bytes(source: Source, file_names: Sequence[FileNames], schema: Schema, choice: LayerChoice) -> int:
    """Estimate the bytes that will be written.

    For each kind of record, the ratio of written to read bytes is measured on the first records of its first file. For files in
    a store the ratio is taken to be 1, because measuring would fetch a file.
    """
    total = 0.0
    for kind in schema.kinds:
        files = [number for number, names in enumerate(file_names) if len(names.labels) and kind in names.kinds]
        share = 1.0
        with suppress(FormatError, DataError):  # the conversion raises it later
            share = _share(source, files[0], schema, choice, kind) if files and source.remote is None else 1.0
        total += share * sum(max(0, source.sizes[number]) for number in files)
    return int(total)


def _share(source: Source, number: int, schema: Schema, choice: LayerChoice, kind: Kind) -> float:
    """Return the bytes written per byte of a file."""
    file, records, written = source.open(number), 0, 0
    for values in file.values():
        count = len(values.sequences) if isinstance(values, Block) else 1
        sequence = values.sequences[0] if isinstance(values, Block) else values.sequence
        graphs = None if isinstance(values, Block) else values.graphs
        if kind == "sequences" and sequence is not None and schema.sequence is not None:
            row_bytes = schema.sequence.row_bytes + sum(field.row_bytes for field in schema.step_fields.values())
            written += count * (len(choice.of(kind, len(sequence))) * row_bytes + NAME_BYTES)
        if kind == "graphs" and graphs is not None:
            kept = graphs if choice.layers is None else graphs.select(choice.of(kind, len(graphs.node_counts)))
            rows = {"node": len(kept.x), "edge": kept.edge_index.shape[1], "graph": len(kept.node_counts)}
            written += sum(field.row_bytes * rows[level_of(name)] for name, field in schema.of_graphs.items())
            written += 4 * rows["edge"] + 16 * rows["graph"] + NAME_BYTES
        for name, field in schema.record_fields.items():
            texts = values.fields.get(name, "") if field.dtype == TEXT else ""
            written += len("".join(texts).encode()) if field.dtype == TEXT else count * field.row_bytes
        records += count
        if records >= MEASURED_RECORDS or written >= MEASURED_BYTES:
            break
    return written / max(1, records) * len(file) / max(1, source.sizes[number])


def _field(path: Path, name: str, dtype: str, shape: tuple[int, ...], config: ConvertConfig, steps: int = 0) -> Field:
    """Return a field as stored. steps: number of steps per record if it is stored layer by layer, otherwise 0."""
    try:
        field = Field(dtype=config.dtypes.get(name, dtype), shape=shape)
        return replace(field, by_layer=ByLayer.of(steps, field.row_bytes)) if steps else field
    except UsageError as error:
        raise FormatError(f"{path}: {error}") from None
