"""Selection: the records that a loader delivers, as rows of shards; all of a split, or a part, or parts of several sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import xxhash

from dali_pipeline.errors import FormatError
from dali_pipeline.format.digest import EpochDigest
from dali_pipeline.format.manifest import ShardTable, shard_path
from dali_pipeline.format.shard import Shard, SoundMap
from dali_pipeline.sampling.draws import Draws
from dali_pipeline.storage.cachedfile import Place, RemotePath
from dali_pipeline.storage.files import Files
from dali_pipeline.types import Array, Ints, Kind

SPARE_BYTES = 16 << 20  # of a cache, for headers, names, and blocks that runs share


@dataclass(frozen=True, kw_only=True, eq=False)
class Shards:
    """The shards of one split and kind of a data set in folder `root`."""

    root: Place
    split: str
    kind: Kind
    table: ShardTable

    def open(self, number: int, files: Files, sound: SoundMap | None = None) -> Shard:
        """One of them; raises FormatError where it is not what the manifest says."""
        path = shard_path(self.root, self.split, self.kind, number)
        shard, records = self.table.open(path, number, files, sound), self.table.records[number]
        if (shard.kind, shard.records) != (self.kind, records):
            raise FormatError(f"{path} has {shard.records} {shard.kind}; expected {records} {self.kind} as in the manifest")
        return shard


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """N records in an order of their own, their positions; entries are runs of positions in one shard.

    shards: where they lie · table, number: (entries,) which of `shards`, and which shard there · records, nbytes: (entries,) ·
    rows: (N,) row of each position in its shard, ascending within an entry; None for all rows of every entry ·
    positions: (N,) what a batch tells as the record's position, None for its own · draws: where an epoch is draws rather than
    every record once · digest: identity of all this, 32 hex digits.
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
        """All records of a split, in file order."""
        table = shards.table
        return cls(
            shards=(shards,),
            table=np.zeros(len(table), np.int64),
            number=np.arange(len(table)),
            records=np.array(table.records, np.int64),
            nbytes=np.array(table.bytes, np.int64),
            digest=digest,
        )

    @classmethod
    def chain(cls, parts: Sequence[Selection], digest: str) -> Selection:
        """The records of all parts, one part after the other."""
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
        """N."""
        return int(self.records.sum())

    @property
    def record_bytes(self) -> float:
        """Bytes of a record as stored, on average; 0 where there is none."""
        return int(self.nbytes.sum()) / max(1, self.num_records)

    def bounds(self, axis: str) -> tuple[int, int] | None:
        """Fewest and most rows of a record (`step`, `graph`, `node`, `edge`) in the splits that these are of; None for none."""
        found = [shards.table.rows[axis] for shards in self.shards if axis in shards.table.rows]
        return (min(fewest for fewest, _ in found), max(most for _, most in found)) if found else None

    def told(self, positions: Ints) -> Ints:
        """What a batch tells as the positions of these records."""
        return positions if self.positions is None else self.positions[positions]

    @property
    def room(self) -> int | None:
        """Bytes of the smallest cache that its shards come through; None where all lie in folders."""
        return min((shards.root.cache.nbytes for shards in self.shards if isinstance(shards.root, RemotePath)), default=None)

    def check_room(self, window_bytes: int) -> None:
        """Raises UsageError where the cache of a store cannot hold two windows, as reading ahead fills, or these shards."""
        needed = 2 * min(window_bytes, int(self.nbytes.sum())) + SPARE_BYTES
        for root in {shards.root for shards in self.shards}:
            if isinstance(root, RemotePath):
                root.cache.check_room(needed, f"a window of {window_bytes} bytes")

    def every_row(self) -> Ints:
        """`rows`, written out."""
        if self.rows is not None:
            return self.rows
        starts = np.cumsum(self.records) - self.records
        return np.arange(self.num_records) - np.repeat(starts, self.records)

    def take(self, chosen: Ints, digest: str, borders: Sequence[int] = ()) -> Selection:
        """The records at positions `chosen`, in that order; a shard that they come back to later is another entry.

        borders: places among them that no entry lies across.
        """
        entry = np.repeat(np.arange(len(self.records)), self.records)[chosen]
        rows = self.every_row()[chosen]
        cut = (np.diff(entry, prepend=-1) != 0) | (np.diff(rows, prepend=-1) <= 0)  # (n,) whether an entry begins here
        cut[np.array([at for at in borders if at < len(chosen)], np.int64)] = True
        begins = np.flatnonzero(cut)
        which, records = entry[begins], np.diff([*begins, len(chosen)])
        return Selection(
            shards=self.shards,
            table=self.table[which],
            number=self.number[which],
            records=records,
            nbytes=np.maximum(1, self.nbytes[which] * records // np.maximum(1, self.records[which])),
            rows=rows,
            digest=digest,
        )

    def drawn(self, parts: Sequence[tuple[Ints, float]], digest: str) -> Selection:
        """Epochs of N draws: of each part (positions, in order) its share, every record of it before one comes again."""
        chosen = np.concatenate([positions for positions, _ in parts])
        ends = np.cumsum([len(positions) for positions, _ in parts])
        taken = self.take(chosen, digest, ends.tolist())
        entry_ends = np.searchsorted(np.cumsum(taken.records), ends, side="left") + 1
        total = sum(share for _, share in parts)
        draws = tuple(
            Draws(begin=int(begin), end=int(end), share=share / total)
            for begin, end, (_, share) in zip([0, *entry_ends[:-1]], entry_ends, parts, strict=True)
        )
        return replace(taken, positions=chosen, draws=draws, num_draws=self.num_records)

    def at(self, position: int) -> tuple[Shards, int, int]:
        """Return where a record lies: the shards of its split, the number of the shard, and its row in it."""
        ends = np.cumsum(self.records)
        entry = int(np.searchsorted(ends, position, side="right"))
        row = position - int(ends[entry] - self.records[entry]) if self.rows is None else int(self.rows[position])
        return self.shards[int(self.table[entry])], int(self.number[entry]), row

    def labels(self) -> Ints:
        """(N,) of every record. Reads them from the shards, a few bytes a record."""
        found = [shard.read("labels")[rows] for shard, rows in self._by_entry()]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def texts(self, name: str) -> list[bytes]:
        """`ids` or `groups` of every record. Reads them from the shards, some ten bytes a record."""
        return [texts[row] for shard, rows in self._by_entry() for texts in [shard.texts(name)] for row in rows.tolist()]

    def expected(self) -> EpochDigest:
        """Of an epoch that delivers every record once: from the manifest; for a part of a split, from the ids themselves."""
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
    """The identity of what is made of something with `digest`, by what `words` say."""
    return xxhash.xxh3_128_hexdigest("\n".join([digest, *map(str, words)]).encode())
