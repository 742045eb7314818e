"""Dataset: an opened data set; its folds, and mixes of several."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from dali_pipeline.dataset.selection import Selection, Shards, derived_digest
from dali_pipeline.dataset.single import checked_positions, find_id, read_record
from dali_pipeline.errors import DataError, FormatError, UsageError
from dali_pipeline.format.manifest import Manifest, ShardTable, shard_path
from dali_pipeline.format.record import Record
from dali_pipeline.format.schema import SPLITS, Schema
from dali_pipeline.format.shard import hash_texts
from dali_pipeline.runtime.checks import path, shown, whole
from dali_pipeline.storage.cache import CACHE_BYTES, Cache
from dali_pipeline.storage.cachedfile import Place, RemotePath
from dali_pipeline.storage.stores import Store, is_url
from dali_pipeline.types import Ints, Kind


@dataclass(frozen=True, eq=False)
class Dataset:
    """An opened data set; cheap, holds no file open. Made by `open_dataset`."""

    root: Place
    manifest: Manifest

    @property
    def folder(self) -> Path:
        """The folder that the data set lies in. Raises DataError for one at a URL."""
        if isinstance(self.root, RemotePath):
            raise DataError(f"{self.root} is not a local folder; expected a data set in a folder")
        return self.root

    @property
    def schema(self) -> Schema:
        """The fields of every record."""
        return self.manifest.schema

    @property
    def digest(self) -> str:
        """The manifest's digest: the identity of these data."""
        return self.manifest.digest

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, train first."""
        return tuple(sorted(self.manifest.splits, key=lambda split: SPLITS.index(split) if split in SPLITS else len(SPLITS)))

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(sum(table.bytes) for tables in self.manifest.splits.values() for table in tables.values())

    @property
    def num_classes(self) -> int:
        """Highest label of any split and kind plus one, at least 2."""
        labels = (label for split in self.splits for counts in self._labels(split).values() for label in counts)
        return max(2, max(labels, default=0) + 1)

    def table(self, split: str, kind: Kind) -> ShardTable:
        """The shards of a split and kind. Raises UsageError for a split, DataError for a kind, that is not there."""
        if not isinstance(split, str) or split not in self.manifest.splits:
            raise UsageError(f"unknown split {shown(split)}; {self.root} has {', '.join(self.splits)}")
        if not isinstance(kind, str) or kind not in self.schema.kinds:
            kind = kind if isinstance(kind, str) else shown(kind)
            raise DataError(f"{self.root} holds no {kind}; it has {' and '.join(self.schema.kinds)}")
        return self.manifest.splits[split].get(kind, ShardTable())

    def select(self, split: str, kind: Kind) -> Selection:
        """The records of a split and kind, for a loader. Raises as `table` does."""
        return Selection.whole(Shards(root=self.root, split=split, kind=kind, table=self.table(split, kind)), self.digest)

    def num_records(self, split: str, kind: Kind) -> int:
        """Records of a split and kind."""
        return sum(self.table(split, kind).records)

    def label_counts(self, split: str, kind: Kind | None = None) -> dict[int, int]:
        """Records of each label in a split, of one kind; by default of the kind that has more records."""
        counts = self._labels(split)
        if kind is not None and kind not in counts:
            raise DataError(f"{self.root} holds no {kind}; it has {' and '.join(self.schema.kinds)}")
        return max(counts.values(), key=lambda each: sum(each.values())) if kind is None else counts[kind]

    def _labels(self, split: str) -> Mapping[Kind, dict[int, int]]:
        """Records of each label in a split, by kind."""
        tables = {kind: self.table(split, kind).labels for kind in self.schema.kinds}
        return {kind: {label: labels[str(label)] for label in sorted(map(int, labels))} for kind, labels in tables.items()}

    def record(self, split: str, position: int) -> Record:
        """Read one record whole, as NumPy arrays.

        Args:
            split: Name of the split.
            position: Number of the record in its split, as `batch.positions` has it; negative numbers count from the end. If
                the set holds sequences and graphs, it is the position among the sequences.

        Returns:
            A `Record` with id, group, label, `sequence` (T, *shape) and `graphs` (a `Graphs`), each None if the record has
            none. Numbers as stored; float32 for bfloat16 and for int8 with a scale.

        Raises:
            UsageError: An unknown split, or a position that is not in it.
            FormatError: The shard is damaged.

        Costs the record's bytes. In a set that holds both, the other half is looked for at the same position, then by reading
        the ids of the split.
        """
        kind, *others = self.schema.kinds
        selection = self.select(split, kind)
        count = selection.num_records
        place = whole("position", position, -count, count - 1, expected=f"0 to {count - 1}, as {split!r} has {count} {kind}")
        record = read_record(selection, self.schema, place % count)
        for other in others:
            half = self.select(split, other)
            where = find_id(half, record.id, place % count)
            if where is not None:
                record = replace(record, graphs=read_record(half, self.schema, where).graphs)
        return record

    def subset(self, split: str, positions: npt.ArrayLike) -> Dataset:
        """Choose some records of a split; a loader takes the result like any other data set.

        Args:
            split: Name of the split. The other splits stay as they are.
            positions: Numbers of records in the split, each once, in the order that they have in the subset: whole numbers, or
                a mask of bools with one per record. If the set holds sequences and graphs, they are positions among the
                sequences, and the graphs of the same ids come with them.

        Returns:
            A `Dataset` without shards of its own. Feature statistics stay those of the whole training split.

        Raises:
            UsageError: An unknown split, or positions that are not in it or come twice.

        Costs the labels of the records chosen, and their ids if the set holds both kinds. No file is written.
        """
        kind, *others = self.schema.kinds
        whole_split = self.select(split, kind)
        chosen = {kind: checked_positions(positions, whole_split.num_records)}
        for other in others:
            wanted = {text: number for number, text in enumerate(whole_split.take(chosen[kind], self.digest).texts("ids"))}
            ranks = np.array([wanted.get(text, -1) for text in self.select(split, other).texts("ids")], np.int64)
            found = np.flatnonzero(ranks >= 0)
            chosen[other] = found[np.argsort(ranks[found])]
        identity = xxhash.xxh3_64_hexdigest(chosen[kind].tobytes())
        digest = derived_digest(self.digest, "subset", split, identity)
        selections = {one: {each: self.select(one, each) for each in self.schema.kinds} for one in self.splits}
        counts = {one: {each: self.label_counts(one, each) for each in self.schema.kinds} for one in self.splits}
        if any(selection.draws for kinds in selections.values() for selection in kinds.values()):
            raise UsageError("a mix has no subset, as its training split is draws; mix subsets instead")
        selections[split] = {each: self.select(split, each).take(at, digest) for each, at in chosen.items()}
        counts[split] = {each: _count(selection.labels()) for each, selection in selections[split].items()}
        return View(self.root, self.manifest, digest, selections, counts)

    def layer_numbers(self, kind: Kind) -> list[int] | None:
        """Number of each step, or graph, of a record, where these are layers whose numbers the set records; None otherwise.

        0 is the embeddings, l the output of block l.
        """
        found = self.manifest.source.get("layers" if kind == "sequences" else "graph_layers")
        known = isinstance(found, list) and bool(found) and all(type(number) is int and number >= 0 for number in found)
        return list(found) if known and found is not None else None

    def shard_path(self, split: str, kind: Kind, shard: int) -> Any:
        """The file of one shard."""
        return shard_path(self.root, split, kind, shard)

    def folds(self, k: int, seed: int = 0) -> list[Dataset]:
        """For cross-validation: k data sets over the same shards, whose `val` is a k-th of `train` and `val` together.

        Dealt by group, as a split is, so no group is on both sides, and both kinds of record agree: groups in the order of
        their hashes (XXH3-64 with `seed`) are cut into k parts of equal number. Every record is in one fold's `val`; `test`
        stays as it is. No file is written; feature statistics are those of `train` as stored. Reads labels and groups: some 20
        bytes a record, held in memory as 8 bytes. Raises DataError for fewer groups than k.
        """
        k, seed = whole("k", k, 2), whole("seed", seed, 0, 2**64 - 1, expected="a whole number from 0 to 2**64 - 1")
        pools, hashes = {}, {}
        for kind in self.schema.kinds:
            pools[kind] = Selection.chain([self.select(split, kind) for split in ("train", "val")], self.digest)
            hashes[kind] = hash_texts(pools[kind].texts("groups"), seed)
        groups = np.unique(np.concatenate(list(hashes.values())))
        if len(groups) < k:
            raise DataError(f"train and val of {self.root} have {len(groups)} groups; expected at least {k} for {k} folds")
        folds = {kind: np.searchsorted(groups, hashes[kind]) * k // len(groups) for kind in self.schema.kinds}
        labels = {kind: pool.labels() for kind, pool in pools.items()}
        views: list[Dataset] = []
        for fold in range(k):
            digest = derived_digest(self.digest, "fold", fold, k, seed)
            selections, counts = {}, {}
            for split in ("train", "val"):
                members = {kind: np.flatnonzero((folds[kind] == fold) == (split == "val")) for kind in pools}
                selections[split] = {kind: pools[kind].take(at, digest) for kind, at in members.items()}
                counts[split] = {kind: _count(labels[kind][at]) for kind, at in members.items()}
            if "test" in self.splits:
                selections["test"] = {kind: self.select("test", kind) for kind in pools}
                counts["test"] = {kind: self.label_counts("test", kind) for kind in pools}
            views.append(View(self.root, self.manifest, digest, selections, counts))
        return views


@dataclass(frozen=True, eq=False)
class View(Dataset):
    """A data set made of the shards of others, as `folds` and `mix` make it; a loader takes it like any other.

    view_digest: identity of these data · selections: by split and kind · counts: of labels, likewise · mixed: whether it is of
    several data sets.
    """

    view_digest: str
    selections: Mapping[str, Mapping[Kind, Selection]]
    counts: Mapping[str, Mapping[Kind, dict[int, int]]]
    mixed: bool = False

    @property
    def digest(self) -> str:
        """The identity of these data: other folds and other mixes have another."""
        return self.view_digest

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, train first."""
        return tuple(self.selections)

    @property
    def nbytes(self) -> int:
        """Bytes of the records chosen, about."""
        return sum(int(one.nbytes.sum()) for kinds in self.selections.values() for one in kinds.values())

    def table(self, split: str, kind: Kind) -> ShardTable:
        """Raises DataError: it has no shards of its own."""
        raise DataError(
            f"a fold, subset or mix of {self.root} has no shards of its own; ask `select` or the data sets it is made of"
        )

    def select(self, split: str, kind: Kind) -> Selection:
        """The records of a split and kind, for a loader. Raises UsageError for a split, DataError for a kind, not there."""
        if not isinstance(split, str) or split not in self.selections:
            raise UsageError(f"unknown split {shown(split)}; this fold, subset or mix has {', '.join(self.splits)}")
        if not isinstance(kind, str) or kind not in self.selections[split]:
            raise DataError(f"{self.root} holds no {kind}; it has {' and '.join(self.schema.kinds)}")
        return self.selections[split][kind]

    def num_records(self, split: str, kind: Kind) -> int:
        """Records of a split and kind."""
        return self.select(split, kind).num_records

    def _labels(self, split: str) -> Mapping[Kind, dict[int, int]]:
        if not isinstance(split, str) or split not in self.counts:
            raise UsageError(f"unknown split {shown(split)}; this fold, subset or mix has {', '.join(self.splits)}")
        return self.counts[split]

    def folds(self, k: int, seed: int = 0) -> list[Dataset]:
        """Raises UsageError: folds are made of a data set as it is stored."""
        raise UsageError("folds are made of a data set as it is stored; this is a fold, a subset or a mix already")


def _count(labels: Ints) -> dict[int, int]:
    return {int(label): count for label, count in sorted(Counter(labels.tolist()).items())}


def default_cache() -> Path:
    """`dali_pipeline` in XDG_CACHE_HOME, or in .cache of the home folder. Raises UsageError where there is neither."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dali_pipeline"
    except RuntimeError:
        raise UsageError(
            "no home folder is known for a cache of the URL's data; name a folder with --cache-dir (cache_dir), or set HOME"
        ) from None


def open_dataset(
    root: str | os.PathLike[str] | RemotePath, cache_dir: str | os.PathLike[str] | None = None, cache_bytes: int | None = None
) -> Dataset:
    """Opens the data set in a folder, or at a URL that fsspec knows (s3, gs, az, http, …). Reads `manifest.json` alone.

    What is read of a URL's shards is kept in `cache_dir` (by default `dali_pipeline` in the user's cache folder), 1 MiB at a
    time, up to `cache_bytes` (32 GiB); a folder has no need of either. All processes of a node share the cache; so may
    other runs. Raises FormatError, in one sentence, where there is no data set, or its manifest is unreadable or damaged;
    DataError for a store that cannot be reached; UsageError for a cache that cannot be.
    """
    if not isinstance(root, RemotePath):
        root = path("the data set", root)
    if not isinstance(root, RemotePath) and is_url(root):
        folder = default_cache() if cache_dir is None else Path(path("cache_dir", cache_dir))
        root = RemotePath(Store(os.fspath(root)), Cache(folder, CACHE_BYTES if cache_bytes is None else cache_bytes))
    if isinstance(root, RemotePath):
        return Dataset(root=root, manifest=Manifest.load(root))
    place = Path(root)
    if not place.is_dir():
        raise FormatError(f"{place} is not a folder; expected a data set, as `convert` or `extract` writes it")
    return Dataset(root=place, manifest=Manifest.load(place))
