"""Measure the size and the error of each encoding: `python -m benchmarks.encodings data/sciq`, some minutes on 2 cores.

Converts a data set anew in every encoding of its sequences, and trains the LSTM on each: bytes of the sequences, test AUROC of
so many seeds, and the error of values beside their own size (root mean squares, over the test split).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer

import dali_pipeline as dp
from benchmarks.harness import Results
from dali_pipeline.cli.app import new_app, run
from dali_pipeline.ingest.config import ConvertConfig
from dali_pipeline.ingest.convert import convert
from training.results import read_metrics

ENCODINGS = ("float32", "float16", "bfloat16", "int8")
app = new_app()


def error(data: dp.Dataset, exact: dp.Dataset) -> float:
    """Return the relative root mean square error, as the mean over steps and features."""
    loaders = (dp.SequenceLoader(data_set, "test", shuffle=False, engine="torch") for data_set in (data, exact))
    squares: list[tuple[torch.Tensor, torch.Tensor]] = []
    for ours, theirs in zip(*loaders, strict=True):
        assert ours.ids == theirs.ids
        difference = ours.sequences - theirs.sequences
        squares.append((difference.square().sum(dim=0), theirs.sequences.square().sum(dim=0)))
    off, size = (sum(part) for part in zip(*squares, strict=True))
    assert isinstance(off, torch.Tensor)
    return float((off / size).sqrt().mean())


@app.command()
def main(
    data: Annotated[Path, typer.Argument(help="Data set with sequences of one length.", show_default=False)],
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder for the temporary data sets. [default: the system's temporary folder]", show_default=False),
    ] = None,
) -> None:
    """Measure every encoding; write results/encodings_<machine>_<date>.csv."""
    results, exact = Results("encodings", ["torch", "numpy"]), dp.open_dataset(data)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        sizes: dict[str, float] = {}
        scores: dict[str, list[float]] = {}
        for encoding in ENCODINGS:
            encoded = convert(data, Path(scratch) / encoding, ConvertConfig(dtype=f"sequence={encoding}"))
            sizes[encoding] = sum(sum(encoded.table(split, "sequences").bytes) for split in encoded.splits) / 1e6
            output = Path(scratch) / f"run-{encoding}"
            options = ["--data", str(encoded.root), "--model", "lstm", "--seeds", str(seeds), "--output-dir", str(output)]
            subprocess.run([sys.executable, "train.py", *options], check=True, stdout=subprocess.DEVNULL)
            scores[encoding] = [
                read_metrics(output / f"seed-{seed}" if seeds > 1 else output)["lstm"]["test"]["auroc"] for seed in range(seeds)
            ]
            results.add(data.name, f"{encoding}, sequences", "MB", [sizes[encoding]], "float32", [sizes["float32"]])
            results.add(data.name, f"{encoding}, error of values", "of their size", [error(encoded, exact)])
            results.add(data.name, f"{encoding}, test AUROC", "", scores[encoding])


if __name__ == "__main__":
    sys.exit(run(app, "benchmarks.encodings"))
