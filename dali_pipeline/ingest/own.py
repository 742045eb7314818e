"""Reader of our own data sets, which `convert` can store in other types, shards or splits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from dali_pipeline.dataset.dataset import Dataset, open_dataset
from dali_pipeline.dataset.single import fields_at, graphs_between, sequence_at
from dali_pipeline.format.encoding import BFLOAT16
from dali_pipeline.format.label import Label
from dali_pipeline.format.manifest import MANIFEST_NAME
from dali_pipeline.format.schema import Field
from dali_pipeline.format.shard import Shard
from dali_pipeline.ingest.foreign import Block, ForeignFile, Reader, Values, rows_at_a_time
from dali_pipeline.ingest.layouts.labels import Relabelling
from dali_pipeline.storage.files import Files
from dali_pipeline.types import KINDS


@lru_cache(maxsize=1)
def opened(root: Path, files_root: str | None = None) -> Dataset:
    """Return the data set that is the source."""
    return open_dataset(root, files_root=files_root)


def _find(files_root: str | None, root: Path, _: list[Path]) -> list[Path]:
    """Return the shards, sequences first, split by split."""
    if not (root / MANIFEST_NAME).is_file():
        return []
    opened.cache_clear()  # the folder may hold another data set than at the last call
    data = opened(root, files_root)
    kinds = [(split, kind) for kind in data.schema.kinds for split in data.splits]
    return [data.shard_path(split, kind, number) for split, kind in kinds for number in range(len(data.table(split, kind)))]


def _open(files_root: str | None, relabelling: Relabelling | None, path: Path, _: str) -> ForeignFile:
    data, split = opened(path.parent.parent, files_root), path.parent.name
    kind = next(kind for kind in KINDS if path.name.startswith(kind))
    number = int(path.stem.removeprefix(f"{kind}-"))
    shard = data.shards(split, kind).open(number, Files(2))
    ids = [text.decode() for text in shard.texts("ids")]
    return ForeignFile(
        path=path,
        kinds=(kind,),
        ids=ids,
        groups=[text.decode() for text in shard.texts("groups")],
        labels=labels_of(data.schema.labels, shard) if relabelling is None else relabelling.labels(path, ids),
        values=partial(_sequences if kind == "sequences" else _graphs, data, shard),
    )


def labels_of(label: Label, shard: Shard) -> list[Any]:
    """Return every record's label as `ShardWriter` takes it."""
    if label.dtype is None:
        return [None] * shard.records
    stored = shard.read("labels")
    return stored.tolist() if label.kind == "class" else list(stored)


def _sequences(data: Dataset, shard: Shard) -> Iterator[Values | Block]:
    schema, field, offsets = data.schema, data.schema.sequence, shard.read("sequence.offsets")
    assert field is not None
    lengths, begin = np.diff(offsets), 0
    narrow = _narrow({"sequence": field, **schema.step_fields, **schema.record_fields})
    if schema.layer_axis is not None or schema.step_fields or schema.record_fields:
        for row in range(shard.records):
            yield Values(sequence_at(shard, schema, row), None, narrow, fields_at(shard, schema, row))
        return
    while field.layout is not None and begin < shard.records:
        end, steps = min(begin + field.layout.records, shard.records), field.layout.steps
        stored = shard.read("sequence", begin * steps, end * steps).reshape(steps, end - begin, *field.shape)
        rows = field.values(stored.swapaxes(0, 1).reshape(-1, *field.shape))
        yield Block(rows.reshape(end - begin, steps, *field.shape), narrow)
        begin = end
    while begin < shard.records:
        # a block of records of one length, about 4 MiB
        end = begin + rows_at_a_time(int(lengths[begin]) * field.row_bytes)
        other_lengths = np.flatnonzero(lengths[begin:end] != lengths[begin])
        end = begin + int(other_lengths[0]) if len(other_lengths) else min(end, shard.records)
        rows = field.values(shard.read("sequence", int(offsets[begin]), int(offsets[end])))
        yield Block(rows.reshape(end - begin, int(lengths[begin]), *field.shape), narrow)
        begin = end


def _graphs(data: Dataset, shard: Shard) -> Iterator[Values | Block]:
    narrow = _narrow({**data.schema.of_graphs, **data.schema.record_fields})
    graphs, nodes, edges = (shard.read(f"{name}.offsets") for name in ("graphs", "x", "edge_index"))
    for row, (begin, end) in enumerate(itertools.pairwise(graphs.tolist())):
        record_graphs = graphs_between(shard, data.schema, begin, nodes[begin : end + 1], edges[begin : end + 1])
        yield Values(None, record_graphs, narrow, fields_at(shard, data.schema, row))


def _narrow(fields: Mapping[str, Field]) -> tuple[str, ...]:
    """Return the names of fields that are stored as bfloat16, and read as float32."""
    return tuple(name for name, field in fields.items() if field.dtype == BFLOAT16)


OWN = f"data set ({MANIFEST_NAME})"


def own_reader(files_root: str | None, relabelling: Relabelling | None = None) -> Reader:
    """Return the reader of data sets.

    Args:
        files_root: Where the values of one in place lie; None for where they lay.
        relabelling: Other labels for its records. Default: none.
    """
    return Reader(what=OWN, find=partial(_find, files_root), open=partial(_open, files_root, relabelling))
