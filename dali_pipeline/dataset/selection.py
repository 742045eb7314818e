"""Selection: the records that a loader delivers, as rows of shards: a split, a part of one, or parts of several data sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import xxhash

from dali_pipeline.errors import FormatError
from dali_pipeline.format.digest import EpochDigest
from dali_pipeline.format.layers import Layers, select
from dali_pipeline.format.manifest import ShardTable, shard_path
from dali_pipeline.format.schema import Field, level_of
from dali_pipeline.format.shard import Shard, SoundMap
from dali_pipeline.sampling.draws import Draws
from dali_pipeline.storage.cachedfile import Place, RemotePath
from dali_pipeline.storage.files import Files
from dali_pipeline.types import Array, Ints, Kind

SPARE_BYTES = 16 << 20  # reserved in a cache for headers, names, and blocks shared by runs


@dataclass(frozen=True, kw_only=True, eq=False)
class Shards:
    """The shards of one split and kind of a data set.

    Attributes:
        root: Folder of the data set, or its place in a store.
        split: Name of the split.
        kind: Kind of record.
        table: Columns with one entry per shard.
        files_root: Folder of the files of others that hold values; None if there are none.
        referenced: Names of the arrays that lie in them.
    """

    root: Place
    split: str
    kind: Kind
    table: ShardTable
    files_root: Place | None = None
    referenced: tuple[str, ...] = ()

    def open(self, number: int, files: Files, sound: SoundMap | None = None) -> Shard:
        """Open one shard; raise FormatError if it is not what the manifest says."""
        path = shard_path(self.root, self.split, self.kind, number)
        shard, records = self.table.open(path, number, files, sound, self.files_root), self.table.records[number]
        if (shard.kind, shard.records) != (self.kind, records):
            raise FormatError(f"{path} has {shard.records} {shard.kind}; expected {records} {self.kind} as in the manifest")
        return shard


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """N records in a fixed order, which defines their positions. An entry is a range of positions in one shard.

    Attributes:
        shards: Tables of shards that the records lie in.
        table: (entries,) number of each entry's table in `shards`.
        number: (entries,) number of each entry's shard in its table.
        records: (entries,) number of records.
        nbytes: (entries,) bytes of the records.
        rows: (N,) row of each position in its shard, ascending within an entry; None for all rows of every entry.
        positions: (N,) what a batch reports as the record's position; None for the position itself.
        draws: Parts of an epoch of draws; empty if an epoch delivers every record once.
        num_draws: Draws per epoch.
        digest: Identity of all this, 32 hexadecimal digits.
    """

    shards: tuple[Shards, ...]
    table: Ints
    number: Ints
    records: Ints
    nbytes: Ints
    rows: Ints | None = None
    positions: Ints | None = None
    draws: tuple[Draws, ...] = ()
    num_draws: int = 0
    digest: str

    @classmethod
    def whole(cls, shards: Shards, digest: str) -> Selection:
        """Return all records of a split, in file order."""
        table = shards.table
        return cls(
            shards=(shards,),
            table=np.zeros(len(table), np.int64),
            number=np.arange(len(table)),
            records=np.array(table.records, np.int64),
            nbytes=np.array(table.nbytes, np.int64),
            digest=digest,
        )

    @classmethod
    def chain(cls, parts: Sequence[Selection], digest: str) -> Selection:
        """Return the records of all parts, one part after the other."""
        firsts = np.cumsum([0, *(len(part.shards) for part in parts)])
        rows = [part.every_row() for part in parts] if any(part.rows is not None for part in parts) else None
        return cls(
            shards=tuple(shards for part in parts for shards in part.shards),
            table=np.concatenate([part.table + first for part, first in zip(parts, firsts, strict=False)]),
            number=np.concatenate([part.number for part in parts]),
            records=np.concatenate([part.records for part in parts]),
            nbytes=np.concatenate([part.nbytes for part in parts]),
            rows=None if rows is None else np.concatenate(rows),
            digest=digest,
        )

    @property
    def num_records(self) -> int:
        """Number of records, N."""
        return int(self.records.sum())

    @property
    def record_bytes(self) -> float:
        """Bytes of a record as stored, on average; 0 if there is none."""
        return int(self.nbytes.sum()) / max(1, self.num_records)

    @property
    def mean_rows(self) -> float:
        """Steps, or nodes, of a record on average, over the whole splits; 1 if unknown."""
        tables = [shards.table for shards in self.shards if shards.table.steps]
        records = sum(sum(table.records) for table in tables)
        return sum(sum(table.steps) for table in tables) / records if records else 1.0

    def bounds(self, axis: str) -> tuple[int, int] | None:
        """Return the fewest and most rows of a record on an axis (step, graph, node, edge) in the splits, or None."""
        tables = [shards.table for shards in self.shards if len(shards.table)]
        if any(axis not in table.rows for table in tables):
            return None
        bounds = [table.rows[axis] for table in tables]
        return (min(fewest for fewest, _ in bounds), max(most for _, most in bounds)) if bounds else None

    def reported_positions(self, positions: Ints) -> Ints:
        """Return what a batch reports as the positions of these records."""
        return positions if self.positions is None else self.positions[positions]

    @property
    def cache_bytes(self) -> int | None:
        """Bytes of the smallest cache that the shards are read through; None if all lie in folders."""
        return min((shards.root.cache.nbytes for shards in self.shards if isinstance(shards.root, RemotePath)), default=None)

    def check_cache(self, window_bytes: int) -> None:
        """Raise UsageError if a store's cache holds neither two windows, as reading ahead fills, nor these shards."""
        needed = 2 * min(window_bytes, int(self.nbytes.sum())) + SPARE_BYTES
        for root in {shards.root for shards in self.shards}:
            if isinstance(root, RemotePath):
                root.cache.check_size(needed, f"a window of {window_bytes} bytes")

    def every_row(self) -> Ints:
        """Return `rows`, also if it is None."""
        if self.rows is not None:
            return self.rows
        starts = np.cumsum(self.records) - self.records
        return np.arange(self.num_records) - np.repeat(starts, self.records)

    def take(self, chosen: Ints, digest: str, borders: Sequence[int] = ()) -> Selection:
        """Return the records at positions `chosen`, in that order; a shard that is returned to later is another entry.

        Args:
            chosen: (n,) positions.
            digest: Identity of the result.
            borders: Indices in `chosen` at which a new entry begins. Default: none.
        """
        entry = np.repeat(np.arange(len(self.records)), self.records)[chosen]
        rows = self.every_row()[chosen]
        begins_entry = (np.diff(entry, prepend=-1) != 0) | (np.diff(rows, prepend=-1) <= 0)  # (n,) bool
        begins_entry[np.array([index for index in borders if index < len(chosen)], np.int64)] = True
        begins = np.flatnonzero(begins_entry)
        entries, records = entry[begins], np.diff([*begins, len(chosen)])
        return Selection(
            shards=self.shards,
            table=self.table[entries],
            number=self.number[entries],
            records=records,
            nbytes=np.maximum(1, self.nbytes[entries] * records // np.maximum(1, self.records[entries])),
            rows=rows,
            digest=digest,
        )

    def drawn(self, parts: Sequence[tuple[Ints, float]], digest: str) -> Selection:
        """Return epochs of N draws: from each part (positions, in order) its share, each record once per pass."""
        chosen = np.concatenate([positions for positions, _ in parts])
        ends = np.cumsum([len(positions) for positions, _ in parts])
        taken = self.take(chosen, digest, ends.tolist())
        entry_ends = np.searchsorted(np.cumsum(taken.records), ends, side="left") + 1
        total_share = sum(share for _, share in parts)
        draws = tuple(
            Draws(begin=int(begin), end=int(end), share=share / total_share)
            for begin, end, (_, share) in zip([0, *entry_ends[:-1]], entry_ends, parts, strict=True)
        )
        return replace(taken, positions=chosen, draws=draws, num_draws=self.num_records)

    def at(self, position: int) -> tuple[Shards, int, int]:
        """Return the shards that a record lies in, the number of its shard, and its row in that shard."""
        ends = np.cumsum(self.records)
        entry = int(np.searchsorted(ends, position, side="right"))
        row = position - int(ends[entry] - self.records[entry]) if self.rows is None else int(self.rows[position])
        return self.shards[int(self.table[entry])], int(self.number[entry]), row

    def labels(self) -> Array:
        """Read the label of every record, (N, *shape) in the stored type; a few bytes per record."""
        labels = [shard.read("labels")[rows] for shard, rows in self._by_entry()]
        return np.concatenate(labels) if labels else np.zeros(0, np.int64)

    def field_values(self, name: str, field: Field, layers: Layers = None) -> Iterator[tuple[Array, Ints, Array]]:
        """Read a step, node or record field of every record, or the labels, a shard at a time; reads no other values.

        Args:
            name: Name of the array in the shards, such as "step.is_right", or "labels".
            field: Its field.
            layers: Steps, or graphs, of each record whose rows are read. Default: all.

        Yields:
            The values (M, *shape) as a loader delivers them, M counted over the records; (n,) int64 rows of each of the n
            records; and (n,) positions of these.
        """
        level, done = ("record" if name == "labels" else level_of(name)), 0
        for shard, rows in self._by_entry():
            values = shard.read(name)
            counts = np.ones(len(rows), np.int64)
            if level == "record":
                values = values[rows]
            else:
                offsets = shard.read("sequence.offsets" if level == "step" else "graphs.offsets")
                begins, counts = offsets[rows], offsets[rows + 1] - offsets[rows]
                if layers is not None:
                    parts = [
                        begin + np.array(select(layers, count)) for begin, count in zip(begins, counts.tolist(), strict=True)
                    ]
                    begins, counts = np.concatenate(parts), np.array([len(part) for part in parts])
                    ends = begins + 1
                else:
                    ends = begins + counts
                if level == "node":
                    nodes = shard.read("x.offsets")
                    per_part = nodes[ends] - nodes[begins]
                    owners = np.repeat(np.arange(len(rows)), counts) if layers is not None else np.arange(len(rows))
                    begins, ends = nodes[begins], nodes[ends]
                    counts = np.bincount(owners, per_part, len(rows)).astype(np.int64)
                widths = ends - begins
                values = values[np.repeat(begins - np.cumsum(widths) + widths, widths) + np.arange(int(widths.sum()))]
            yield field.values(values), counts, np.arange(done, done + len(rows))
            done += len(rows)

    def texts(self, name: str) -> list[bytes]:
        """Read the `ids` or `groups` of every record; some ten bytes per record."""
        return [texts[row] for shard, rows in self._by_entry() for texts in [shard.texts(name)] for row in rows.tolist()]

    def expected(self) -> EpochDigest:
        """Return the digest of an epoch that delivers every record once.

        It comes from the manifest. For a part of a split it is computed from the ids.
        """
        if self.rows is None and all(shards.table.ids for shards in self.shards if len(shards.table)):
            total = sum(int(shards.table.ids, 16) for shards in self.shards if len(shards.table)) % 2**64
            return EpochDigest(records=self.num_records, total=total)
        return EpochDigest.of(self.texts("ids"))

    def _by_entry(self) -> Iterator[tuple[Shard, Array]]:
        ends, rows, files = np.cumsum(self.records), self.every_row(), Files()
        for table, number, begin, end in zip(
            self.table.tolist(), self.number.tolist(), (ends - self.records).tolist(), ends.tolist(), strict=True
        ):
            yield self.shards[table].open(number, files), rows[begin:end]


def derived_digest(digest: str, *words: object) -> str:
    """Return the identity of data derived from data with `digest`, in the way that `words` describe."""
    return xxhash.xxh3_128_hexdigest("\n".join([digest, *map(str, words)]).encode())
