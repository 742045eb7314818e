"""convert: a folder in somebody else's format to a data set, stretch by stretch on several workers, restartable."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash

from dali_pipeline.dataset.dataset import Dataset, default_cache, open_dataset
from dali_pipeline.errors import DataError, FormatError, PipelineError, UsageError
from dali_pipeline.format.encoding import BFLOAT16
from dali_pipeline.format.manifest import MANIFEST_NAME
from dali_pipeline.format.record import Record
from dali_pipeline.format.schema import Field
from dali_pipeline.ingest.config import ConvertConfig
from dali_pipeline.ingest.foreign import Block, Values
from dali_pipeline.ingest.job import Job, prepare
from dali_pipeline.ingest.onray import deal
from dali_pipeline.ingest.own import OWN, opened
from dali_pipeline.ingest.readers.traces import TRACES
from dali_pipeline.ingest.remote import Remote, raw_files
from dali_pipeline.ingest.sources import Source
from dali_pipeline.ingest.upload import finished, upload
from dali_pipeline.ingest.workers import Advance
from dali_pipeline.reading.damage import log
from dali_pipeline.runtime.progress import progress_bar, shown
from dali_pipeline.storage.stores import Store, is_url
from dali_pipeline.types import Array
from dali_pipeline.writing.filler import Contents, ShardFiller
from dali_pipeline.writing.journal import remove_leftovers
from dali_pipeline.writing.openshard import Stack
from dali_pipeline.writing.split import FileSplit
from dali_pipeline.writing.writer import ShardWriter

TELL_EVERY = 50  # records between two moves of the progress bar, and two looks at whether to stop


def convert(src: Path, dst: Path, config: ConvertConfig | None = None, remote: Remote | None = None) -> Dataset:
    """Writes the data set `dst` from the files of `src`; goes on where an earlier run was stopped, and takes a finished one.

    The group of a record is its question id, or what the format has for it; its id is that too where the folder has it once,
    else `<question id>#<k>` in file order, alike in both halves. The same files and settings give the same bytes, with any
    number of workers, on one machine or many, interrupted or not. Raises FormatError for a file that is not what it says,
    DataError for halves that disagree, UsageError for too little space; then there is no manifest. Memory a worker: a few MiB,
    and the edges, names and labels of a shard a split; of a pickle, or a compressed file, all of it. Files are opened twice,
    first for their names. Of a store's, `src` is their scratch folder.
    """
    config = config or ConvertConfig()
    if config.engine == "ray":  # whose workers stand in other folders
        src, dst = src.absolute(), dst.absolute()
    source = Source.find(src, config.traces, remote)
    if config.traces.scores is not None and source.reader.what != TRACES:
        raise UsageError(f"{src} holds {source.reader.what}, whose labels are their own; scores are for raw traces")
    fingerprint = config.fingerprint(source)
    if (dst / MANIFEST_NAME).exists():
        source.check_older(dst / MANIFEST_NAME)
        data = open_dataset(dst)
        if data.manifest.source.get("fingerprint") != fingerprint:
            raise UsageError(f"{dst} is a data set of other files or settings than {src}; expected a new folder")
        remove_leftovers(dst)
        return data
    with progress_bar() as bar:
        job = prepare(source, config, bar.track(range(len(source.files)), description="read names"))
    for sentence in job.told:
        log.warning(sentence.replace("%", "%%"))
    written = sum(path.stat().st_size for path in dst.glob("*/*.safetensors"))
    check_space(job.written_bytes - written, dst)
    made_by = _made_by(job) | {"made_by": "convert", "files": len(source.files), "fingerprint": fingerprint}
    stretches = source.stretches
    dated = xxhash.xxh3_128_hexdigest(msgspec.json.encode((fingerprint, source.times)))  # a restart sees changed files
    with ShardWriter(dst, job.schema, shard_bytes=config.shard_bytes, source=made_by, fingerprint=dated) as writer:
        writer.parts.mkdir(exist_ok=True)
        work = partial(_write, job, writer.parts)
        before = sum(job.counts[: stretches[writer.cursor - 1].stop]) if writer.cursor else 0
        with progress_bar() as bar:
            show = shown(bar, "convert", sum(job.counts), before)
            numbers, shared = range(writer.cursor, len(stretches)), [writer.parts, *source.folders]
            with closing(deal(config.engine, work, numbers, config.num_workers, show, shared)) as results:
                for number, (part, contents, left_out) in results:
                    writer.adopt(part, contents, number + 1, left_out)
        source.check_unchanged()
    return open_dataset(dst)


def _made_by(job: Job) -> dict[str, Any]:
    """What the manifest says of where the data come from; of a data set of ours what that says, as far as it is still so."""
    found: dict[str, Any] = {}
    if job.source.reader is OWN:
        before = opened(job.source.root).manifest.source
        found = {name: value for name, value in before.items() if name not in ("left_out", "in_one_half", "moved", "torn")}
    if isinstance(job.dealer, FileSplit):
        found["moved"] = job.dealer.moved
    if job.torn:
        found["torn"] = job.torn
    return found | job.choice.kept_numbers


def convert_to(src: str | Path, dst: str, config: ConvertConfig | None = None) -> Dataset:
    """`convert` from and to folders and URLs: to a URL into a folder beside the caches, then up, the manifest last.

    Stopped, it goes on where it was, uploads too. Needs the data set's size on the local disk meanwhile; of a URL's raw files
    two a worker, each fetched twice, first for its names.
    """
    if is_url(src):
        with raw_files(str(src), dst) as remote:
            return _convert_to(remote.scratch, dst, config, remote)
    return _convert_to(Path(src), dst, config, None)


def _convert_to(src: Path, dst: str, config: ConvertConfig | None, remote: Remote | None) -> Dataset:
    if not is_url(dst):
        return convert(src, Path(dst), config, remote)
    store = Store(dst)
    finished(store)  # a store that refuses does so now, and not when all is converted
    staging = default_cache() / "uploads" / xxhash.xxh3_64_hexdigest(str(store).encode())
    convert(src, staging, config, remote)
    upload(staging, dst)
    shutil.rmtree(staging)
    return open_dataset(dst)


def _write(job: Job, parts: Path, number: int, advance: Advance) -> tuple[Path, Contents, dict[str, str]]:
    """`write_stretch` under a name of its own, for a task may run twice at a time."""
    part, stretch = Path(tempfile.mkdtemp(prefix=f"{number}-", dir=parts)), job.source.stretches[number]
    if job.config.engine == "ray":
        for file in stretch:
            job.source.check_file(file)
    return part, *write_stretch(job, stretch, part, advance)


def write_stretch(job: Job, stretch: range, root: Path, advance: Advance) -> tuple[Contents, dict[str, str]]:
    """Writes the records of some files under `root`; returns what it wrote, and why, by name, a file was left out.

    With `skip_bad` every file is read twice, first to see whether all of it can be taken in.
    """
    filler = ShardFiller(root, job.schema, job.config.shard_bytes, job.dealer_of(stretch.start), Contents())
    left_out: dict[str, str] = {}
    for number in stretch:
        name, filler.dealer = job.source.names[number], job.dealer_of(number)
        if name in job.unreadable:
            left_out[name] = job.unreadable[name]
            continue
        try:
            if job.config.skip_bad:
                for record in _records(job, number):
                    filler.check(record)
        except (FormatError, DataError) as error:
            left_out[name] = job.source.told(_with_path(job, number, error))
            advance(job.counts[number])
            continue
        untold = 0
        try:
            for record in _records(job, number):
                filler.write(record)
                untold += len(record.ids) if isinstance(record, Stack) else 1
                if untold >= TELL_EVERY:
                    advance(untold)
                    untold = 0
        except (FormatError, DataError) as error:
            raise _with_path(job, number, error) from None
        advance(untold)
    filler.flush()
    return filler.contents, left_out


def _with_path(job: Job, number: int, error: PipelineError) -> PipelineError:
    path = job.source.files[number]
    return error if str(path) in str(error) else type(error)(f"{path}: {error}")


def _records(job: Job, number: int) -> Iterator[Record | Stack]:
    """The records of one file, one by one or stacked as they lie there."""
    file, end = job.source.open(number), 0
    if len(file) != job.counts[number]:
        raise FormatError(f"{file.path} has {len(file)} records, and had {job.counts[number]}; it changed while it was read")
    ids = job.names.ids(number, file)
    for values in file.values():
        begin, end = end, end + (len(values.sequences) if isinstance(values, Block) else 1)
        if end > len(file):
            break
        names = slice(begin, end)
        if isinstance(values, Block):
            yield _stack(job, Stack(ids[names], file.groups[names], file.labels[names], values.sequences), values.bfloat16)
        else:
            yield _record(job, ids[begin], file.groups[begin], file.labels[begin], values)
    if end != len(file):
        raise FormatError(f"{file.path} has {len(file)} labels and not as many records; it changed while it was read")


def _stack(job: Job, stack: Stack, bfloat16: Sequence[str]) -> Stack:
    """With the layers that are kept."""
    if job.config.layers is not None:
        chosen = job.choice.of("sequences", stack.sequences.shape[1])
        stack = stack._replace(sequences=stack.sequences[:, chosen])
    if "sequence" not in job.config.dtypes:
        _check_width(stack.ids[0], "sequence", stack.sequences, job.schema.sequence, bfloat16)
    return stack


def _record(job: Job, name: str, group: str, label: int, values: Values) -> Record:
    """With the layers that are kept."""
    (sequence, graphs, bfloat16), schema = values, job.schema
    if job.config.layers is not None:
        sequence = None if sequence is None else sequence[job.choice.of("sequences", len(sequence))]
        graphs = None if graphs is None else graphs.select(job.choice.of("graphs", len(graphs.node_counts)))
    if graphs is not None and graphs.edge_attr is not None and schema.edge_attr is None:
        raise DataError(f"record {name!r} has edge_attr, which the first graphs with edges had not; expected all or none")
    rows = {"sequence": sequence}
    if graphs is not None:
        rows |= {"x": graphs.x, "edge_attr": graphs.edge_attr, **graphs.fields}
    for what, array in rows.items():
        if what not in job.config.dtypes:
            _check_width(name, what, array, schema.named.get(what) or getattr(schema, what), bfloat16)
    return Record(id=name, group=group, label=label, sequence=sequence, graphs=graphs)


def _check_width(name: str, what: str, rows: Array | None, field: Field | None, bfloat16: Sequence[str]) -> None:
    """Raises DataError for values that would lose digits unasked. bfloat16: as in `Values`."""
    if rows is None or field is None or not rows.size or rows.dtype.kind not in "fiub" or field.scales:
        return
    dtype = BFLOAT16 if what in bfloat16 else rows.dtype.name
    if not _holds(field.dtype, dtype):
        raise DataError(
            f"record {name!r}: {what} is {dtype}, and {field.dtype} in the first file; give --dtype float32 or float16"
        )


def _holds(wide: str, narrow: str) -> bool:
    """Whether every value of one stored type is one of another."""
    if BFLOAT16 in (wide, narrow):  # eight bits of digits, and the exponents of float32
        return wide == narrow or (wide in ("float32", "float64") if narrow == BFLOAT16 else narrow in ("bool", "int8", "uint8"))
    return np.can_cast(narrow, wide)


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
