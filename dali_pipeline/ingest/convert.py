"""convert: write a data set from files in another format, chunk by chunk on several workers; restartable."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash

from dali_pipeline.dataset.dataset import Dataset, default_cache, open_dataset
from dali_pipeline.errors import DataError, FormatError, PipelineError, UsageError
from dali_pipeline.format.encoding import BFLOAT16, holds
from dali_pipeline.format.manifest import FORMAT_VERSION, MANIFEST_NAME, ForeignFiles, Manifest
from dali_pipeline.format.record import Record
from dali_pipeline.format.schema import Field
from dali_pipeline.ingest.config import ConvertConfig
from dali_pipeline.ingest.foreign import Block, Values
from dali_pipeline.ingest.job import Job, prepare
from dali_pipeline.ingest.layouts.alike import Pattern, pattern_of_files
from dali_pipeline.ingest.layouts.labels import NO_LABEL, scored
from dali_pipeline.ingest.layouts.placed import path_to, placed_alike, placed_records, read_ahead
from dali_pipeline.ingest.layouts.recipe import Recipe
from dali_pipeline.ingest.onray import deal
from dali_pipeline.ingest.readers.traces import TRACES
from dali_pipeline.ingest.remote import Remote, raw_files
from dali_pipeline.ingest.sources import Source, named
from dali_pipeline.ingest.upload import finished, upload
from dali_pipeline.ingest.workers import Advance
from dali_pipeline.reading.damage import log
from dali_pipeline.runtime.progress import progress_bar, shown
from dali_pipeline.storage.stores import Store, is_url
from dali_pipeline.types import Array
from dali_pipeline.writing.filler import Contents, ShardFiller
from dali_pipeline.writing.growth import ADDITION, grow, was_appended
from dali_pipeline.writing.journal import remove_leftovers
from dali_pipeline.writing.openshard import Stack
from dali_pipeline.writing.places import PlacedRecord
from dali_pipeline.writing.split import FileSplit
from dali_pipeline.writing.writer import ShardWriter

LABEL_RULE = "label_rule"  # key of a manifest's `source`: the threshold that made labels of scores
MOST_MISSES = 3  # times that neighbouring files of a chunk are not alike, until they are no longer tried together
TELL_EVERY = 50  # records between two updates of the progress bar, and between two checks whether to stop


def convert(src: Path, dst: Path, config: ConvertConfig | None = None, remote: Remote | None = None) -> Dataset:
    """Write the data set `dst` from the files of `src`; continue an interrupted run, and return a finished data set unchanged.

    The group of a record is its question id, or the format's equivalent. The id of a record is the question id if that occurs
    once in the folder, otherwise `<question id>#<k>` in file order, the same in sequences and graphs. The same files and
    settings give the same bytes, with any number of workers, on one machine or many, interrupted or not.

    Every file is opened twice, first for its names. Memory per worker: a few MiB, and the edges, names and labels of one shard
    per split; a pickle or a compressed file is held whole.

    Args:
        src: Folder of the files, or one file; with `remote` the scratch folder of the files.
        dst: Folder of the data set, new or unfinished.
        config: Settings; `ConvertConfig()` by default.
        remote: Store of the files, if they are not in a folder.

    Returns:
        The finished data set.

    Raises:
        FormatError: A file does not have its format. No manifest is written.
        DataError: Sequences and graphs disagree. No manifest is written.
        UsageError: Too little disk space, or `dst` was made from other files or settings.
    """
    config = config or ConvertConfig()
    if config.engine == "ray":  # Ray workers have other working folders
        src, dst = src.absolute(), dst.absolute()
    source, config = _found(src, config, remote, dst)
    return _written(source, dst, config)


def append(src: Path, dst: Path, config: ConvertConfig | None = None, remote: Remote | None = None) -> Dataset:
    """Add the records of files to a finished data set; continue an interrupted run.

    The records go to the splits by the data set's own rule, and a group that it has stays in its split. The new shards follow
    the old ones, which are not touched, and the manifest is replaced last: at any moment the folder holds the old data set or
    the new one. A loader that is running keeps the old one. A state of the old one is refused by the new one.

    Args:
        src: Folder of the files, or one file; with `remote` the scratch folder of the files.
        dst: Folder of the data set.
        config: Settings; `ConvertConfig()` by default. `files_root` belongs to `dst` if that is in place.
        remote: Store of the files, if they are not in a folder.

    Returns:
        The data set with the new records.

    Raises:
        UsageError: `dst` is no data set of version 2, or the files have other fields, axes, labels or layers.
        DataError: A record is in the data set already. It is as it was.
        FormatError: A file does not have its format. The data set is as it was.
    """
    config = config or ConvertConfig()
    src, dst = src.absolute(), dst.absolute()
    data = open_dataset(dst, files_root=config.files_root)
    if config.split_by == "file" and data.manifest.split.get("by") != "file":
        raise UsageError(f"{dst} has another rule for its splits than whole files; leave --split-by out")
    if data.manifest.version < FORMAT_VERSION:
        raise UsageError(f"{dst} has version {data.manifest.version}; convert it to a new folder, which can be added to")
    in_place = data.manifest.files is not msgspec.UNSET
    if config.in_place and not in_place:
        raise UsageError(f"{dst} holds its values itself, so what is added is copied; leave --in-place out")
    config = replace(config, recipe=_thresholded_like(config.recipe, data), in_place=in_place, files_root=None)
    source, config = _found(src, config, remote, dst)
    fingerprint = _dated(config.fingerprint(source), source)
    if was_appended(data.manifest, fingerprint):
        log.warning("%s holds the records of %s already; nothing was added", dst, src)
    else:
        source = _labelled_like(source, data)
        _written(source, dst / ADDITION, config, data)
    origin = {"made_by": "convert --append", "files": len(source.files), "fingerprint": fingerprint}
    grow(dst, origin)
    return open_dataset(dst, files_root=data.files_root)


def _dated(fingerprint: str, source: Source) -> str:
    """Return a hash of a fingerprint and the dates of the files, by which other files of the same names are noticed."""
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode((fingerprint, source.times)))


def _thresholded_like(recipe: Recipe, data: Dataset) -> Recipe:
    """Return a recipe with the threshold that made the labels of a data set; raise UsageError for another one."""
    rule = data.manifest.source.get(LABEL_RULE)
    if rule is None:
        return recipe
    words = "above" if rule["above"] else "below"
    key = "label_above" if rule["above"] else "label_threshold"
    if recipe.threshold is not None and (recipe.threshold, recipe.label_above is not None) != (
        rule["threshold"],
        rule["above"],
    ):
        raise UsageError(f"{data.root} has label 1 {words} {rule['threshold']:g}; leave other thresholds out")
    return replace(recipe, **{key: rule["threshold"]})


def _labelled_like(source: Source, data: Dataset) -> Source:
    """Return a source whose labels become those of a data set; raise UsageError if it has none and the data set has."""
    plan, label = source.plan, data.schema.labels
    if plan is None:
        return source
    if label.kind == "none":
        plan = replace(plan, rule=NO_LABEL)
    elif plan.rule.label.kind == "none":
        raise UsageError(f"{source.root} has no labels, and {data.root} has; give --label KEY or --labels-from FILE")
    else:
        plan = replace(plan, rule=replace(plan.rule, label=label))
    return replace(source, plan=plan, reader=replace(source.reader, open=plan.open))


def _written(source: Source, dst: Path, config: ConvertConfig, like: Dataset | None = None) -> Dataset:
    """Write a data set; with fields, labels and splits like those of another one that it is to be added to."""
    fingerprint = config.fingerprint(source)
    dated = _dated(fingerprint, source)
    if (dst / MANIFEST_NAME).exists():
        if like is not None:
            if Manifest.load(dst).source.get("dated") != dated:
                raise UsageError(
                    f"{dst} holds the records of other files, whose --append was interrupted; repeat that first, or remove it"
                )
            return like
        source.check_older(dst / MANIFEST_NAME)
        data = open_dataset(dst)
        if data.manifest.source.get("fingerprint") != fingerprint:
            raise UsageError(f"{dst} is a data set of other files or settings than {source.root}; expected a new folder")
        remove_leftovers(dst)
        return data
    with progress_bar() as bar:
        job = prepare(source, config, shown(bar, "read names", len(source.files)), like)
    for sentence in job.notices:
        log.warning(sentence.replace("%", "%%"))
    written = sum(path.stat().st_size for path in dst.glob("*/*.safetensors"))
    check_space(job.written_bytes - written, dst)
    origin = _origin(job) | {"made_by": "convert", "files": len(source.files), "fingerprint": fingerprint}
    chunks = source.chunks
    if like is not None:
        origin["dated"] = dated
    counted = dated + source.chunk_rule
    with ShardWriter(dst, job.schema, shard_bytes=config.shard_bytes, source=origin, fingerprint=counted) as writer:
        writer.parts.mkdir(exist_ok=True)
        work = partial(_write, job, writer.parts)
        before = sum(job.counts[: chunks[writer.cursor - 1].stop]) if writer.cursor else 0
        with progress_bar() as bar:
            show = shown(bar, "convert", sum(job.counts), before)
            numbers, shared = range(writer.cursor, len(chunks)), [writer.parts, *source.folders]
            with closing(deal(config.engine, work, numbers, config.num_workers, show, shared)) as results:
                for number, (part, contents, left_out) in results:
                    writer.adopt(part, contents, number + 1, left_out)
        source.check_unchanged()
        named_by_us = source.own is None and like is None and job.schema.step_axis == "layer" and not job.schema.layers
        if named_by_us and writer.steps[0] != writer.steps[1]:
            writer.schema = replace(job.schema, step_axis="step")  # sequences of different lengths lie along no layers
        writer.rule = job.rule
        if job.placement is not None:
            path = path_to(job.placement.root, dst)
            writer.files = ForeignFiles(path=path, arrays=job.placement.names)
    return open_dataset(dst)


def _found(src: Path, config: ConvertConfig, remote: Remote | None, dst: Path) -> tuple[Source, ConvertConfig]:
    """Return the files of a source, and the settings that are for them."""
    source = Source.find(
        src, config.traces, remote, config.recipe, skip_bad=config.skip_bad, files_root=config.files_root, dst=dst
    )
    if source.reader.what == TRACES and config.recipe:
        config = replace(config, traces=scored(config.traces, config.recipe), recipe=Recipe())
        source = Source.find(src, config.traces, remote, dst=dst)
    if config.traces.scores is not None and source.reader.what != TRACES:
        raise UsageError(
            f"{src} holds {source.reader.what}, whose labels are their own; scores are for raw traces, and --labels-from with "
            "--label-threshold for others"
        )
    if config.files_root is not None and source.own is None:
        raise UsageError(f"{source.root} holds {source.reader.what}; --files-root is for a data set made in place")
    if config.in_place:
        if remote is not None:
            raise UsageError(f"{source.root} is a URL; --in-place takes files in a folder, which are read where they lie")
        source = replace(source, chunk_bytes=config.shard_bytes)
    return source, config


def _origin(job: Job) -> dict[str, Any]:
    """Return the manifest's `source`; if the source is a data set of ours, start with the facts there that still hold."""
    origin: dict[str, Any] = {}
    if job.source.own is not None:
        before = job.source.own.manifest.source
        origin = {name: value for name, value in before.items() if name not in ("left_out", "in_one_half", "moved", "torn")}
    if isinstance(job.dealer, FileSplit):
        origin["moved"] = job.dealer.moved
    if job.source.relabelling is not None:
        origin = {name: value for name, value in origin.items() if name not in ("labels", LABEL_RULE)}
    if (rule := job.source.label_rule) is not None and rule.describe():
        origin["labels"] = rule.describe()
        origin[LABEL_RULE] = {"threshold": rule.threshold, "above": rule.above}
    if job.torn:
        origin["torn"] = job.torn
    return origin | job.choice.kept_numbers


def convert_to(src: str | Path, dst: str, config: ConvertConfig | None = None, *, adds: bool = False) -> Dataset:
    """Run `convert` from and to folders or URLs; continue an interrupted run, uploads too.

    If `dst` is a URL, the data set is written to a folder beside the caches, then uploaded, the manifest last; this takes the
    size of the data set on the local disk. If `src` is a URL, every file is fetched twice, first for its names, and each worker
    holds two files at most.

    Args:
        src: Folder or URL of the files.
        dst: Folder or URL of the data set.
        config: Settings; `ConvertConfig()` by default.
        adds: Whether to `append` to the data set `dst`, in a folder. Default: no.

    Returns:
        The finished data set.

    Raises:
        FormatError, DataError, UsageError: Like `convert` and `append`.
    """
    if adds and is_url(dst):
        raise UsageError(f"{Store(dst)} is a URL; --append adds to a data set in a folder, from which it can be uploaded")
    if is_url(src):
        with raw_files(str(src), dst) as remote:
            return _convert_to(remote.scratch, dst, config, remote, adds)
    return _convert_to(Path(src), dst, config, None, adds)


def _convert_to(src: Path, dst: str, config: ConvertConfig | None, remote: Remote | None, adds: bool) -> Dataset:
    if not is_url(dst):
        return (append if adds else convert)(src, Path(dst), config, remote)
    if config is not None and config.in_place:
        raise UsageError(f"{Store(dst)} is a URL; --in-place writes into a folder, from which set and files can be uploaded")
    store = Store(dst)
    finished(store)  # if the store refuses access, fail now and not after the conversion
    staging = default_cache() / "uploads" / xxhash.xxh3_64_hexdigest(str(store).encode())
    convert(src, staging, config, remote)
    upload(staging, dst)
    shutil.rmtree(staging)
    return open_dataset(dst)


def _write(job: Job, parts: Path, number: int, advance: Advance) -> tuple[Path, Contents, dict[str, str]]:
    """Run `write_chunk` in a new folder, because a task may run twice at the same time."""
    part, chunk = Path(tempfile.mkdtemp(prefix=f"{number}-", dir=parts)), job.source.chunks[number]
    if job.config.engine == "ray":
        for file in chunk:
            job.source.check_file(file)
    return part, *write_chunk(job, chunk, part, advance)


def write_chunk(job: Job, chunk: range, root: Path, advance: Advance) -> tuple[Contents, dict[str, str]]:
    """Write the records of a chunk of files under `root`; return its contents, and the reason for each file left out, by name.

    With `skip_bad` every file is read twice, first to check that all of it can be converted.
    """
    filler = ShardFiller(root, job.schema, job.config.shard_bytes, job.dealer_of(chunk.start), Contents())
    left_out: dict[str, str] = {}
    pattern = pattern_of_files(job.source.plan, job.source.files[chunk.start])
    misses, tried, written = 0, chunk.start, chunk.start  # files before `tried` were tried together, those before `written` are
    for number in chunk:
        if number < written:
            continue
        name, filler.dealer = job.source.names[number], job.dealer_of(number)
        if job.placement is not None and pattern is None and number + 1 in chunk:
            read_ahead(job.source.files[number + 1])
        if pattern is not None and misses < MOST_MISSES and number >= tried:
            together = chunk[number - chunk.start :][: pattern.files_at_once]
            tried = together.stop
            if _write_alike(job, filler, pattern, together):
                written = tried
                advance(len(together))
                continue
            misses += 1
        reason = job.unreadable.get(name) or _write_file(job, filler, number, advance)
        if reason is not None:
            left_out[name] = reason
    filler.flush()
    return filler.contents, left_out


def _write_file(job: Job, filler: ShardFiller, number: int, advance: Advance) -> str | None:
    """Write the records of a file; return the reason if it is left out."""
    if job.config.skip_bad:
        try:
            for record in _records(job, number):
                filler.check(record)
        except (FormatError, DataError) as error:
            advance(job.counts[number])
            return job.source.without_root(_with_path(job, number, error))
    unreported = 0
    try:
        for record in _records(job, number):
            filler.write(record)
            unreported += len(record.ids) if isinstance(record, Stack) else 1
            if unreported >= TELL_EVERY:
                advance(unreported)
                unreported = 0
    except (FormatError, DataError) as error:
        raise _with_path(job, number, error) from None
    advance(unreported)
    return None


def _write_alike(job: Job, filler: ShardFiller, pattern: Pattern, numbers: range) -> bool:
    """Write the records of files that differ in nothing but values; return False, and write nothing, if not all are so."""
    source = job.source
    assert source.plan is not None
    if any(source.names[number] in job.unreadable or job.dealer_of(number) != filler.dealer for number in numbers):
        return False
    try:
        paths = [source.files[number] for number in numbers]
        stored = pattern.read(paths)
        if stored is None:
            return False
        names, labels = zip(*map(source.outside, numbers), strict=True)
        if job.placement is not None:
            placed = placed_alike(source.plan, pattern, paths, job.placement, job.schema, stored, names, labels)
            filler.write_placed(placed)
            return True
        block = pattern.block(source.plan, stored, str(paths[0]))
        filler.write(_stack(job, Stack(list(names), list(names), labels, block.sequences), block.bfloat16))
    except (FormatError, DataError):  # whoever reads the files one by one says which it is
        return False
    return True


def _with_path(job: Job, number: int, error: PipelineError) -> PipelineError:
    path = job.source.files[number]
    return error if str(path) in str(error) else type(error)(f"{path}: {error}")


def _records(job: Job, number: int) -> Iterator[Record | Stack | PlacedRecord]:
    """Yield the records of one file, one by one, or stacked if the file stacks them."""
    file, end = job.source.open(number), 0
    if len(file) != job.counts[number]:
        file.close()
        raise FormatError(f"{file.path} has {len(file)} records, and had {job.counts[number]}; it changed while it was read")
    ids = job.names.ids(number, file)
    if job.placement is not None and job.source.plan is not None:
        file.close()
        path = job.source.files[number]
        with named(path, path):
            yield from placed_records(job.source.plan, path, job.placement, job.schema, file, ids)
        return
    for values in file.values():
        begin, end = end, end + (len(values.sequences) if isinstance(values, Block) else 1)
        if end > len(file):
            break
        names = slice(begin, end)
        if isinstance(values, Block):
            stack = Stack(ids[names], file.groups[names], file.labels[names], values.sequences, values.fields)
            yield _stack(job, stack, values.bfloat16)
        else:
            yield _record(job, ids[begin], file.groups[begin], file.labels[begin], values)
    if end != len(file):
        raise FormatError(f"{file.path} has {len(file)} labels and not as many records; it changed while it was read")


def _stack(job: Job, stack: Stack, bfloat16: Sequence[str]) -> Stack:
    """Return a stack of records with the layers that are kept."""
    if job.config.layers is not None:
        stack = stack._replace(**_kept_layers(job, stack.sequences, stack.fields, 1))
    if "sequence" not in job.config.dtypes:
        _check_width(stack.ids[0], "sequence", stack.sequences, job.schema.sequence, bfloat16)
    return stack


def _record(job: Job, name: str, group: str, label: Any, values: Values) -> Record:
    """Return a record with the layers that are kept."""
    (sequence, graphs, bfloat16, fields), schema = values, job.schema
    if job.config.layers is not None:
        if sequence is not None:
            kept = _kept_layers(job, sequence, fields, 0)
            sequence, fields = kept["sequences"], kept["fields"]
        graphs = None if graphs is None else graphs.select(job.choice.of("graphs", len(graphs.node_counts)))
    if graphs is not None and graphs.edge_attr is not None and schema.edge_attr is None:
        raise DataError(f"record {name!r} has edge_attr, which the first graphs with edges had not; expected all or none")
    rows = {"sequence": sequence, **{key: values for key, values in fields.items() if not isinstance(values, str)}}
    if graphs is not None:
        rows |= {"x": graphs.x, "edge_attr": graphs.edge_attr, **graphs.fields}
    for field_name, array in rows.items():
        if field_name not in job.config.dtypes:
            field = (schema.fields or {}).get(field_name) or getattr(schema, field_name, None)
            _check_width(name, field_name, array, field, bfloat16)
    return Record(id=name, group=group, label=label, sequence=sequence, graphs=graphs, fields=fields)


def _kept_layers(job: Job, sequences: Array, fields: Mapping[str, Any], steps_axis: int) -> dict[str, Any]:
    """Return the kept layers of sequences, whose steps lie along an axis, and of their step fields."""
    layer_axis = job.schema.layer_axis
    if layer_axis is not None:
        axis = steps_axis + 1 + layer_axis
        return {"sequences": np.take(sequences, job.choice.of("sequences", sequences.shape[axis]), axis), "fields": fields}
    chosen = job.choice.of("sequences", sequences.shape[steps_axis])
    kept = {name: np.take(rows, chosen, steps_axis) if name.startswith("step.") else rows for name, rows in fields.items()}
    return {"sequences": np.take(sequences, chosen, steps_axis), "fields": kept}


def _check_width(name: str, field_name: str, rows: Array | None, field: Field | None, bfloat16: Sequence[str]) -> None:
    """Raise DataError if values would lose digits that nobody asked to drop. bfloat16: like in `Values`."""
    if rows is None or field is None or not rows.size or rows.dtype.kind not in "fiub" or field.scales:
        return
    dtype = BFLOAT16 if field_name in bfloat16 else rows.dtype.name
    if not holds(field.dtype, dtype):
        raise DataError(
            f"record {name!r}: {field_name} is {dtype}, and {field.dtype} in the first file; give --dtype float32 or float16"
        )


def check_space(needed: int, dst: Path) -> None:
    """Raise UsageError if the file system of `dst` has less free space than `needed` bytes and 1 % more."""
    parent = next(folder for folder in (dst, *dst.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed * 1.01:
        raise UsageError(
            f"{dst} needs about {gigabytes(needed)} and {parent} has {gigabytes(free)} free; free some or choose another folder"
        )


def gigabytes(nbytes: int) -> str:
    """Return a size in words, for example `12.3 GB` or `4.5 MB`."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
