"""Measure speed by number of workers and by size of records: `python -m benchmarks.scaling`, some minutes on 2 cores.

Both engines and the graph loader with 0, 2 and 4 workers, on records `[33, 1024]` float16 by 32, and on graphs, 8 a record,
of about 32 nodes x 576 by 16: records a second shuffled and in order (warm), and shuffled from the disk (cold: a later epoch,
every file evicted); the memory of an epoch, all processes together, above that of the same process before it. Then both
engines, on records of half a KiB to 4 MiB, beside numpy's copy of the same rows.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import dali_pipeline as dp
from benchmarks.graphs import made as made_graphs
from benchmarks.graphs import written
from benchmarks.harness import Results, alternately, evict, growth, rate, seconds, shards
from benchmarks.sequences import epoch, gather, made
from dali_pipeline.cli.app import new_app, run

WORKERS = (0, 2, 4)
SHAPES = ((4, 64), (30, 64), (33, 256), (33, 1024), (33, 8192), (64, 32768))
BATCH_BYTES, MOST_RECORDS = 2 << 20, 256
KINDS = ("torch engine", "dali engine", "GraphLoader")
EPOCH = """
import sys
import torch, dali_pipeline as dp
kind, root, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
if kind == "GraphLoader":
    loader = dp.GraphLoader(dp.open_dataset(root), num_workers=workers)
else:
    from nvidia.dali.plugin import pytorch
    loader = dp.SequenceLoader(dp.open_dataset(root), engine=kind.split()[0], num_workers=workers, dtype=torch.float16)
print("ready", flush=True)
sys.stdin.readline()
for batch in loader:
    len(batch)
"""
app = new_app()


def loader_of(kind: str, data: dp.Dataset, workers: int, *, shuffle: bool = True) -> Any:
    """Return a loader that delivers sequences as stored, and graphs as float32."""
    if kind == "GraphLoader":
        return dp.GraphLoader(data, num_workers=workers, shuffle=shuffle)
    engine: Any = kind.split()[0]
    return dp.SequenceLoader(data, num_workers=workers, engine=engine, shuffle=shuffle, dtype=torch.float16)


def measure_workers(results: Results, sets: dict[str, dp.Dataset], repeats: int, least: float) -> None:
    """Measure warm and cold, shuffled and not."""
    ways: dict[tuple[str, int, str], Callable[[], float]] = {}
    for kind in KINDS:
        data = sets[kind]
        for workers in WORKERS:
            loader = loader_of(kind, data, workers)
            ways[kind, workers, "shuffled, warm"] = partial(rate, partial(epoch, loader), least)
            in_order = loader_of(kind, data, workers, shuffle=False)
            ways[kind, workers, "in order, warm"] = partial(rate, partial(epoch, in_order), least)
    keys = {f"{kind} {workers} {how}": (kind, workers, how) for kind, workers, how in ways}
    rates_by_way = alternately({name: ways[key] for name, key in keys.items()}, repeats)
    for kind, workers, _ in ways:  # apart, as an evicted file is cold for all
        rates_by_way.setdefault(f"{kind} {workers} shuffled, cold", [])
        keys[f"{kind} {workers} shuffled, cold"] = (kind, workers, "shuffled, cold")
    cold = {(kind, workers): loader_of(kind, sets[kind], workers) for kind in KINDS for workers in WORKERS}
    for turn in range(repeats + 1):
        for (kind, workers), loader in cold.items():
            evict(shards(sets[kind]))
            measured = loader.num_records / seconds(partial(epoch, loader))
            rates_by_way[f"{kind} {workers} shuffled, cold"] += [measured] if turn else []
    for name, (kind, workers, how) in keys.items():
        how, _, cache = how.partition(", ")
        alone = rates_by_way[f"{kind} 0 {how}, {cache}"]
        reference, against = ("workers=0", alone) if workers else ("", None)
        results.add(f"{kind}, {how}", f"workers={workers}", "records/s", rates_by_way[name], reference, against, cache=cache)


def measure_memory(results: Results, sets: dict[str, dp.Dataset]) -> None:
    """Measure the memory of an epoch above that of the process before it."""
    for kind in KINDS:
        for workers in WORKERS:
            command = [sys.executable, "-c", EPOCH, kind, str(sets[kind].root), str(workers)]
            results.add(f"{kind}, memory", f"workers={workers}", "MB", [growth(command) / 1e6], cache="warm")


def measure_sizes(results: Results, folder: Path | None, megabytes: int, repeats: int, least: float) -> None:
    """Measure the MB/s of both engines and of a copy, as delivered, in float16."""
    for shape in SHAPES:
        nbytes = 2 * shape[0] * shape[1]
        count = max(8, (megabytes << 20) // nbytes)
        batch_size = max(1, min(MOST_RECORDS, BATCH_BYTES // nbytes, count // 2))
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            data, values = made(Path(scratch) / "set", count, shape)
            ways = {"gather": partial(gather, values, batch_size, cast=False)}
            for kind in KINDS[:2]:
                engine: Any = kind.split()[0]
                loader = dp.SequenceLoader(data, batch_size=batch_size, drop_last=True, engine=engine, dtype=torch.float16)
                ways[kind] = partial(epoch, loader)
            rates_by_way = alternately({name: partial(rate, way, least) for name, way in ways.items()}, repeats)
        for name, rates in rates_by_way.items():
            against = None if name == "gather" else [sample * nbytes / 1e6 for sample in rates_by_way["gather"]]
            results.add(
                f"records of {nbytes} bytes, {batch_size} a batch", name, "MB/s", [sample * nbytes / 1e6 for sample in rates],
                "gather" if against else "", against, cache="" if name == "gather" else "warm",
            )  # fmt: skip


@app.command()
def main(
    repeats: Annotated[int, typer.Option(min=1, help="Number of repetitions of each measurement.")] = 5,
    megabytes: Annotated[int, typer.Option(help="Size of each data set, in MiB.")] = 128,
    seconds: Annotated[float, typer.Option(help="Minimum time per sample, in seconds.")] = 0.5,
    memory: Annotated[bool, typer.Option(help="Also measure memory, one process per case.")] = True,
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder for the temporary data sets. [default: the system's temporary folder]", show_default=False),
    ] = None,
) -> None:
    """Measure every number of workers and every size; write results/scaling_<machine>_<date>.csv."""
    results = Results("scaling", ["torch", "torch-geometric", "numpy", "nvidia-dali"])
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        where, nbytes = Path(scratch), megabytes << 20
        sequences, _ = made(where / "sequences", nbytes // (2 * 33 * 1024), (33, 1024))
        arrays = made_graphs(where / "arrays", nbytes // (2 * 8 * 32 * 576), 8, 32, 576, 100, weighted=True)
        graphs = written(where / "graphs", arrays)
        sets = dict(zip(KINDS, (sequences, sequences, graphs), strict=True))
        measure_workers(results, sets, repeats, seconds)
        if memory:
            measure_memory(results, sets)
    measure_sizes(results, folder, megabytes, repeats, seconds)


if __name__ == "__main__":
    sys.exit(run(app, "benchmarks.scaling"))
