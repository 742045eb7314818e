"""How fast sequences come, beside what the machine allows: `python -m benchmarks.sequences`, some minutes on 2 cores.

Warm page cache, shuffled, the loader alone; records `[33, 1024]` float16 by 32 and `[30, 64]` by 256. Every repeat runs all
ways one after the other, each over the whole set, after one epoch that is not counted (it checks the hashes). The limits: numpy
copying the same rows from memory into fresh batch arrays; the same and torch's cast to float32; DALI passing one constant array
through. The `.pt` way: a torch `IterableDataset` that loads files of 250 records, shuffles through a deque of 250, and is
batched by torch's `DataLoader`.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import torch
import typer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import dali_pipeline as dp
from benchmarks.harness import Results
from dali_pipeline.cli import CONTEXT, run
from dali_pipeline.decoding import sequence_graph
from dali_pipeline.sequences import STRETCH_BYTES, Engine

FILE_RECORDS = DEQUE_RECORDS = 250
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, context_settings=CONTEXT)


class PtFiles(IterableDataset[Any]):
    """The `.pt` way."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        info, rng, held = get_worker_info(), random.Random(0), []
        for file in self._files[info.id :: info.num_workers] if info else self._files:
            for record in torch.load(file, weights_only=True):
                held.append(record)
                if len(held) > DEQUE_RECORDS:
                    yield held.pop(rng.randrange(len(held)))
        rng.shuffle(held)
        yield from held


def made(folder: Path, count: int, shape: tuple[int, int]) -> tuple[dp.Dataset, np.ndarray[Any, Any]]:
    """A set of so many records of normal values, and the values."""
    values = np.random.default_rng(0).standard_normal((count, *shape), np.float32).astype(np.float16)
    schema = dp.Schema(sequence=dp.Field(dtype="float16", shape=shape[1:]))
    with dp.ShardWriter(folder, schema, split=dp.Split.parse("100/0/0"), shard_bytes=64 << 20) as writer:
        for number, value in enumerate(values):
            writer.write(dp.Record(id=f"record-{number}", label=number % 2, sequence=value))
    return dp.open_dataset(folder), values


def epoch(loader: Any) -> Callable[[], int]:
    """One epoch of a loader; returns its records."""
    return lambda: sum(len(batch) if isinstance(batch, dp.SequenceBatch) else len(batch[0]) for batch in loader)


def gather(values: np.ndarray[Any, Any], batch_size: int, *, cast: bool) -> int:
    """The limit: rows in random order from memory into fresh arrays."""
    order = np.random.default_rng(1).permutation(len(values))
    for begin in range(0, len(order) - batch_size + 1, batch_size):
        batch = np.take(values, order[begin : begin + batch_size], axis=0)
        if cast:
            torch.from_numpy(batch).to(torch.float32)
    return len(order) // batch_size * batch_size


def through_dali(values: np.ndarray[Any, Any], count: int) -> int:
    """The limit: one constant array through the loader's own graph, as often as `count` records need."""
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    labels, valid, left = np.zeros(len(values), np.int64), np.ones(len(values), np.bool_), [count // len(values)]

    def feed() -> tuple[Any, Any, Any]:
        left[0] -= 1
        if left[0] < 0:
            raise StopIteration
        return values, labels, valid

    options = {"num_threads": 2, "device_id": None, "prefetch_queue_depth": 2}
    graph = sequence_graph(feed, decoding=None, pads=False, batch_size=len(values), **options)
    names = ["sequences", "labels", "valid"]
    iterator = DALIGenericIterator([graph], names, size=-1, auto_reset=False, prepare_first_batch=False)
    return sum(len(out["labels"]) for (out,) in iterator)


@app.command()
def main(
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    records: Annotated[int, typer.Option(help="Of [33, 1024]; eight times as many of [30, 64].")] = 8000,
    folder: Annotated[Path | None, typer.Option(help="Where the sets are made, and removed again.", show_default=False)] = None,
) -> None:
    """Measure every way in turn; write results/sequences.csv."""
    results = Results("sequences", ["torch", "numpy", "nvidia-dali-cuda120"])
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        data, values = made(Path(scratch) / "long", records, (33, 1024))
        files = []
        for begin in range(0, min(records, 2000), FILE_RECORDS):
            files.append(Path(scratch) / f"{begin}.pt")
            torch.save([(torch.from_numpy(each.copy()), 0) for each in values[begin : begin + FILE_RECORDS]], files[-1])
        ways: dict[str, Callable[[], int]] = {
            "gather": lambda: gather(values, 32, cast=False),
            "gather and cast": lambda: gather(values, 32, cast=True),
            "DALI, a constant batch": lambda: through_dali(values[: STRETCH_BYTES // values[0].nbytes // 32 * 32], len(values)),
        }
        for engine in get_args(Engine):
            for dtype in (torch.float16, torch.float32):
                for workers in (0, 1, 2):
                    loader = dp.SequenceLoader(data, tail="drop", engine=engine, dtype=dtype, workers=workers)
                    ways[f"{engine} engine, {str(dtype)[6:]}, workers={workers}"] = epoch(loader)
        for workers in (0, 2, 4):
            ways[f".pt IterableDataset, workers={workers}"] = epoch(DataLoader(PtFiles(files), 32, num_workers=workers))
        report(results, "[33, 1024] float16, batch 32", measured(ways, repeats), "gather")
        data, values = made(Path(scratch) / "short", 8 * records, (30, 64))
        ways = {"gather": lambda: gather(values, 256, cast=False)}
        for engine in get_args(Engine):
            loader = dp.SequenceLoader(data, batch_size=256, tail="drop", engine=engine, dtype=torch.float16)
            ways[f"{engine} engine, float16"] = epoch(loader)
        report(results, "[30, 64] float16, batch 256", measured(ways, repeats), "gather")


def measured(ways: dict[str, Callable[[], int]], repeats: int) -> dict[str, list[float]]:
    """Records a second of every way, `repeats` times in turn, after one time that is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            begun = time.perf_counter()
            rate = way() / (time.perf_counter() - begun)
            rates[name] += [rate] if repeat else []
    return rates


def report(results: Results, scenario: str, rates: dict[str, list[float]], reference: str) -> None:
    """A row for every way, held against the reference and, for our engines, the best of the `.pt` ways too."""
    for name, values in rates.items():
        against = "gather and cast" if "float32" in name else reference
        results.add(
            scenario, name, "records/s", values, against if name != against else "", rates[against] if name != against else None
        )
    pt = [name for name in rates if name.startswith(".pt")]
    if pt:
        best = max(pt, key=lambda name: statistics.median(rates[name]))
        for name in (each for each in rates if "engine" in each):
            results.add(scenario, name, "records/s", rates[name], best, rates[best])
    constant = rates.get("DALI, a constant batch")
    for name in (each for each in rates if constant and each.startswith("dali engine, float16")):
        results.add(scenario, name, "records/s", rates[name], "DALI, a constant batch", constant)


if __name__ == "__main__":
    sys.exit(run(app, "benchmarks.sequences"))
