"""Say what lies in a source, how it would be taken and what is left out, and write nothing."""

from __future__ import annotations

import itertools
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dali_pipeline.errors import FormatError, PipelineError, UsageError
from dali_pipeline.format.encoding import holds
from dali_pipeline.format.schema import SPLITS, Field, Schema
from dali_pipeline.ingest.containers.base import Leaf, open_container
from dali_pipeline.ingest.foreign import Block, list_files
from dali_pipeline.ingest.job import Job, prepare
from dali_pipeline.ingest.layouts.known import suggested
from dali_pipeline.ingest.layouts.parts import OpenPart
from dali_pipeline.ingest.layouts.recipe import Recipe
from dali_pipeline.ingest.layouts.resolve import by_suffix, candidates
from dali_pipeline.ingest.sources import Source
from dali_pipeline.storage.stores import is_url
from dali_pipeline.types import Kind
from dali_pipeline.writing.split import SplitRule

if TYPE_CHECKING:
    from dali_pipeline.ingest.config import ConvertConfig

COMPARED = 20_000  # files of a kind whose keys, shapes and types are compared with the first one's
SHOWN_KEYS, SHOWN_ODD = 24, 5
MEASURED_BYTES, MEASURED_SECONDS = 32 << 20, 1.0  # for the estimate of the time


def dry_run(src: str, dst: str | None, config: ConvertConfig) -> tuple[list[str], bool]:
    """Return what would happen to a source, as lines of text, and whether it would be taken.

    Opens every file, as a conversion does, and reads the values of the first ones. Writes nothing.

    Args:
        src: Folder of the files, or one file.
        dst: Folder of the data set, for the command; None if it is not chosen.
        config: Settings.

    Raises:
        UsageError: `src` does not exist, or is a URL.
    """
    if is_url(src):
        raise UsageError(
            f"--dry-run looks at files that are here, and {src} is a store; expected a folder with a few of its files"
        )
    root = Path(src)
    if not root.exists():
        raise UsageError(f"{root} is not a folder; expected one with files to convert, or such a file")
    files, _ = list_files(root)
    lines = list(_what_lies(root, files))
    try:
        source = Source.find(root, config.traces, None, config.recipe, skip_bad=config.skip_bad)
        job = prepare(source, config, lambda _: None)
        unlike = list(_unlike(job))
        if unlike and not config.skip_bad:
            raise FormatError(
                f"{unlike[0]}; expected one shape and type, or give --dtype, or --skip-bad to leave such files out"
            )
        lines += ["", *_how_taken(job)]
    except PipelineError as error:
        lines += ["", f"would not be taken: {error}"]
        usable = candidates(root, files)
        if usable:
            lines += ["try:", f"  {_command(src, dst, config, None)} {suggested(root, usable)}"]
        return lines, False
    left = (
        [sentence for sentence in job.notices if not sentence.startswith("taken as ")] + list(job.unreadable.values()) + unlike
    )
    lines += ["", "notes, and what is left out:" if left else "left out: nothing", *(f"  {sentence}" for sentence in left)]
    return [*lines, "", "command:", f"  {_command(src, dst, config, source)}"], True


def _unlike(job: Job) -> Iterator[str]:
    """Yield a sentence for every file whose sequences have another shape than those of the first, or a wider type."""
    plan, field = job.source.plan, job.schema.sequence
    if plan is None or field is None:
        return
    retyped, names = "sequence" in job.config.dtypes, dict(zip(job.source.files, job.source.names, strict=True))
    for path, part in itertools.islice(plan.parts.items(), COMPARED):
        if names[path] in job.unreadable:
            continue
        opened = OpenPart(part)
        try:
            leaf = opened.leaf("sequence")
            first = 0 if plan.per_file or plan.ragged or opened.container().records is not None else 1
            shape = list(leaf.shape)
            if plan.axes.layer is not None:
                shape.insert(first + plan.axes.layer, len(plan.axes.layers))
            rows = plan.axes.oriented(np.broadcast_to(np.zeros((), np.bool_), shape), first, f"{path}, {leaf.key}")
            if rows.shape[first + 1 :] != plan.row_shape:
                yield f"{path}, {leaf.key or 'its array'} has rows of {rows.shape[first + 1 :]}, and others {plan.row_shape}"
            elif not retyped and not holds(field.dtype, leaf.dtype):
                yield f"{path}, {leaf.key or 'its array'} is {leaf.dtype}, and {field.dtype} in the first file"
        except FormatError as error:
            yield str(error)
        finally:
            opened.close()


def _what_lies(root: Path, files: Sequence[Path]) -> Iterator[str]:
    """Yield lines about the files: each kind, its number, and keys, shapes and types of the first and of odd ones."""
    nbytes = sum(path.stat().st_size for path in files if path.exists())
    yield f"{root}: {len(files):,} {'file' if len(files) == 1 else 'files'}, {_size(nbytes)}"
    usable = candidates(root, files)
    for suffix, paths in by_suffix(usable).items():
        yield f"  {len(paths):,} {suffix}"
        yield from _leaves_of(root, paths)
    others = Counter(path.suffix or path.name for path in set(files) - set(usable))
    if others:
        yield "  not containers of arrays: " + ", ".join(f"{count:,} {name}" for name, count in sorted(others.items()))


def _leaves_of(root: Path, paths: Sequence[Path]) -> Iterator[str]:
    first: dict[str, tuple[int, str]] | None = None
    odd: list[str] = []
    for path in paths[:COMPARED]:
        name = path.relative_to(root).as_posix() if path != root else path.name
        try:
            leaves, records = _opened(path)
        except PipelineError as error:
            odd.append(str(error))
            continue
        kinds = {leaf.key: (len(leaf.shape), leaf.dtype) for leaf in leaves}
        if first is None:
            first = kinds
            held = "" if records is None else f", {records:,} records, of which the first has"
            yield f"    {name}{held}"
            yield from (f"      {_described(leaf)}" for leaf in leaves[:SHOWN_KEYS])
            if len(leaves) > SHOWN_KEYS:
                yield f"      and {len(leaves) - SHOWN_KEYS:,} more keys"
        elif kinds != first:
            words = [_described(leaf) for leaf in leaves if first.get(leaf.key) != kinds[leaf.key]][:4]
            words += [f"no {key}" for key in first if key not in kinds][:4]
            odd.append(f"{name} has {'; '.join(words)}")
    yield from (f"    odd: {words}" for words in odd[:SHOWN_ODD])
    if len(odd) > SHOWN_ODD:
        yield f"    and {len(odd) - SHOWN_ODD:,} more that differ from the first"
    if len(paths) > COMPARED:
        yield f"    ({len(paths) - COMPARED:,} more were not compared)"


def _opened(path: Path) -> tuple[list[Leaf], int | None]:
    """Return the leaves of a file, and its number of records if it holds records."""
    container = open_container(path)
    try:
        return container.leaves(), None if container.records is None else len(container.records)
    finally:
        container.close()


def _described(leaf: Leaf) -> str:
    key = leaf.key or "(the array itself)"
    return f"{key}: cannot be taken, {leaf.why}" if leaf.why else f"{key}: {leaf.dtype} {list(leaf.shape)}"


def _how_taken(job: Job) -> Iterator[str]:
    """Yield lines about records, fields, labels, splits, bytes and time."""
    schema, source = job.schema, job.source
    counts, labels, splits = _counted(job)
    yield f"would be taken as {source.reader.what}"
    told_counts = " and ".join(f"{count:,} {kind}" for kind, count in counts.items())
    counted = f"{counts[schema.kinds[0]]:,}" if len(counts) == 1 else told_counts
    yield f"  records: {counted} in {len(source.files):,} {'file' if len(source.files) == 1 else 'files'}"
    for line in _fields(schema):
        yield f"  {line}"
    kind = schema.labels.kind
    told = ", ".join(f"{label}: {count:,}" for label, count in sorted(labels.items(), key=lambda entry: str(entry[0]))[:20])
    names = f", named {', '.join(schema.labels.names[:20])}" if schema.labels.names else ""
    shape = f" {list(schema.labels.shape)}" if schema.labels.shape else ""
    yield f"  labels: {kind}{shape}{names}{f' ({told})' if told else ''}"
    if source.label_rule is not None and source.label_rule.describe():
        yield f"    {source.label_rule.describe()}"
    yield "  splits: " + ", ".join(f"{split} {splits[split]:,}" for split in SPLITS)
    yield f"  bytes: about {_size(job.written_bytes)}, in about {_seconds(job)}"


def _counted(job: Job) -> tuple[Counter[Kind], Counter[object], Counter[str]]:
    """Return the number of records of each kind, and how many of the first kind have each class and go to each split."""
    kinds: Counter[Kind] = Counter()
    labels: Counter[object] = Counter()
    splits: Counter[str] = Counter()
    for number, name in enumerate(job.source.names):
        if name in job.unreadable or not job.counts[number]:
            continue
        file, dealer = job.source.open(number), job.dealer_of(number)
        file.close()
        kinds.update({kind: len(file) for kind in file.kinds})
        if job.schema.kinds[0] not in file.kinds:
            continue
        splits.update(dealer.of(group) for group in file.groups)
        if job.schema.labels.kind == "class":
            labels.update(file.labels)
    return kinds, labels, splits


def _fields(schema: Schema) -> Iterator[str]:
    if schema.sequence is not None:
        axes = f", axes {', '.join([schema.steps, *schema.sequence.axis_names])}" if schema.sequence.axis_names else ""
        layers = f", layers {_ranged(schema.layers)}" if schema.layers else ""
        yield f"sequence: {_field(schema.sequence)} per {schema.steps}{axes}{layers}"
    for name, field in {**schema.of_graphs, **schema.step_fields, **schema.record_fields}.items():
        yield f"{name}: {_field(field)}"


def _field(field: Field) -> str:
    return f"{field.dtype} {list(field.shape)}"


def _ranged(numbers: Sequence[int]) -> str:
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _seconds(job: Job) -> str:
    """Return an estimate of the time on one core, from reading the first records."""
    begin, nbytes = time.perf_counter(), 0
    for number, count in enumerate(job.counts):
        if not count:
            continue
        for values in job.source.open(number).values():
            if isinstance(values, Block):
                nbytes += values.sequences.nbytes
            else:
                arrays = [values.sequence, *(() if values.graphs is None else (values.graphs.x, values.graphs.edge_index))]
                nbytes += sum(np.asarray(array).nbytes for array in arrays if array is not None)
            if nbytes > MEASURED_BYTES or time.perf_counter() - begin > MEASURED_SECONDS:
                break
        if nbytes > MEASURED_BYTES or time.perf_counter() - begin > MEASURED_SECONDS:
            break
    seconds = 2 * (time.perf_counter() - begin) * job.written_bytes / max(1, nbytes)  # writing takes about as long as reading
    return f"{seconds:.0f} s on one core" if seconds < 120 else f"{seconds / 60:.0f} minutes on one core"


def _command(src: str, dst: str | None, config: ConvertConfig, source: Source | None) -> str:
    """Return the command that does it; with everything that was inferred, if the source is understood."""
    recipe = config.recipe if source is None or source.plan is None else source.plan.recipe
    if source is None:
        recipe = Recipe()
    options = list(recipe.flags())
    if config.split is not None:
        shares = "/".join(map(str, config.split.shares))
        options += [
            "--split",
            shares,
            *(["--split-seed", str(config.split.seed)] if config.split.seed != SplitRule().seed else []),
        ]
    if config.split_by != "group":
        options += ["--split-by", config.split_by]
    if config.dtype is not None:
        options += ["--dtype", config.dtype]
    options += ["--skip-bad"] * config.skip_bad + ["--in-place"] * config.in_place
    return shlex.join(["python", "-m", "dali_pipeline", "convert", src, dst or "DST", *options])


def _size(nbytes: int) -> str:
    units = ((10**9, "GB"), (10**6, "MB"), (10**3, "KB"))
    return next((f"{nbytes / size:.1f} {unit}" for size, unit in units if nbytes >= size), f"{nbytes} bytes")
