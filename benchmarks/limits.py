"""Measure the limits of the machine: `python -m benchmarks.limits`, half a minute.

Copying memory, one thread and torch's all; reading files in order, past the page cache and from it; where there is a GPU,
copying to it from pinned and from other memory. The limits of gathering and of DALI stand in benchmarks/sequences.py, beside
what they limit.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from benchmarks.harness import Results, alternately, rate, read_in_order, wait_for_gpu
from dali_pipeline.cli.app import new_app, run

app = new_app()


def copy(source: torch.Tensor, target: torch.Tensor, threads: int) -> int:
    """Copy bytes once; return their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    target.copy_(source, non_blocking=True)
    wait_for_gpu()
    torch.set_num_threads(before)
    return source.nbytes


@app.command()
def main(
    repeats: Annotated[int, typer.Option(min=1, help="Number of repetitions of each measurement.")] = 5,
    megabytes: Annotated[int, typer.Option(help="Size of the copied memory, and of the file, in MiB.")] = 512,
    seconds: Annotated[float, typer.Option(help="Minimum time per sample, in seconds.")] = 1.0,
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder for the temporary file. [default: the system's temporary folder]", show_default=False),
    ] = None,
) -> None:
    """Measure every limit in turn; write results/limits_<machine>_<date>.csv."""
    results = Results("limits", ["torch", "numpy"])
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 256, megabytes << 20, np.uint8))
    cores = torch.get_num_threads()
    ways: dict[str, Callable[[], int]] = {"memory copy, 1 thread": partial(copy, values, torch.empty_like(values), 1)}
    if cores > 1:
        ways[f"memory copy, {cores} threads"] = partial(copy, values, torch.empty_like(values), cores)
    if torch.cuda.is_available():
        for name, source in (("pinned", values.pin_memory()), ("pageable", values)):
            ways[f"host to device, {name}"] = partial(copy, source, torch.empty_like(source, device="cuda"), cores)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "values"
        with path.open("wb") as file:
            file.write(values.numpy().data)
            os.fsync(file.fileno())
        ways["sequential read, cold"] = partial(read_in_order, [path])
        ways["sequential read, warm"] = partial(read_in_order, [path], direct=False)
        rates_by_way = alternately({name: partial(rate, way, seconds) for name, way in ways.items()}, repeats)
    for name, rates in rates_by_way.items():
        name, _, cache = name.partition(", ") if name.startswith("sequential") else (name, "", "")
        results.add("this machine", name, "GB/s", [sample / 1e9 for sample in rates], cache=cache)
    if not torch.cuda.is_available():
        results.missing("this machine", "host to device", "no GPU")


if __name__ == "__main__":
    sys.exit(run(app, "benchmarks.limits"))
