"""Build the loaders, the network and the loss of a detector from a configuration, a schema and a number of classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from dali_pipeline import Dataset, GraphBatch, GraphLoader, Schema, SequenceBatch, SequenceLoader
from dali_pipeline.format.layers import parse_layers, to_positions
from dali_pipeline.loaders.loader import Loader
from dali_pipeline.loaders.options import NumWorkers, OnNan
from dali_pipeline.loaders.sidestream import to_device
from models import GNNLSTMDetector, GVAELSTMDetector, LSTMDetector, Output
from models.gnn_lstm import records_of_graphs
from models.noise import mix
from training.config import ModelName, TrainConfig

Batch = SequenceBatch | GraphBatch
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_loader(
    name: ModelName,
    data: Dataset,
    config: TrainConfig,
    split: str,
    device: str | torch.device,
    *,
    num_workers: NumWorkers = "auto",
    world_size: int = 1,
    shuffle: bool | None = None,
    on_nan: OnNan = "keep",
) -> Loader[Any]:
    """Return the loader of a split for a model; raise UsageError for a device or layers that are not there.

    By default the training split is shuffled, and other splits come in file order.
    """
    common: dict[str, Any] = {
        "split": split,
        "batch_size": config.batch_size // world_size,
        "shuffle": split == "train" if shuffle is None else shuffle,
        "seed": config.seed,
        "layers": parse_layers(config.layers),
        "device": device,
        "num_workers": num_workers,
        "num_partitions": config.num_partitions if split == "train" else 1,
        "on_nan": on_nan,
    }
    return SequenceLoader(data, **common) if name == "lstm" else GraphLoader(data, **common)


def step_features(schema: Schema, config: TrainConfig) -> int:
    """Return the number of features of a step as the model sees it, with the chosen layers if an axis of it is named layer."""
    assert schema.sequence is not None
    shape = list(schema.sequence.shape)
    if schema.layer_axis is not None:
        numbers = schema.layers or range(shape[schema.layer_axis])
        shape[schema.layer_axis] = len(to_positions(parse_layers(config.layers), numbers))
    return int(np.prod(shape))


def build_model(name: ModelName, schema: Schema, classes: int, config: TrainConfig) -> nn.Module:
    """Return the detector for a schema and a number of classes."""
    if name == "lstm":
        return LSTMDetector(step_features(schema, config), classes, dropout=config.dropout)
    assert schema.x is not None
    features = int(np.prod(schema.x.shape))
    edges = int(np.prod(schema.edge_attr.shape)) if schema.edge_attr is not None else 1
    if name == "gnn_lstm":
        return GNNLSTMDetector(features, classes, edge_features=edges, dropout=config.dropout)
    return GVAELSTMDetector(features, classes, edge_features=edges, dropout=config.dropout, kl_weight=config.kl_weight)


def forward(model: nn.Module, batch: Batch, noise_key: int | None = None) -> Output:
    """Run a batch of either kind through its detector. noise_key: key of this epoch's noise, for gvae_lstm."""
    if isinstance(batch, SequenceBatch):
        output: Output = model(batch.sequences, batch.lengths)
    elif noise_key is None:
        output = model(batch.graphs, batch.graphs_per_record, batch.last_node)
    else:
        keys_B = to_device(mix(mix(batch.positions) + noise_key), batch.valid.device)
        output = model(batch.graphs, batch.graphs_per_record, batch.last_node, keys_B)
    return output


def record_losses(output: Output, labels_B: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy plus the penalty of each record, (B,) float32."""
    logits_BK, penalty_B = output.logits_BK.float(), output.penalty_B.float()
    if logits_BK.shape[1] == 1:
        losses_B = functional.binary_cross_entropy_with_logits(logits_BK[:, 0], labels_B.float(), reduction="none")
    else:
        losses_B = functional.cross_entropy(logits_BK, labels_B, reduction="none")
    return losses_B + penalty_B


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return a context of mixed precision for a forward pass; with fp32 nothing changes."""
    return torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=precision != "fp32")


def unfit_records(batch: Batch) -> list[str]:
    """Return the ids of the records in a batch that have values which are not finite."""
    if isinstance(batch, SequenceBatch):
        bad = {int(row) for row in torch.nonzero(~torch.isfinite(batch.sequences.flatten(1)).all(dim=1)).flatten()}
        return [batch.ids[row] for row in sorted(bad)]
    graphs, record_G = batch.graphs, records_of_graphs(batch.graphs_per_record)
    bad = set(record_G[graphs.batch[~torch.isfinite(graphs.x.unsqueeze(-1).flatten(1)).all(dim=1)].cpu()].tolist())
    if "edge_attr" in graphs:
        graph_E = graphs.batch[graphs.edge_index[0]]
        bad |= set(record_G[graph_E[~torch.isfinite(graphs.edge_attr.unsqueeze(-1).flatten(1)).all(dim=1)].cpu()].tolist())
    return [batch.ids[row] for row in sorted(bad)]
