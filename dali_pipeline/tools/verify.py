"""verify: check every hash, offset, shape, id, label and value of a data set; report each damage in one line."""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from dali_pipeline.dataset.dataset import Dataset, open_dataset
from dali_pipeline.errors import FormatError
from dali_pipeline.format.shard import Hashes, count_shared
from dali_pipeline.runtime.progress import progress_bar
from dali_pipeline.storage.cachedfile import Place, RemotePath
from dali_pipeline.storage.stores import is_url
from dali_pipeline.tools.shardcheck import ShardCheck
from dali_pipeline.types import Kind
from dali_pipeline.writing.growth import ADDITION

CACHE_BYTES = 4 << 30  # size of the cache for the shards of a URL, each of which is read once


@dataclass(frozen=True, kw_only=True)
class Report:
    """Result of `verify`.

    Attributes:
        damages: One line per damage: file, field, what is wrong. Empty if the data set is sound.
        records: Number of records.
        shards: Number of shards.
        bytes: Bytes that were read.
        seconds: Duration.
    """

    damages: list[str]
    records: int
    shards: int
    bytes: int
    seconds: float

    @property
    def summary(self) -> str:
        """The result in one line."""
        verdict = f"{len(self.damages)} damages" if self.damages else "sound"
        rate = f"{self.bytes / 1e9:.2f} GB in {self.seconds:.1f} s, {self.bytes / 1e9 / max(self.seconds, 1e-9):.2f} GB/s"
        return f"{verdict}: {self.records:,} records, {self.shards:,} shards, {rate}"


def verify(root: str | os.PathLike[str], *, quick: bool = False, files_root: str | os.PathLike[str] | None = None) -> Report:
    """Check a data set, one shard per core at a time.

    Finds wrong sizes, headers, hashes, shapes, types and offsets; edges that leave their graph; values that are not finite,
    counted by layer; ids that occur twice; labels or rows that the manifest counts differently; sequences and graphs that
    disagree; groups in several splits; shards that the manifest does not name.

    Costs a read of all bytes. Memory: the offsets and edges of one shard per core, and 24 bytes per record. The shards of a URL
    are read through a temporary cache, which is removed at the end.

    Args:
        root: Folder or URL of the data set.
        quick: Whether to read only headers, names, labels and offsets, no values.
        files_root: Folder or URL of the values of a data set made in place. Default: where they lay.

    Returns:
        A report, whose `damages` are empty if the data set is sound.

    Raises:
        FormatError: `root` is no data set.
    """
    started = time.perf_counter()
    if is_url(root):
        with tempfile.TemporaryDirectory(prefix="verify-") as cache:
            return _verify(open_dataset(root, cache, CACHE_BYTES, files_root), quick, started)
    return _verify(open_dataset(root, files_root=files_root), quick, started)


def _verify(data: Dataset, quick: bool, started: float) -> Report:
    checks = [
        ShardCheck(data, split, kind, number)
        for split in data.splits
        for kind in data.schema.kinds
        for number in range(len(data.table(split, kind)))
    ]
    with progress_bar() as bar, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        task = bar.add_task("verify, MB", total=None if quick else data.nbytes / 1e6)
        try:
            list(pool.map(lambda check: check.run(quick, lambda nbytes: bar.advance(task, nbytes / 1e6)), checks))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    damages = [line for check in checks for line in check.damages]
    damages += [
        line for split in data.splits for kind in data.schema.kinds for line in _against_manifest(data, split, kind, checks)
    ]
    damages += [
        *_ids_twice(checks),
        *_halves(checks),
        *_leaks(checks, data.manifest.source.get("torn", 0)),
        *_strangers(data, checks),
    ]
    return Report(
        damages=damages,
        records=sum(data.num_records(split, kind) for split in data.splits for kind in data.schema.kinds),
        shards=len(checks),
        bytes=sum(check.bytes for check in checks),
        seconds=time.perf_counter() - started,
    )


def _against_manifest(data: Dataset, split: str, kind: Kind, checks: Sequence[ShardCheck]) -> Iterator[str]:
    """Yield damages if the manifest counts ids, labels or rows differently than the shards, unless other damage hides that."""
    table, own = data.table(split, kind), [check for check in checks if (check.split, check.kind) == (split, kind)]
    where = f"{data.root / 'manifest.json'}, {split}/{kind}"
    if any(check.damages for check in own):
        return
    total = sum(int(check.ids.sum(dtype=np.uint64)) for check in own) % 2**64
    if table.ids and table.ids != f"{total:016x}":
        yield f"{where}, ids: their hashes sum to {table.ids} in the manifest, to {total:016x} in the shards"
    labels: Counter[str] = Counter()
    rows: dict[str, tuple[int, int]] = {}
    for check in own:
        label = check.data.schema.labels
        labels.update(str(number) for row in (() if check.labels is None else check.labels) for number in label.counted(row))
        for axis, (fewest, most) in check.rows.items():
            rows[axis] = (min(fewest, rows.get(axis, (fewest, 0))[0]), max(most, rows.get(axis, (0, most))[1]))
    if dict(labels) != table.labels:
        yield f"{where}, labels: {table.labels} in the manifest, {dict(labels)} in the shards"
    if rows != table.rows:
        yield f"{where}, rows: {table.rows} in the manifest, {rows} in the shards"


def _ids_twice(checks: Sequence[ShardCheck]) -> Iterator[str]:
    for kind in {check.kind: None for check in checks}:
        own = [check for check in checks if check.kind == kind]
        ids, counts = np.unique(np.concatenate([check.ids for check in own]), return_counts=True)
        for hashed, count in zip(ids[counts > 1][:10], counts[counts > 1], strict=False):
            first = next(check for check in own if hashed in check.ids)
            yield f"{first.path}, ids: {_text(first, 'ids', hashed)} is given to {count} {kind} records"


def _halves(checks: Sequence[ShardCheck]) -> Iterator[str]:
    """Yield damages if a record has different labels in its sequence and its graphs."""
    sides = [[check for check in checks if check.kind == kind and check.labels is not None] for kind in ("sequences", "graphs")]
    if not all(sides):
        return
    (ids, labels), (other_ids, other_labels) = (
        [np.concatenate([getattr(check, name) for check in own]) for name in ("ids", "labels")] for own in sides
    )
    if len(ids) != len(labels) or len(other_ids) != len(other_labels):
        return  # damaged, which another check reports
    shared, here, there = np.intersect1d(ids, other_ids, return_indices=True)
    different = np.flatnonzero((labels[here] != other_labels[there]).reshape(len(here), -1).any(axis=1))
    if len(different):
        first = next(check for check in sides[0] if shared[different[0]] in check.ids)
        record = _text(first, "ids", shared[different[0]])
        yield f"{first.path}, labels: {len(different)} records have another label as graphs, the first {record}"


def _leaks(checks: Sequence[ShardCheck], torn: object) -> Iterator[str]:
    """Yield damages if a group is in two splits, unless exactly `torn` groups are, which the source's own splits tore."""
    groups: dict[str, Hashes] = {}
    for check in checks:
        groups[check.split] = np.union1d(groups.get(check.split, check.groups), check.groups)
    if groups and torn == count_shared(groups.values()):
        return
    for split, other in combinations(groups, 2):
        shared = np.intersect1d(groups[split], groups[other])
        if len(shared):
            first = next(check for check in checks if check.split == split and shared[0] in check.groups)
            group = _text(first, "groups", shared[0])
            yield f"{first.path}, groups: {len(shared)} groups are in {split} and in {other}, the first {group}"


def _strangers(data: Dataset, checks: Sequence[ShardCheck]) -> Iterator[str]:
    """Yield damages for shards in the folder that the manifest does not name."""
    named = {check.path for check in checks}
    if isinstance(data.root, RemotePath):
        paths: list[Place] = [data.root / name for name in data.root.store.names() if ".safetensors" in name]
    else:
        if (data.folder / ADDITION).exists():  # more records are being added: what they add is in no manifest yet
            return
        paths = [*sorted(data.folder.rglob("*.safetensors*"))]
    for path in paths:
        if path not in named:
            yield f"{path}: the manifest does not name this file; remove it"


def _text(check: ShardCheck, name: str, hashed: np.uint64) -> str:
    """Return the id or group that has a hash, for messages."""
    row = int(np.flatnonzero(getattr(check, name) == hashed)[0])
    try:
        return repr(check.open().texts(name)[row].decode())
    except FormatError:
        return f"record {row}"
