"""The report of `inspect --shuffle`, as plain values and as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from dali_pipeline.dataset.dataset import Dataset
from dali_pipeline.errors import DataError
from dali_pipeline.format.manifest import ShardTable
from dali_pipeline.runtime.outside import readable
from dali_pipeline.runtime.progress import plain_console
from dali_pipeline.sampling.order import WINDOW_BYTES
from dali_pipeline.tools.shufflequality import WINDOW_SHARES, Quality, measure
from dali_pipeline.types import Kind


def describe_shuffle(
    data: Dataset, split: str, windows: Sequence[int], batch_size: int, epochs: int = 5
) -> tuple[dict[str, Any], dict[Kind, list[Quality]]]:
    """Measure how well the epochs of a split are shuffled; reads only the manifest.

    Args:
        data: The data set.
        split: Name of the split.
        windows: Window sizes in bytes; if empty, 1 %, 5 % and 20 % of the split, and the default of the loaders.
        batch_size: Records per batch.
        epochs: Number of epochs.

    Returns:
        The report in JSON types, and the measurements by kind and window.

    Raises:
        UsageError: There is no such split, or `measure` raises it.
        DataError: The split has no records, or `measure` raises it.
    """
    tables = {kind: data.table(split, kind) for kind in data.schema.kinds}
    if not any(sum(table.records) for table in tables.values()):
        raise DataError(f"split {split!r} of {data.root} has no records, so no order to measure")
    measured = {
        kind: [
            measure(
                np.array(table.records, np.int64),
                np.array(table.nbytes, np.int64),
                window_bytes=window,
                batch_size=batch_size,
                epochs=epochs,
                digest=data.digest,
                split=split,
            )
            for window in windows or usual_windows(table)
        ]
        for kind, table in tables.items()
        if sum(table.records)
    }
    report = {
        "root": readable(data.root),
        "digest": data.digest,
        "split": split,
        "epochs": epochs,
        "splits": {split: {kind: sum(table.records) for kind, table in tables.items()}},
        "shards": {kind: len(table) for kind, table in tables.items()},
        "shuffle": {kind: [quality.to_json() for quality in qualities] for kind, qualities in measured.items()},
    }
    return report, measured


def usual_windows(table: ShardTable) -> list[int]:
    """Return 1 %, 5 % and 20 % of the shards' bytes, and the default window of the loaders, ascending."""
    return sorted({*(max(1, round(share * sum(table.nbytes))) for share in WINDOW_SHARES), WINDOW_BYTES})


def print_shuffle(report: dict[str, Any], measured: dict[Kind, list[Quality]]) -> None:
    """Print one table per kind; piped output is never wrapped."""
    console = plain_console()
    for kind, qualities in measured.items():
        console.print(
            f"{report['root']}, {report['split']}: {report['splits'][report['split']][kind]:,} {kind} in "
            f"{report['shards'][kind]:,} shards, batches of {qualities[0].batch_size}, {report['epochs']} epochs"
        )
        table = Table("window", "order", "same shard in a batch", "off by", "displacement", "off by", box=box.SIMPLE_HEAD)
        for quality in qualities:
            window = f"{quality.window_bytes / 1e6:,.6g} MB ({quality.window_share:.3g} of all, {quality.capacity:,} records)"
            for method in quality.methods:
                off = method.distances(quality)
                table.add_row(
                    window,
                    method.method,
                    spread_text(method.same_shard, percent=True),
                    f"{off[0]:.4%}",
                    spread_text(method.displacement),
                    f"{off[1]:.4f}",
                )
                window = ""
            exact = f"{quality.full_same_shard:.4%}", "", f"{quality.full_displacement:.4f}", ""
            table.add_row("", "full permutation, exactly", *exact, end_section=True)
        console.print(table)
        for quality in qualities:
            window = f"window {quality.window_bytes / 1e6:,.6g} MB:"
            if quality.batches < quality.all_batches:
                console.print(f"{window} {quality.batches:,} batches of {quality.all_batches:,} measured in each epoch")
            if quality.joined > 1:
                console.print(
                    f"{window} scaled down: {quality.joined:,} records taken as one, in the same shards and windows of bytes"
                )
            if behind := quality.behind():
                console.print(f"{window} a shuffle buffer is nearer to the full permutation by {' and by '.join(behind)}")


def spread_text(values: Sequence[float], *, percent: bool = False) -> str:
    """Return the mean and the standard deviation over the epochs, in words."""
    mean, spread = float(np.mean(values)), float(np.std(values))
    return f"{mean:.4%} ± {spread:.4%}" if percent else f"{mean:.4f} ± {spread:.4f}"
