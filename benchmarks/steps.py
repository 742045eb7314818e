"""Measure single steps per second: `python -m benchmarks.steps`, two minutes.

Rows `[512]` float16, 4,096 per batch, shuffled, delivered as float16 on the CPU: from records `[T, 512]`, and one layer of
records `[T, 4, 512]`, once from a window that holds the split and once from one of a quarter of it. Beside them what costs
least, a gather from an array in memory; a gather from a file mapped into memory; and torch's DataLoader over a tensor.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch.utils.data import DataLoader, TensorDataset

import dali_pipeline as dp
from benchmarks.harness import Results, alternately, rate
from dali_pipeline.cli.app import new_app, run

FEATURES, LAYERS, LONGEST = 512, 4, 256
LIMIT = "gather"
Values = np.ndarray[Any, Any]
app = new_app()


def made(folder: Path, rows: int, layers: int) -> dp.Dataset:
    """Write records of 1 to LONGEST steps, with about `rows` steps in all; `layers` is 0 for records without a layer axis."""
    shape: dict[str, Any] = {"shape": (layers, FEATURES), "axes": ("layer", "feature")} if layers else {"shape": (FEATURES,)}
    schema = dp.Schema(sequence=dp.Field(dtype="float16", **shape), step_axis="token")
    rng, written = np.random.default_rng(0), 0
    values = rng.standard_normal((LONGEST, *shape["shape"]), np.float32).astype(np.float16)
    with dp.ShardWriter(folder, schema, split=dp.SplitRule.parse("100/0/0"), shard_bytes=64 << 20) as writer:
        while written < rows:
            steps = int(rng.integers(1, LONGEST + 1))
            writer.write({"id": f"record {written}", "label": 0, "sequence": values[:steps]})
            written += steps
    return dp.open_dataset(folder)


def gather(values: Values, batch_size: int) -> int:
    """Copy all rows in a random order, batch by batch; return their number."""
    order, count = np.random.default_rng(0).permutation(len(values)), 0
    for begin in range(0, len(order), batch_size):
        count += len(np.take(values, order[begin : begin + batch_size], axis=0))
    return count


def through_torch(values: Values, batch_size: int, *, most: int) -> int:
    """Iterate over torch's DataLoader for `most` rows; return their number."""
    count = 0
    for (batch,) in DataLoader(TensorDataset(torch.from_numpy(values)), batch_size=batch_size, shuffle=True):
        count += len(batch)
        if count >= most:
            break
    return count


def epoch(loader: Any) -> int:
    """Iterate over one epoch; return its steps."""
    return sum(len(batch) for batch in loader)


@app.command()
def main(
    repeats: Annotated[int, typer.Option(min=1, help="Number of repetitions of each measurement.")] = 5,
    rows: Annotated[int, typer.Option(help="Steps of each data set, about.")] = 300_000,
    batch_size: Annotated[int, typer.Option()] = 4096,
    seconds: Annotated[float, typer.Option(help="Least seconds of each measurement.")] = 0.5,
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder for the temporary data sets. [default: the system's temporary folder]", show_default=False),
    ] = None,
) -> None:
    """Measure every way in turn; write results/steps_<machine>_<date>.csv."""
    torch.set_num_threads(1)
    results = Results("steps", ["torch", "numpy", "nvidia-dali-cuda120"])
    print(f"load of the machine before: {os.getloadavg()[0]:.2f}")
    with tempfile.TemporaryDirectory(dir=folder) as name:
        values = np.random.default_rng(0).standard_normal((rows, FEATURES), np.float32).astype(np.float16)
        np.save(Path(name) / "rows.npy", values)
        mapped = np.load(Path(name) / "rows.npy", mmap_mode="r")
        ways: dict[str, Callable[[], int]] = {
            LIMIT: partial(gather, values, batch_size),
            "gather from a mapped file": partial(gather, mapped, batch_size),
            "torch DataLoader over a tensor": partial(through_torch, values, batch_size, most=min(rows, 16 * batch_size)),
        }
        for layers, what in ((0, "[T, 512]"), (LAYERS, "one layer of [T, 4, 512]")):
            data = made(Path(name) / what.replace(" ", "_"), rows, layers)
            nbytes = sum(data.table("train", "sequences").bytes)
            for window, window_bytes in (("the split", 2 * nbytes), ("a quarter of the split", nbytes // 4)):
                for engine in ("torch", "dali"):
                    options: dict[str, Any] = {"layers": [2] if layers else None, "engine": engine, "device": "cpu"}
                    loader = dp.SequenceLoader(
                        data, unit="step", batch_size=batch_size, dtype=torch.float16, window_bytes=window_bytes, **options
                    )
                    ways[f"{what}, window of {window}, {engine} engine"] = partial(epoch, loader)
        found = alternately({name: partial(rate, way, seconds) for name, way in ways.items()}, repeats)
    for measured, values_found in found.items():
        against = None if measured == LIMIT else found[LIMIT]
        results.add("rows [512] float16", measured, "rows/s", values_found, LIMIT if against else "", against, cache="warm")
    print(f"load of the machine after: {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    sys.exit(run(app, "benchmarks.steps"))
