"""Measure data sets in place beside copied ones: `python -m benchmarks.in_place`, some 5 minutes on two cores.

    python -m benchmarks.in_place                          # 1 GB of each kind, 20,000 files for the opening
    python -m benchmarks.in_place --files 1000000          # a million files: 10 minutes more

Sources: stacked `.npy` of [33, 1024] float16, files like vLLM's (about 8 MB, [T, 4, 4096] bfloat16 with token ids), and one
`.npy` of 64 KiB per record. Converting in place is held against a sequential direct read of the same files, every file evicted
before; epochs in place against epochs of a copied set of the same records, through the same loader.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors.torch import save_file

import dali_pipeline as dp
from benchmarks.convert import convert, total_bytes, write_sequences, write_small_files
from benchmarks.harness import Results, evict, rate, read_in_order, seconds
from dali_pipeline.cli.app import new_app, run

LAYERS, HIDDEN, STEPS = 4, 4096, 256
TINY = (4, 32)  # of the records of a million files: 256 bytes in float16
WORKERS = len(os.sched_getaffinity(0))
MAKERS = ("stacked .npy", "vLLM .safetensors", "one .npy a record")
OPENING = """
import sys, time
import dali_pipeline as dp, torch
from dali_pipeline import SequenceLoader
begun = time.perf_counter()
data = dp.open_dataset(sys.argv[1])
opened = time.perf_counter() - begun
next(iter(SequenceLoader(data, batch_size=32, engine="torch", dtype=torch.float16)))
print(opened, time.perf_counter() - begun)
"""
app = new_app()


def made(kind: str, root: Path, nbytes: float, rng: np.random.Generator) -> tuple[str, ...]:
    """Write files of about `nbytes`; return the flags that convert needs."""
    if kind == "stacked .npy":
        write_sequences(root, nbytes, rng, "npy")
        return ("--sequence", "states_{row}", "--label", "labels_{row}", "--axes", "layer,feature")
    if kind == "one .npy a record":
        write_small_files(root, max(64, round(nbytes / 65536)), rng, "npy")
        return ("--labels-from", str(root / "labels.csv"))
    root.mkdir(parents=True)
    for number in range(max(4, round(nbytes / (STEPS * LAYERS * HIDDEN * 2)))):
        steps = int(rng.integers(STEPS // 2, STEPS * 3 // 2))
        states = torch.from_numpy(rng.standard_normal((steps, LAYERS, HIDDEN), np.float32)).bfloat16()
        save_file({"hidden_states": states, "token_ids": torch.arange(steps)}, root / f"hs_{number}.safetensors")
    return ()


def files_of(root: Path) -> list[Path]:
    """Return all files below a folder."""
    return sorted(path for path in root.rglob("*") if path.is_file())


def epoch_rate(root: Path, files: list[Path] | None) -> float:
    """Return the records per second of an epoch; with `files`, of the first epoch, these evicted before."""
    loader = dp.SequenceLoader(dp.open_dataset(root), batch_size=32, dtype=torch.float16, engine="torch")

    def epoch() -> int:
        return sum(len(batch) for batch in loader)

    if files is None:
        epoch()
        return rate(epoch, 1.0)
    evict(files)
    return rate(epoch, 0.0)


def measure(results: Results, kind: str, root: Path, nbytes: float, rng: np.random.Generator, repeats: int) -> None:
    """Measure converting in place, and the epochs of both data sets."""
    src = root / "src"
    flags = made(kind, src, nbytes, rng)
    files = files_of(src)
    total = total_bytes(src)
    ours, disk = [], []
    for turn in range(repeats):
        evict(files)
        disk.append(total / 1e6 / seconds(lambda: read_in_order(files)))
        evict(files)
        work = partial(convert, src, root / f"set{turn}", workers=WORKERS, flags=("--in-place", *flags))
        ours.append(total / 1e6 / seconds(work))
    name = f"{kind}, {total / 1e9:.1f} GB in {len(files):,} files"
    results.add(name, "convert --in-place", "MB/s", ours, "sequential direct read", disk, cache="cold")
    placed, copied = root / "set0", root / "copied"
    written = total_bytes(placed)
    results.add(name, "written by convert --in-place", "share of the bytes", [written / total])
    convert(src, copied, workers=WORKERS, flags=flags)
    for cache in ("cold", "warm"):
        rates: dict[Path, list[float]] = {placed: [], copied: []}
        for _ in range(repeats):
            for where in (placed, copied):
                everything = (files if where == placed else files_of(copied)) if cache == "cold" else None
                rates[where].append(epoch_rate(where, everything))
        results.add(name, f"epoch in place, {cache}", "records/s", rates[placed], "copied", rates[copied], cache=cache)


def measure_opening(results: Results, root: Path, count: int, rng: np.random.Generator, repeats: int) -> None:
    """Measure the opening of a data set that refers to many files, and the first batch, each in a new process."""
    src = root / "src"
    src.mkdir()
    record = rng.standard_normal(TINY, np.float32).astype(np.float16)
    for number in range(count):
        np.save(src / f"r{number:07d}.npy", record)
    flags = ("--in-place", "--label-kind", "none", "--layout", "record-per-file")
    took = seconds(lambda: convert(src, root / "set", workers=WORKERS, flags=flags))
    name = f"{count:,} files"
    results.add(name, "convert --in-place", "files/s", [count / took], cache="warm")
    written = total_bytes(root / "set")
    results.add(name, "written, a record and file", "bytes", [written / count])
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        output = subprocess.run(
            [sys.executable, "-c", OPENING, str(root / "set")], check=True, capture_output=True, text=True
        ).stdout
        for values, value in zip(found, map(float, output.split()), strict=True):
            values.append(value)
    results.add(name, "open_dataset", "s", found[0])
    results.add(name, "open_dataset to the first batch", "s", found[1])


@app.command()
def main(
    gigabytes: Annotated[float, typer.Option(help="Size of each kind of input, in GB.")] = 1.0,
    files: Annotated[int, typer.Option(help="Number of files whose opening is measured; 0 for none.")] = 20_000,
    repeats: Annotated[int, typer.Option(min=1, help="Number of repetitions of each measurement.")] = 3,
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder to write in. [default: the system's temporary folder]", show_default=False),
    ] = None,
) -> None:
    """Measure everything; write results/in_place_<machine>_<date>.csv."""
    results, rng = Results("in_place", ["numpy", "torch", "safetensors"]), np.random.default_rng(0)
    for kind in MAKERS if gigabytes else ():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            measure(results, kind, Path(scratch), gigabytes * 1e9, rng, repeats)
    if files:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            measure_opening(results, Path(scratch), files, rng, repeats)


if __name__ == "__main__":
    sys.exit(run(app, "benchmarks.in_place"))
