"""Sequences written in every encoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

import dali_pipeline as dp

STEPS, FEATURES = 5, 6


def made(root: Path, rows: list[np.ndarray[Any, Any]], field: dp.Field) -> dp.Dataset:
    with dp.ShardWriter(
        root, dp.Schema(sequence=field, step_axis="layer"), split=dp.SplitRule.parse("100/0/0"), shard_bytes=400
    ) as writer:
        for number, sequence in enumerate(rows):
            writer.write({"id": str(number), "label": number % 2, "sequence": sequence})
    return dp.open_dataset(root)


def rows_of(count: int, *, ragged: bool) -> list[np.ndarray[Any, Any]]:
    """Features of very different size, as hidden states have them."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, STEPS + 1, count) if ragged else np.full(count, STEPS)
    return [(rng.normal(size=(n, FEATURES)) * 10.0 ** np.arange(-2, 4)).astype(np.float32) for n in lengths]


def greatest(rows: list[np.ndarray[Any, Any]], *, by_step: bool) -> np.ndarray[Any, Any]:
    return np.asarray(
        np.abs(np.stack(rows)).max(axis=0) if by_step else np.abs(np.concatenate(rows)).max(axis=0, keepdims=True)
    )


def assert_same_but_for_ties(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> None:
    """Halfway between two numbers torch and CUDA round to the even one, DALI's cast on the CPU away from zero."""
    differ = ours != theirs
    halfway = (ours[differ].double() + theirs[differ].double()) / 2
    assert torch.equal(halfway, exact[differ].double())
