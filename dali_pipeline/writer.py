"""ShardWriter: records in, a data set out; the manifest last, so that a folder is a data set or is none."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
import xxhash

from dali_pipeline.files import Files
from dali_pipeline.journal import WorkFolder
from dali_pipeline.manifest import Manifest, shard_path
from dali_pipeline.pending import Pending, as_bytes, record_arrays, whole_label
from dali_pipeline.schema import SPLITS, DataError, Kind, Record, Schema, UsageError
from dali_pipeline.shard import Shard, write_shard
from dali_pipeline.split import Split

SHARD_BYTES = 256 << 20


class ShardWriter:
    """Writes a data set into folder `root`; use it as a context manager.

    Records go to their split by group and fill shards of up to `shard_bytes` (a larger record has a shard of its own).
    Leaving the `with` block writes the manifest; an exception leaves none, and takes away what was written unless a
    `commit` made it final. Memory: what waits for its shard, at most one shard a split and kind, and a copy of the one
    being written.

    Restartable where `fingerprint` (a text that names input and settings) is given: `commit(cursor)` makes all records so
    far final; opened again with the same fingerprint, `cursor` is the one last committed, and the caller goes on there.
    Same records and same commits give the same bytes, interrupted or not.

    Raises UsageError where `root` holds something else; DataError for a record that does not fit the schema, or an id
    given twice (found at the end, from the ids as written).
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        schema: Schema,
        *,
        shard_bytes: int = SHARD_BYTES,
        split: Split | None = None,
        source: Mapping[str, Any] | None = None,
        fingerprint: str = "",
    ) -> None:
        if shard_bytes < 1:
            raise UsageError(f"shard_bytes is {shard_bytes}; expected at least 1")
        try:
            self.source = msgspec.json.decode(msgspec.json.encode(dict(source or {})))
        except (TypeError, ValueError) as error:
            raise UsageError(f"source cannot be written as JSON ({error}); expected plain values") from None
        self.root = Path(root)
        self.schema = schema
        self.shard_bytes = shard_bytes
        self.split = split or Split()
        self._folder = WorkFolder(self.root, fingerprint)
        self._journal = self._folder.journal
        self._pending = {(name, kind): Pending(kind) for name in SPLITS for kind in schema.kinds}
        self._closed = False

    @property
    def cursor(self) -> int:
        """What the last `commit` was given, in this process or an earlier one; 0 before the first."""
        return self._journal.cursor

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None and not self._closed:
                self.close()
        finally:
            self._closed = True
            self._folder.abandon()

    def write(self, record: Record | Mapping[str, Any]) -> None:
        """Adds a `Record`, or a mapping with its names, to the split of its group: whole, or not at all where it is refused."""
        if self._closed:
            raise UsageError(f"{self.root} is closed; records must be written before")
        record = Record.of(record)
        label, group = whole_label(record), record.id if record.group is None else record.group
        id_bytes, group_bytes = as_bytes(record, "id", record.id), as_bytes(record, "group", group)
        split = self.split.of(group)
        given = {"sequences": record.sequence, "graphs": record.graphs}
        arrays = {kind: record_arrays(record, self.schema, kind) for kind in self.schema.kinds if given[kind] is not None}
        if not arrays:
            raise DataError(
                f"record {record.id!r} has neither of the schema's kinds; expected {' or '.join(self.schema.kinds)}"
            )
        for kind, (parts, rows) in arrays.items():
            if self._pending[split, kind].nbytes + sum(part.nbytes for part in parts.values()) > self.shard_bytes:
                self._flush(split, kind)
            self._pending[split, kind].add(id_bytes, group_bytes, label, parts)
            self._journal.splits[split][kind].count(label, rows)

    def commit(self, cursor: int) -> None:
        """Closes the open shards and notes `cursor`: a restart begins here. Costs a small file and one fsync a shard."""
        for split, kind in list(self._pending):
            self._flush(split, kind)
        self._journal.cursor, self._journal.committed = cursor, True
        self._folder.save()

    def close(self) -> Manifest:
        """Writes what is left and the manifest, and returns it. Raises DataError for no records, or an id given twice."""
        for split, kind in list(self._pending):
            self._flush(split, kind)
        splits = self._journal.splits
        if not any(len(table) for tables in splits.values() for table in tables.values()):
            raise DataError(f"no records were written to {self.root}; expected at least one")
        self._check_ids()
        manifest = Manifest(
            schema=self.schema,
            splits={split: {kind: tables[kind] for kind in self.schema.kinds} for split, tables in splits.items()},
            statistics=self._journal.moments.statistics(),
            source=self.source,
        ).save(self.root)
        self._closed = True
        self._folder.finish()
        return manifest

    def _flush(self, split: str, kind: Kind) -> None:
        pending = self._pending[split, kind]
        if not pending.labels:
            return
        table = self._journal.splits[split][kind]
        arrays = pending.concatenated()
        if kind == "sequences" and split == "train":
            self._journal.moments.update(arrays["sequence"])
        path = shard_path(self.root, split, kind, len(table))
        path.parent.mkdir(parents=True, exist_ok=True)
        table.append(write_shard(path, kind, len(pending.labels), arrays))
        self._pending[split, kind] = Pending(kind)

    def _check_ids(self) -> None:
        """Reads every id back; a hash a record finds candidates, the ids themselves decide."""
        for kind in self.schema.kinds:
            ids = [
                one
                for split, tables in self._journal.splits.items()
                for shard in range(len(tables[kind]))
                for one in self._shard_ids(split, kind, shard)
            ]
            hashes, counts = np.unique(
                np.fromiter((xxhash.xxh3_64_intdigest(one) for one in ids), np.uint64, len(ids)), return_counts=True
            )
            for suspect in hashes[counts > 1]:
                same = [one for one in ids if xxhash.xxh3_64_intdigest(one) == suspect]
                if len(set(same)) < len(same):
                    raise DataError(f"id {same[0].decode()!r} is given to {len(same)} {kind} records; expected each id once")

    def _shard_ids(self, split: str, kind: Kind, shard: int) -> list[bytes]:
        table = self._journal.splits[split][kind]
        path = shard_path(self.root, split, kind, shard)
        opened = Shard(
            path, nbytes=table.bytes[shard], digest=table.digest(shard), sound=bytearray(table.blocks[shard]), files=Files()
        )
        blob, offsets = opened.read("ids").tobytes(), opened.read("ids.offsets").tolist()
        return [blob[a:b] for a, b in itertools.pairwise(offsets)]
