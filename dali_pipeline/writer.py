"""ShardWriter: records in, a data set out; the manifest last, so that a folder is a data set or is none."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
import xxhash

from dali_pipeline.manifest import MANIFEST_NAME, Manifest, ShardTable, empty_splits, shard_path
from dali_pipeline.moments import Moments
from dali_pipeline.pending import Pending, record_arrays, whole_label
from dali_pipeline.schema import SPLITS, DataError, FormatError, Kind, Record, Schema, UsageError
from dali_pipeline.shard import Files, Shard, write_shard, write_whole
from dali_pipeline.split import Split

JOURNAL_NAME = "journal.json"
JOURNAL_TEMPORARY = JOURNAL_NAME + ".tmp"
SHARD_BYTES = 256 << 20


@dataclass(kw_only=True)
class Journal:
    """What an unfinished data set has so far; the next process goes on from here. cursor: the caller's own place."""

    fingerprint: str
    cursor: int = 0
    splits: dict[str, dict[Kind, ShardTable]] = field(default_factory=empty_splits)
    moments: Moments = field(default_factory=Moments)


class ShardWriter:
    """Writes a data set into folder `root`; use it as a context manager.

    Records go to their split by group and fill shards of up to `shard_bytes` (a larger record has a shard of its own); at
    most one unwritten shard a split and kind is in memory. Leaving the `with` block writes the manifest; an exception
    leaves none, and takes away what was written unless a `commit` made it final.

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
        self.root = Path(root)
        self.schema = schema
        self.shard_bytes = shard_bytes
        self.split = split or Split()
        self.source = dict(source or {})
        self._journal = self._claim_folder(fingerprint)
        self._save_journal()
        self._pending = {(name, kind): Pending(kind) for name in SPLITS for kind in schema.kinds}

    @property
    def cursor(self) -> int:
        """What the last `commit` was given, in this process or an earlier one; 0 before the first."""
        return self._journal.cursor

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self.close()
        finally:
            if not self.cursor and not (self.root / MANIFEST_NAME).exists():
                self._remove()

    def write(self, record: Record | Mapping[str, Any]) -> None:
        """Adds a `Record`, or a mapping with its names, to the split of its group."""
        record = Record.of(record)
        label = whole_label(record)
        group = record.id if record.group is None else record.group
        split = self.split.of(group)
        written = False
        for kind in self.schema.kinds:
            if (record.sequence if kind == "sequences" else record.graphs) is None:
                continue
            arrays, rows = record_arrays(record, self.schema, kind)
            nbytes = sum(array.nbytes for array in arrays.values())
            if self._pending[split, kind].nbytes + nbytes > self.shard_bytes:
                self._flush(split, kind)
            self._pending[split, kind].add(record.id, group, label, arrays, nbytes)
            self._journal.splits[split][kind].count(label, rows)
            written = True
        if not written:
            raise DataError(
                f"record {record.id!r} has neither of the schema's kinds; expected {' or '.join(self.schema.kinds)}"
            )

    def commit(self, cursor: int) -> None:
        """Closes the open shards and notes `cursor`: a restart begins here. Costs a small file and one fsync a shard."""
        for split, kind in self._pending:
            self._flush(split, kind)
        self._journal.cursor = cursor
        self._save_journal()

    def close(self) -> Manifest:
        """Writes what is left and the manifest, and returns it. Raises DataError for no records, or an id given twice."""
        for split, kind in self._pending:
            self._flush(split, kind)
        splits = self._journal.splits
        if not any(len(table) for tables in splits.values() for table in tables.values()):
            raise DataError(f"no records were written to {self.root}; expected at least one")
        self._check_ids()
        kinds = self.schema.kinds
        Manifest(
            schema=self.schema,
            splits={split: {kind: tables[kind] for kind in kinds} for split, tables in splits.items()},
            statistics=self._journal.moments.statistics(),
            source=self.source,
        ).save(self.root)
        (self.root / JOURNAL_NAME).unlink(missing_ok=True)
        return Manifest.load(self.root)

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

    def _claim_folder(self, fingerprint: str) -> Journal:
        """Makes the folder and marks it by a journal; finds the journal of the same work; refuses anything else."""
        journal = self.root / JOURNAL_NAME
        if (self.root / MANIFEST_NAME).exists():
            raise UsageError(f"{self.root} is a finished data set already; expected a new folder")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            found = sorted(entry.name for entry in self.root.iterdir() if entry.name != JOURNAL_TEMPORARY)
            earlier = msgspec.json.decode(journal.read_bytes(), type=Journal) if JOURNAL_NAME in found else None
        except msgspec.DecodeError as error:
            raise FormatError(f"{journal} is not a journal ({error}); remove the folder to begin anew") from None
        except OSError as error:
            raise UsageError(f"{self.root} cannot hold a data set ({error.strerror}); expected a writable folder") from error
        if earlier is None and found:
            raise UsageError(f"{self.root} is not empty (it holds {found[0]}); expected a new or empty folder")
        if earlier and earlier.cursor and earlier.fingerprint != fingerprint:
            raise UsageError(f"{self.root} holds an unfinished data set of other input or settings; finish or remove it")
        return earlier if earlier and earlier.cursor else Journal(fingerprint=fingerprint)

    def _save_journal(self) -> None:
        write_whole(self.root / JOURNAL_NAME, msgspec.json.encode(self._journal))

    def _remove(self) -> None:
        """Takes away what was written. Safe: the folder was empty, or carried our journal, when this writer claimed it."""
        for split in SPLITS:
            shutil.rmtree(self.root / split, ignore_errors=True)
        for name in (JOURNAL_NAME, JOURNAL_TEMPORARY):
            (self.root / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.root.rmdir()
