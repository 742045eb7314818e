"""ShardFiller: write records into shards, without a manifest; used by ShardWriter and by each worker of a conversion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from dali_pipeline.errors import DataError
from dali_pipeline.format.encoding import BFLOAT16
from dali_pipeline.format.manifest import ShardTable, empty_splits, shard_path
from dali_pipeline.format.record import Record, named_rows
from dali_pipeline.format.schema import Schema
from dali_pipeline.types import KINDS, Array, Kind
from dali_pipeline.writing.moments import Moments
from dali_pipeline.writing.openshard import STREAMED, OpenShard, Stack, as_bytes, check_layers, record_arrays
from dali_pipeline.writing.places import PlacedRecord


class Dealer(Protocol):
    """Interface of a rule that assigns groups to splits."""

    def of(self, group: str) -> str:
        """Return the name of the group's split."""


@dataclass(kw_only=True)
class Contents:
    """What was written.

    Attributes:
        splits: Shard table per split and kind.
        moments: Moments of the training split's sequences.
        node_moments: Moments of the training split's nodes.
    """

    splits: dict[str, dict[Kind, ShardTable]] = field(default_factory=empty_splits)
    moments: Moments = field(default_factory=Moments)
    node_moments: Moments = field(default_factory=Moments)

    @property
    def shards(self) -> list[tuple[str, Kind, int]]:
        """Split, kind and number of every shard."""
        return [
            (split, kind, shard)
            for split, tables in self.splits.items()
            for kind, table in tables.items()
            for shard in range(len(table))
        ]

    def extend(self, other: Contents) -> None:
        """Append the shards and moments that another filler wrote."""
        for split, tables in other.splits.items():
            for kind, table in tables.items():
                self.splits[split][kind].extend(table)
        self.moments.extend(other.moments)
        self.node_moments.extend(other.node_moments)


class ShardFiller:
    """Fill shards under a folder and record them in `contents`.

    Memory: a few MiB, and the edges, names and labels of one shard per split.

    Args:
        root: Folder of the data set.
        schema: Fields of every record.
        shard_bytes: Size of a shard in bytes, at most.
        dealer: Rule that assigns groups to splits.
        contents: Tables that finished shards are appended to.
    """

    def __init__(self, root: Path, schema: Schema, shard_bytes: int, dealer: Dealer, contents: Contents) -> None:
        self.root, self.schema, self.shard_bytes, self.dealer, self.contents = root, schema, shard_bytes, dealer, contents
        self._kinds = schema.kinds
        self._copied: dict[tuple[str, ...], Schema] = {}  # the schema without the arrays that stay in place
        self._open_shards: dict[tuple[str, Kind], OpenShard] = {}

    def check(self, record: Record | Stack | PlacedRecord) -> None:
        """Raise DataError if `write` would refuse the record."""
        if isinstance(record, Stack):
            record.rows(self.schema)
        elif isinstance(record, PlacedRecord):
            self._check_placed(record)
        else:
            self._check(record)

    def write(self, record: Record | Stack | PlacedRecord) -> None:
        """Add a record, or several, to the split of their group: as a whole, or not at all if refused (DataError)."""
        if isinstance(record, Stack):
            self._write_stack(record)
            return
        if isinstance(record, PlacedRecord):
            self.write_placed([record])
            return
        id_, group, label, split, arrays = self._check(record)
        for kind, (parts, rows) in arrays.items():
            nbytes, values = sum([part.nbytes for part in parts.values()]), parts.pop(STREAMED[kind])
            self._shard_for(split, kind, nbytes).add([id_], [group], [label], [values], parts)
            self.contents.splits[split][kind].count(self.schema.labels.counted(label), rows)

    def _check(
        self, record: Record
    ) -> tuple[bytes, bytes, Array | None, str, dict[Kind, tuple[dict[str, Array], dict[str, int]]]]:
        """Return id, group, label and split of a record, and per kind its arrays and its number of rows per axis."""
        group = record.id if record.group is None else record.group
        given = {"sequences": record.sequence, "graphs": record.graphs}
        arrays = {kind: record_arrays(record, self.schema, kind) for kind in self._kinds if given[kind] is not None}
        if not arrays:
            raise DataError(f"record {record.id!r} has neither of the schema's kinds; expected {' or '.join(self._kinds)}")
        texts = as_bytes(record, "id", record.id), as_bytes(record, "group", group)
        return *texts, self.schema.labels.stored(record.id, record.label), self.dealer.of(group), arrays

    def _write_stack(self, stack: Stack) -> None:
        """Write the same bytes as its records would give one by one, without a check and small arrays per record."""
        label, kind = self.schema.labels, KINDS[0]
        if stack.fields or self.schema.step_fields or self.schema.record_fields:
            for row in range(len(stack.ids)):
                self.write(stack.record(row))
            return
        rows = stack.rows(self.schema)
        labels = [label.stored(name, given) for name, given in zip(stack.ids, stack.labels, strict=True)]
        ids, groups = ([text.encode() for text in texts] for texts in (stack.ids, stack.groups))
        length, nbytes = rows.shape[1], rows[0].nbytes + 8
        splits = [self.dealer.of(group) for group in stack.groups]
        for split in dict.fromkeys(splits):
            members = [row for row, row_split in enumerate(splits) if row_split == split]
            for counted, times in Counter(label.counted(labels[row]) for row in members).items():
                self.contents.splits[split][kind].count(counted, {"step": length}, times)
            while members:
                shard = self._shard_for(split, kind, nbytes)
                max_records = max(1, (self.shard_bytes - shard.nbytes) // nbytes)
                taken, members = members[:max_records], members[max_records:]
                counts = {"sequence.counts": np.full(len(taken), length)}
                shard.add(
                    [ids[row] for row in taken],
                    [groups[row] for row in taken],
                    [labels[row] for row in taken],
                    [rows[row] for row in taken],
                    counts,
                )

    def write_placed(self, records: Iterable[PlacedRecord]) -> None:
        """Add records whose values stay in files of others: all of them, or none if one is refused (DataError)."""
        kind = KINDS[0]
        for record, (arrays, label, split) in [(record, self._check_placed(record)) for record in records]:
            self._shard_for(split, kind, record.nbytes, in_place=True).add_placed(record, label, arrays)
            self.contents.splits[split][kind].count(self.schema.labels.counted(label), {"step": record.steps})

    def _check_placed(self, record: PlacedRecord) -> tuple[dict[str, Array], Array | None, str]:
        """Return the arrays of such a record that are copied, its label and split; raise DataError if it does not fit."""
        stays = tuple(record.pieces)
        if stays not in self._copied:
            fields = {name: field for name, field in (self.schema.fields or {}).items() if name not in stays}
            self._copied[stays] = replace(self.schema, fields=fields or msgspec.UNSET)
        given = Record(id=record.id, group=record.group, label=record.label, fields=record.fields)
        check_layers(record.id, record.steps, self.schema)
        arrays = named_rows(given, self._copied[stays], KINDS[0], record.steps)
        arrays["sequence.counts"] = np.array([record.steps])
        for name in ("id", "group"):
            as_bytes(given, name, getattr(record, name))
        return arrays, self.schema.labels.stored(record.id, record.label), self.dealer.of(record.group)

    def _shard_for(self, split: str, kind: Kind, nbytes: int, *, in_place: bool = False) -> OpenShard:
        """Return the open shard that a record of `nbytes` bytes goes to."""
        shard = self._open_shards.get((split, kind))
        if shard is None or shard.nbytes + nbytes > self.shard_bytes:
            self._flush(split, kind)
            expected = 0 if in_place else max(nbytes, self.shard_bytes)
            shard = self._open_shards[split, kind] = self._begin(split, kind, expected, in_place)
        return shard

    def flush(self) -> None:
        """Close the open shards, so every record is in a finished one."""
        for split, kind in list(self._open_shards):
            self._flush(split, kind)

    def discard(self) -> None:
        """Remove the open shards."""
        for shard in self._open_shards.values():
            shard.discard()
        self._open_shards.clear()

    def _begin(self, split: str, kind: Kind, expected_bytes: int, in_place: bool) -> OpenShard:
        path = shard_path(self.root, split, kind, len(self.contents.splits[split][kind]))
        path.parent.mkdir(parents=True, exist_ok=True)
        field = self.schema.sequence if kind == "sequences" else self.schema.x
        moments = self.contents.moments if kind == "sequences" else self.contents.node_moments
        assert field is not None
        values, rows_seen = field.values, 0  # rows of this shard, which begins with a record

        def update_moments(rows: Array) -> None:
            nonlocal rows_seen
            if field.dtype == BFLOAT16:
                moments.update(rows, bfloat16=True)
            else:
                moments.update(values(rows, rows_seen))
            rows_seen += len(rows)

        on_rows = update_moments if split == "train" else None
        return OpenShard(path, kind, self.schema, expected_bytes, on_rows, in_place=in_place)

    def _flush(self, split: str, kind: Kind) -> None:
        shard = self._open_shards.pop((split, kind), None)
        if shard is not None:
            self.contents.splits[split][kind].append(shard.close())
