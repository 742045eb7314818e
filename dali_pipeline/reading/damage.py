"""Damage: replacement of records that cannot be read, or are not finite, and are to be left out."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from dali_pipeline.errors import PipelineError
from dali_pipeline.sampling.plan import Shares
from dali_pipeline.types import Ints

TRIED = 64  # records of the split that are tried if none of a batch can be read
TOLD = 10  # records left out that the log names, per epoch
log = logging.getLogger("dali_pipeline")


def without_damaged(
    shares: Shares, gather: Callable[[Ints], object], skips: tuple[type[PipelineError], ...], num_records: int
) -> tuple[Shares, tuple[str, ...]]:
    """Return the rows with padding in place of records that cannot be read, and the reason per such record.

    Padding repeats a sound record of the batch, or if there is none, of the split, found the same way on every rank. Gathers
    record by record. Raises any other error of `gather`, or the first refusal if nothing can be read.

    Args:
        shares: Rows of one rank's batch.
        gather: Function that reads the records at positions.
        skips: Errors of `gather` for which a record is left out.
        num_records: Records of the split.
    """
    refused: dict[int, PipelineError] = {}
    for position in dict.fromkeys(shares.positions.tolist()):
        try:
            gather(np.array([position]))
        except skips as error:
            refused[position] = error
    damaged = np.isin(shares.positions, list(refused))
    sound = shares.positions[~damaged]
    if not len(sound):
        sound = _first_sound(gather, skips, np.arange(0, num_records, max(1, num_records // TRIED)), refused)
    positions = np.where(damaged, sound[0], shares.positions)
    named = [position for position in dict.fromkeys(shares.positions[shares.valid].tolist()) if position in refused]
    return Shares(positions=positions, valid=shares.valid & ~damaged), tuple(str(refused[position]) for position in named)


def without_padding(shares: Shares) -> Shares:
    """Return the valid rows only; if there are none, one row of padding."""
    kept = shares.valid if shares.valid.any() else np.arange(len(shares.valid)) == 0
    return Shares(positions=shares.positions[kept], valid=shares.valid[kept])


def _first_sound(
    gather: Callable[[Ints], object], skips: tuple[type[PipelineError], ...], tried: Ints, refused: dict[int, PipelineError]
) -> Ints:
    for position in tried.tolist():
        try:
            gather(np.array([position]))
        except skips:
            continue
        return np.array([position])
    raise next(iter(refused.values()))


def tell(epoch: int, faults: tuple[str, ...], left_out: list[str]) -> None:
    """Log the reasons of records left out, the first ones by name, and append them to `left_out`."""
    for fault in faults:
        left_out.append(fault)
        if len(left_out) <= TOLD:
            log.warning("epoch %d: left out: %s", epoch, fault)
