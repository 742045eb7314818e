"""The command `predict`: what a checkpoint of train.py says of any data set.

Its engine, training/scores.py, stands above this package, so it is imported only when the command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def predict_command(
    data: Annotated[Path, typer.Argument(help="A data set, as convert or extract writes it.", show_default=False)],
    checkpoint: Annotated[
        Path,
        typer.Option(metavar="FILE.pt", help="As train.py keeps them: <model>-best.pt, -last.pt.", show_default=False),
    ],
    split: Annotated[str | None, typer.Option(metavar="NAME", help="[default: all splits]", show_default=False)] = None,
    output: Annotated[Path, typer.Option(metavar="FILE", help="To be written: .parquet or .csv.")] = Path("scores.parquet"),
    batch_size: Annotated[int, typer.Option(help="Records at a time.")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Score every record of a data set with a trained detector, once each, however large it is.

    \b
    Columns: id, group, label, score (the probability of label 1), split.
    Examples:
      python -m dali_pipeline predict --checkpoint runs/one/lstm-best.pt data/traces
      python -m dali_pipeline predict --checkpoint runs/one/lstm-best.pt data/traces --split test --output scores.csv
    """
    from training.scores import write_scores

    records = write_scores(checkpoint, data, output, split, batch_size, device)
    typer.echo(f"{output}: {records:,} records")
