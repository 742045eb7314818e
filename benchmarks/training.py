"""Measure training with the loader and on one repeated batch: `python -m benchmarks.training`, a minute on 2 cores.

Each detector's step on one batch again and again, which is its ceiling; the same with the loader; and the share of the time
that waits for data (the stall). Sequences `[33, 1024]` float16, graphs of 8 layers of about 32 nodes x 576, batches of 32. On
a GPU also its utilisation, as its driver samples it.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

import dali_pipeline as dp
from benchmarks.graphs import made as made_graphs
from benchmarks.graphs import written
from benchmarks.harness import Results, alternately
from benchmarks.sequences import made
from dali_pipeline.cli.app import new_app, run
from dali_pipeline.tools.stages import measure_together, model_rate
from training.checkup import train_step
from training.config import ModelName
from training.watch import gpu_use

BATCH_SIZE, SAMPLE_SECONDS = 32, 0.2
app = new_app()


@contextmanager
def sampled(loader: Any) -> Iterator[list[int]]:
    """Yield samples of the GPU use in per cent, five per second of the block; none without a GPU."""
    uses: list[int] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            use = gpu_use(loader.device)
            uses.extend([] if use is None else [use])

    thread = threading.Thread(target=sample)
    if loader.device.type == "cuda":
        thread.start()
    try:
        yield uses
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()


def measure(results: Results, name: ModelName, loader: Any, repeats: int, seconds: float) -> None:
    """Measure the ceiling and training in turn."""
    step = train_step(name, loader)
    stalls: list[float] = []
    uses: list[float] = []

    def train() -> float:
        with sampled(loader) as use:
            rate, share = measure_together(loader, step, seconds)
        stalls.append(100 * share)
        uses.extend([sum(use) / len(use)] if use else [])
        return rate

    ceiling = "one batch again and again"
    rates_by_way = alternately({ceiling: lambda: model_rate(loader, step, seconds), "with the loader": train}, repeats)
    results.add(name, ceiling, "records/s", rates_by_way[ceiling])
    results.add(
        name, "with the loader", "records/s", rates_by_way["with the loader"], ceiling, rates_by_way[ceiling], cache="warm"
    )
    results.add(name, "time waiting for data", "%", stalls[1:], cache="warm")
    if uses:
        results.add(name, "GPU utilisation", "%", uses[1:] or uses, cache="warm")
    else:
        results.missing(name, "GPU utilisation", "no GPU" if loader.device.type == "cpu" else "its driver does not tell")


@app.command()
def main(
    repeats: Annotated[int, typer.Option(min=1, help="Number of repetitions of each measurement.")] = 5,
    megabytes: Annotated[int, typer.Option(help="Size of each data set, in MiB.")] = 64,
    seconds: Annotated[float, typer.Option(help="Minimum time per sample, in seconds.")] = 1.0,
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder for the temporary data sets. [default: the system's temporary folder]", show_default=False),
    ] = None,
) -> None:
    """Measure every detector; write results/training_<machine>_<date>.csv."""
    results = Results("training", ["torch", "torch-geometric", "nvidia-dali"])
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        where, nbytes = Path(scratch), megabytes << 20
        sequences, _ = made(where / "sequences", nbytes // (2 * 33 * 1024), (33, 1024))
        graphs = written(
            where / "graphs", made_graphs(where / "arrays", nbytes // (2 * 8 * 32 * 576), 8, 32, 576, 100, weighted=True)
        )
        for name in get_args(ModelName):
            kind = dp.SequenceLoader if name == "lstm" else dp.GraphLoader
            measure(results, name, kind(sequences if name == "lstm" else graphs, batch_size=BATCH_SIZE), repeats, seconds)


if __name__ == "__main__":
    sys.exit(run(app, "benchmarks.training"))
