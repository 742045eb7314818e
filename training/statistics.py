"""Compute the mean and standard deviation of every feature that a detector sees, over its training split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from dali_pipeline import Dataset, GraphBatch, SequenceBatch
from dali_pipeline.dataset.dataset import View
from dali_pipeline.writing.moments import Moments
from models import set_statistics
from models.lstm import over_layers
from training.build import make_loader
from training.config import ModelName, TrainConfig, kind_of
from training.target import Batch

MOST_RECORDS = 4096  # records of the training split: the first of its shuffled order
BATCH_SIZE = 64


class Statistics(NamedTuple):
    """Mean and standard deviation, (F,) float64, of each feature of a step, or node; and likewise of an edge, (D,), or None."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    edges: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def give(self, model: nn.Module) -> None:
        """Give them to a model, as float32."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        set_statistics(
            model, mean, std, None if self.edges is None else (torch.tensor(self.edges[0]), torch.tensor(self.edges[1]))
        )


def feature_statistics(name: ModelName, data: Dataset, config: TrainConfig) -> Statistics:
    """Return the feature statistics of the training split as the model sees it, the same on every machine.

    They come from the manifest if it has them and the model sees all steps as they are stored. Otherwise they are computed from
    at most MOST_RECORDS records, which are read once. NaN and infinite values are left out. A feature without any value has
    mean and spread 0.
    """
    stored, schema = data.manifest.statistics, data.schema
    plain = (
        config.layers_for(name) is None and not isinstance(data, View) and (schema.layer_axis is None or config.over == "token")
    )
    if kind_of(name) == "sequences" and stored is not None and plain:
        return Statistics(stored.mean, stored.std)
    rows, edges = Moments(), Moments()
    for batch in first_batches(name, data, config):
        if isinstance(batch, SequenceBatch):
            steps, lengths = over_layers(batch.sequences, batch.lengths, schema.layer_axis if config.over == "layer" else None)
            real_BT = torch.arange(steps.shape[1]) < lengths[:, None]
            rows.update(steps[real_BT & batch.valid[:, None]].unsqueeze(-1).flatten(1).numpy())
            continue
        valid_G = torch.repeat_interleave(batch.valid, batch.graphs_per_record)
        valid_N = valid_G[batch.graphs.batch]
        rows.update(batch.graphs.x[valid_N].unsqueeze(-1).flatten(1).numpy())
        if "edge_attr" in batch.graphs:
            edges.update(batch.graphs.edge_attr[valid_N[batch.graphs.edge_index[0]]].unsqueeze(-1).flatten(1).numpy())
    computed, of_edges = rows.statistics(), edges.statistics()
    assert computed is not None
    return Statistics(computed.mean, computed.std, None if of_edges is None else (of_edges.mean, of_edges.std))


def first_batches(name: ModelName, data: Dataset, config: TrainConfig) -> Iterator[Batch]:
    """Yield the first MOST_RECORDS training records in shuffled order on the CPU, the same whatever the number of processes."""
    count = 0
    whole = replace(config, target="label", num_partitions=1)
    for batch in make_loader(name, data, whole, "train", "cpu", engine="torch", batch_size=BATCH_SIZE, alone=True):
        yield batch
        count += len(batch)
        if count >= MOST_RECORDS:
            return


def run_forward(data: Dataset, config: TrainConfig) -> bool:
    """Return whether every edge of the first MOST_RECORDS training records runs to a later node of its graph, or to itself."""
    return all(
        bool((batch.graphs.edge_index[0] <= batch.graphs.edge_index[1]).all())
        for batch in first_batches("gnn_lstm", data, config)
        if isinstance(batch, GraphBatch)
    )
