"""The manifest: the contents of a data set in one JSON file, which is written last."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec
import xxhash

from dali_pipeline.errors import FormatError, UsageError
from dali_pipeline.format.schema import SPLITS, Schema
from dali_pipeline.format.shard import Shard, ShardInfo, SoundMap
from dali_pipeline.storage.cachedfile import Place, RemotePath
from dali_pipeline.storage.stores import GoneError, NoBucketError
from dali_pipeline.storage.whole import write_whole
from dali_pipeline.types import KINDS, Kind

if TYPE_CHECKING:
    from dali_pipeline.storage.files import Files

P = TypeVar("P", Path, RemotePath, Place)
MANIFEST_NAME = "manifest.json"
FORMAT_NAME = "dali_pipeline"
FORMAT_VERSION = 2
VERSIONS = (1, 2)  # that are read


@dataclass(kw_only=True)
class ShardTable:
    """The shards of one split and kind, column by column, so that a million of them parse quickly.

    Attributes:
        records: Number of records per shard.
        bytes: File size per shard.
        blocks: Number of hash blocks per shard.
        steps: Rows of all sequences, or nodes of all graphs, per shard; empty in version 1.
        digests: Header digests, 32 hexadecimal digits per shard, in one string.
        labels: Number of records per class; of several labels, of the records that have each; empty for values.
        rows: Fewest and most rows of a record, per axis: `step`, or `graph`, `node` and `edge`.
        ids: Sum of the XXH3-64 of all ids modulo 2**64, 16 hexadecimal digits; empty if unknown, in data sets older than this
            field.
        referenced: Bytes of values in files of others per shard. Default: unset, the shards hold all values.
    """

    records: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    digests: str = ""
    labels: dict[str, int] = field(default_factory=dict)
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)
    ids: str = ""
    referenced: list[int] | msgspec.UnsetType = msgspec.UNSET

    def __len__(self) -> int:
        return len(self.records)

    def append(self, info: ShardInfo) -> None:
        """Append one shard."""
        self._add_ids(f"{info.ids:016x}")
        self.records.append(info.records)
        self.bytes.append(info.bytes)
        self.blocks.append(info.blocks)
        self.steps.append(info.steps)
        self.digests += info.digest
        self._refer([info.referenced], 1)

    def extend(self, other: ShardTable) -> None:
        """Append the shards of another table."""
        if len(other):
            self._add_ids(other.ids)
        self.records += other.records
        self.bytes += other.bytes
        self.blocks += other.blocks
        self.steps += other.steps
        self.digests += other.digests
        self._refer(list(other.referenced or ()), len(other))
        for label, count in other.labels.items():
            self.labels[label] = self.labels.get(label, 0) + count
        self._widen(other.rows)

    @property
    def nbytes(self) -> list[int]:
        """Bytes of the records of each shard, those in files of others included."""
        return [own + other for own, other in zip(self.bytes, self.referenced or [0] * len(self), strict=True)]

    def _refer(self, referenced: list[int], shards: int) -> None:
        """Append the bytes in files of others of the last shards, which are in the other columns already."""
        if self.referenced or any(referenced):
            before = list(self.referenced or [0] * (len(self) - shards))
            self.referenced = before + (referenced or [0] * shards)

    def _add_ids(self, ids: str) -> None:
        known = ids and (self.ids or not len(self))
        self.ids = f"{(int(self.ids or '0', 16) + int(ids, 16)) % 2**64:016x}" if known else ""

    def _widen(self, rows: dict[str, tuple[int, int]]) -> None:
        for axis, (fewest, most) in rows.items():
            own = self.rows.get(axis, (fewest, most))
            if fewest < own[0] or most > own[1] or axis not in self.rows:
                self.rows[axis] = (min(fewest, own[0]), max(most, own[1]))

    def digest(self, shard: int) -> str:
        """Return the header digest of one shard."""
        return self.digests[32 * shard : 32 * shard + 32]

    def open(
        self, path: Place, shard: int, files: Files, sound: SoundMap | None = None, files_root: Place | None = None
    ) -> Shard:
        """Open one shard, and check it against the table. files_root: folder of files that its values lie in, or None."""
        sound = bytearray(self.blocks[shard]) if sound is None else sound
        if isinstance(path, RemotePath):
            path = dataclasses.replace(path, digest=self.digest(shard), nbytes=self.bytes[shard], blocks=self.blocks[shard])
        digest, nbytes = self.digest(shard), self.bytes[shard]
        return Shard(path, nbytes=nbytes, digest=digest, sound=sound, files=files, files_root=files_root)

    def count(self, classes: Iterable[int], rows: dict[str, int], times: int = 1) -> None:
        """Add the classes and row counts of one record, or of `times` equal ones, to `labels` and `rows`."""
        for label in classes:
            self.labels[str(label)] = self.labels.get(str(label), 0) + times
        self._widen({axis: (count, count) for axis, count in rows.items()})


@dataclass(frozen=True, kw_only=True)
class FeatureStatistics:
    """Statistics of every feature of a sequence's rows, or of nodes, over the training split.

    Attributes:
        mean: Mean per feature.
        std: Population standard deviation per feature.
        count: Finite values that were counted, per feature; empty in version 1. With it, statistics of two sets can be joined.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    count: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ForeignFiles:
    """The files of others that hold values of a data set in place.

    Attributes:
        path: Path from the data set to the folder of the files, with `/`.
        arrays: Names of the arrays that lie in them.
    """

    path: str
    arrays: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that is known of a data set without opening a shard.

    Attributes:
        schema: Fields of every record.
        splits: Shard table per split and kind.
        statistics: Feature statistics of the training split's sequences, or None.
        node_statistics: Feature statistics of the training split's nodes, or None.
        source: Where the data came from, for people (model, threshold, files left out). It contains no path, because a data set
            may be moved.
        split: The rule that dealt the splits: `shares` and `seed`, or the owner's own `names`. Empty if not known.
        files: Where the values lie that its shards refer to. Default: unset, the shards hold all values.
        format: Name of the format.
        version: Version of the format.
        digest: 32 hexadecimal digits over all the rest; the order of every epoch depends on it.
    """

    schema: Schema
    splits: dict[str, dict[Kind, ShardTable]]
    statistics: FeatureStatistics | None = None
    node_statistics: FeatureStatistics | None = None
    source: dict[str, Any] = field(default_factory=dict)
    split: dict[str, Any] = field(default_factory=dict)
    files: ForeignFiles | msgspec.UnsetType = msgspec.UNSET
    format: str = FORMAT_NAME
    version: int = FORMAT_VERSION
    digest: str = ""

    def compute_digest(self) -> str:
        """Return the XXH3-128 of the canonical JSON of everything but the digest."""
        return xxhash.xxh3_128_hexdigest(msgspec.json.encode(dataclasses.replace(self, digest=""), order="sorted"))

    def save(self, root: Path) -> Manifest:
        """Write `manifest.json` with its digest, atomically and synced to the disk; return the manifest as read back."""
        whole = dataclasses.replace(self, digest=self.compute_digest())
        data = whole.to_bytes()
        manifest = self._parse(root / MANIFEST_NAME, data)  # before writing, so an unreadable manifest is never written
        write_whole(root / MANIFEST_NAME, data)
        return manifest

    def to_bytes(self) -> bytes:
        """Return the canonical JSON of the file."""
        return msgspec.json.encode(self, order="sorted") + b"\n"

    @classmethod
    def load(cls, root: Place) -> Manifest:
        """Read and check `manifest.json`; raise FormatError with the reason if it is none."""
        path = root / MANIFEST_NAME
        try:
            data = path.store.read(path.key) if isinstance(path, RemotePath) else path.read_bytes()
        except FileNotFoundError:
            raise FormatError(f"{root} has no {MANIFEST_NAME}: not a data set, or one that was never finished") from None
        except NoBucketError:
            raise
        except GoneError:
            raise FormatError(f"{root} has no {MANIFEST_NAME}: not a data set, or one that was half uploaded") from None
        except OSError as error:
            raise FormatError(f"{path} cannot be read ({error.strerror})") from error
        return cls._parse(path, data)

    @classmethod
    def _parse(cls, path: Place, data: bytes) -> Manifest:
        try:
            manifest = msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, UsageError, UnicodeDecodeError, RecursionError) as error:
            raise FormatError(f"{path} is not a {FORMAT_NAME} manifest ({error})") from None
        if manifest.format != FORMAT_NAME or manifest.version not in VERSIONS:
            raise FormatError(
                f"{path} is {manifest.format!r} version {manifest.version}; "
                f"expected {FORMAT_NAME!r} version 1 or {FORMAT_VERSION}"
            )
        if manifest.version > 1 and (unknown := unknown_key(msgspec.json.decode(data), cls, "")):
            raise FormatError(f"{path} has the key {unknown!r}, which this release does not know; read it with a newer one")
        # The digest covers the bytes as they are, so a field that a later version adds does not matter.
        head = b'{"digest":"%s"' % manifest.digest.encode()
        digest = xxhash.xxh3_128_hexdigest(b'{"digest":""' + data[len(head) : -1])
        if digest != manifest.digest or not (data.startswith(head) and data.endswith(b"\n")):
            raise FormatError(f"{path} does not have the digest that it names: edited or damaged; restore it or convert again")
        for split, tables in manifest.splits.items():
            for kind, table in tables.items():
                steps = len(table.steps) if manifest.version > 1 else len(table.records)
                others = len(table.records) if table.referenced is msgspec.UNSET else len(table.referenced)
                columns = {len(table.records), len(table.bytes), len(table.blocks), steps, others, len(table.digests) / 32}
                if len(columns) > 1:
                    raise FormatError(f"{path}, {split}/{kind}: columns of unequal length")
                if not re.fullmatch("([0-9a-f]{16})?", table.ids):
                    raise FormatError(f"{path}, {split}/{kind}: ids are {table.ids!r}; expected 16 hex digits")
                labels, records = sum(table.labels.values()), sum(table.records)
                if manifest.schema.labels.kind == "class" and labels != records:
                    raise FormatError(f"{path}, {split}/{kind}: {labels} labels for {records} records")
        return manifest


def shard_path(root: P, split: str, kind: Kind, shard: int) -> P:
    """Return the path of a shard, such as `train/sequences-00000.safetensors`."""
    return root / split / f"{kind}-{shard:05d}.safetensors"


def empty_splits(kinds: tuple[Kind, ...] = KINDS) -> dict[str, dict[Kind, ShardTable]]:
    """Return a table without shards for every split and kind."""
    return {split: {kind: ShardTable() for kind in kinds} for split in SPLITS}


def unknown_key(value: Any, known: Any, where: str) -> str:
    """Return the first key in decoded JSON that a dataclass of this module has no field for; "" if there is none."""
    if dataclasses.is_dataclass(known) and isinstance(value, dict):
        names = {field.name for field in dataclasses.fields(known)}
        for key in value:
            if key not in names:
                return f"{where}{key}"
        hints = get_type_hints(known)
        found = (unknown_key(value[key], hints[key], f"{where}{key}.") for key in value)
        return next(filter(None, found), "")
    arguments = get_args(known)
    if get_origin(known) is dict and isinstance(value, dict):
        found = (unknown_key(each, arguments[1], f"{where}{key}.") for key, each in value.items())
        return next(filter(None, found), "")
    if isinstance(value, dict) and arguments:  # of several types, the one that is a dataclass
        classes = [each for each in arguments if dataclasses.is_dataclass(each) or get_origin(each) is dict]
        return unknown_key(value, classes[0], where) if classes else ""
    return ""
