"""Measure the reads that `layers=` saves: `python -m benchmarks.layers`, half a minute.

Bytes that an epoch reads from the disk, as the system counts them for this process, and its seconds, every file evicted
before. First epochs read whole blocks, to hash them; later ones the pages that rows lie in. Sequences `[32, 1024]` float16
stored record by record and layer by layer, and graphs of 8 layers; all layers, a quarter of them, and one.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import dali_pipeline as dp
from benchmarks.graphs import made as made_graphs
from benchmarks.graphs import written
from benchmarks.harness import Results, evict, seconds, shards
from dali_pipeline.cli.app import new_app, run
from dali_pipeline.format.layout import ByLayer

LAYERS, FEATURES, GRAPH_LAYERS = 32, 1024, 8
Chosen = slice | None
MakeLoader = Callable[[dp.Dataset, Chosen], Any]
app = new_app()


def made_sequences(folder: Path, count: int, *, by_layer: bool) -> dp.Dataset:
    """Write a data set of this number of records."""
    field = dp.Field(dtype="float16", shape=(FEATURES,))
    if by_layer:
        field = replace(field, by_layer=ByLayer.of(LAYERS, 2 * FEATURES))
    rng = np.random.default_rng(0)
    with dp.ShardWriter(folder, dp.Schema(sequence=field), split=dp.SplitRule.parse("100/0/0"), shard_bytes=64 << 20) as writer:
        for number in range(count):
            values = rng.standard_normal((LAYERS, FEATURES), np.float32).astype(np.float16)
            writer.write({"id": number, "label": number % 2, "sequence": values})
    return dp.open_dataset(folder)


def read_bytes() -> int:
    """Return the bytes that this process and its threads have read from the disk."""
    lines = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(dict(lines)["read_bytes"])


def measure(results: Results, scenario: str, root: Path, layers: int, make: MakeLoader, repeats: int) -> None:
    """Measure first and later epochs of all layers, a quarter, and one, relative to the size of the files."""
    whole: dict[str, list[float]] = {}
    chosen: dict[str, Chosen] = {"all layers": None}
    chosen |= {f"{count} of {layers} layers": slice(0, count) for count in (layers // 4, 1)}
    for name, some in chosen.items():
        found: dict[str, list[float]] = {}
        for _ in range(repeats):
            data = dp.open_dataset(root)  # which knows no block yet
            loader = make(data, some)
            for epoch in ("first epoch", "second epoch"):
                evict(shards(data))
                before = read_bytes()
                spent = seconds(lambda loader=loader: sum(len(batch) for batch in loader))  # type: ignore[misc]
                found.setdefault(f"{epoch}, read", []).append((read_bytes() - before) / 1e6)
                found.setdefault(f"{epoch}, time", []).append(spent)
        whole = whole or found
        for measured, values in found.items():
            unit = "MB" if measured.endswith("read") else "s"
            against = None if found is whole else whole[measured]
            results.add(scenario, f"{name}, {measured}", unit, values, "all layers" if against else "", against, cache="cold")


@contextmanager
def scratch(folder: Path | None) -> Iterator[Path]:
    """Yield a temporary folder."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        yield Path(name)


@app.command()
def main(
    repeats: Annotated[int, typer.Option(min=1, help="Number of repetitions of each measurement.")] = 5,
    megabytes: Annotated[int, typer.Option(help="Size of each data set, in MiB.")] = 200,
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder for the temporary data sets. [default: the system's temporary folder]", show_default=False),
    ] = None,
) -> None:
    """Measure every choice of layers; write results/layers_<machine>_<date>.csv."""
    results = Results("layers", ["torch", "numpy"])
    if not Path("/proc/self/io").exists():
        results.missing("all", "bytes read", "this system does not count them (no /proc/self/io)")
        return
    for by_layer, name in ((False, "sequences, record by record"), (True, "sequences, layer by layer")):
        with scratch(folder) as where:
            root = made_sequences(where / "set", (megabytes << 20) // (2 * LAYERS * FEATURES), by_layer=by_layer).folder
            measure(
                results, name, root, LAYERS,
                lambda data, some: dp.SequenceLoader(data, layers=some, engine="torch", dtype=torch.float16), repeats,
            )  # fmt: skip
    with scratch(folder) as where:
        count = max(1, (megabytes << 20) // (2 * GRAPH_LAYERS * 32 * 576))
        records = made_graphs(where / "arrays", count, GRAPH_LAYERS, 32, 576, 100, weighted=True)
        root = written(where / "set", records).folder
        make: MakeLoader = lambda data, some: dp.GraphLoader(data, layers=some, dtype=torch.float16)  # noqa: E731
        measure(results, "graphs", root, GRAPH_LAYERS, make, repeats)


if __name__ == "__main__":
    sys.exit(run(app, "benchmarks.layers"))
