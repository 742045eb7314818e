"""The command `predict`: what a checkpoint of train.py says of any data set.

Its engine, training/scores.py, stands above this package, so it is imported only when the command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dali_pipeline.cli.arguments import CacheBytes, CacheDir, SetArgument, parse_cache_bytes


def predict_command(
    data: SetArgument,
    checkpoint: Annotated[
        Path,
        typer.Option(metavar="FILE.pt", help="As train.py keeps them: <model>-best.pt, -last.pt.", show_default=False),
    ],
    split: Annotated[str | None, typer.Option(metavar="NAME", help="[default: all splits]", show_default=False)] = None,
    output: Annotated[Path, typer.Option(metavar="FILE", help="To be written: .parquet or .csv.")] = Path("scores.parquet"),
    batch_size: Annotated[int, typer.Option(help="Records at a time.")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    on_nan: Annotated[
        Literal["raise", "skip", "keep"], typer.Option(help="For records with NaN or infinite values.")
    ] = "raise",
    cache_dir: CacheDir = None,
    cache_bytes: CacheBytes = None,
) -> None:
    """Score every record of a data set with a trained detector, once each, however large it is.

    \b
    Columns: id, group, label, score (the probability of label 1), split. Records with NaN or infinite values end it, unless
    they are left out (--on-nan skip) or scored all the same (keep).
    Examples:
      python -m dali_pipeline predict --checkpoint runs/one/lstm-best.pt data/traces
      python -m dali_pipeline predict --checkpoint runs/one/lstm-best.pt data/traces --split test --output scores.csv
    """
    from dali_pipeline.dataset.dataset import open_dataset
    from training.scores import write_scores

    opened = open_dataset(data, cache_dir, parse_cache_bytes(cache_bytes))
    told = write_scores(checkpoint, opened, output, split, batch_size, device, on_nan)
    left_out = f", {told.left_out:,} left out for NaN" if told.left_out else ""
    strange = f", {told.strange:,} without a finite score" if told.strange else ""
    typer.echo(f"{output}: {told.records:,} records{left_out}{strange}")
