"""ShardCheck: check one shard, and collect what `verify` compares over all shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

import numpy as np
import numpy.typing as npt

from dali_pipeline.dataset.dataset import Dataset
from dali_pipeline.errors import FormatError
from dali_pipeline.format.encoding import BFLOAT16, TEXT, decode
from dali_pipeline.format.schema import Field, a_or_an, level_of
from dali_pipeline.format.shard import Hashes, Shard, hash_texts
from dali_pipeline.storage.files import Files
from dali_pipeline.types import Array, Kind

MOST_FILES = 20  # faults of files of others that are named, per array of a shard
EXPONENTS = {
    "float16": ("<u2", 0x7C00),
    BFLOAT16: ("<u2", 0x7F80),
    "float32": ("<u4", 0x7F800000),
    "float64": ("<u8", 0x7FF0000000000000),
}
# ragged arrays, the array whose rows each of them divides, and the manifest's name of its rows
RAGGED: dict[Kind, tuple[tuple[str, str, str], ...]] = {
    "sequences": (("sequence", "labels", "step"),),
    "graphs": (("graphs", "labels", "graph"), ("x", "graphs", "node"), ("edge_index", "graphs", "edge")),
}
COUNTED = {
    "step": "sequence",
    "node": "x",
    "edge": "edge_index",
    "graph": "graphs",
}  # the array whose offsets end with the number of nodes, edges or graphs


@dataclass(eq=False)
class ShardCheck:
    """Checks of one shard. Results that damage hides stay None or empty.

    Attributes:
        data: The data set.
        split, kind, number: Split, kind and number of the shard.
        damages: One line per damage.
        ids, groups: Hashes, one per record.
        labels: (records, *shape) in the stored type.
        rows: Smallest and largest number of rows per record, by axis.
        bytes: Bytes that were read.
    """

    data: Dataset
    split: str
    kind: Kind
    number: int
    damages: list[str] = dataclass_field(default_factory=list)
    ids: Hashes = dataclass_field(default_factory=lambda: np.zeros(0, np.uint64))
    groups: Hashes = dataclass_field(default_factory=lambda: np.zeros(0, np.uint64))
    labels: Array | None = None
    rows: dict[str, tuple[int, int]] = dataclass_field(default_factory=dict)
    bytes: int = 0
    _offsets: dict[str, npt.NDArray[np.int64]] = dataclass_field(default_factory=dict)

    @property
    def path(self) -> Any:
        """The shard's file."""
        return self.data.shard_path(self.split, self.kind, self.number)

    def open(self) -> Shard:
        """Open the shard; raise FormatError if it does not fit the manifest."""
        shards = self.data.shards(self.split, self.kind)
        return shards.open(self.number, Files(2))

    def run(self, quick: bool, advance: Callable[[int], None]) -> None:
        """Check the whole shard, or with `quick` everything but its values. advance: called with the bytes that were read."""
        try:
            shard = self.open()
        except FormatError as error:
            self.damages.append(str(error))
            return
        schema = self.data.schema
        fields = self._fields()
        if schema.labels.dtype is not None:
            self._step(self._check_labels, shard)
        self._step(self._check_texts, shard, "ids")
        self._step(self._check_texts, shard, "groups")
        for name, counted_in, axis in RAGGED[self.kind]:
            self._step(self._check_offsets, shard, name, counted_in, axis)
        for name, field in fields.items():
            self._check_field(shard, name, field, quick, advance)
        if self.kind == "graphs":
            self._step(self._check_type, shard, "edge_index", ("uint8", "uint16", "uint32"), (2,))
            if not quick:
                self._step(self._check_edges, shard)
        known = {"labels", "ids", "groups", "edge_index", *fields, *(name for name, _, _ in RAGGED[self.kind])}
        for name in shard.arrays:
            if name.removesuffix(".offsets") not in known and not quick:
                self._step(self._check_values, shard, name, advance)
        self._offsets.clear()

    def _fields(self) -> dict[str, Field]:
        """Return the fields of this kind of record as arrays of the shard have them."""
        schema = self.data.schema
        if self.kind == "graphs":
            return schema.of_graphs | schema.record_fields
        return {"sequence": schema.stored_sequence, **schema.step_fields, **schema.record_fields}

    def _check_field(self, shard: Shard, name: str, field: Field, quick: bool, advance: Callable[[int], None]) -> None:
        if field.dtype == TEXT:
            self._step(self._check_texts, shard, name)
            return
        self._step(self._check_type, shard, name, (field.storage.name,), field.shape)
        if name != "sequence":
            self._step(self._check_rows, shard, name)
        if not quick:
            self._step(self._check_values, shard, name, advance, field)

    def _step(self, check: Callable[..., None], *arguments: object) -> None:
        """Run one check; add its damage as a line, so that the other checks still run."""
        try:
            check(*arguments)
        except FormatError as error:
            if str(error) not in self.damages:
                self.damages.append(str(error))

    def _fail(self, name: str, words: str) -> FormatError:
        return FormatError(f"{self.path}, {name}: {words}")

    def _read(self, shard: Shard, name: str) -> Array:
        self.bytes += shard.array(name).nbytes
        return shard.read(name)

    def _check_type(self, shard: Shard, name: str, dtypes: tuple[str, ...], row: tuple[int, ...]) -> None:
        layout = shard.array(name)
        if layout.dtype.name not in dtypes or layout.shape[1:] != row or not layout.shape:
            raise self._fail(name, f"{layout.dtype} {layout.shape}; expected {' or '.join(dtypes)} in rows of {row}")

    def _check_labels(self, shard: Shard) -> None:
        label = self.data.schema.labels
        self._check_type(shard, "labels", (str(label.dtype),), label.shape)
        labels = self._read(shard, "labels")
        if label.kind == "value" and not np.isfinite(labels).all():
            raise self._fail("labels", "values that are not finite; expected finite numbers")
        if len(labels) != shard.records or (label.kind == "class" and (labels < 0).any()):
            raise self._fail(
                "labels", f"{len(labels)}, the least {labels.min(initial=0)}; expected {shard.records} of 0 or more"
            )
        if label.names and label.kind == "class" and labels.max(initial=0) >= len(label.names):
            raise self._fail(
                "labels", f"the highest is {labels.max()}; expected numbers below {len(label.names)}, as class_names"
            )
        self.labels = labels

    def _check_texts(self, shard: Shard, name: str) -> None:
        self._check_type(shard, name, ("uint8",), ())
        self._offsets_of(shard, name, shard.records)
        self.bytes += shard.array(name).nbytes
        texts = shard.texts(name)
        for row, text in enumerate(texts):
            try:
                text.decode()
            except UnicodeDecodeError as error:
                raise self._fail(name, f"record {row} is not UTF-8 ({error.reason})") from None
        if name in ("ids", "groups"):
            setattr(self, name, hash_texts(texts))

    def _check_offsets(self, shard: Shard, name: str, counted_in: str, axis: str) -> None:
        outer = np.arange(shard.records + 1) if counted_in == "labels" else self._offsets.get(counted_in)
        if outer is None:
            return  # damaged, which another check reports
        offsets = self._offsets_of(shard, name, int(outer[-1]))
        self._offsets[name] = offsets
        lengths = np.diff(offsets)
        if name != "edge_index" and len(lengths) and lengths.min() < 1:
            raise self._fail(f"{name}.offsets", f"row {int(lengths.argmin())} is empty; expected at least one {axis} in each")
        counts = np.diff(offsets[outer])
        self.rows[axis] = (int(counts.min()), int(counts.max()))

    def _offsets_of(self, shard: Shard, name: str, rows: int) -> npt.NDArray[np.int64]:
        self._check_type(shard, f"{name}.offsets", ("int64",), ())
        offsets: npt.NDArray[np.int64] = self._read(shard, f"{name}.offsets")
        if len(offsets) != rows + 1 or offsets[0] != 0 or (np.diff(offsets) < 0).any():
            raise self._fail(f"{name}.offsets", f"{len(offsets)} that do not rise from 0; expected {rows + 1} that do")
        length = int(offsets[-1]) if name == "graphs" else shard.array(name).shape[0] // self._layers(name)
        if offsets[-1] != length:
            raise self._fail(f"{name}.offsets", f"end at {offsets[-1]} of {length} rows; expected them to end with the array")
        return offsets

    def _layers(self, name: str) -> int:
        """Return how many rows an array has per step: the layers, if a sequence has an axis named layer."""
        return self.data.schema.stored_layers if name == "sequence" else 1

    def _check_values(self, shard: Shard, name: str, advance: Callable[[int], None], field: Field | None = None) -> None:
        """Check the hash of every block, and, if `field` is given, that its numbers are finite."""
        layout, dtype = shard.array(name), "" if field is None else field.dtype
        view, mask = EXPONENTS.get(dtype, ("u1", 0))
        exponent = np.array(mask, view)[()]
        bad_blocks: list[int] = []
        faults: dict[str, None] = {}  # of files of others, each once
        strange: list[Array] = []  # numbers of elements that are not finite, and which of them are NaN
        for start, data, wrong in shard.blocks(name):
            self.bytes += len(data)
            advance(len(data))
            if wrong and layout.referenced:
                faults.setdefault(wrong)
            elif wrong:
                bad_blocks.append(start)
            elif mask and len(found := _not_finite(data, view, exponent)):
                nan = np.isnan(decode(data.view(layout.dtype)[found], dtype, None))
                strange.append(np.stack([found + start // layout.dtype.itemsize, nan]))
        if strange:
            elements, nan = np.concatenate(strange, axis=1)
            rows = elements // max(1, int(np.prod(layout.shape[1:])))
            if field is not None and field.layout is not None:
                rows = field.layout.numbered(rows, layout.shape[0])
            self._step(self._tell_strange, name, rows, nan)
        self.damages += [fault for fault in [*faults][:MOST_FILES] if fault not in self.damages]
        if len(faults) > MOST_FILES:
            raise self._fail(name, f"{len(faults) - MOST_FILES} more faults in files that it refers to")
        if bad_blocks:
            raise self._fail(name, f"{len(bad_blocks)} blocks are damaged, the first at byte {bad_blocks[0]} (wrong hash)")

    def _tell_strange(self, name: str, rows: Array, nan: Array) -> None:
        """Report values that are not finite, counted by layer, which is the step or graph of a record."""
        level = level_of(name)
        outer, inner = self._offsets.get("graphs"), self._offsets.get(COUNTED.get(level, name))
        outer = None if level == "graph" else outer
        where = ""
        if inner is not None:
            inner = inner * self._layers(name)
            owners = np.searchsorted(inner, rows, side="right") - 1  # the record or graph of each row
            layers = rows - inner[owners]
            if self._layers(name) > 1:
                sequence = self.data.schema.sequence
                within = layers // (np.diff(inner)[owners] // self._layers(name))
                layers = layers % self._layers(name) if sequence is not None and sequence.step_major else within
            if outer is not None:
                layers = owners - outer[np.searchsorted(outer, owners, side="right") - 1]
            distinct, counts = np.unique(layers, return_counts=True)
            listed = [f"{layer}: {count}" for layer, count in zip(distinct[:8].tolist(), counts[:8].tolist(), strict=True)]
            where = f"; by layer {', '.join(listed)}{' …' if len(distinct) > 8 else ''}"
        raise self._fail(name, f"{int(nan.sum())} NaN and {int((1 - nan).sum())} infinite values{where}")

    def _check_rows(self, shard: Shard, name: str) -> None:
        """Check that a field has one row per step, record, node, edge or graph."""
        level = level_of(name)
        offsets, rows = self._offsets.get(COUNTED.get(level, "")), shard.array(name).shape[0]
        expected = shard.records if level == "record" else None if offsets is None else int(offsets[-1])
        if expected is not None and rows != expected:
            raise self._fail(name, f"{rows} rows for {expected} {level}s; expected one {a_or_an(level)}")

    def _check_edges(self, shard: Shard) -> None:
        """Check that every edge connects nodes of its own graph."""
        nodes, edges = self._offsets.get("x"), self._offsets.get("edge_index")
        edge_index = self._read(shard, "edge_index")
        if nodes is None or edges is None:
            return
        limit = np.repeat(np.diff(nodes), np.diff(edges))
        wrong = np.flatnonzero((edge_index >= limit[:, None]).any(axis=1))
        if len(wrong):
            graph = int(np.searchsorted(edges, wrong[0], side="right")) - 1
            raise self._fail(
                "edge_index", f"{len(wrong)} edges leave their graph, the first in graph {graph} of {limit[wrong[0]]} nodes"
            )


def _not_finite(data: Array, view: str, exponent: Any) -> Array:
    """Return the numbers of the elements whose exponent says that they are NaN or infinite."""
    masked = data.view(view) & exponent
    return np.flatnonzero(masked == exponent) if masked.max(initial=0) == exponent else np.zeros(0, np.int64)
