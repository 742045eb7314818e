"""What grows with the data, and must not: `python -m benchmarks.scale`, some minutes on 2 cores, 11 GB of disk.

Peak memory of an epoch in a process of its own, over that of the same process without one, for sets of 1 and 10 GB: all its
processes together, shared pages once. Seconds from opening a set to its first batch, imports apart, by number of shards; cold:
with the files taken out of the page cache. Epochs from the disk, beside reading the same files in order past the page cache.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import torch
import typer

import dali_pipeline as dp
from benchmarks.harness import Results, evict, peak_memory, seconds
from dali_pipeline.cli import CONTEXT, run
from dali_pipeline.order import WINDOW_BYTES
from dali_pipeline.sequences import Engine

SHAPE, BATCH_SIZE = (33, 1024), 32
IMPORTS = "import sys, time, torch, dali_pipeline as dp; from nvidia.dali.plugin import pytorch; dp.SequenceLoader; "
EPOCH = "loader = dp.SequenceLoader(dp.open_dataset(sys.argv[1]), engine=sys.argv[2], dtype=torch.float16); "
EPOCH += "print(sum(len(batch) for batch in loader))"
FIRST = "begun = time.perf_counter(); loader = dp.SequenceLoader(dp.open_dataset(sys.argv[1]), engine=sys.argv[2]); "
FIRST += "next(iter(loader)); print(time.perf_counter() - begun)"
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, context_settings=CONTEXT)


def made(folder: Path, count: int, shape: tuple[int, int], shard_bytes: int) -> dp.Dataset:
    """A set of so many records; their values repeat, which no part of the loader notices."""
    values = np.random.default_rng(0).standard_normal((512, *shape), np.float32).astype(np.float16)
    schema = dp.Schema(sequence=dp.Field(dtype="float16", shape=shape[1:]))
    with dp.ShardWriter(folder, schema, split=dp.Split.parse("100/0/0"), shard_bytes=shard_bytes) as writer:
        for number in range(count):
            writer.write({"id": number, "label": number % 2, "sequence": values[number % 512]})
    return dp.open_dataset(folder)


def shards(data: dp.Dataset) -> list[Path]:
    """Their paths."""
    return [data.shard_path("train", "sequences", number) for number in range(len(data.table("train", "sequences")))]


def read_directly(paths: list[Path]) -> None:
    """In order, 8 MiB at a time, past the page cache."""
    buffer = mmap.mmap(-1, 8 << 20)
    for path in paths:
        fd, at = os.open(path, os.O_RDONLY | os.O_DIRECT), 0
        while (got := os.preadv(fd, [buffer], at)) == len(buffer):
            at += got
        os.close(fd)


def command(code: str, *arguments: object) -> list[str]:
    """A Python process of its own."""
    return [sys.executable, "-c", IMPORTS + code, *map(str, arguments)]


def measure_memory(results: Results, folder: Path, repeats: int) -> None:
    """Of epochs of 1 and 10 GB."""
    for gigabytes in (1, 10):
        count = gigabytes * 10**9 // (2 * SHAPE[0] * SHAPE[1])
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            data = made(Path(scratch) / "set", count, SHAPE, 256 << 20)
            for engine in get_args(Engine):
                idle = [peak_memory(command("time.sleep(1)"))[1] / 1e6 for _ in range(repeats)]
                peaks = [peak_memory(command(EPOCH, data.root, engine))[1] / 1e6 for _ in range(repeats)]
                above = [peak - sorted(idle)[len(idle) // 2] for peak in peaks]
                limit = [(WINDOW_BYTES + 300e6) / 1e6]
                results.add(
                    f"an epoch of {gigabytes} GB", f"{engine} engine, memory above imports", "MB", above, "allowed", limit
                )
            if gigabytes == 10:
                measure_cold(results, data, repeats)


def measure_cold(results: Results, data: dp.Dataset, repeats: int) -> None:
    """Epochs from the disk: the first, which hashes, and the second, of the same loader."""
    rates: dict[str, list[float]] = {"sequential direct read": []}
    for _ in range(repeats):
        evict(shards(data))
        rates["sequential direct read"].append(data.nbytes / 1e6 / seconds(lambda: read_directly(shards(data))))
        for engine in get_args(Engine):
            loader = dp.SequenceLoader(data, batch_size=BATCH_SIZE, engine=engine, dtype=torch.float16)
            for epoch in ("first", "second"):
                evict(shards(data))
                rate = data.nbytes / 1e6 / seconds(lambda loader=loader: [len(batch) for batch in loader])  # type: ignore[misc]
                rates.setdefault(f"{engine} engine, {epoch} epoch", []).append(rate)
    reference = "sequential direct read"
    for name, values in rates.items():
        against = ("", None) if name == reference else (reference, rates[reference])
        results.add("10 GB, cold", name, "MB/s", values, *against)


def measure_first_batch(results: Results, folder: Path, repeats: int) -> None:
    """By number of shards."""
    for count in (100, 1000, 10_000):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            data = made(Path(scratch) / "set", 4 * count, (4, 64), 4 * (4 * 64 * 2 + 8))
            assert len(shards(data)) == count
            for engine in get_args(Engine):
                for state in ("warm", "cold"):
                    found = []
                    for _ in range(repeats):
                        if state == "cold":
                            evict([data.root / "manifest.json", *shards(data)])
                        done = subprocess.run(command(FIRST, data.root, engine), capture_output=True, text=True, check=True)
                        found.append(float(done.stdout))
                    results.add(f"{count:,} shards", f"{engine} engine, first batch, {state}", "s", found)


@app.command()
def main(
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    folder: Annotated[Path | None, typer.Option(help="Where the sets are made, and removed again.", show_default=False)] = None,
) -> None:
    """Measure memory, cold epochs and first batches; write results/scale_<machine>_<date>.csv."""
    results = Results("scale", ["torch", "numpy", "nvidia-dali-cuda120"])
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        measure_first_batch(results, Path(scratch), repeats)
        measure_memory(results, Path(scratch), repeats)


if __name__ == "__main__":
    sys.exit(run(app, "benchmarks.scale"))
