"""Compute the mean and standard deviation of every feature that a detector sees, over its training split."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from dali_pipeline import Dataset, GraphLoader, SequenceBatch, SequenceLoader
from dali_pipeline.dataset.dataset import View
from dali_pipeline.format.layers import parse_layers
from dali_pipeline.loaders.loader import Loader
from dali_pipeline.writing.moments import Moments
from training.build import Batch
from training.config import ModelName, TrainConfig, kind_of

MOST_RECORDS = 4096  # records of the training split: the first of its shuffled order
BATCH_SIZE = 64


class Statistics(NamedTuple):
    """mean, std: (F,) float64, of each feature of a step, or node."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both as float32."""
        return torch.tensor(self.mean, dtype=torch.float32), torch.tensor(self.std, dtype=torch.float32)


def feature_statistics(name: ModelName, data: Dataset, config: TrainConfig) -> Statistics:
    """Return the feature statistics of the training split as the model sees it, the same on every machine.

    They come from the manifest if it has them and the model sees all steps. Otherwise they are computed from at most
    MOST_RECORDS records, which are read once. NaN and infinite values are left out. A feature without any
    value has mean and spread 0.
    """
    stored = data.manifest.statistics
    if kind_of(name) == "sequences" and stored is not None and config.layers is None and not isinstance(data, View):
        return Statistics(stored.mean, stored.std)
    moments, count = Moments(), 0
    # computed by one rank, whatever the number of processes
    alone: dict[str, Any] = {"rank": 0, "world_size": 1, "device": "cpu", "batch_size": BATCH_SIZE, "seed": config.seed}
    layers = parse_layers(config.layers)
    loader: Loader[Any]
    if kind_of(name) == "sequences":
        loader = SequenceLoader(data, "train", engine="torch", layers=layers, **alone)
    else:
        loader = GraphLoader(data, "train", layers=layers, **alone)
    for batch in loader:
        moments.update(_rows(batch).flatten(1).numpy())
        count += len(batch)
        if count >= MOST_RECORDS:
            break
    computed = moments.statistics()
    assert computed is not None
    return Statistics(computed.mean, computed.std)


def _rows(batch: Batch) -> torch.Tensor:
    """Return the steps or nodes of the valid records, one after the other."""
    if isinstance(batch, SequenceBatch):
        real_BT = torch.arange(batch.sequences.shape[1]) < batch.lengths[:, None]
        return batch.sequences[real_BT & batch.valid[:, None]].unsqueeze(-1)
    valid_G = torch.repeat_interleave(batch.valid, batch.graphs_per_record)
    rows: torch.Tensor = batch.graphs.x[valid_G[batch.graphs.batch]]
    return rows.unsqueeze(-1)
