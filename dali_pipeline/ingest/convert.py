"""convert: a folder in somebody else's format to a data set, file by file, restartable."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import xxhash

from dali_pipeline.ingest.progress import progress_bar
from dali_pipeline.ingest.pt import PtFile, find_files, read_file
from dali_pipeline.journal import JOURNAL_NAME
from dali_pipeline.manifest import MANIFEST_NAME, Dataset, open_dataset
from dali_pipeline.schema import KINDS, Array, DataError, Field, Kind, Record, Schema, UsageError
from dali_pipeline.split import Split
from dali_pipeline.writer import SHARD_BYTES, ShardWriter

COMMIT_BYTES = 1 << 30  # of source files between two points of restart


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files of a foreign folder, sequences first."""

    root: Path
    files: list[tuple[Kind, Path]]

    @classmethod
    def find(cls, root: Path) -> Source:
        """Raises UsageError where the folder holds nothing that can be read."""
        found = find_files(root)
        return cls(root=root, files=[(kind, path) for kind, paths in found.items() for path in paths])

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for _, path in self.files)

    @property
    def names(self) -> list[tuple[str, int]]:
        """Name and size of every file: what tells this folder from another."""
        return [(str(path.relative_to(self.root)), path.stat().st_size) for _, path in self.files]

    def check_older(self, dst: Path) -> None:
        """Raises UsageError for a file that changed after `dst` was made of it, finished or not: as `make` would see it."""
        for made in (dst / MANIFEST_NAME, dst / JOURNAL_NAME):
            changed = [path for _, path in self.files if made.exists() and path.stat().st_mtime_ns > made.stat().st_mtime_ns]
            if changed:
                raise UsageError(
                    f"{changed[0]} is newer than {dst}, which was made of it; remove {dst}, choose another folder, or, if only "
                    f"the date is new, `touch {made}`"
                )


def convert(
    src: Path, dst: Path, *, split: Split | None = None, shard_bytes: int = SHARD_BYTES, dtype: str | None = None
) -> Dataset:
    """Writes the data set `dst` from the files of `src`; goes on where an earlier run was stopped, and takes a finished one.

    dtype: of values as stored; that of the first file by default. The group of a record is its question id; its id is that
    too where the folder has it once, else `<question id>#<k>` in file order, alike in both halves. Raises FormatError for a
    file that is not what it says, DataError for halves that disagree, UsageError for too little space; then there is no
    manifest. Memory: one file (a zip `.pt` is mapped) and three shards.
    """
    split = split or Split()
    source = Source.find(src)
    described = {"files": source.names, "split": split, "shard_bytes": shard_bytes, "dtype": dtype}
    fingerprint = xxhash.xxh3_128_hexdigest(msgspec.json.encode(described))
    source.check_older(dst)
    if (dst / MANIFEST_NAME).exists():
        data = open_dataset(dst)
        if data.manifest.source.get("fingerprint") != fingerprint:
            raise UsageError(f"{dst} is a data set of other files or settings than {src}; expected a new folder")
        return data
    check_space(source.nbytes, dst)
    with progress_bar() as bar:
        ids, in_one_half = name_records(source, bar.track(source.files, description="read ids"))
        writer = ShardWriter(
            dst,
            infer_schema(source, dtype),
            shard_bytes=shard_bytes,
            split=split,
            source={"made_by": "convert", "files": len(source.files), "in_one_half": in_one_half, "fingerprint": fingerprint},
            fingerprint=fingerprint,
        )
        with writer:
            task = bar.add_task("convert", total=sum(map(len, ids)), completed=sum(map(len, ids[: writer.cursor])))
            uncommitted = 0
            for number, (kind, path) in enumerate(source.files):
                if number < writer.cursor:
                    continue
                file = read_file(path, kind)
                for row, name in enumerate(ids[number]):
                    try:
                        writer.write(_record(file, row, name, writer.schema))
                    except DataError as error:
                        raise DataError(f"{path}: {error}") from error
                    bar.advance(task)
                uncommitted += path.stat().st_size
                if uncommitted >= COMMIT_BYTES:
                    writer.commit(number + 1)
                    uncommitted = 0
    return open_dataset(dst)


def _record(file: PtFile, row: int, name: str, schema: Schema) -> Record:
    part = file.sequence(row) if file.kind == "sequences" else None
    graphs = file.graphs(row) if file.kind == "graphs" else None
    if graphs is not None and graphs.edge_attr is not None and schema.edge_attr is None:
        raise DataError(f"record {name!r} has edge_attr, which the first graphs with edges had not; expected all or none")
    return Record(id=name, group=file.question_ids[row], label=file.labels[row], sequence=part, graphs=graphs)


def name_records(source: Source, files: Iterable[tuple[Kind, Path]]) -> tuple[list[list[str]], int]:
    """The record ids of every file, and how many records one half has and the other lacks. Opens every file once.

    Raises DataError where a question has different numbers of records in the two halves, or a record different labels.
    """
    read: list[tuple[Kind, list[str], list[int]]] = []
    times: dict[Kind, Counter[str]] = {kind: Counter() for kind in KINDS}
    for kind, path in files:
        file = read_file(path, kind)
        read.append((kind, file.question_ids, file.labels))
        times[kind].update(file.question_ids)
    for question in times["sequences"].keys() & times["graphs"].keys():
        if (a := times["sequences"][question]) != (b := times["graphs"][question]):
            raise DataError(
                f"{source.root}: question {question!r} has {a} records in lstm_solo and {b} in gnn; expected equal numbers"
            )
    recurring = {question for counts in times.values() for question, count in counts.items() if count > 1}
    labels: dict[Kind, dict[str, int]] = {kind: {} for kind in KINDS}
    seen: dict[Kind, Counter[str]] = {kind: Counter() for kind in KINDS}
    ids: list[list[str]] = []
    for kind, questions, file_labels in read:
        names = []
        for question in questions:
            names.append(f"{question}#{seen[kind][question]}" if question in recurring else question)
            seen[kind][question] += 1
        labels[kind].update(zip(names, file_labels, strict=True))
        ids.append(names)
    for name in labels["sequences"].keys() & labels["graphs"].keys():
        if (one := labels["sequences"][name]) != (other := labels["graphs"][name]):
            raise DataError(
                f"{source.root}: record {name!r} has the label {one} in lstm_solo and {other} in gnn; expected the same"
            )
    both = bool(times["sequences"] and times["graphs"])
    return ids, len(labels["sequences"].keys() ^ labels["graphs"].keys()) if both else 0


def check_space(needed: int, dst: Path) -> None:
    """Raises UsageError unless the file system of `dst` has room for `needed` bytes and one hundredth more."""
    parent = next(folder for folder in (dst, *dst.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed * 1.01:
        raise UsageError(
            f"{dst} needs about {gigabytes(needed)} and {parent} has {gigabytes(free)} free; free some or choose another folder"
        )


def gigabytes(nbytes: int) -> str:
    """`12.3 GB`, `4.5 MB`."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def infer_schema(source: Source, dtype: str | None) -> Schema:
    """From the first sequence, and the first record whose graphs have edges; the writer checks that all others agree."""
    fields: dict[str, Field] = {}
    if first := next(_filled(source, "sequences"), None):
        fields["sequence"] = _field(first.sequence(0), dtype)
    graphs = None
    for file in _filled(source, "graphs"):
        found = (file.graphs(row) for row in range(len(file)))
        graphs = next((each for each in found if each.edge_index.size), graphs or file.graphs(0))
        if graphs.edge_index.size:
            break
    if graphs is not None:
        fields["x"] = _field(graphs.x, dtype)
        if graphs.edge_attr is not None:
            fields["edge_attr"] = _field(graphs.edge_attr, dtype)
    if not fields:
        raise DataError(f"{source.root} holds no records; expected at least one")
    return Schema(**fields)


def _filled(source: Source, kind: Kind) -> Iterator[PtFile]:
    files = (read_file(path, kind) for each, path in source.files if each == kind)
    return (file for file in files if len(file))


def _field(rows: Array, dtype: str | None) -> Field:
    return Field(dtype=dtype or rows.dtype.name, shape=rows.shape[1:])
