"""ConvertConfig: the settings of a conversion."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import msgspec
import xxhash

from dali_pipeline.errors import UsageError
from dali_pipeline.format.layers import Layers
from dali_pipeline.format.schema import LEVELS, SEQUENCE_LEVELS, level_of
from dali_pipeline.ingest.dealing import splits_in_names
from dali_pipeline.ingest.layouts.recipe import Recipe
from dali_pipeline.ingest.own import OWN
from dali_pipeline.ingest.readers.traces import TraceOptions
from dali_pipeline.ingest.workers import Engine, NumWorkers
from dali_pipeline.writing.split import SplitRule
from dali_pipeline.writing.writer import SHARD_BYTES

if TYPE_CHECKING:
    from dali_pipeline.ingest.sources import Source

FIELDS = ("sequence", "x", "edge_attr")
DTYPES = ("float16", "bfloat16", "float32", "int8")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Settings of a conversion.

    `num_workers` and `engine` do not change what is written; `skip_bad` does only if a file is bad.

    Attributes:
        split: Rule that assigns groups to splits. None keeps the splits of the source, from its file names or because it is a
            data set, and otherwise uses 70/15/15.
        split_by: "group" assigns each group by its hash, "file" assigns whole files.
        shard_bytes: Maximum size of a shard in bytes.
        dtype: Stored type of values: one of DTYPES for all fields, or one per field, for example `sequence=int8,x=float16`.
            None stores the type of the first record, or of the source if that is a data set. int8 is only for sequences; one
            pass over the data finds a scale for each step and feature.
        by_layer: Whether to store sequences, which must all have one length, layer by layer. None does as the source.
        layers: Numbers of the layers (or steps) and graphs of each record to keep; None keeps all.
        num_workers: Number of processes; "auto" is one per core. Not used by Ray.
        skip_bad: Whether to leave out a file that cannot be converted, instead of stopping.
        engine: "local", or "ray" for tasks of a Ray cluster whose nodes see both folders.
        traces: Options for reading traces.
        recipe: Which keys of the files become what; an empty one infers it.
        in_place: Whether the values stay in the files, to which the data set then refers.
        files_root: Folder of the values of the source, if that is a data set in place; None for where they lay.

    Raises:
        UsageError: A value is not one of those above.
    """

    split: SplitRule | None = None
    split_by: Literal["group", "file"] = "group"
    shard_bytes: int = SHARD_BYTES
    dtype: str | None = None
    by_layer: bool | None = None
    layers: Layers = None
    num_workers: NumWorkers = "auto"
    skip_bad: bool = False
    engine: Engine = "local"
    traces: TraceOptions = field(default_factory=TraceOptions)
    recipe: Recipe = field(default_factory=Recipe)
    in_place: bool = False
    files_root: str | None = None

    def __post_init__(self) -> None:
        for name, dtype in self.dtypes.items():
            known = DTYPES if name == "sequence" else DTYPES[:-1]
            if dtype not in known or not (name in FIELDS or level_of(name) in (*LEVELS, *SEQUENCE_LEVELS)):
                raise UsageError(
                    f"dtype is {self.dtype!r}; expected {', '.join(DTYPES)}, or by field, of "
                    f"{', '.join(FIELDS)} or a further field, such as sequence=int8,x=float16; int8 for sequences alone"
                )
        if self.split_by not in ("group", "file"):
            raise UsageError(f"split by {self.split_by!r}; expected group or file")
        if self.engine not in get_args(Engine):
            raise UsageError(f"engine is {self.engine!r}; expected {' or '.join(get_args(Engine))}")
        if self.num_workers != "auto" and self.num_workers < 1:
            raise UsageError(f"num_workers is {self.num_workers}; expected at least 1")
        if self.in_place and (self.dtype is not None or self.by_layer or self.layers is not None):
            raise UsageError("values that stay in place are not changed; leave --dtype, --by-layer and --layers out")

    @property
    def dtypes(self) -> dict[str, str]:
        """Return the stored type of each field that `dtype` names."""
        if self.dtype is None:
            return {}
        if "=" not in self.dtype:
            return dict.fromkeys(FIELDS if self.dtype != "int8" else FIELDS[:1], self.dtype)
        return {name: dtype for name, _, dtype in (part.partition("=") for part in self.dtype.split(","))}

    @property
    def keeps_splits(self) -> bool:
        """Whether to keep the splits of the source if it has any."""
        return self.split is None and self.split_by == "group"

    def fingerprint(self, source: Source) -> str:
        """Return a hash of the files' names and sizes and of the settings; it differs between different conversions."""
        layers = str(self.layers) if isinstance(self.layers, slice) else self.layers
        done = (
            self.split or SplitRule(),
            self.split_by,
            self.shard_bytes,
            self.dtype,
            layers,
            self.traces,
            *([True] if self.by_layer else []),
        )
        more: tuple[str, ...] = ("by layer",) if self.by_layer else ()  # older conversions had no such setting
        if self.keeps_splits and (source.reader.what == OWN or splits_in_names(source.names, SplitRule())):
            more += ("own splits",)
        more += ("in place",) if self.in_place else ()
        followed = () if source.plan is None else source.plan.facts
        followed += () if source.relabelling is None else source.relabelling.facts
        return xxhash.xxh3_128_hexdigest(
            msgspec.json.encode((source.names, source.sizes, *done, *more, *followed), order="sorted")
        )
