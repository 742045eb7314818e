"""Measure what must not grow with the size of the data: `python -m benchmarks.scale`, two minutes on 2 cores, 2 GB of disk.

    python -m benchmarks.scale --gigabytes 1,10      # memory and cold epochs show best on more: 11 GB of disk

Peak memory of an epoch in a process of its own, above what it has before: all its processes together, shared pages once.
The same of short records with a few long ones among them, whose batches are mostly padding.
Seconds from opening a set to its first batch, imports apart, by number of shards; cold: with the files taken out of the page
cache. Epochs of the largest set from the disk, beside reading the same files in order past the page cache.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import torch
import typer

import dali_pipeline as dp
from benchmarks.harness import Results, evict, growth, read_in_order, seconds, shards
from dali_pipeline.cli.app import new_app, run
from dali_pipeline.loaders.sequences import Engine
from dali_pipeline.sampling.order import WINDOW_BYTES

SHAPE, BATCH_SIZE = (33, 1024), 32
IMPORTS = "import sys, time, torch, dali_pipeline as dp; from nvidia.dali.plugin import pytorch; dp.SequenceLoader; "
EPOCH = "print('ready', flush=True); sys.stdin.readline(); "
EPOCH += "loader = dp.SequenceLoader(dp.open_dataset(sys.argv[1]), engine=sys.argv[2], dtype=torch.float16); "
EPOCH += "print(sum(len(batch) for batch in loader))"
FIRST = "begun = time.perf_counter(); loader = dp.SequenceLoader(dp.open_dataset(sys.argv[1]), engine=sys.argv[2]); "
FIRST += "next(iter(loader)); print(time.perf_counter() - begun)"
TAILS = {"4,000 records, one of 100,000 steps": (16, 100_000, 1), "4,000 records, mean 50 steps, longest 4,096": (64, 4096, 45)}
SHARDS = (100, 1000, 10_000)
app = new_app()


def made(folder: Path, count: int, shape: tuple[int, int], shard_bytes: int) -> dp.Dataset:
    """Write a data set of `count` records whose values repeat, which does not affect the loader."""
    values = np.random.default_rng(0).standard_normal((512, *shape), np.float32).astype(np.float16)
    schema = dp.Schema(sequence=dp.Field(dtype="float16", shape=shape[1:]))
    with dp.ShardWriter(folder, schema, split=dp.SplitRule.parse("100/0/0"), shard_bytes=shard_bytes) as writer:
        for number in range(count):
            writer.write({"id": number, "label": number % 2, "sequence": values[number % 512]})
    return dp.open_dataset(folder)


def command(code: str, *arguments: object) -> list[str]:
    """A Python process of its own."""
    return [sys.executable, "-c", IMPORTS + code, *map(str, arguments)]


def measure_memory(results: Results, folder: Path, sizes: list[float], repeats: int) -> None:
    """Measure the memory of epochs by size in GB, and of the largest set also cold."""
    for gigabytes in sizes:
        count = round(gigabytes * 1e9) // (2 * SHAPE[0] * SHAPE[1])
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            data = made(Path(scratch) / "set", count, SHAPE, 256 << 20)
            for engine in get_args(Engine):
                above = [growth(command(EPOCH, data.root, engine)) / 1e6 for _ in range(repeats)]
                limit = [(WINDOW_BYTES + 300e6) / 1e6]
                measured = f"{engine} engine, memory above imports"
                results.add(f"an epoch of {gigabytes:g} GB", measured, "MB", above, "allowed", limit, cache="warm")
            if gigabytes == max(sizes):
                measure_cold(results, data, repeats)


def measure_tails(results: Results, folder: Path, repeats: int) -> None:
    """Measure epochs of short records among which a few are long; 300 MB and two delivered batches are allowed."""
    for name, (features, longest, long) in TAILS.items():
        lengths = np.random.default_rng(0).integers(2, 9, 4000)
        lengths[:: 4000 // long][:long] = longest
        values = np.random.default_rng(0).standard_normal((longest, features), np.float32).astype(np.float16)
        schema = dp.Schema(sequence=dp.Field(dtype="float16", shape=(features,)))
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            with dp.ShardWriter(Path(scratch) / "set", schema, split=dp.SplitRule.parse("100/0/0")) as writer:
                for number, length in enumerate(lengths.tolist()):
                    writer.write({"id": number, "label": number % 2, "sequence": values[:length]})
            allowed = [300 + 2 * BATCH_SIZE * longest * features * 2 / 1e6]
            for engine in get_args(Engine):
                above = [growth(command(EPOCH, Path(scratch) / "set", engine)) / 1e6 for _ in range(repeats)]
                results.add(name, f"{engine} engine, memory above imports", "MB", above, "allowed", allowed, cache="warm")


def measure_cold(results: Results, data: dp.Dataset, repeats: int) -> None:
    """Measure epochs from the disk: the first, which checks hashes, and the second of the same loader."""
    rates: dict[str, list[float]] = {"sequential direct read": []}
    for _ in range(repeats):
        evict(shards(data))
        rates["sequential direct read"].append(data.nbytes / 1e6 / seconds(lambda: read_in_order(shards(data))))
        for engine in get_args(Engine):
            loader = dp.SequenceLoader(data, batch_size=BATCH_SIZE, engine=engine, dtype=torch.float16)
            for epoch in ("first", "second"):
                evict(shards(data))
                rate = data.nbytes / 1e6 / seconds(lambda loader=loader: [len(batch) for batch in loader])  # type: ignore[misc]
                rates.setdefault(f"{engine} engine, {epoch} epoch", []).append(rate)
    reference = "sequential direct read"
    for name, values in rates.items():
        against = None if name == reference else rates[reference]
        scenario = f"{data.nbytes / 1e9:.2g} GB, cold"
        results.add(scenario, name, "MB/s", values, reference if against else "", against, cache="cold")


def measure_first_batch(results: Results, folder: Path, most: int, repeats: int) -> None:
    """Measure the time to the first batch by number of shards."""
    for count in (number for number in SHARDS if number <= most):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            data = made(Path(scratch) / "set", 4 * count, (4, 64), 4 * (4 * 64 * 2 + 8))
            assert len(shards(data)) == count
            for engine in get_args(Engine):
                for state in ("warm", "cold"):
                    samples = []
                    for _ in range(repeats):
                        if state == "cold":
                            evict([data.folder / "manifest.json", *shards(data)])
                        done = subprocess.run(command(FIRST, data.root, engine), capture_output=True, text=True, check=True)
                        samples.append(float(done.stdout))
                    results.add(f"{count:,} shards", f"{engine} engine, first batch, {state}", "s", samples, cache=state)


@app.command()
def main(
    repeats: Annotated[int, typer.Option(min=1, help="Number of repetitions of each measurement.")] = 5,
    gigabytes: Annotated[str, typer.Option(help="Sizes of the data sets in GB, separated by commas.")] = "0.25,0.5,1",
    most_shards: Annotated[int, typer.Option(help="Maximum number of shards, of 100, 1,000 and 10,000.")] = 10_000,
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder for the temporary data sets. [default: the system's temporary folder]", show_default=False),
    ] = None,
) -> None:
    """Measure memory, cold epochs and first batches; write results/scale_<machine>_<date>.csv."""
    results = Results("scale", ["torch", "numpy", "nvidia-dali"])
    sizes = [float(size) for size in gigabytes.split(",")]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        measure_first_batch(results, Path(scratch), most_shards, repeats)
        measure_memory(results, Path(scratch), sizes, repeats)
        measure_tails(results, Path(scratch), repeats)


if __name__ == "__main__":
    sys.exit(run(app, "benchmarks.scale"))
