"""Find the largest absolute value of each step and feature, from which the scales of int8 storage are computed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Protocol

import numpy as np

from dali_pipeline.errors import DataError, FormatError
from dali_pipeline.format.layers import Layers
from dali_pipeline.ingest.foreign import Block
from dali_pipeline.ingest.onray import deal
from dali_pipeline.ingest.sources import Source
from dali_pipeline.ingest.workers import Advance, Engine, NumWorkers
from dali_pipeline.types import Array, Kind


class Choice(Protocol):
    """The layers of each record that are kept."""

    @property
    def layers(self) -> Layers:
        """The layers that the user asked for."""

    def of(self, kind: Kind, count: int) -> list[int]:
        """Return the positions of the kept layers among the `count` steps of a record."""


def greatest_values(
    source: Source,
    numbers: list[int],
    choice: Choice,
    num_workers: NumWorkers,
    engine: Engine,
    skip_bad: bool,
    progress: Callable[[int], None],
) -> Array:
    """Return the largest absolute values in the sequences of files: (T, *row), or (1, *row) if lengths differ.

    Reads all these files, in worker processes or on Ray.

    Args:
        source: Files to convert.
        numbers: Numbers of the files to read.
        choice: Layers that are kept.
        num_workers: Number of processes.
        engine: "local" or "ray".
        skip_bad: Whether to leave out a file that cannot be read.
        progress: Called with the number of files that are done.

    Raises:
        FormatError: A file cannot be read or has NaN or infinite values, and `skip_bad` is False.
        DataError: No file has sequences, or their rows differ in shape.
    """
    greatest: Array | None = None
    work = partial(_work, source, choice, skip_bad)
    with closing(deal(engine, work, numbers, num_workers, progress, source.folders)) as results:
        for _, file_greatest in results:
            greatest = _joined(greatest, file_greatest)
    if greatest is None:
        raise DataError(f"{source.root} holds no sequences that can be taken in; expected at least one")
    return greatest


def _work(source: Source, choice: Choice, skip_bad: bool, number: int, advance: Advance) -> Array | None:
    try:
        return _of_file(source, number, choice)
    except (FormatError, DataError) as error:
        if not skip_bad:
            path = str(source.files[number])
            raise error if path in str(error) else type(error)(f"{path}: {error}") from None
        return None
    finally:
        advance(1)


def _of_file(source: Source, number: int, choice: Choice) -> Array | None:
    greatest: Array | None = None
    file, record = source.open(number), 0
    for values in file.values():
        rows = values.sequences if isinstance(values, Block) else values.sequence
        if rows is None:
            continue
        stacked = np.asarray(rows if isinstance(values, Block) else rows[None])  # (N, T, *row)
        name, record = (file.ids or file.groups)[record], record + len(stacked)
        if stacked.ndim < 2 or not stacked.shape[1]:
            raise DataError(f"record {name!r}, sequence has shape {stacked.shape[1:]}; expected at least one row")
        if choice.layers is not None:
            stacked = stacked[:, choice.of("sequences", stacked.shape[1])]
        # in float64, -low is correct for -128 and for unsigned types too
        low, high = stacked.min(axis=0).astype(np.float64), stacked.max(axis=0).astype(np.float64)
        block_greatest = np.maximum(high, -low)
        if not np.isfinite(block_greatest).all():
            raise FormatError(
                f"{source.files[number]}, sequence holds NaN or infinite values, which int8 cannot; store float16"
            )
        if greatest is not None and block_greatest.shape[1:] != greatest.shape[1:]:
            raise DataError(
                f"record {name!r}, sequence has rows of shape {block_greatest.shape[1:]}; expected {greatest.shape[1:]} "
                "as before"
            )
        greatest = _joined(greatest, block_greatest)
    return greatest


def _joined(ours: Array | None, theirs: Array | None) -> Array | None:
    """Return the elementwise maximum; over all steps if the numbers of steps differ."""
    if ours is None or theirs is None:
        return theirs if ours is None else ours
    if ours.shape[1:] != theirs.shape[1:]:
        raise DataError(
            f"sequences have rows of shape {ours.shape[1:]} in one file and {theirs.shape[1:]} in another; expected one shape"
        )
    if len(ours) != len(theirs):  # lengths differ: one row for all steps
        ours, theirs = ours.max(axis=0, keepdims=True), theirs.max(axis=0, keepdims=True)
    return np.maximum(ours, theirs)
