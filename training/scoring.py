"""Score a split with a trained detector, batch by batch, each record once, without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dali_pipeline.loaders.loader import Loader
from training.build import Batch, autocast, forward, record_losses
from training.metrics import Predictions


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """Scores of R records, on the CPU.

    Attributes:
        ids: R texts.
        positions: (R,) int64.
        logits: (R, K) float32.
        labels: (R,) int64; -1 for records of a data set without classes.
        losses: (R,) float32; NaN if they were not asked for.
    """

    ids: list[str]
    positions: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor
    losses: torch.Tensor

    @classmethod
    def join(cls, parts: Sequence[Scored]) -> Scored:
        """Concatenate several scores."""
        names = ("positions", "logits", "labels", "losses")
        joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return cls(ids=[id_ for part in parts for id_ in part.ids], **joined)

    @property
    def scores(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Probability of label 1, (R,), for two classes; otherwise of each class, (R, C)."""
        one_logit = self.logits.shape[1] == 1
        scores: np.ndarray[Any, Any] = (self.logits[:, 0].sigmoid() if one_logit else self.logits.softmax(dim=1)).numpy()
        return scores

    def in_file_order(self) -> Predictions:
        """Return predictions sorted by position, so that the number of processes does not matter."""
        order = torch.argsort(self.positions)
        whole = Scored(
            ids=[self.ids[row] for row in order.tolist()],
            **{name: getattr(self, name)[order] for name in ("positions", "logits", "labels", "losses")},
        )
        return Predictions(
            ids=whole.ids,
            positions=whole.positions.numpy(),
            scores=whole.scores,
            labels=whole.labels.numpy(),
            loss=float(whole.losses.mean()),
        )


def score_batches(model: nn.Module, loader: Loader[Any], precision: str, *, with_losses: bool = True) -> Iterator[Scored]:
    """Yield the scores of each batch's valid records, in evaluation mode. with_losses: needs labels that the model knows."""
    model.eval()
    coming: Callable[[], Scored] | None = None
    for batch in loader:
        with torch.inference_mode():
            with autocast(loader.device, precision):
                output = forward(model, batch)
            losses_B = record_losses(output, batch.labels) if with_losses else torch.full_like(output.penalty_B, torch.nan)
            before, coming = coming, _on_the_way(batch, output.logits_BK.float(), losses_B)
        if before is not None:  # while the GPU works on this batch
            yield before()
    if coming is not None:
        yield coming()


def _classes(batch: Batch) -> torch.Tensor:
    """Return the classes of a batch, (B,) int64; -1 for records of a data set without classes."""
    if batch.labels is None or batch.labels.dtype != torch.int64:
        return torch.full(batch.valid.shape, -1, dtype=torch.int64, device=batch.valid.device)
    return batch.labels


def _on_the_way(batch: Batch, logits_BK: torch.Tensor, losses_B: torch.Tensor) -> Callable[[], Scored]:
    """Begin to copy a batch's results to the CPU; return a function that waits for the copies and returns the scores."""
    ids, positions = batch.ids, batch.positions
    copies = [values.to("cpu", non_blocking=True) for values in (batch.valid, _classes(batch), logits_BK, losses_B)]
    copied = torch.cuda.current_stream(logits_BK.device).record_event() if logits_BK.is_cuda else None

    def scored() -> Scored:
        if copied is not None:
            copied.synchronize()
        valid, labels, logits, losses = copies
        return Scored(
            ids=[id_ for id_, real in zip(ids, valid.tolist(), strict=True) if real],
            positions=positions[valid],
            logits=logits[valid],
            labels=labels[valid],
            losses=losses[valid],
        )

    return scored
