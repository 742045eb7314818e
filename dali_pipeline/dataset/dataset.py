"""Dataset: an opened data set, with its splits, folds and subsets."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
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
from dali_pipeline.types import Kind


@dataclass(frozen=True, eq=False)
class Dataset:
    """An opened data set, as `open_dataset` returns it. It holds no open file.

    Attributes:
        root: Folder of the data set, a `Path`; or its place in a store.
        manifest: Everything that is known of it without opening a shard.
        files_root: Folder, or place in a store, of the files that hold its values, if it was made in place; otherwise None.
    """

    root: Place
    manifest: Manifest
    files_root: Place | None = field(default=None, kw_only=True)

    @property
    def folder(self) -> Path:
        """Folder of the data set, a `Path`.

        Raises:
            DataError: The data set is at a URL.
        """
        if isinstance(self.root, RemotePath):
            raise DataError(f"{self.root} is not a local folder; expected a data set in a folder")
        return self.root

    @property
    def schema(self) -> Schema:
        """The `Schema`: fields of every record."""
        return self.manifest.schema

    @property
    def digest(self) -> str:
        """Digest of the manifest, 32 hexadecimal digits: the identity of these data."""
        return self.manifest.digest

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, train first."""
        return tuple(sorted(self.manifest.splits, key=lambda split: SPLITS.index(split) if split in SPLITS else len(SPLITS)))

    @property
    def nbytes(self) -> int:
        """Bytes of all shards, and of the values that they refer to in other files."""
        return sum(sum(table.nbytes) for tables in self.manifest.splits.values() for table in tables.values())

    @property
    def num_classes(self) -> int:
        """The highest class of any split and kind plus one, at least 2; the number of labels if a record has several.

        Raises DataError if the labels are values, or there are none.
        """
        label = self.schema.labels
        if label.kind not in ("class", "multilabel"):
            raise DataError(f"{self.root} has labels of kind {label.kind!r}; expected classes, which have a number")
        if label.kind == "multilabel":
            return label.shape[0]
        if label.names:
            return len(label.names)
        labels = (label for split in self.splits for counts in self._labels(split).values() for label in counts)
        return max(2, max(labels, default=0) + 1)

    def table(self, split: str, kind: Kind) -> ShardTable:
        """Return the shards of a split and kind.

        Args:
            split: Name of the split.
            kind: "sequences" or "graphs".

        Returns:
            The `ShardTable`, with one entry per shard in each column.

        Raises:
            UsageError: An unknown split.
            DataError: The data set has no records of this kind.
        """
        if not isinstance(split, str) or split not in self.manifest.splits:
            raise UsageError(f"unknown split {shown(split)}; {self.root} has {', '.join(self.splits)}")
        if not isinstance(kind, str) or kind not in self.schema.kinds:
            kind = kind if isinstance(kind, str) else shown(kind)
            raise DataError(f"{self.root} holds no {kind}; it has {' and '.join(self.schema.kinds)}")
        return self.manifest.splits[split].get(kind, ShardTable())

    def select(self, split: str, kind: Kind) -> Selection:
        """Return the records of a split and kind in the form that loaders use.

        Args:
            split: Name of the split.
            kind: "sequences" or "graphs".

        Returns:
            The `Selection`.

        Raises:
            UsageError: An unknown split.
            DataError: The data set has no records of this kind.
        """
        return Selection.whole(self.shards(split, kind), self.digest)

    def shards(self, split: str, kind: Kind) -> Shards:
        """Return the shards of a split and kind, which open one by one.

        Args:
            split: Name of the split.
            kind: "sequences" or "graphs".

        Returns:
            The `Shards`.

        Raises:
            UsageError: An unknown split.
            DataError: The data set has no records of this kind.
        """
        table, files = self.table(split, kind), self.manifest.files
        arrays = () if files is msgspec.UNSET else files.arrays
        return Shards(root=self.root, split=split, kind=kind, table=table, files_root=self.files_root, referenced=arrays)

    def num_records(self, split: str, kind: Kind) -> int:
        """Return the number of records.

        Args:
            split: Name of the split.
            kind: "sequences" or "graphs".

        Returns:
            The number of records of that split and kind.

        Raises:
            UsageError: An unknown split.
            DataError: The data set has no records of this kind.
        """
        return sum(self.table(split, kind).records)

    def label_counts(self, split: str, kind: Kind | None = None) -> dict[int, int]:
        """Count the records of each label.

        Args:
            split: Name of the split.
            kind: "sequences" or "graphs". Default: None, for the kind with more records.

        Returns:
            A dict from class to number of records, in the order of the classes; of several labels, to the records that have
            each; empty if labels are values or there are none.

        Raises:
            UsageError: An unknown split.
            DataError: The data set has no records of this kind.
        """
        counts = self._labels(split)
        if kind is not None and kind not in counts:
            raise DataError(f"{self.root} holds no {kind}; it has {' and '.join(self.schema.kinds)}")
        return max(counts.values(), key=lambda labels: sum(labels.values())) if kind is None else counts[kind]

    def _labels(self, split: str) -> Mapping[Kind, dict[int, int]]:
        """Return the number of records per label in a split, by kind."""
        tables = {kind: self.table(split, kind).labels for kind in self.schema.kinds}
        return {kind: {label: labels[str(label)] for label in sorted(map(int, labels))} for kind, labels in tables.items()}

    def record(self, split: str, position: int) -> Record:
        """Read one complete record as NumPy arrays.

        Args:
            split: Name of the split.
            position: Position of the record in its split, as in `batch.positions`. Negative numbers count from the end. If the
                data set has sequences and graphs, it is the position among the sequences.

        Returns:
            A `Record` with id, group, label, `sequence` (T, *shape) and `graphs` (a `Graphs`), each None if the record has
            none. Numbers as stored; float32 for bfloat16 and for int8 with a scale.

        Raises:
            UsageError: An unknown split, or a position that is not in it.
            FormatError: The shard is damaged.

        Costs a read of the record's bytes. If the data set has both kinds, the graphs are looked up at the same position first,
        and then by reading the ids of the split.
        """
        kind, *others = self.schema.kinds
        selection = self.select(split, kind)
        count = selection.num_records
        index = whole("position", position, -count, count - 1, expected=f"0 to {count - 1}, as {split!r} has {count} {kind}")
        record = read_record(selection, self.schema, index % count)
        for other in others:
            graphs = self.select(split, other)
            graph_index = find_id(graphs, record.id, index % count)
            if graph_index is not None:
                record = replace(record, graphs=read_record(graphs, self.schema, graph_index).graphs)
        return record

    def subset(self, split: str, positions: npt.ArrayLike) -> Dataset:
        """Choose some records of a split; a loader takes the result like any other data set.

        Args:
            split: Name of the split. The other splits stay as they are.
            positions: Positions of records in the split, each once, in the order of the subset: whole numbers, or a mask of
                bools with one per record. If the data set has sequences and graphs, they are positions among the sequences, and
                the graphs with the same ids are included.

        Returns:
            A `Dataset` without shards of its own. Feature statistics stay those of the whole training split.

        Raises:
            UsageError: An unknown split, or positions that are not in it or are given twice.

        Costs a read of the chosen records' labels, and of their ids if the data set has both kinds. No file is written.
        """
        kind, *others = self.schema.kinds
        whole_split = self.select(split, kind)
        chosen = {kind: checked_positions(positions, whole_split.num_records)}
        for other in others:
            ids = whole_split.take(chosen[kind], self.digest).texts("ids")
            rank_of_id = {record_id: rank for rank, record_id in enumerate(ids)}
            ranks = np.array([rank_of_id.get(record_id, -1) for record_id in self.select(split, other).texts("ids")], np.int64)
            matches = np.flatnonzero(ranks >= 0)
            chosen[other] = matches[np.argsort(ranks[matches])]
        identity = xxhash.xxh3_64_hexdigest(chosen[kind].tobytes())
        digest = derived_digest(self.digest, "subset", split, identity)
        kinds = self.schema.kinds
        selections = {name: {kind: self.select(name, kind) for kind in kinds} for name in self.splits}
        counts = {name: {kind: self.label_counts(name, kind) for kind in kinds} for name in self.splits}
        if any(selection.draws for by_kind in selections.values() for selection in by_kind.values()):
            raise UsageError("a mix has no subset, as its training split is draws; mix subsets instead")
        selections[split] = {kind: self.select(split, kind).take(rows, digest) for kind, rows in chosen.items()}
        counts[split] = {kind: self._count(selection) for kind, selection in selections[split].items()}
        return View(self.root, self.manifest, digest, selections, counts, files_root=self.files_root)

    def _count(self, selection: Selection) -> dict[int, int]:
        """Count the records of each class; reads the labels."""
        kind = self.schema.labels.kind
        if kind == "class":
            return {int(label): count for label, count in sorted(Counter(selection.labels().tolist()).items())}
        if kind == "multilabel":
            labels = selection.labels().reshape(-1, *self.schema.labels.shape)
            return {label: count for label, count in enumerate(labels.sum(axis=0).tolist()) if count}
        return {}

    def layer_numbers(self, kind: Kind) -> list[int] | None:
        """Return the layer number of each step, or graph, of a record.

        0 is the embeddings, l the output of block l.

        Args:
            kind: "sequences" for steps, "graphs" for graphs.

        Returns:
            The numbers; None if steps or graphs are not layers, or the data set does not record their numbers.
        """
        if kind == "sequences" and self.schema.layers:
            return list(self.schema.layers)
        numbers = self.manifest.source.get("layers" if kind == "sequences" else "graph_layers")
        if numbers is None and kind == "graphs" and self.schema.layers:
            count = len(self.schema.layers)
            bounds = self.select(self.splits[0], kind).bounds("graph")
            return list(self.schema.layers) if bounds == (count, count) else None
        known = isinstance(numbers, list) and bool(numbers) and all(type(number) is int and number >= 0 for number in numbers)
        return list(numbers) if known and numbers is not None else None

    def shard_path(self, split: str, kind: Kind, shard: int) -> Any:
        """Return the path of one shard.

        Args:
            split: Name of the split.
            kind: "sequences" or "graphs".
            shard: Number of the shard.

        Returns:
            A `Path`, or the place in a store.
        """
        return shard_path(self.root, split, kind, shard)

    def folds(self, k: int, seed: int = 0) -> list[Dataset]:
        """Make k data sets for cross-validation, over the same shards.

        The `val` of each is one k-th of `train` and `val` together. Records are dealt by group, as a split is, so no group is
        on both sides and both kinds of record agree: the groups, in the order of their hashes (XXH3-64 with `seed`), are cut
        into k parts of equal number. Every record is in the `val` of one fold; `test` stays as it is.

        Args:
            k: Number of folds, at least 2.
            seed: Seed of the hash, 0 to 2**64 - 1. Default: 0.

        Returns:
            k data sets. Feature statistics are those of `train` as stored.

        Raises:
            UsageError: An argument is out of range, or the data set is a fold, a subset or a mix itself.
            DataError: There are fewer groups than k.

        Costs a read of labels and groups, some 20 bytes per record, kept in memory as 8 bytes. No file is written.
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
        views: list[Dataset] = []
        for fold in range(k):
            digest = derived_digest(self.digest, "fold", fold, k, seed)
            selections, counts = {}, {}
            for split in ("train", "val"):
                members = {kind: np.flatnonzero((folds[kind] == fold) == (split == "val")) for kind in pools}
                selections[split] = {kind: pools[kind].take(rows, digest) for kind, rows in members.items()}
                counts[split] = {kind: self._count(selections[split][kind]) for kind in members}
            if "test" in self.splits:
                selections["test"] = {kind: self.select("test", kind) for kind in pools}
                counts["test"] = {kind: self.label_counts("test", kind) for kind in pools}
            views.append(View(self.root, self.manifest, digest, selections, counts, files_root=self.files_root))
        return views


@dataclass(frozen=True, eq=False)
class View(Dataset):
    """A data set made of the shards of others, by `folds`, `subset` or `mix`; a loader takes it like any other.

    Attributes:
        view_digest: Identity of these data.
        selections: Records, by split and kind.
        counts: Number of records per label, by split and kind.
        mixed: Whether it is made of several data sets.
    """

    view_digest: str
    selections: Mapping[str, Mapping[Kind, Selection]]
    counts: Mapping[str, Mapping[Kind, dict[int, int]]]
    mixed: bool = False

    @property
    def digest(self) -> str:
        """Identity of these data; other folds and other mixes have another."""
        return self.view_digest

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, train first."""
        return tuple(self.selections)

    @property
    def nbytes(self) -> int:
        """Bytes of the chosen records, approximately."""
        return sum(int(part.nbytes.sum()) for kinds in self.selections.values() for part in kinds.values())

    def table(self, split: str, kind: Kind) -> ShardTable:
        """Raise DataError, because the data set has no shards of its own."""
        raise DataError(
            f"a fold, subset or mix of {self.root} has no shards of its own; ask `select` or the data sets it is made of"
        )

    def select(self, split: str, kind: Kind) -> Selection:
        """Return the records of a split and kind; raise UsageError or DataError for one that is not there."""
        if not isinstance(split, str) or split not in self.selections:
            raise UsageError(f"unknown split {shown(split)}; this fold, subset or mix has {', '.join(self.splits)}")
        if not isinstance(kind, str) or kind not in self.selections[split]:
            raise DataError(f"{self.root} holds no {kind}; it has {' and '.join(self.schema.kinds)}")
        return self.selections[split][kind]

    def num_records(self, split: str, kind: Kind) -> int:
        """Return the number of records of a split and kind."""
        return self.select(split, kind).num_records

    def _labels(self, split: str) -> Mapping[Kind, dict[int, int]]:
        if not isinstance(split, str) or split not in self.counts:
            raise UsageError(f"unknown split {shown(split)}; this fold, subset or mix has {', '.join(self.splits)}")
        return self.counts[split]

    def folds(self, k: int, seed: int = 0) -> list[Dataset]:
        """Raise UsageError, because folds are made of a data set as it is stored."""
        raise UsageError("folds are made of a data set as it is stored; this is a fold, a subset or a mix already")


def default_cache() -> Path:
    """Return `dali_pipeline` in XDG_CACHE_HOME, or in .cache of the home folder; raise UsageError if there is neither."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dali_pipeline"
    except RuntimeError:
        raise UsageError(
            "no home folder is known for a cache of the URL's data; name a folder with --cache-dir (cache_dir), or set HOME"
        ) from None


def _cache(cache_dir: str | os.PathLike[str] | None, cache_bytes: int | None) -> Cache:
    folder = default_cache() if cache_dir is None else Path(path("cache_dir", cache_dir))
    return Cache(folder, CACHE_BYTES if cache_bytes is None else cache_bytes)


def open_dataset(
    root: str | os.PathLike[str] | RemotePath,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
    files_root: str | os.PathLike[str] | RemotePath | None = None,
) -> Dataset:
    """Open the data set in a folder, or at a URL that fsspec knows (s3, gs, az, http and so on).

    The cache keeps what is read from a URL's shards, 1 MiB at a time. All processes of a node share it, and other runs may
    share it too. A folder needs none.

    Args:
        root: Folder or URL.
        cache_dir: Directory for cached remote blocks. Default: `dali_pipeline` in the user's cache folder.
        cache_bytes: Maximum size of the cache in bytes. Default: 32 GiB.
        files_root: Folder or URL of the files that hold the values of a data set made in place. Default: where they lay, seen
            from the data set, when it was made.

    Returns:
        A `Dataset`.

    Raises:
        FormatError: There is no data set, its manifest is unreadable or damaged, or the folder of its values is not there.
        DataError: The store cannot be reached.
        UsageError: The URL or the cache cannot be used, or `files_root` is no folder, or given for a data set that holds its
            values itself.

    Costs a read of `manifest.json` alone.

    Examples:
        >>> data = dp.open_dataset("s3://bucket/traces", cache_bytes=100 << 30)  # doctest: +SKIP
        >>> data.num_records("train", "sequences")  # doctest: +SKIP
    """
    place = root if isinstance(root, RemotePath) else _place(path("the data set", root), cache_dir, cache_bytes)
    manifest = Manifest.load(place)
    return Dataset(place, manifest, files_root=_files_root(place, manifest, files_root, cache_dir, cache_bytes))


def _place(root: str, cache_dir: str | os.PathLike[str] | None, cache_bytes: int | None) -> Place:
    """Return the place of a data set in a store, or its folder; raise FormatError if that is none."""
    if is_url(root):
        return RemotePath(Store(root), _cache(cache_dir, cache_bytes))
    if not Path(root).is_dir():
        raise FormatError(f"{Path(root)} is not a folder; expected a data set, as `convert` or `extract` writes it")
    return Path(root)


def _files_root(
    root: Place,
    manifest: Manifest,
    given: str | os.PathLike[str] | RemotePath | None,
    cache_dir: str | os.PathLike[str] | None,
    cache_bytes: int | None,
) -> Place | None:
    """Return the folder of the files that hold the values of a data set in place; None for any other data set."""
    if manifest.files is msgspec.UNSET:
        if given is not None:
            raise UsageError(f"{root} holds its values itself, and files_root is {shown(given)}; leave it out")
        return None
    if isinstance(given, RemotePath):
        return given
    if given is not None:
        given = path("files_root", given)
        if is_url(given):
            return RemotePath(Store(os.fspath(given)), _cache(cache_dir, cache_bytes))
        if not Path(given).is_dir():
            raise UsageError(f"files_root is {given}, which is not a folder; expected the one with the files of {root}")
        return Path(given)
    if isinstance(root, RemotePath):
        return RemotePath(root.store.beside(manifest.files.path), root.cache)
    folder = Path(os.path.normpath(root.resolve() / manifest.files.path))
    if not folder.is_dir():
        raise FormatError(
            f"the values of {root} lie in files below {folder}, which is not there; name their folder by files_root "
            "(--files-root), and in a container mount it too"
        )
    return folder
