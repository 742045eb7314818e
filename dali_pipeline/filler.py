"""ShardFiller: records in, shards out; no manifest yet. What a ShardWriter writes with, and each worker of a conversion."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from dali_pipeline.manifest import ShardTable, empty_splits, shard_path
from dali_pipeline.moments import Moments
from dali_pipeline.pending import Pending, as_bytes, record_arrays, whole_label
from dali_pipeline.schema import Array, DataError, Kind, Record, Schema


class Dealer(Protocol):
    """Says which split a group goes to."""

    def of(self, group: str) -> str:
        """The name of the split."""


@dataclass(kw_only=True)
class Contents:
    """What was written: the shards of each split and kind, and the moments of the training split's sequences."""

    splits: dict[str, dict[Kind, ShardTable]] = field(default_factory=empty_splits)
    moments: Moments = field(default_factory=Moments)

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
        """Takes in what another filler wrote, its shards behind these."""
        for split, tables in other.splits.items():
            for kind, table in tables.items():
                self.splits[split][kind].extend(table)
        self.moments.extend(other.moments)


class Checked(NamedTuple):
    """A record that can be written. arrays: of each kind its arrays, and its rows by axis."""

    id: bytes
    group: bytes
    label: int
    split: str
    arrays: dict[Kind, tuple[dict[str, Array], dict[str, int]]]


class ShardFiller:
    """Fills shards under `root` and notes them in `contents`.

    Memory: a few MiB, and the edges, names and labels of a shard a split.
    """

    def __init__(self, root: Path, schema: Schema, shard_bytes: int, dealer: Dealer, contents: Contents) -> None:
        self.root, self.schema, self.shard_bytes, self.dealer, self.contents = root, schema, shard_bytes, dealer, contents
        self._kinds = schema.kinds
        self._pending: dict[tuple[str, Kind], Pending] = {}

    def check(self, record: Record) -> Checked:
        """What would be written of the record; raises DataError where `write` would refuse it."""
        group = record.id if record.group is None else record.group
        given = {"sequences": record.sequence, "graphs": record.graphs}
        arrays = {kind: record_arrays(record, self.schema, kind) for kind in self._kinds if given[kind] is not None}
        if not arrays:
            raise DataError(f"record {record.id!r} has neither of the schema's kinds; expected {' or '.join(self._kinds)}")
        return Checked(
            id=as_bytes(record, "id", record.id),
            group=as_bytes(record, "group", group),
            label=whole_label(record),
            split=self.dealer.of(group),
            arrays=arrays,
        )

    def write(self, record: Record) -> None:
        """Adds a record to the split of its group: whole, or not at all where it is refused (DataError)."""
        new = self.check(record)
        for kind, (parts, rows) in new.arrays.items():
            pending, nbytes = self._pending.get((new.split, kind)), sum([part.nbytes for part in parts.values()])
            if pending is None or pending.nbytes + nbytes > self.shard_bytes:
                self._flush(new.split, kind)
                pending = self._pending[new.split, kind] = self._begin(new.split, kind, max(nbytes, self.shard_bytes))
            pending.add(new.id, new.group, new.label, parts)
            self.contents.splits[new.split][kind].count(new.label, rows)

    def flush(self) -> None:
        """Closes the shards under way, so that every record is in a whole one."""
        for split, kind in list(self._pending):
            self._flush(split, kind)

    def discard(self) -> None:
        """Takes away the shards under way."""
        for pending in self._pending.values():
            pending.discard()
        self._pending.clear()

    def _begin(self, split: str, kind: Kind, expected_bytes: int) -> Pending:
        path = shard_path(self.root, split, kind, len(self.contents.splits[split][kind]))
        path.parent.mkdir(parents=True, exist_ok=True)
        see = self.contents.moments.update if (split, kind) == ("train", "sequences") else None
        return Pending(path, kind, self.schema, expected_bytes, see)

    def _flush(self, split: str, kind: Kind) -> None:
        pending = self._pending.pop((split, kind), None)
        if pending is not None:
            self.contents.splits[split][kind].append(pending.close())
