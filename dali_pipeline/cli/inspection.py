"""The command `inspect`: show the contents of a data set, and how well it is shuffled, as text, JSON or a picture."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from dali_pipeline.cli.arguments import CacheBytes, CacheDir, FilesRoot, SetArgument, parse_cache_bytes, parse_sizes


def inspect_command(
    dst: SetArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="OUT.png", help="Also draw the printed figures to this PNG file.", show_default=False)
    ] = None,
    shuffle: Annotated[
        bool, typer.Option("--shuffle", help="Measure how close an epoch's order is to a uniform shuffle.")
    ] = False,
    window: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE,…", help="Shuffle windows that --shuffle measures. [default: 1, 5, 20 % of the split; 256MiB]"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Records, or steps, per batch, for --shuffle.")] = 32,
    unit: Annotated[
        str, typer.Option(metavar="record|step", help="What --shuffle measures: the order of records, or of single steps.")
    ] = "record",
    split: Annotated[str, typer.Option(help="Split that --shuffle measures.")] = "train",
    cache_dir: CacheDir = None,
    cache_bytes: CacheBytes = None,
    files_root: FilesRoot = None,
) -> None:
    """Print what a data set holds: records, labels, lengths, nodes and edges, bytes, types, a sample.

    \b
    Examples:
      python -m dali_pipeline inspect data/traces
      python -m dali_pipeline inspect data/traces --plot traces.png
      python -m dali_pipeline inspect data/traces --json | jq .splits
      python -m dali_pipeline inspect data/traces --shuffle --window 64MiB,1GiB --plot shuffle.png
      python -m dali_pipeline inspect data/states --shuffle --unit step --batch-size 4096
    """
    from dali_pipeline.dataset.dataset import open_dataset
    from dali_pipeline.errors import UsageError
    from dali_pipeline.runtime.checks import one_of
    from dali_pipeline.tools.describe import describe, print_description
    from dali_pipeline.tools.picture import check_picture, draw_description, draw_shuffle
    from dali_pipeline.tools.shufflereport import describe_shuffle, print_shuffle
    from dali_pipeline.tools.stepquality import describe_step_shuffle, print_step_shuffle

    check_picture(plot)
    one_of("--unit", unit, ("record", "step"))
    if unit == "step" and (plot is not None or not shuffle):
        raise UsageError("--unit step goes with --shuffle, which prints it; expected --shuffle, and no --plot")
    data = open_dataset(dst, cache_dir, parse_cache_bytes(cache_bytes), files_root)
    if unit == "step":
        description, by_window = describe_step_shuffle(data, split, parse_sizes(window), batch_size)
        show = partial(print_step_shuffle, description, by_window)
    elif shuffle:
        description, measured = describe_shuffle(data, split, parse_sizes(window), batch_size)
        show, draw = partial(print_shuffle, description, measured), partial(draw_shuffle, description, measured)
    else:
        description = describe(data)
        show, draw = partial(print_description, description), partial(draw_description, description)
    if plot is not None:
        draw(plot)
    if as_json:
        plain = msgspec.json.decode(msgspec.json.encode(description))  # null instead of NaN
        typer.echo(json.dumps(plain, indent=2))  # ASCII, which every terminal can print
    else:
        show()
