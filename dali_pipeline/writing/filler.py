"""ShardFiller: records in, shards out; no manifest yet. What a ShardWriter writes with, and each worker of a conversion."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from dali_pipeline.errors import DataError
from dali_pipeline.format.manifest import ShardTable, empty_splits, shard_path
from dali_pipeline.format.record import Record
from dali_pipeline.format.schema import Schema
from dali_pipeline.types import KINDS, Array, Kind
from dali_pipeline.writing.moments import Moments
from dali_pipeline.writing.pending import STREAMED, Pending, Stack, as_bytes, record_arrays, whole_label


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


class ShardFiller:
    """Fills shards under `root` and notes them in `contents`.

    Memory: a few MiB, and the edges, names and labels of a shard a split.
    """

    def __init__(self, root: Path, schema: Schema, shard_bytes: int, dealer: Dealer, contents: Contents) -> None:
        self.root, self.schema, self.shard_bytes, self.dealer, self.contents = root, schema, shard_bytes, dealer, contents
        self._kinds = schema.kinds
        self._pending: dict[tuple[str, Kind], Pending] = {}

    def check(self, record: Record | Stack) -> None:
        """Raises DataError where `write` would refuse it."""
        if isinstance(record, Stack):
            record.rows(self.schema)
        else:
            self._check(record)

    def write(self, record: Record | Stack) -> None:
        """Adds a record, or several, to the split of its group: whole, or not at all where it is refused (DataError)."""
        if isinstance(record, Stack):
            self._write_stack(record)
            return
        id_, group, label, split, arrays = self._check(record)
        for kind, (parts, rows) in arrays.items():
            nbytes, values = sum([part.nbytes for part in parts.values()]), parts.pop(STREAMED[kind])
            self._with_room(split, kind, nbytes).add([id_], [group], [label], [values], parts)
            self.contents.splits[split][kind].count(label, rows)

    def _check(self, record: Record) -> tuple[bytes, bytes, int, str, dict[Kind, tuple[dict[str, Array], dict[str, int]]]]:
        """Id, group, label and split of a record, and for each kind its arrays, and its rows by axis."""
        group = record.id if record.group is None else record.group
        given = {"sequences": record.sequence, "graphs": record.graphs}
        arrays = {kind: record_arrays(record, self.schema, kind) for kind in self._kinds if given[kind] is not None}
        if not arrays:
            raise DataError(f"record {record.id!r} has neither of the schema's kinds; expected {' or '.join(self._kinds)}")
        texts = as_bytes(record, "id", record.id), as_bytes(record, "group", group)
        return *texts, whole_label(record), self.dealer.of(group), arrays

    def _write_stack(self, stack: Stack) -> None:
        """The same bytes as its records one by one would give, without their checks and small arrays one by one."""
        rows, kind = stack.rows(self.schema), KINDS[0]
        ids, groups = ([text.encode() for text in texts] for texts in (stack.ids, stack.groups))
        length, nbytes = rows.shape[1], rows[0].nbytes + 8
        splits = [self.dealer.of(group) for group in stack.groups]
        for split in dict.fromkeys(splits):
            mine = [at for at, each in enumerate(splits) if each == split]
            for label, count in Counter(stack.labels[at] for at in mine).items():
                self.contents.splits[split][kind].count(label, {"step": length}, count)
            while mine:
                pending = self._with_room(split, kind, nbytes)
                fitting = max(1, (self.shard_bytes - pending.nbytes) // nbytes)
                now, mine = mine[:fitting], mine[fitting:]
                counts = {"sequence.counts": np.full(len(now), length)}
                labels = [stack.labels[at] for at in now]
                pending.add([ids[at] for at in now], [groups[at] for at in now], labels, [rows[at] for at in now], counts)

    def _with_room(self, split: str, kind: Kind, nbytes: int) -> Pending:
        """The shard that a record of so many bytes goes to."""
        pending = self._pending.get((split, kind))
        if pending is None or pending.nbytes + nbytes > self.shard_bytes:
            self._flush(split, kind)
            pending = self._pending[split, kind] = self._begin(split, kind, max(nbytes, self.shard_bytes))
        return pending

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
        field = self.schema.sequence if (split, kind) == ("train", "sequences") else None
        seen = 0  # rows of this shard, which begins with a record

        def see(rows: Array) -> None:
            nonlocal seen
            assert field is not None
            self.contents.moments.update(field.values(rows, seen))
            seen += len(rows)

        return Pending(path, kind, self.schema, expected_bytes, None if field is None else see)

    def _flush(self, split: str, kind: Kind) -> None:
        pending = self._pending.pop((split, kind), None)
        if pending is not None:
            self.contents.splits[split][kind].append(pending.close())
