"""What is known before a conversion begins: settings, names, splits, schema."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import msgspec
import xxhash

from dali_pipeline.filler import Dealer
from dali_pipeline.ingest.foreign import Block
from dali_pipeline.ingest.names import Disagreement, FileNames, Names
from dali_pipeline.ingest.pt import FOLDERS
from dali_pipeline.ingest.scales import greatest_values
from dali_pipeline.ingest.sources import Source
from dali_pipeline.ingest.traces import TraceOptions
from dali_pipeline.ingest.workers import Engine, Workers
from dali_pipeline.layers import Layers, select
from dali_pipeline.layout import ByLayer
from dali_pipeline.progress import progress_bar, shown
from dali_pipeline.schema import LEVELS, Array, DataError, Field, FormatError, Schema, UsageError, level_of
from dali_pipeline.split import FileSplit, Split
from dali_pipeline.writer import SHARD_BYTES

FIELDS = ("sequence", "x", "edge_attr")
DTYPES = ("float16", "bfloat16", "float32", "int8")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What a conversion does; `workers` and `engine` do not change what is written, `skip_bad` only where a file is bad.

    split_by: `group`, each by its own hash, or `file`, whole files · dtype: of values as stored, one of DTYPES for all of them,
    or by field, such as `sequence=int8,x=float16`; as in the first record where it says nothing. int8 is for sequences alone: a
    pass over the data finds a scale for each step and feature · by_layer: sequences, all of one length, stored layer by layer ·
    layers: the steps, and graphs, of each record to keep; None for all · workers: processes; "auto" for one a core · skip_bad:
    leaves out a file that cannot be taken in, instead of stopping · engine: `ray` for tasks of a Ray cluster, whose nodes see
    both folders; `workers` then says nothing.
    """

    split: Split = field(default_factory=Split)
    split_by: Literal["group", "file"] = "group"
    shard_bytes: int = SHARD_BYTES
    dtype: str | None = None
    by_layer: bool = False
    layers: Layers = None
    workers: Workers = "auto"
    skip_bad: bool = False
    engine: Engine = "local"
    traces: TraceOptions = field(default_factory=TraceOptions)

    def __post_init__(self) -> None:
        for name, dtype in self.dtypes.items():
            known = DTYPES if name == "sequence" else DTYPES[:-1]
            if dtype not in known or not (name in FIELDS or level_of(name) in LEVELS):
                raise UsageError(
                    f"dtype is {self.dtype!r}; expected {', '.join(DTYPES)}, or by field, of "
                    f"{', '.join(FIELDS)} or a further field, such as sequence=int8,x=float16; int8 for sequences alone"
                )
        if self.split_by not in ("group", "file"):
            raise UsageError(f"split by {self.split_by!r}; expected group or file")
        if self.engine not in get_args(Engine):
            raise UsageError(f"engine is {self.engine!r}; expected {' or '.join(get_args(Engine))}")
        if self.workers != "auto" and self.workers < 1:
            raise UsageError(f"workers is {self.workers}; expected at least 1")

    @property
    def dtypes(self) -> dict[str, str]:
        """As stored, by the names of fields that it is said of."""
        if self.dtype is None:
            return {}
        if "=" not in self.dtype:
            return dict.fromkeys(FIELDS if self.dtype != "int8" else FIELDS[:1], self.dtype)
        return {name: dtype for name, _, dtype in (part.partition("=") for part in self.dtype.split(","))}

    def fingerprint(self, source: Source) -> str:
        """What tells this conversion from another: the files' names and sizes, and what is done with them."""
        layers = str(self.layers) if isinstance(self.layers, slice) else self.layers
        done = (
            self.split,
            self.split_by,
            self.shard_bytes,
            self.dtype,
            layers,
            self.traces,
            *([True] if self.by_layer else []),
        )
        more = ("by layer",) if self.by_layer else ()  # older conversions knew of none
        return xxhash.xxh3_128_hexdigest(msgspec.json.encode((source.names, source.sizes, *done, *more), order="sorted"))


@dataclass(frozen=True, kw_only=True)
class Job:
    """What workers need to know. counts: records of each file, 0 for one in `unreadable`, which says why, by its name."""

    source: Source
    config: ConvertConfig
    names: Names
    counts: list[int]
    dealer: Dealer
    schema: Schema
    unreadable: dict[str, str]


def prepare(source: Source, config: ConvertConfig, numbers: Iterable[int]) -> Job:
    """Reads names and labels of every file, and numbers, deals and types the records."""
    unreadable: dict[str, str] = {}
    found: list[FileNames] = []
    for number in numbers:
        try:
            found.append(FileNames.of(source.open(number)))
        except (FormatError, DataError) as error:
            if not config.skip_bad:
                raise
            unreadable[source.names[number]] = source.told(error)
            found.append(FileNames.empty())
    halves = {_dealt_as(name): name for name in unreadable}
    for number, name in enumerate(source.names):
        if _dealt_as(name) in halves and name not in unreadable:  # else recurring questions would be paired wrongly
            unreadable[name] = f"{name}: its other half, {halves[_dealt_as(name)]}, cannot be read"
            found[number] = FileNames.empty()
    try:
        names = Names(found)
    except Disagreement as error:
        file = source.open(error.file)
        name = (file.ids or file.groups)[error.row]
        raise DataError(f"{file.path}: {name!r} {error.words}") from None
    dealer: Dealer = config.split
    if config.split_by == "file":
        dealer = FileSplit(config.split, [_dealt_as(name) for name in source.names], [each.groups for each in found])
    counts = [len(each.labels) for each in found]
    schema = infer_schema(source, found, config)
    if schema.sequence is not None and config.dtypes.get("sequence") == "int8":
        schema = replace(schema, sequence=replace(_scaled(source, found, config), by_layer=schema.sequence.by_layer))
    return Job(source=source, config=config, names=names, counts=counts, dealer=dealer, schema=schema, unreadable=unreadable)


def _dealt_as(name: str) -> str:
    """A file's name; of a `.pt` without its half's folder, as both halves of a file are one."""
    half, _, rest = name.partition("/")
    return rest if half in FOLDERS else name


def infer_schema(source: Source, found: Sequence[FileNames], config: ConvertConfig) -> Schema:
    """From the first sequence, and the first record whose graphs have edges; the writer checks that all others agree."""
    sequence: Field | None = None
    x: Field | None = None
    edge_attr: Field | None = None
    fields: dict[str, Field] = {}
    edges = False
    for number, names in enumerate(found):
        missing = {"sequences": sequence is None, "graphs": not edges}
        if not len(names.labels) or not any(missing[kind] for kind in names.kinds):
            continue
        try:
            for values in source.open(number).values():
                rows, graphs = (values.sequences[0], None) if isinstance(values, Block) else values
                if rows is not None and sequence is None:
                    sequence = _field(source.files[number], "sequence", rows, config)
                if graphs is not None and (x is None or graphs.edge_index.size):
                    x, edges = _field(source.files[number], "x", graphs.x, config), bool(graphs.edge_index.size)
                    attr = graphs.edge_attr
                    edge_attr = None if attr is None else _field(source.files[number], "edge_attr", attr, config)
                    fields = {name: _field(source.files[number], name, one, config) for name, one in graphs.fields.items()}
                if graphs is None or edges:
                    break
        except (FormatError, DataError):
            if not config.skip_bad:
                raise
    if sequence is None and x is None:
        raise DataError(f"{source.root} holds no records that can be taken in; expected at least one")
    return Schema(sequence=sequence, x=x, edge_attr=edge_attr, fields=fields or msgspec.UNSET)


def _scaled(source: Source, found: Sequence[FileNames], config: ConvertConfig) -> Field:
    numbers = [number for number, names in enumerate(found) if len(names.labels) and "sequences" in names.kinds]
    with progress_bar() as bar:
        show = shown(bar, "measure", len(numbers))
        greatest = greatest_values(source, numbers, config.layers, config.workers, config.engine, config.skip_bad, show)
        return Field.scaled(greatest)


def _field(path: Path, name: str, rows: Array, config: ConvertConfig) -> Field:
    try:
        field = Field(dtype=config.dtypes.get(name, rows.dtype.name), shape=rows.shape[1:])
        if name == "sequence" and config.by_layer:
            steps = len(select(config.layers, len(rows)))
            field = replace(field, by_layer=ByLayer.of(steps, field.row_bytes))
        return field
    except UsageError as error:
        raise FormatError(f"{path}: {error}") from None
