"""Growth: add the shards of one data set to another in its folder, so that at any moment it is the old set or the new one."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dali_pipeline.errors import DataError, FormatError, UsageError
from dali_pipeline.format.manifest import FeatureStatistics, Manifest, shard_path
from dali_pipeline.format.shard import Hashes, Shard, count_shared, hash_texts
from dali_pipeline.storage.files import Files
from dali_pipeline.storage.whole import lock, sync_folder
from dali_pipeline.types import Array, Kind
from dali_pipeline.writing.moments import Moments

ADDITION = ".append"  # folder within a data set where what is to be added is written
APPENDED = "appended"  # key of a manifest's `source`: what was added, one entry each


def was_appended(manifest: Manifest, fingerprint: str) -> bool:
    """Return whether files with this fingerprint were added to a data set already."""
    return any(entry.get("fingerprint") == fingerprint for entry in manifest.source.get(APPENDED, ()))


def grow(root: Path, entry: dict[str, Any]) -> Manifest:
    """Add the data set in the folder `.append` of a data set to it, and remove that folder; return the new manifest.

    The new shards follow the old ones, which are not touched; the manifest is replaced last. If it is interrupted, the data set
    is as it was, and a second call goes on. Costs a read of all ids.

    Args:
        root: Folder of the data set.
        entry: What is added, for the manifest's `source`; its `fingerprint` names it.

    Raises:
        DataError: An id is in both. The folder `.append` is removed.
        UsageError: Another process adds to it.
    """
    addition = root / ADDITION
    with _locked(root):
        old = Manifest.load(root)
        if was_appended(old, entry["fingerprint"]):
            shutil.rmtree(addition, ignore_errors=True)
            return old
        new = Manifest.load(addition)
        shards = _Shards(root, old, addition, new)
        try:
            shards.check_ids()
        except DataError:
            shutil.rmtree(addition, ignore_errors=True)
            raise
        grown = _merged(old, new, entry, shards)
        shards.move()
        manifest = grown.save(root)
        shutil.rmtree(addition, ignore_errors=True)
    return manifest


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    try:
        fd = os.open(root, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"{root} cannot be added to ({error.strerror}); expected a writable folder") from None
    try:
        lock(fd)
        yield
    except BlockingIOError:
        raise UsageError(f"{root} is being written by another process; wait for it") from None
    finally:
        os.close(fd)


class _Shards:
    """The shards of both data sets. One of the new ones may have been moved already, by a process that was interrupted."""

    def __init__(self, root: Path, old: Manifest, addition: Path, new: Manifest) -> None:
        self._root, self._old, self._addition, self._new = root, old, addition, new

    def _moves(self) -> Iterator[tuple[str, Kind, int, Path, Path]]:
        for split, tables in self._new.splits.items():
            for kind, table in tables.items():
                begin = len(self._old.splits[split][kind])
                for number in range(len(table)):
                    home = shard_path(self._root, split, kind, begin + number)
                    yield split, kind, number, shard_path(self._addition, split, kind, number), home

    def move(self) -> None:
        """Move the new shards to their places."""
        folders = set()
        for _, _, _, source, home in self._moves():
            if source.exists():
                home.parent.mkdir(exist_ok=True)
                source.replace(home)
                folders.add(home.parent)
            elif not home.exists():
                raise FormatError(f"{source} is gone; remove {self._addition}, and append again, which writes it anew")
        for folder in folders:
            sync_folder(folder)

    def _opened(self, kind: Kind) -> Iterator[tuple[str, Shard, bool]]:
        """Yield split and shard of every shard of a kind, and whether it is a new one."""
        for split, shard in _shards(self._root, self._old, kind):
            yield split, shard, False
        for split, new_kind, number, source, home in self._moves():
            if new_kind == kind:
                path = source if source.exists() else home
                yield split, self._new.splits[split][kind].open(path, number, Files(1)), True

    def check_ids(self) -> None:
        """Raise DataError if a record is in both: hashes find candidates, the ids decide."""
        for kind in self._old.schema.kinds:
            hashes: dict[bool, list[Hashes]] = {False: [], True: []}
            for _, shard, is_new in self._opened(kind):
                hashes[is_new].append(hash_texts(shard.texts("ids")))
            old, new = (np.concatenate([np.zeros(0, np.uint64), *hashes[is_new]]) for is_new in (False, True))
            shared = np.intersect1d(old, new)
            if not len(shared):
                continue
            texts: dict[bool, set[bytes]] = {False: set(), True: set()}
            for _, shard, is_new in self._opened(kind):
                ids = shard.texts("ids")
                texts[is_new] |= {ids[row] for row in np.flatnonzero(np.isin(hash_texts(ids), shared)).tolist()}
            if twice := texts[False] & texts[True]:
                raise DataError(
                    f"{len(twice):,} ids are in {self._root} already, such as {min(twice).decode()!r}; expected new records, "
                    "so nothing was added"
                )

    def torn_groups(self) -> int:
        """Count the groups that are in several splits."""
        opened = ((split, shard) for kind in self._old.schema.kinds for split, shard, _ in self._opened(kind))
        return count_shared(_groups(opened).values())


def _merged(old: Manifest, new: Manifest, entry: dict[str, Any], shards: _Shards) -> Manifest:
    splits = copy.deepcopy(old.splits)
    for split, tables in new.splits.items():
        for kind, table in tables.items():
            splits[split][kind].extend(table)
    source = dict(old.source)
    source[APPENDED] = [*source.get(APPENDED, ()), entry]
    if new.source.get("left_out"):
        source["left_out"] = {**source.get("left_out", {}), **new.source["left_out"]}
    if new.source.get("in_one_half"):
        source["in_one_half"] = source.get("in_one_half", 0) + new.source["in_one_half"]
    if not old.split and (torn := shards.torn_groups()):
        source["torn"] = torn
    return replace(
        old,
        splits=splits,
        statistics=joined(old.statistics, new.statistics),
        node_statistics=joined(old.node_statistics, new.node_statistics),
        source=source,
    )


def joined(one: FeatureStatistics | None, other: FeatureStatistics | None) -> FeatureStatistics | None:
    """Return the statistics of two sets of rows together, by their counts."""
    if one is None or other is None:
        return one or other
    moments = _moments(one)
    moments.extend(_moments(other))
    return moments.statistics()


def _moments(statistics: FeatureStatistics) -> Moments:
    counts: Array = np.array(statistics.count, np.int64)
    squares = np.array(statistics.std) ** 2 * counts
    return Moments(count=list(statistics.count), mean=list(statistics.mean), squares=squares.tolist())


def groups_of(root: Path, manifest: Manifest) -> dict[str, Hashes]:
    """Return the hashes of the groups in each split."""
    return _groups((split, shard) for kind in manifest.schema.kinds for split, shard in _shards(root, manifest, kind))


def _shards(root: Path, manifest: Manifest, kind: Kind) -> Iterator[tuple[str, Shard]]:
    """Yield split and shard of every shard of a kind."""
    for split, tables in manifest.splits.items():
        for number in range(len(tables.get(kind, ()))):
            yield split, tables[kind].open(shard_path(root, split, kind, number), number, Files(1))


def _groups(opened: Iterable[tuple[str, Shard]]) -> dict[str, Hashes]:
    """Return the distinct hashes of the groups of each split."""
    found: dict[str, list[Hashes]] = {}
    for split, shard in opened:
        found.setdefault(split, []).append(np.unique(hash_texts(shard.texts("groups"))))
    return {split: np.unique(np.concatenate(hashes)) for split, hashes in found.items()}
