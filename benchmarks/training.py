"""Measure training with the loader and on one repeated batch: `python -m benchmarks.training`, a minute on 2 cores.

Each detector's step on one batch again and again, which is its ceiling; the same with the loader; and the share of the time
that waits for data (the stall). Sequences `[33, 1024]` float16, graphs of 8 layers of about 32 nodes x 576, batches of 32. On
a GPU also its utilisation, as its driver samples it.

Then where an epoch of a small set goes: 18 steps of the LSTM on `[30, 64]` float16 by train.py's own Trainer, in milliseconds:
model, data, checkpoint, validation, bars and files, and what is left.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, get_args
from unittest import mock

import numpy as np
import typer

import dali_pipeline as dp
import training.scoring
from benchmarks.graphs import made as made_graphs
from benchmarks.graphs import written
from benchmarks.harness import Results, alternately
from benchmarks.sequences import made
from dali_pipeline.cli.app import new_app, run
from dali_pipeline.tools.stages import measure_together, model_rate
from training.checkup import train_step
from training.config import Conduct, ModelName, TrainConfig
from training.extras import Board
from training.interrupt import Interrupts
from training.processes import Processes
from training.run import keep_history, note, print_epoch
from training.trainer import Trainer
from training.watch import Watch, gpu_use

BATCH_SIZE, SAMPLE_SECONDS = 32, 0.2
STEPS = 18  # of an epoch whose parts are measured
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


@dataclass
class Spent:
    """Seconds spent in each part of an epoch, by name; parts within parts count for the inner one alone."""

    seconds: dict[str, float] = field(default_factory=dict)
    _inner: list[float] = field(default_factory=list)

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Count the time of the block, less that of blocks within it."""
        begun = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            passed = time.perf_counter() - begun
            self.seconds[name] = self.seconds.get(name, 0.0) + passed - self._inner.pop()
            if self._inner:
                self._inner[-1] += passed

    def counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, with its time counted."""

        def call(*given: Any, **named: Any) -> Any:
            with self.on(name):
                return function(*given, **named)

        return call

    def iterated(self, name: str, iterable: Any) -> Iterator[Any]:
        """Yield from an iterable, with the time of every step of it counted."""
        iterator, ended = iter(iterable), object()
        while True:
            with self.on(name):
                item = next(iterator, ended)
            if item is ended:
                return
            yield item


def anatomy(results: Results, where: Path, epochs: int) -> None:
    """Measure the parts of an epoch of STEPS steps, of a run as train.py makes it."""
    rng, schema = np.random.default_rng(0), dp.Schema(sequence=dp.Field(dtype="float16", shape=(64,)), step_axis="layer")
    with dp.ShardWriter(where / "small", schema) as writer:
        for number in range(round(STEPS * BATCH_SIZE / 0.7)):
            writer.write({"id": number, "label": number % 2, "sequence": rng.normal(size=(30, 64))})
    data, processes = dp.open_dataset(where / "small"), Processes(dp.World())
    batch_size = -(-data.num_records("train", "sequences") // STEPS)  # the split is by hash
    config = TrainConfig(models=("lstm",), epochs=epochs + 1, batch_size=batch_size)
    folder = where / "run"
    folder.mkdir()
    trainer = Trainer("lstm", data, config, folder, Conduct(device="cpu"), Interrupts(processes), processes)
    assert trainer.steps_per_epoch == STEPS
    board = Board(folder / "tensorboard", 0)
    per_epoch: dict[str, list[float]] = {}
    with Watch("lstm", epochs * STEPS, trainer.timer, trainer.device, 1, show=False) as watch:
        for epoch in range(epochs + 1):
            spent = Spent()
            with ExitStack() as wrapped:
                for owner, name, part in (
                    (trainer.stepper, "step", "model"),
                    (training.scoring, "forward", "model"),  # of validation
                    (trainer, "predict", "validation"),
                    (trainer, "save", "checkpoint"),
                    (trainer, "_save_best", "checkpoint"),
                    (trainer.writer, "check", "checkpoint"),
                ):
                    wrapped.enter_context(mock.patch.object(owner, name, spent.counted(part, getattr(owner, name))))
                timer = trainer.timer
                wrapped.enter_context(mock.patch.object(trainer, "timer", lambda loader: spent.iterated("data", timer(loader))))  # noqa: B023
                with spent.on("other"):
                    row = trainer.train_epoch(spent.counted("bars and files", partial(watch.step, epoch * STEPS)))
            with spent.on("bars and files"), redirect_stdout(StringIO()):
                keep_history(folder, {"lstm": trainer.history})
                note(board, row, trainer)
                print_epoch("lstm", row, epochs, trainer.delivered)
            for part, passed in spent.seconds.items() if epoch else ():
                per_epoch.setdefault(part, []).append(1000 * passed)
    board.close()
    trainer.writer.wait()
    beside = [sum(parts) for parts in zip(*(times for part, times in per_epoch.items() if part != "model"), strict=True)]
    scenario = f"an epoch of {STEPS} steps, [30, 64] float16"
    for part, times in (*per_epoch.items(), ("all but the model", beside)):
        results.add(scenario, part, "ms", times, cache="warm")


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
        anatomy(results, where, 4 * repeats)


if __name__ == "__main__":
    sys.exit(run(app, "benchmarks.training"))
