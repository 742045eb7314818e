"""ShardWriter: records in, a data set out; the manifest last, so that a folder is a data set or is none."""

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
from dali_pipeline.format.manifest import Manifest, shard_path
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


class ShardWriter:
    """Writes a data set into folder `root`; use it as a context manager.

    Records go to their split by group and fill shards of up to `shard_bytes` (a larger record has a shard of its own).
    Leaving the `with` block writes the manifest; an exception leaves none, and takes away what was written unless a
    `commit` made it final. split: a Split, or its shares as text, `70/15/15`. Memory: a few MiB, and the edges, names and
    labels of a shard a split.

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
            raise UsageError(f"split is {shown(split)}; expected a Split, or shares such as '70/15/15'")
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
            self.filler.discard()
            self._folder.abandon()

    def write(self, record: Record | Mapping[str, Any]) -> None:
        """Adds a `Record`, or a mapping with its names, to the split of its group: whole, or not at all where it is refused."""
        if self._closed:
            raise UsageError(f"{self.root} is closed; records must be written before")
        self.filler.write(Record.of(record))

    def commit(self, cursor: int) -> None:
        """Closes the open shards and notes `cursor`: a restart begins here. Costs a small file and one fsync a shard."""
        cursor = whole("cursor", cursor)
        self.filler.flush()
        self._journal.cursor, self._journal.committed = cursor, True
        self._folder.save()

    @property
    def parts(self) -> Path:
        """A folder within `root` for what `adopt` takes; it is gone once the data set is whole."""
        return self._folder.parts

    def adopt(self, part: Path, contents: Contents, cursor: int, left_out: Mapping[str, str]) -> None:
        """Takes over the shards that a ShardFiller wrote under `part`, as if their records had been written here; commits.

        left_out: why, by file that the part should have had; the manifest tells.
        """
        self.filler.flush()
        self._folder.adopt(part, contents)
        self._journal.left_out |= left_out
        self.commit(cursor)

    @property
    def left_out(self) -> dict[str, str]:
        """Why, by file, in every part adopted so far, by earlier processes too."""
        return self._journal.left_out

    def close(self) -> Manifest:
        """Writes what is left and the manifest, and returns it. Raises DataError for no records, or an id given twice."""
        self.filler.flush()
        contents = self._journal.contents
        if not contents.shards:
            raise DataError(f"no records were written to {self.root}; expected at least one")
        source = {**self.source, **({"left_out": self.left_out} if self.left_out else {}), **self._check_ids()}
        manifest = Manifest(
            schema=self.schema,
            splits={split: {kind: tables[kind] for kind in self.schema.kinds} for split, tables in contents.splits.items()},
            statistics=contents.moments.statistics(),
            source=source,
        ).save(self.root)
        self._closed = True
        self._folder.finish()
        return manifest

    def _check_ids(self) -> dict[str, int]:
        """Refuses an id given twice: hashes find candidates, the ids decide. Counts those in one half alone."""
        contents = self._journal.contents
        halves: list[Hashes] = []
        for kind in self.schema.kinds:
            shards = [(split, shard) for split, each, shard in contents.shards if each == kind]
            hashes = [hash_texts(self._shard_ids(split, kind, shard)) for split, shard in shards]
            every, counts = np.unique(np.concatenate(hashes or [np.zeros(0, np.uint64)]), return_counts=True)
            halves.append(every)
            if (counts <= 1).all():
                continue
            ids = Counter(one for split, shard in shards for one in self._shard_ids(split, kind, shard))
            for one, count in ids.items():
                if count > 1:
                    raise DataError(f"id {one.decode()!r} is given to {count} {kind} records; expected each id once")
        alone = len(np.setxor1d(halves[0], halves[1])) if len(halves) == 2 and all(map(len, halves)) else 0
        return {"in_one_half": alone} if alone else {}

    def _shard_ids(self, split: str, kind: Kind, shard: int) -> list[bytes]:
        file = shard_path(self.root, split, kind, shard)
        return self._journal.contents.splits[split][kind].open(file, shard, Files()).texts("ids")


def _check_names(schema: Schema) -> None:
    """Raises UsageError for a field that PyG could hold, but not give back."""
    if not schema.named:
        return
    with needs_extra("graphs", "a schema with fields of graphs"):
        from torch_geometric.data import Batch, Data

    for name in schema.named:
        of_class = getattr(type(Batch(_base_cls=Data)), name.rpartition(".")[2], None)
        if of_class is not None and getattr(of_class, "fset", None) is None:  # `pos` and `y` may be set, `to` and `size` not
            raise UsageError(f"fields has {name!r}, which has a meaning of its own in a PyG batch; expected another name")
