"""ShardWriter: write records into a data set. The manifest is written last, so a folder is a complete data set or none."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np

from dali_pipeline.errors import DataError, UsageError, needs_extra
from dali_pipeline.format.manifest import ForeignFiles, Manifest, shard_path
from dali_pipeline.format.record import Record
from dali_pipeline.format.schema import Schema
from dali_pipeline.format.shard import Hashes, hash_texts
from dali_pipeline.runtime.checks import path, shown, whole
from dali_pipeline.storage.files import Files
from dali_pipeline.types import Kind
from dali_pipeline.writing.filler import Contents, Dealer, ShardFiller
from dali_pipeline.writing.journal import WorkFolder
from dali_pipeline.writing.split import SplitRule

SHARD_BYTES = 256 << 20
IN_PLACE_DIGITS = 8  # of statistics: a set in place is small beside its values, and float32 has no more


class ShardWriter:
    """Write a data set into a folder; use it as a context manager.

    Records go to the split of their group, and fill shards of up to `shard_bytes`. A larger record gets a shard of its own.
    Leaving the `with` block writes the manifest. An exception leaves no manifest, and removes what was written unless a
    `commit` made it final.

    A writer with a `fingerprint` can be restarted. `commit(cursor)` makes all records so far final. If the writer is opened
    again with the same fingerprint, `cursor` is the one last committed, and the caller continues from there. The same records
    and the same commits give the same bytes, interrupted or not.

    Memory: a few MiB, and the edges, names and labels of one shard per split.

    Args:
        root: Folder of the data set: new, empty, or left unfinished by the same work.
        schema: Fields of every record.
        shard_bytes: Size of a shard in bytes, at most. Default: 256 MiB.
        split: A `SplitRule`, or its shares in per cent as text. Default: "70/15/15".
        source: Where the data come from, for people; plain values that JSON can hold. Default: nothing.
        fingerprint: ASCII text that names input and settings, for a restart. Default: "".

    Attributes:
        root: The folder, as a `Path`.
        schema: The schema.
        source: The source, as JSON returns it.

    Raises:
        UsageError: `root` holds something else, another process writes to it, or an argument is not what is expected.
        DataError: While writing, a record does not fit the schema. While closing, an id was given twice, or there are no
            records.
        PipelineError: The disk is full, or the folder cannot be written to.

    Examples:
        >>> schema = dp.Schema(sequence=dp.Field(dtype="float32", shape=(16,)))  # doctest: +SKIP
        >>> with dp.ShardWriter("data/traces", schema) as writer:  # doctest: +SKIP
        ...     writer.write(dp.Record(id="a", label=1, sequence=values))  # (T, 16)
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        schema: Schema,
        *,
        shard_bytes: int = SHARD_BYTES,
        split: Dealer | str | None = None,
        source: Mapping[str, Any] | None = None,
        fingerprint: str = "",
    ) -> None:
        shard_bytes = whole("shard_bytes", shard_bytes, 1)
        if not isinstance(schema, Schema):
            raise UsageError(f"schema is {shown(schema)}; expected a Schema")
        if not isinstance(fingerprint, str) or not fingerprint.isascii():
            raise UsageError(f"fingerprint is {shown(fingerprint)}; expected a text")
        if isinstance(split, str):
            split = SplitRule.parse(split)
        if split is not None and (isinstance(split, type) or not callable(getattr(split, "of", None))):
            raise UsageError(f"split is {shown(split)}; expected a SplitRule, or shares such as '70/15/15'")
        try:
            self.source = msgspec.json.decode(msgspec.json.encode(dict({} if source is None else source)))
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"source cannot be written as JSON ({error}); expected plain values") from None
        self.root = Path(path("root", root))
        self.schema = schema
        _check_names(schema)
        self._folder = WorkFolder(self.root, fingerprint)
        self._journal = self._folder.journal
        self.filler = ShardFiller(
            self.root, schema, shard_bytes, SplitRule() if split is None else split, self._journal.contents
        )
        self._closed = False
        rule = SplitRule() if split is None else split
        self.files: ForeignFiles | msgspec.UnsetType = msgspec.UNSET  # where the values lie, if they stay in place
        self.rule: dict[str, Any] = {"shares": list(rule.shares), "seed": rule.seed} if isinstance(rule, SplitRule) else {}

    @property
    def cursor(self) -> int:
        """Cursor of the last `commit`, in this process or an earlier one; 0 before the first."""
        return self._journal.cursor

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None and not self._closed:
                self.close()
        finally:
            self._closed = True
            self.filler.discard()
            self._folder.abandon()

    def write(self, record: Record | Mapping[str, Any]) -> None:
        """Add a record to the split of its group: as a whole, or not at all if it is refused.

        Args:
            record: A `Record`, or a mapping with the names of its fields.

        Raises:
            DataError: The record does not fit the schema.
            UsageError: The writer is closed.

        Costs a copy of the record's bytes; they reach the disk 2 MiB at a time.
        """
        if self._closed:
            raise UsageError(f"{self.root} is closed; records must be written before")
        self.filler.write(Record.of(record))

    def commit(self, cursor: int) -> None:
        """Close the open shards and save `cursor`; a restart begins here.

        Args:
            cursor: The caller's own position in its input, a whole number of 0 or more.

        Raises:
            UsageError: `cursor` is not such a number.

        Costs one small file and one fsync per open shard.
        """
        cursor = whole("cursor", cursor)
        self.filler.flush()
        self._journal.cursor, self._journal.committed = cursor, True
        self._folder.save()

    @property
    def steps(self) -> tuple[int, int]:
        """Fewest and most steps of a sequence in all shards finished so far; (0, 0) before the first."""
        bounds = [
            tables["sequences"].rows["step"] for tables in self._journal.contents.splits.values() if tables["sequences"].rows
        ]
        return min((fewest for fewest, _ in bounds), default=0), max((most for _, most in bounds), default=0)

    @property
    def parts(self) -> Path:
        """Folder within `root` for the shards that `adopt` takes over; removed once the data set is complete."""
        return self._folder.parts

    def adopt(self, part: Path, contents: Contents, cursor: int, left_out: Mapping[str, str]) -> None:
        """Take over the shards that a `ShardFiller` wrote, as if their records had been written here, and commit.

        Args:
            part: Folder that the filler wrote to.
            contents: The filler's shard tables and moments.
            cursor: The caller's own position in its input.
            left_out: The reason per file that the part should have contained and does not; the manifest records it.
        """
        self.filler.flush()
        self._folder.adopt(part, contents)
        self._journal.left_out |= left_out
        self.commit(cursor)

    @property
    def left_out(self) -> dict[str, str]:
        """The reason per file that was left out, in all adopted parts, those of earlier processes included."""
        return self._journal.left_out

    def close(self) -> Manifest:
        """Write the remaining records and the manifest.

        Returns:
            The `Manifest`.

        Raises:
            DataError: No records were written, or an id was given twice.

        Costs a read of all ids.
        """
        self.filler.flush()
        contents = self._journal.contents
        if not contents.shards:
            raise DataError(f"no records were written to {self.root}; expected at least one")
        source = dict(self.source)
        if self.left_out:
            source["left_out"] = self.left_out
        source |= self._check_ids()
        manifest = Manifest(
            schema=self.schema,
            splits={split: {kind: tables[kind] for kind in self.schema.kinds} for split, tables in contents.splits.items()},
            statistics=contents.moments.statistics(IN_PLACE_DIGITS if self.files else None),
            node_statistics=contents.node_moments.statistics(),
            source=source,
            split=self.rule,
            files=self.files,
        ).save(self.root)
        self._closed = True
        self._folder.finish()
        return manifest

    def _check_ids(self) -> dict[str, int]:
        """Refuse an id given twice: hashes find candidates, the ids decide. Count the ids that only one kind of record has."""
        contents = self._journal.contents
        halves: list[Hashes] = []
        for kind in self.schema.kinds:
            shards = [(split, shard) for split, shard_kind, shard in contents.shards if shard_kind == kind]
            hashes = [hash_texts(self._shard_ids(split, kind, shard)) for split, shard in shards]
            unique_hashes, counts = np.unique(np.concatenate(hashes or [np.zeros(0, np.uint64)]), return_counts=True)
            halves.append(unique_hashes)
            if (counts <= 1).all():
                continue
            ids = Counter(record_id for split, shard in shards for record_id in self._shard_ids(split, kind, shard))
            for record_id, count in ids.items():
                if count > 1:
                    raise DataError(f"id {record_id.decode()!r} is given to {count} {kind} records; expected each id once")
        unpaired = len(np.setxor1d(halves[0], halves[1])) if len(halves) == 2 and all(map(len, halves)) else 0
        return {"in_one_half": unpaired} if unpaired else {}

    def _shard_ids(self, split: str, kind: Kind, shard: int) -> list[bytes]:
        file = shard_path(self.root, split, kind, shard)
        return self._journal.contents.splits[split][kind].open(file, shard, Files()).texts("ids")


def _check_names(schema: Schema) -> None:
    """Raise UsageError for a field name that a PyG batch accepts but does not return."""
    if not schema.named:
        return
    with needs_extra("graphs", "a schema with fields of graphs"):
        from torch_geometric.data import Batch, Data

    for name in schema.named:
        class_attribute = getattr(type(Batch(_base_cls=Data)), name.rpartition(".")[2], None)
        if (
            class_attribute is not None and getattr(class_attribute, "fset", None) is None
        ):  # `pos` and `y` can be set, `to` and `size` cannot
            raise UsageError(f"fields has {name!r}, which has a meaning of its own in a PyG batch; expected another name")
