"""Score a split with a trained detector, batch by batch, each record once, without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dali_pipeline import GraphBatch
from dali_pipeline.loaders.loader import Loader
from training.build import autocast, forward
from training.metrics import Predictions
from training.objective import Objective
from training.target import Batch, Target


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """Scores of R records, on the CPU; M rows: a record, or each of its steps or nodes.

    Attributes:
        ids: R texts.
        positions: (R,) int64.
        counts: (R,) int64, rows of each record.
        logits: (M, K) float32.
        labels: (M, *shape) targets, as `Target.of` returns them; `Target.missing` for those of a data set without.
        losses: (R,) float32; NaN if they were not asked for.
    """

    ids: list[str]
    positions: torch.Tensor
    counts: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor
    losses: torch.Tensor

    @classmethod
    def join(cls, parts: Sequence[Scored]) -> Scored:
        """Concatenate several scores."""
        names = ("positions", "counts", "logits", "labels", "losses")
        joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return cls(ids=[id_ for part in parts for id_ in part.ids], **joined)

    def predictions(self, target: Target) -> Predictions:
        """Return the predictions, in the present order."""
        return Predictions(
            task=target.task,
            level=target.level,
            ids=self.ids,
            positions=self.positions.numpy(),
            counts=self.counts.numpy(),
            scores=self._scores(target),
            labels=plain_targets(self.labels, target),
            loss=float(self.losses.mean()),
        )

    def _scores(self, target: Target) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Probability of label 1, (M,); of each class or label, (M, K); or values, (M, K)."""
        if target.task == "regression":
            return target.scaled(self.logits.numpy())
        if target.task == "binary":
            return self.logits[:, 0].sigmoid().numpy()
        return (self.logits.softmax(dim=1) if target.task == "multiclass" else self.logits.sigmoid()).numpy()

    def in_file_order(self, target: Target) -> Predictions:
        """Return predictions sorted by position, so that the number of processes does not matter."""
        return self.predictions(target).rows(torch.argsort(self.positions).tolist())


def score_batches(
    model: nn.Module,
    loader: Loader[Any],
    precision: str,
    objective: Objective,
    *,
    with_losses: bool = True,
    with_targets: bool = True,
) -> Iterator[Scored]:
    """Yield the scores of each batch's valid records, in evaluation mode.

    Args:
        model: The detector.
        loader: Loader of the records.
        precision: Precision of the forward pass.
        objective: The loss, with the target.
        with_losses: Whether to compute losses, for which every record has a target that the model knows. Default: True.
        with_targets: Whether the records have targets of the model's kind. Default: True.
    """
    model.eval()
    coming: Callable[[], Scored] | None = None
    for batch in loader:
        with torch.inference_mode():
            with autocast(loader.device, precision):
                output = forward(model, batch)
            losses_B = objective(output, batch) if with_losses else torch.full_like(output.penalty_B, torch.nan)
            begun = _on_the_way(batch, output.logits_BK.float(), losses_B, objective.target, with_targets)
            before, coming = coming, begun
        if before is not None:  # while the GPU works on this batch
            yield before()
    if coming is not None:
        yield coming()


def plain_targets(values: torch.Tensor, target: Target) -> np.ndarray[Any, Any]:
    """Return targets as `Predictions` has them: (M,) int64 classes, (M, K) int64 of labels, (M, K) float64 values.

    A number that is no class, or no label, is one that is not known.
    """
    rows = values.reshape(len(values), target.outputs) if target.task != "multiclass" else values.reshape(len(values), 1)
    if target.task == "regression":
        return rows.double().numpy()
    whole = rows.long()
    allowed = (whole == rows) & (whole >= 0) & ((whole <= 1) | (target.task != "multilabel"))
    plain = torch.where(allowed.all(dim=1, keepdim=True), whole, -1).numpy()
    return plain if target.task == "multilabel" else plain[:, 0]


def _targets(batch: Batch, target: Target, logits: torch.Tensor, there: bool) -> torch.Tensor:
    """Return the targets of a batch, with the axes of the logits before the last; `Target.missing` where there are none."""
    values = target.of(batch) if there else None
    if values is not None:
        return values
    dtype = torch.float32 if target.task == "regression" else torch.int64
    return torch.full((*logits.shape[:-1], *target.shape), target.missing, dtype=dtype, device=logits.device)


def _on_the_way(
    batch: Batch, logits: torch.Tensor, losses_B: torch.Tensor, target: Target, there: bool
) -> Callable[[], Scored]:
    """Begin to copy a batch's results to the CPU; return a function that waits for the copies and returns the scores."""
    ids, positions, counts = batch.ids, batch.positions, rows_per_record(batch, target)
    copies = [
        values.to("cpu", non_blocking=True)
        for values in (batch.valid, _targets(batch, target, logits, there), logits, losses_B)
    ]
    copied = torch.cuda.current_stream(logits.device).record_event() if logits.is_cuda else None

    def scored() -> Scored:
        if copied is not None:
            copied.synchronize()
        valid, labels, outputs, losses = copies
        if target.level == "record":
            chosen = valid
        elif target.level == "step":
            chosen = (torch.arange(outputs.shape[1]) < counts[:, None]) & valid[:, None]
        else:
            chosen = torch.repeat_interleave(valid, counts)
        return Scored(
            ids=[id_ for id_, real in zip(ids, valid.tolist(), strict=True) if real],
            positions=positions[valid],
            counts=counts[valid],
            logits=outputs[chosen],
            labels=labels[chosen],
            losses=losses[valid],
        )

    return scored


def rows_per_record(batch: Batch, target: Target) -> torch.Tensor:
    """Return the rows of scores of each record, (B,) int64 on the CPU: 1, or its steps or nodes."""
    if target.level == "record":
        return torch.ones(len(batch), dtype=torch.int64)
    if not isinstance(batch, GraphBatch):
        return batch.lengths
    per_graph = batch.graphs._slice_dict["x"].diff()  # on the CPU
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), per_graph.cumsum(0)])[batch.graphs_per_record.cumsum(0)]
    return ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
