"""Objective: the loss of each record of a batch, for every task."""

from __future__ import annotations

import torch
from torch.nn import functional

from dali_pipeline import DataError, GraphBatch
from dali_pipeline.loaders.sidestream import to_device
from models import Output
from models.gvae_lstm import records_of_nodes
from training.target import Batch, Target


class Objective:
    """The loss of each record: cross entropy of classes and labels, Huber's loss (1964, delta 1) of values.

    Values are in standard deviations of the training split. Several labels, or numbers of a value, count as their mean; steps
    or nodes too, over those of the record that are known, so that every record weighs the same.
    """

    def __init__(self, target: Target, device: torch.device) -> None:
        self.target = target
        self._mean, self._spread = (
            torch.tensor(numbers, dtype=torch.float64).to(device) for numbers in (target.mean, target.spread)
        )

    def __call__(self, output: Output, batch: Batch) -> torch.Tensor:
        """Return the loss plus the penalty of each record, (B,) float32; raises DataError if the batch has no target."""
        target, penalty_B = self.target, output.penalty_B.float()
        values = target.of(batch)
        if values is None:
            raise DataError(f"the records have no {target.name}; expected one in every record")
        if target.level == "record":
            return self._losses(output.logits_BK.float(), values) + penalty_B
        counted, size = target.known(values), len(penalty_B)
        if target.level == "step":
            counted = counted & steps_of_records(batch)
        # padding may hold anything, also what no class is, and NaN would reach the gradient
        values = torch.where(counted.view(*counted.shape, *[1] * len(target.shape)), values, 0)
        kept = self._losses(output.logits_BK.float().flatten(0, -2), values) * counted.flatten()
        if target.level == "step":
            totals_B, counts_B = kept.view(size, -1).sum(dim=1), counted.sum(dim=1)
        else:
            assert isinstance(batch, GraphBatch)
            record_N = records_of_nodes(batch.graphs, batch.graphs_per_record)
            totals_B = kept.new_zeros(size).index_add(0, record_N, kept)
            counts_B = kept.new_zeros(size).index_add(0, record_N, counted.to(kept.dtype))
        return totals_B / counts_B.clamp(min=1) + penalty_B

    def _losses(self, logits_MK: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return the loss of each of M rows, (M,)."""
        task = self.target.task
        if task == "multiclass":
            return functional.cross_entropy(logits_MK, values.flatten().long(), reduction="none")
        values_MK = values.reshape(logits_MK.shape)
        if task == "regression":
            wanted_MK = ((values_MK - self._mean) / self._spread).float()  # float64 up to here, for a large mean
            losses_MK = functional.huber_loss(logits_MK, wanted_MK, reduction="none")
        else:
            losses_MK = functional.binary_cross_entropy_with_logits(logits_MK, values_MK.float(), reduction="none")
        return losses_MK.mean(dim=1) if losses_MK.shape[1] > 1 else losses_MK[:, 0]  # a mean of one is a kernel for nothing


def steps_of_records(batch: Batch) -> torch.Tensor:
    """Return which steps of a batch of sequences are no padding, (B, T) bool on the device; the lengths are copied there."""
    assert not isinstance(batch, GraphBatch)
    device = batch.sequences.device
    return torch.arange(batch.sequences.shape[1], device=device) < to_device(batch.lengths, device)[:, None]
