"""Score every record of a data set with a detector that train.py trained.

python predict.py --checkpoint runs/one/lstm-best.pt --data data/traces
python predict.py --checkpoint runs/one/lstm-best.pt data/traces --split test --output scores.csv
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from dali_pipeline.cli.app import new_app, run
from dali_pipeline.cli.arguments import CacheBytes, CacheDir, FilesRoot, parse_cache_bytes
from dali_pipeline.errors import UsageError
from dali_pipeline.runtime.threads import wait_passively

app = new_app()


@app.command()
def command_line(
    place: Annotated[
        str | None, typer.Argument(metavar="SET", help="Folder or URL of the data set.", show_default=False)
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="SET", help="Folder or URL of the data set, instead of SET.", show_default=False),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="FILE.pt", help="Checkpoint that train.py kept: <model>-best.pt. [required]", show_default=False),
    ] = None,
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help="Split to score. [default: all splits]", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option(metavar="FILE", help="File to write: .parquet or .csv.")] = Path("scores.parquet"),
    batch_size: Annotated[int, typer.Option(help="Records per batch.")] = 256,
    device: Annotated[str, typer.Option(help="Device of the model: auto, cpu, cuda or cuda:N.")] = "auto",
    on_nan: Annotated[
        Literal["raise", "skip", "keep"], typer.Option(help="What to do with records that hold NaN or infinite values.")
    ] = "raise",
    cache_dir: CacheDir = None,
    cache_bytes: CacheBytes = None,
    files_root: FilesRoot = None,
) -> None:
    """Score every record of a data set with a trained detector, once each, however large it is.

    \b
    Columns: id, group, label, score (the probability of label 1), split. Of several classes or labels score_0 …, of values
    prediction; of steps and nodes a row each, with its number. If the records have labels, a table shows the metrics beside
    those of the training. A record with NaN or infinite values ends the command, unless such records are left out (--on-nan
    skip) or scored all the same (--on-nan keep).
    Examples:
      python predict.py --checkpoint runs/one/lstm-best.pt --data data/traces
      python predict.py --checkpoint runs/one/lstm-best.pt data/traces --split test --output scores.csv
    """
    from dali_pipeline.dataset.dataset import open_dataset
    from dali_pipeline.loaders.device import make_current
    from training.scores import write_scores
    from training.transfer import tell_transfer

    if (place is None) == (data is None):
        raise UsageError("name the data set to score, once: predict.py --checkpoint FILE.pt --data SET")
    if checkpoint is None:
        raise UsageError("name a checkpoint that train.py kept: --checkpoint runs/one/lstm-best.pt")
    opened = open_dataset(data or place or "", cache_dir, parse_cache_bytes(cache_bytes), files_root)
    make_current(device)
    counts = write_scores(checkpoint, opened, output, split, batch_size, device, on_nan)
    left_out = f", {counts.left_out:,} left out for NaN" if counts.left_out else ""
    strange = f", {counts.strange:,} without a finite score" if counts.strange else ""
    typer.echo(f"{output}: {counts.records:,} records{left_out}{strange}")
    assert counts.tally is not None
    tell_transfer(checkpoint, counts.name, opened, split, counts.tally)


def main() -> None:
    """Run the command line."""
    wait_passively()
    sys.exit(run(app, "predict.py"))


if __name__ == "__main__":
    main()
