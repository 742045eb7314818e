"""Measure the speed and memory of converting and verifying files, each with a reference in the same run.

    python -m benchmarks.convert                     # 2 GB of each kind: some 10 minutes on two cores
    python -m benchmarks.convert --gigabytes 0.2 --memory-gigabytes 0 --files 2000     # a quick look

References: `cp --reflink=never` and `sync` of the same files; `torch.load(weights_only=True)` of the same files in one
process, times the workers; a sequential direct read of the same files; XXH3 in memory; a double loop over tokens.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
import xxhash
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors
from torch_geometric.data import Data
from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
from torch_geometric.data.storage import GlobalStorage

from benchmarks.harness import Results, evict, peak_memory, read_in_order, seconds
from dali_pipeline.cli.app import new_app, run
from dali_pipeline.ingest.readers.traces import attention_graphs
from dali_pipeline.tools.verify import verify

LAYERS, HIDDEN = 33, 1024  # of sequences: 67,584 bytes a record in float16
GRAPH_LAYERS, GRAPH_HIDDEN = 30, 576
RECORDS_A_FILE, GRAPHS_A_FILE = 1500, 250
ONE_RECORD = (32, 1024)  # of files with one record each: 64 KiB in float16
STACKED = {  # by the suffix, or bfloat16 in .safetensors: scenario, and flags for convert
    "pt": ("stacked .pt", ()),
    "npz": (".npz", ()),
    "npy": ("stacked .npy", ("--sequence", "states_{row}", "--label", "labels_{row}")),
    "safetensors": ("stacked .safetensors", ("--sequence", "hidden_states", "--label", "labels")),
    "bfloat16": ("stacked .safetensors of bfloat16", ("--sequence", "hidden_states", "--label", "labels")),
}
app = new_app()


def write_sequences(root: Path, nbytes: float, rng: np.random.Generator, suffix: str = "pt") -> int:
    """Write stacked sequences of about `nbytes` in files of 1,500 records; return their bytes."""
    folder = root / "lstm_solo" if suffix == "pt" else root
    folder.mkdir(parents=True)
    for number in range(max(1, round(nbytes / (RECORDS_A_FILE * LAYERS * HIDDEN * 2)))):
        values = rng.standard_normal((RECORDS_A_FILE, LAYERS, HIDDEN), np.float32).astype(np.float16)
        labels = rng.integers(0, 2, RECORDS_A_FILE)
        names = [f"question-{number}-{row}" for row in range(RECORDS_A_FILE)]
        path = folder / f"batch_{number}.{suffix}"
        if suffix == "safetensors":
            save_file({"hidden_states": values, "labels": labels}, path)
        elif suffix == "bfloat16":
            tensors = {"hidden_states": torch.from_numpy(values).bfloat16(), "labels": torch.from_numpy(labels)}
            save_tensors(tensors, folder / f"batch_{number}.safetensors")
        elif suffix == "npy":
            np.save(folder / f"states_{number}.npy", values)
            np.save(folder / f"labels_{number}.npy", labels)
        elif suffix == "pt":
            torch.save({"sequences": torch.from_numpy(values), "labels": labels.tolist(), "question_ids": names}, path)
        else:
            np.savez(path, sequences=values, labels=labels, ids=np.array(names))
    return total_bytes(root)


def write_small_files(root: Path, files: int, rng: np.random.Generator, suffix: str) -> int:
    """Write files of one record of 64 KiB each, and a table of their labels; return their bytes."""
    root.mkdir()
    values = rng.standard_normal((64, *ONE_RECORD), np.float32).astype(np.float16)
    for number in range(files):
        record, path = values[number % len(values)], root / f"r{number:06d}.{suffix}"
        if suffix == "safetensors":
            save_file({"hidden_states": record}, path)
        elif suffix == "npy":
            np.save(path, record)
        else:
            torch.save({"hidden_states": torch.from_numpy(record.copy())}, path)
    labels = rng.integers(0, 2, files)
    lines = [f"r{number:06d},{label}\n" for number, label in enumerate(labels.tolist())]
    (root / "labels.csv").write_text("id,label\n" + "".join(lines))
    return total_bytes(root)


def write_graphs(root: Path, nbytes: float, rng: np.random.Generator) -> int:
    """Write records of 30 layers of about 25 tokens x 576, one `Data` per layer, 250 per file; return their bytes."""
    (root / "gnn").mkdir(parents=True)
    count = min(GRAPHS_A_FILE, max(1, round(nbytes / (GRAPH_LAYERS * 25 * GRAPH_HIDDEN * 2))))
    number = 0
    while number == 0 or total_bytes(root) < nbytes:
        graphs = []
        for _ in range(count):
            nodes = int(rng.integers(12, 40))
            graphs.append([_layer(rng, nodes) for _ in range(GRAPH_LAYERS)])
        names = [f"question-{number}-{row}" for row in range(count)]
        torch.save(
            {"graphs": graphs, "labels": rng.integers(0, 2, count).tolist(), "question_ids": names},
            root / "gnn" / f"batch_{number}.pt",
        )
        number += 1
    return total_bytes(root)


def _layer(rng: np.random.Generator, nodes: int) -> Data:
    edges = int(rng.integers(3 * nodes, 6 * nodes))
    return Data(
        x=torch.from_numpy(rng.standard_normal((nodes, GRAPH_HIDDEN), np.float32)).half(),
        edge_index=torch.from_numpy(rng.integers(0, nodes, (2, edges))),
        edge_attr=torch.from_numpy(rng.random(edges, np.float32)).half(),
    )


def total_bytes(root: Path) -> int:
    """Return the bytes of all files under a folder."""
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def convert(src: Path, dst: Path, *, workers: int, flags: tuple[str, ...] = ()) -> None:
    """Convert in a new process, like a user."""
    command = [sys.executable, "-m", "dali_pipeline", "convert", str(src), str(dst), "--num-workers", str(workers), *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def copy(src: Path, dst: Path) -> None:
    """Copy with `cp`, to the disk."""
    subprocess.run(["cp", "-r", "--reflink=never", str(src), str(dst)], check=True)
    subprocess.run(["sync", "-f", str(dst)], check=True)


def rates(work: Callable[[Path], object], amount: float, scratch: Path, repeats: int) -> list[float]:
    """Return the amount per second of several runs, each into a new folder, after waiting for the disk."""
    samples = []
    for _ in range(repeats):
        os.sync()
        samples.append(amount / seconds(lambda: work(scratch / "out")))
        shutil.rmtree(scratch / "out")
    return samples


def alternately(
    one: Callable[[Path], object], other: Callable[[Path], object], amount: float, scratch: Path, repeats: int
) -> tuple[list[float], list[float]]:
    """Return the rates of two ways, measured in turn, so that both see the same disk."""
    pairs = [(rates(one, amount, scratch, 1)[0], rates(other, amount, scratch, 1)[0]) for _ in range(repeats)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def loop_over_tokens(attentions: list[np.ndarray], threshold: float, *, mean_first: bool) -> int:
    """Build edges like a first version of users: two loops over tokens, with the mean over heads inside or before them."""
    edges: list[tuple[int, int]] = []
    weights: list[float] = []
    for layer in attentions:
        mean = layer.mean(axis=0) if mean_first else None
        for i in range(layer.shape[1]):
            for j in range(i + 1):
                weight = layer[:, i, j].mean() if mean is None else mean[i, j]
                if weight > threshold:
                    edges.append((j, i))
                    weights.append(weight)
    return len(edges)


@app.command()
def main(
    gigabytes: Annotated[float, typer.Option(help="Size of each kind of input, in GB.")] = 2.0,
    memory_gigabytes: Annotated[
        float, typer.Option(help="Size in GB of the larger input whose peak memory is measured; 0 for none.")
    ] = 8.0,
    files: Annotated[int, typer.Option(help="Number of files with one record of 64 KiB each; 0 for none.")] = 20_000,
    repeats: Annotated[int, typer.Option(help="Number of repetitions of each measurement.")] = 3,
    folder: Annotated[Path | None, typer.Option(help="Folder to write in. [default: a temporary folder]")] = None,
) -> None:
    """Measure everything and write results/convert_<machine>_<date>.csv."""
    results = Results("convert", ["numpy", "torch", "xxhash", "pyarrow"])
    workers = len(os.sched_getaffinity(0))
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        root = Path(scratch)
        reference = "cp --reflink=never; sync"
        for suffix, (scenario, flags) in STACKED.items():
            src = root / suffix
            nbytes = write_sequences(src, gigabytes * 1e9, rng, suffix)
            ours, theirs = alternately(
                partial(convert, src, workers=workers, flags=flags), partial(copy, src), nbytes / 1e6, root, repeats
            )
            results.add(scenario, f"convert, {workers} workers", "MB/s", ours, reference, theirs, cache="warm")
            if suffix != "pt":
                shutil.rmtree(src)
        for suffix in ("npy", "safetensors", "pt") if files else ():
            measure_small_files(results, root, files, rng, suffix, workers, repeats)
        measure_verify(results, root, repeats)
        shutil.rmtree(root / "pt")
        measure_graphs(results, root, gigabytes, rng, workers, repeats)
        measure_edges(results, rng, repeats)
        for size in [1.0, memory_gigabytes] if memory_gigabytes else []:
            measure_memory(results, root, size, rng, workers)


def measure_small_files(
    results: Results, root: Path, files: int, rng: np.random.Generator, suffix: str, workers: int, repeats: int
) -> None:
    """Measure files of one record each, in files per second, against a copy of the same files."""
    src = root / "small"
    write_small_files(src, files, rng, suffix)
    keys = () if suffix == "npy" else ("--sequence", "hidden_states")
    work = partial(convert, src, workers=workers, flags=(*keys, "--labels-from", str(src / "labels.csv")))
    ours, theirs = alternately(work, partial(copy, src), files, root, repeats)
    scenario = f"{files:,} files .{suffix} of 64 KiB"
    results.add(scenario, f"convert, {workers} workers", "files/s", ours, "cp --reflink=never; sync", theirs, cache="warm")
    shutil.rmtree(src)


def measure_verify(results: Results, root: Path, repeats: int) -> None:
    """Measure verify cold and warm, against the disk and the hash."""
    convert(root / "pt", root / "set", workers=len(os.sched_getaffinity(0)))
    paths, nbytes = sorted((root / "set").rglob("*.safetensors")), total_bytes(root / "set")
    cold, disk = [], []
    for _ in range(repeats):
        evict(paths)
        cold.append(nbytes / 1e6 / verify(root / "set").seconds)
        evict(paths)
        disk.append(nbytes / 1e6 / seconds(lambda: read_in_order(paths)))
    for path in paths:
        path.read_bytes()
    warm = [nbytes / 1e6 / verify(root / "set").seconds for _ in range(repeats)]
    block = np.random.default_rng(0).bytes(1 << 20)
    hashed = [
        1000 * len(block) / 1e6 / seconds(lambda: [xxhash.xxh3_64_intdigest(block) for _ in range(1000)])
        for _ in range(repeats)
    ]
    results.add("verify", "cold", "MB/s", cold, "sequential direct read", disk, cache="cold")
    results.add("verify", "warm", "MB/s", warm, "XXH3 in memory, one thread", hashed, cache="warm")
    shutil.rmtree(root / "set")


def measure_graphs(
    results: Results, root: Path, gigabytes: float, rng: np.random.Generator, workers: int, repeats: int
) -> None:
    """Measure convert against torch.load in one process, times the number of workers."""
    nbytes = write_graphs(root / "graphs", gigabytes * 1e9, rng)
    paths = sorted((root / "graphs" / "gnn").iterdir())

    def load() -> None:
        with torch.serialization.safe_globals([Data, DataEdgeAttr, DataTensorAttr, GlobalStorage]):
            for path in paths:
                torch.load(path, weights_only=True, mmap=True)

    loads = [workers * nbytes / 1e6 / seconds(load) for _ in range(repeats)]
    ours = rates(partial(convert, root / "graphs", workers=workers), nbytes / 1e6, root, repeats)
    reference = f"torch.load(weights_only=True) x {workers}"
    results.add("graphs .pt", f"convert, {workers} workers", "MB/s", ours, reference, loads, cache="warm")
    shutil.rmtree(root / "graphs")


def measure_edges(results: Results, rng: np.random.Generator, repeats: int) -> None:
    """Measure the edges of one trace of 30 layers, 9 heads, 64 tokens."""
    attentions = [rng.dirichlet(np.ones(64), (9, 64)).astype(np.float32) for _ in range(30)]
    hidden = [np.zeros((64, 1), np.float16)] * 30
    attention_graphs(hidden, attentions, 0.01)
    ours = [1 / seconds(lambda: attention_graphs(hidden, attentions, 0.01)) for _ in range(repeats * 3)]
    for mean_first, words in ((False, ""), (True, ", means of a layer at once")):
        work = partial(loop_over_tokens, attentions, 0.01, mean_first=mean_first)
        loop = [1 / seconds(work) for _ in range(repeats)]
        results.add("edges of a trace", "vectorised", "traces/s", ours, f"a double loop over tokens{words}", loop)


def measure_memory(results: Results, root: Path, gigabytes: float, rng: np.random.Generator, workers: int) -> None:
    """Measure the peak memory of a conversion, over all its processes."""
    src, dst = root / "memory", root / "out"
    nbytes = write_sequences(src, gigabytes * 1e9, rng)
    command = [sys.executable, "-m", "dali_pipeline", "convert", str(src), str(dst), "--num-workers", str(workers)]
    took, peak = peak_memory(command)
    results.add(f"memory, {nbytes / 1e9:.1f} GB of .pt", f"peak, {workers} workers", "MB", [peak / 1e6])
    results.add(f"memory, {nbytes / 1e9:.1f} GB of .pt", f"convert, {workers} workers", "MB/s", [nbytes / 1e6 / took])
    shutil.rmtree(src)
    shutil.rmtree(dst)


if __name__ == "__main__":
    sys.exit(run(app, "benchmarks.convert"))
