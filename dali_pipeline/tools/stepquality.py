"""Measure how alike the rows of batches of single steps are: pairs of one record, beside a full permutation.

Steps of one record are alike, so a batch with many of them teaches less than its size says. A set whose records are shuffled,
and then cut into steps, looks shuffled and is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from dali_pipeline.dataset.dataset import Dataset
from dali_pipeline.errors import DataError, UsageError
from dali_pipeline.reading.steps import StepIndex
from dali_pipeline.runtime.outside import readable
from dali_pipeline.runtime.progress import plain_console
from dali_pipeline.sampling.order import Order
from dali_pipeline.sampling.plan import EpochPlan
from dali_pipeline.tools.shufflequality import choose_steps, same_shard_share
from dali_pipeline.tools.shufflereport import spread_text, usual_windows
from dali_pipeline.types import Ints

SAMPLED_ROWS, SUPERBATCHES = 1 << 18, 8


@dataclass(frozen=True, kw_only=True)
class StepQuality:
    """Share of the pairs within a batch that are steps of one record, at one window size, per epoch.

    Attributes:
        window_bytes: Size of the window in bytes.
        window_share: Size of the window as a share of the split.
        single_steps: With `unit="step"`.
        whole_records: With records in a random order, and their steps one after the other.
    """

    window_bytes: int
    window_share: float
    single_steps: tuple[float, ...]
    whole_records: tuple[float, ...]


def full_same_record_share(lengths: Ints) -> float:
    """Return the exact same-record share of a full permutation of all steps of records with these lengths, (N,)."""
    total = int(lengths.sum())
    return float((lengths.astype(float) * (lengths - 1)).sum() / (total * (total - 1)))


def describe_step_shuffle(
    data: Dataset, split: str, windows: Sequence[int], batch_size: int, epochs: int = 5
) -> tuple[dict[str, Any], list[StepQuality]]:
    """Measure how alike the rows of batches of single steps are; reads the manifest and the offsets of all records.

    Args:
        data: The data set.
        split: Name of the split.
        windows: Window sizes in bytes; if empty, 1 %, 5 % and 20 % of the split, and the default of the loaders.
        batch_size: Steps per batch, at least 2.
        epochs: Number of epochs.

    Returns:
        The report in JSON types, and the measurements by window.

    Raises:
        UsageError: There is no such split, or the batch size is below 2.
        DataError: There are no sequences, or fewer steps than one batch has.
        FormatError: A damaged shard.
    """
    if batch_size < 2:
        raise UsageError(f"batch size is {batch_size}; expected at least 2, as pairs within a batch are counted")
    selection = data.select(split, "sequences")
    index = StepIndex(selection, data.schema)
    lengths = index.lengths()
    if index.num_steps < batch_size:
        raise DataError(f"batch size is {batch_size}; split {split!r} has {index.num_steps} steps, and a whole batch is needed")
    table = data.table(split, "sequences")
    measured = []
    for window_bytes in windows or usual_windows(table):
        order = Order(
            digest=data.digest, split=split, seed=0, shuffle=True, global_batch_size=batch_size, window_bytes=window_bytes,
            num_partitions=1, drop_last=False, unit="step",
        )  # fmt: skip
        steps = choose_steps(index.num_steps // batch_size, max(1, SAMPLED_ROWS // batch_size), SUPERBATCHES)
        single, whole = [], []
        for epoch in range(epochs):
            full = index.counts > 0
            plan = EpochPlan(order, epoch, index.counts[full], selection.nbytes[full])
            rows = np.stack([plan.batch(int(step)).positions for step in steps])  # (batches, B)
            single.append(same_shard_share(index.find(rows.reshape(-1))[0].reshape(rows.shape)))
            records = np.random.default_rng([0, epoch]).permutation(len(lengths))
            ends = np.cumsum(lengths[records])
            places = steps[:, None] * batch_size + np.arange(batch_size)
            whole.append(same_shard_share(np.searchsorted(ends, places, side="right")))
        measured.append(
            StepQuality(
                window_bytes=window_bytes,
                window_share=window_bytes / max(1, int(selection.nbytes.sum())),
                single_steps=tuple(single),
                whole_records=tuple(whole),
            )
        )
    report = {
        "root": readable(data.root),
        "digest": data.digest,
        "split": split,
        "unit": "step",
        "epochs": epochs,
        "batch_size": batch_size,
        "records": len(lengths),
        "steps": index.num_steps,
        "full_same_record": full_same_record_share(lengths),
        "shuffle": [vars(quality) for quality in measured],
    }
    return report, measured


def print_step_shuffle(report: dict[str, Any], measured: list[StepQuality]) -> None:
    """Print one table; piped output is never wrapped."""
    console = plain_console()
    console.print(
        f"{report['root']}, {report['split']}: {report['steps']:,} steps of {report['records']:,} records, batches of "
        f"{report['batch_size']}, {report['epochs']} epochs"
    )
    table = Table("window", "order", "same record in a batch", box=box.SIMPLE_HEAD)
    for quality in measured:
        window = f"{quality.window_bytes / 1e6:,.6g} MB ({quality.window_share:.3g} of all)"
        table.add_row(window, "single steps (unit='step')", spread_text(quality.single_steps, percent=True))
        table.add_row("", "whole records, then cut into steps", spread_text(quality.whole_records, percent=True))
        table.add_row("", "full permutation, exactly", f"{report['full_same_record']:.4%}", end_section=True)
    console.print(table)
