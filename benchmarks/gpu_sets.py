"""Data sets of benchmarks/gpu_day.py, which repeat a few records under new ids.

Speed does not depend on the values, and drawing gigabytes of them would take longer than measuring. Imports no torch, so that
processes that only write start in a second.
"""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

import dali_pipeline as dp
from benchmarks.gpu_work import Deadline, Report, Setup
from dali_pipeline.runtime.container import allowed_cores

STEPS, POOL = 33, 64  # of a sequence; different records
SHARD_BYTES = 64 << 20
Array = np.ndarray[Any, Any]


def write_sequences(folder: Path, nbytes: int, *, features: int, dtype: str = "float16", ragged: bool = False) -> None:
    """Write sequences (33, features), or of 8 to 33 steps if ragged, with about `nbytes` in total.

    Args:
        folder: Of the data set.
        nbytes: Stored bytes.
        features: Of a step.
        dtype: `float16`, or `int8` with a scale for each feature.
        ragged: Whether lengths differ.
    """
    rng = np.random.default_rng(0)
    pool = rng.standard_normal((POOL, STEPS, features), np.float32).astype(np.float16)
    lengths = rng.integers(8, STEPS + 1, POOL) if ragged else np.full(POOL, STEPS)
    field = dp.Field(dtype=dtype, shape=(features,))
    if dtype == "int8":
        field = dp.Field.scaled(np.abs(pool.astype(np.float32)).max(axis=(0, 1))[None])
    count = max(POOL, int(nbytes / (lengths.mean() * features * np.dtype(dtype).itemsize)))
    with dp.ShardWriter(
        folder, dp.Schema(sequence=field), split=dp.SplitRule.parse("100/0/0"), shard_bytes=SHARD_BYTES
    ) as writer:
        for number in range(count):
            sequence = pool[number % POOL, : lengths[number % POOL]]
            writer.write(dp.Record(id=f"record-{number}", label=number % 2, sequence=sequence))


def write_graphs(folder: Path, nbytes: int, *, layers: int, nodes: int, features: int, edges: int, dtype: str) -> None:
    """Write records of graphs with about these numbers of nodes and edges, +-25 %, weighted if features are float16.

    Args:
        folder: Of the data set.
        nbytes: Stored bytes of the features.
        layers: Graphs of a record.
        nodes: Of a graph.
        features: Of a node.
        edges: Of a graph.
        dtype: Of the features.
    """
    rng = np.random.default_rng(0)
    weighted = dtype == "float16"
    pool = [_graphs(rng, layers, nodes, features, edges, dtype, weighted) for _ in range(POOL)]
    schema = dp.Schema(x=dp.Field(dtype=dtype, shape=(features,)), edge_attr=dp.Field(dtype="float16") if weighted else None)
    count = max(POOL, int(nbytes / (layers * nodes * features * np.dtype(dtype).itemsize)))
    with dp.ShardWriter(folder, schema, split=dp.SplitRule.parse("100/0/0"), shard_bytes=SHARD_BYTES) as writer:
        for number in range(count):
            writer.write(dp.Record(id=f"record-{number}", label=number % 2, graphs=pool[number % POOL]))


def _graphs(
    rng: np.random.Generator, layers: int, nodes: int, features: int, edges: int, dtype: str, weighted: bool
) -> dp.Graphs:
    node_counts, edge_counts = (rng.integers(mean - mean // 4, mean + mean // 4 + 1, layers) for mean in (nodes, edges))
    ends = rng.random((2, edge_counts.sum())) * np.repeat(node_counts, edge_counts)
    return dp.Graphs(
        x=rng.standard_normal((node_counts.sum(), features), np.float32).astype(dtype),
        edge_index=ends.astype(np.int64),
        edge_attr=rng.random(edge_counts.sum(), np.float32).astype(np.float16) if weighted else None,
        node_counts=node_counts,
        edge_counts=edge_counts,
    )


GB, MB = 10**9, 10**6
SEQUENCES = {
    "[33, 1024] float16": partial(write_sequences, features=1024),
    "[33, 4096] float16": partial(write_sequences, features=4096),
    "[33, 1024] int8": partial(write_sequences, features=1024, dtype="int8"),
    "[8 to 33, 1024] float16": partial(write_sequences, features=1024, ragged=True),
}
GRAPHS = {
    "traces": partial(write_graphs, layers=8, nodes=32, features=576, edges=100, dtype="float16"),
    "molecules": partial(write_graphs, layers=1, nodes=26, features=9, edges=56, dtype="float32"),
}
WRITERS: dict[str, Callable[[Path, int], None]] = {**SEQUENCES, **GRAPHS}
# bytes of a set: an epoch long enough that its start does not count; few where a record costs more to write than its bytes
SIZES = dict.fromkeys(SEQUENCES, GB) | {"[33, 1024] int8": GB // 2, "traces": GB, "molecules": 40 * MB}
QUICK_SIZES = dict.fromkeys(SEQUENCES, 8 * MB) | {"traces": 16 * MB, "molecules": MB // 2}


def folder_of(setup: Setup, name: str) -> Path:
    """Return the folder of a set."""
    return setup.folder / "".join(letter if letter.isalnum() else "-" for letter in name)


def opened(setup: Setup, name: str) -> dp.Dataset:
    """Open a set; make it first if it is missing or unfinished."""
    folder = folder_of(setup, name)
    try:
        return dp.open_dataset(folder)
    except dp.PipelineError:
        make(setup, name)
        return dp.open_dataset(folder)


def make(setup: Setup, name: str) -> None:
    """Write a set anew. Costs two to five seconds per gigabyte."""
    folder = folder_of(setup, name)
    shutil.rmtree(folder, ignore_errors=True)
    WRITERS[name](folder, (QUICK_SIZES if setup.quick else SIZES)[name])


def make_all(setup: Setup, deadline: Deadline, report: Report) -> None:
    """Part: write every set, in parallel if there are enough cores."""
    if setup.quick or allowed_cores() < 4:
        for name in WRITERS:
            make(setup, name)
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(len(WRITERS), int(allowed_cores())), mp_context=context) as pool:
            list(pool.map(make, repeat(setup), WRITERS, timeout=deadline.left_seconds))
    report.facts(**{name: opened(setup, name).nbytes for name in WRITERS})
