"""Measure the speed of sequence loading, and its limits: `python -m benchmarks.sequences`, some minutes on 2 cores.

Warm page cache, shuffled, the loader alone; records `[33, 1024]` float16 by 32, gathered and from a window that holds all, and
`[30, 64]` by 256, from the resident window and gathered, with the usual window, which they fit in, and with a quarter of it.
Every repeat runs all ways one after the other, each over the whole set for a second or more, after a turn that is not counted
(it checks the hashes). The limits: numpy copying the same rows from memory into fresh batch arrays; the same and torch's cast
to float32; the system copying them from the page cache into one array that is used again; DALI passing one constant array
through. The peers (benchmarks/peers_sequences.py), each at the number of workers that was fastest in its trials, are held
against each engine at its fastest gathered float16.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import torch
import typer

import dali_pipeline as dp
from benchmarks.harness import Results, alternately, rate, read_rows, wait_for_gpu
from benchmarks.peers import Peer, report, running
from benchmarks.peers_sequences import PEERS
from benchmarks.peers_torch import VALUES, write_values
from dali_pipeline.cli.app import new_app, run
from dali_pipeline.loaders.dali import device_id, iterate
from dali_pipeline.loaders.decoding import sequence_graph
from dali_pipeline.loaders.sequences import Engine
from dali_pipeline.reading.superbatch import SUPERBATCH_BYTES
from dali_pipeline.sampling.order import WINDOW_BYTES

CAST, CONSTANT, PAGE_CACHE = "gather and cast", "DALI, a constant batch", "preadv from the page cache"
WINDOWS: dict[str, dict[str, Any]] = {  # of the short records, which fit in the usual window
    "": {},
    ", gathered": {"window": "gather"},
    ", resident, a quarter": {"window": "resident", "window_bytes": WINDOW_BYTES // 4},
    ", gathered, a quarter": {"window": "gather", "window_bytes": WINDOW_BYTES // 4},
}
app = new_app()


def made(folder: Path, count: int, shape: tuple[int, int]) -> tuple[dp.Dataset, np.ndarray[Any, Any]]:
    """Write a data set of records with normal values; return it and the values."""
    values = np.random.default_rng(0).standard_normal((count, *shape), np.float32).astype(np.float16)
    schema = dp.Schema(sequence=dp.Field(dtype="float16", shape=shape[1:]))
    with dp.ShardWriter(folder, schema, split=dp.SplitRule.parse("100/0/0"), shard_bytes=64 << 20) as writer:
        for number, value in enumerate(values):
            writer.write(dp.Record(id=f"record-{number}", label=number % 2, sequence=value))
    return dp.open_dataset(folder), values


def epoch(loader: dp.SequenceLoader) -> int:
    """Run one epoch; return its number of records."""
    records = sum(len(batch) for batch in loader)
    wait_for_gpu()
    return records


def gather(values: np.ndarray[Any, Any], batch_size: int, *, cast: bool) -> int:
    """Measure the limit: copy rows in random order from memory to new arrays."""
    order = np.random.default_rng(1).permutation(len(values))
    for begin in range(0, len(order) - batch_size + 1, batch_size):
        batch = np.take(values, order[begin : begin + batch_size], axis=0)
        if cast:
            torch.from_numpy(batch).to(torch.float32)
    return len(order) // batch_size * batch_size


def read(path: Path, values: np.ndarray[Any, Any], batch_size: int) -> int:
    """Measure the limit: read the same rows from a file in the page cache, whose end holds `values`."""
    order, row = np.random.default_rng(1).permutation(len(values)), values[0].nbytes
    begins = (path.stat().st_size - values.nbytes + order * row).tolist()
    batch = np.empty(batch_size * row, np.uint8)
    for begin in range(0, len(order) - batch_size + 1, batch_size):
        assert read_rows(path, begins[begin : begin + batch_size], [row] * batch_size, batch.data) == len(batch)
    return len(order) // batch_size * batch_size


def through_dali(values: np.ndarray[Any, Any], count: int, batch_size: int, device: torch.device) -> int:
    """Measure the limit: pass one constant array through the loader's DALI graph until it has `count` records."""
    batches = values.reshape(-1, batch_size, *values.shape[1:])  # a sample each, as the loader feeds them
    left = iter(range(count // len(values)))

    def feed() -> np.ndarray[Any, Any]:
        next(left)
        return batches

    options = {"num_threads": 2, "device_id": device_id(device), "prefetch_queue_depth": 2}
    graph = sequence_graph(feed, decoding=None, pads=False, batch_size=len(batches), **options)
    records: int = sum(out["sequences"].shape[:2].numel() for (out,) in iterate(graph))
    wait_for_gpu()
    return records


@app.command()
def main(
    repeats: Annotated[int, typer.Option(min=1, help="Number of repetitions of each measurement.")] = 5,
    records: Annotated[
        int, typer.Option(help="Number of records of shape [33, 1024]; there are eight times as many of [30, 64].")
    ] = 8000,
    seconds: Annotated[float, typer.Option(help="Minimum time per sample, in seconds.")] = 1.0,
    peers: Annotated[bool, typer.Option(help="Also measure the other loaders; `make peers` installs them.")] = True,
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder for the temporary data sets. [default: the system's temporary folder]", show_default=False),
    ] = None,
) -> None:
    """Measure every way in turn; write results/sequences_<machine>_<date>.csv."""
    results = Results("sequences", ["torch", "numpy", "nvidia-dali"])
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        where = Path(scratch)
        data, values = made(where / "long", records, (33, 1024))
        write_values(where, values)
        names = list(PEERS) if peers else []
        with running("sequences", names, where, where, batch_size=32, seconds=seconds) as found:
            long_records(results, where, data, values, found, repeats, seconds)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        data, values = made(Path(scratch) / "short", 8 * records, (30, 64))
        ways = {"gather": partial(gather, values, 256, cast=False)}
        options: dict[str, Any] = {"batch_size": 256, "drop_last": True, "dtype": torch.float16}
        for engine, (words, window) in itertools.product(get_args(Engine), WINDOWS.items()):
            loader = dp.SequenceLoader(data, engine=engine, **options, **window)
            ways[f"{engine} engine, float16{words}"] = partial(epoch, loader)
        rates = alternately({name: partial(rate, way, seconds) for name, way in ways.items()}, repeats)
        report(results, "[30, 64] float16, batch 256", rates, [], lambda _: "gather", [])


def long_records(
    results: Results,
    folder: Path,
    data: dp.Dataset,
    values: np.ndarray[Any, Any],
    peers: list[Peer],
    repeats: int,
    seconds: float,
) -> None:
    """Measure the limits, both engines and the peers in turn."""
    scenario = "[33, 1024] float16, batch 32"
    device = dp.SequenceLoader(data).device
    ways = {
        "gather": partial(gather, values, 32, cast=False),
        CAST: partial(gather, values, 32, cast=True),
        PAGE_CACHE: partial(read, folder / VALUES, values, 32),
        CONSTANT: partial(through_dali, values[: SUPERBATCH_BYTES // values[0].nbytes // 32 * 32], len(values), 32, device),
    }
    for engine in get_args(Engine):
        for dtype in (torch.float16, torch.float32):
            for num_workers in (0, 1, 2, 4):
                options: dict[str, Any] = {"drop_last": True, "engine": engine, "dtype": dtype, "num_workers": num_workers}
                loader = dp.SequenceLoader(data, window="gather", **options)
                ways[f"{engine} engine, {str(dtype)[6:]}, workers={num_workers}"] = partial(epoch, loader)
        loader = dp.SequenceLoader(data, drop_last=True, engine=engine, dtype=torch.float16, window_bytes=2 * data.nbytes)
        ways[f"{engine} engine, all in its window, float16"] = partial(epoch, loader)
    timed: dict[str, Callable[[], float]] = {name: partial(rate, way, seconds) for name, way in ways.items()}
    rates = alternately(timed | {peer.label: peer.sample for peer in peers if not peer.why}, repeats)
    stored = {engine: [name for name in ways if name.startswith(f"{engine} engine, float16")] for engine in get_args(Engine)}
    best = [max(names, key=lambda name: statistics.median(rates[name])) for names in stored.values()]
    report(results, scenario, rates, peers, lambda name: CAST if "float32" in name else "gather", best)
    for name in stored["dali"]:
        results.add(scenario, name, "records/s", rates[name], CONSTANT, rates[CONSTANT])


if __name__ == "__main__":
    sys.exit(run(app, "benchmarks.sequences"))
