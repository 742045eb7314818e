"""Build the loaders and the network of a detector from a configuration, a schema and a target; run a batch through it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from dali_pipeline import Dataset, GraphLoader, Schema, SequenceBatch, SequenceLoader
from dali_pipeline.format.layers import parse_layers, to_positions
from dali_pipeline.loaders.loader import Loader
from dali_pipeline.loaders.options import NumWorkers, OnNan
from dali_pipeline.loaders.sequences import Engine
from dali_pipeline.loaders.sidestream import to_device
from models import GNNLSTMDetector, GVAELSTMDetector, LSTMDetector, Output
from models.gnn_lstm import records_of_graphs
from models.noise import mix
from training.config import ModelName, TrainConfig, kind_of
from training.target import Batch, Target

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
    engine: Engine = "dali",
    batch_size: int | None = None,
    alone: bool = False,
) -> Loader[Any]:
    """Return the loader of a split for a model; raise UsageError for a device or layers that are not there.

    By default the training split is shuffled, and other splits come in file order. With `alone` this process gets all records,
    whatever the number of processes. The loader delivers the steps, layers and fields
    that the model and its target need.
    """
    common: dict[str, Any] = {
        "split": split,
        "batch_size": batch_size or config.batch_size // world_size,
        "shuffle": split == "train" if shuffle is None else shuffle,
        "seed": config.seed,
        "device": device,
        "num_workers": num_workers,
        "num_partitions": config.num_partitions if split == "train" and config.num_partitions != "auto" else 1,
        "on_nan": on_nan,
        **parts_of_records(name, data.schema, config),
        **({"rank": 0, "world_size": 1} if alone else {}),
    }
    if kind_of(name) == "graphs":
        return GraphLoader(data, **common)
    return SequenceLoader(data, **common, engine=engine)


def parts_of_records(name: ModelName, schema: Schema, config: TrainConfig) -> dict[str, Any]:
    """Return what a model reads of each record, as arguments of its loader: layers, fields, and steps of sequences."""
    parts: dict[str, Any] = {
        "layers": parse_layers(config.layers_for(name)),
        "fields": () if config.target == "label" else (config.target.partition(".")[2],),
    }
    if kind_of(name) == "sequences":
        parts["steps"] = [-1] if schema.layer_axis is not None and config.over == "layer" else None
    return parts


def step_features(schema: Schema, config: TrainConfig) -> int:
    """Return the number of features of a step as the model sees it: of the chosen layers; of one if it runs over them."""
    assert schema.sequence is not None
    shape = list(schema.sequence.shape)
    if schema.layer_axis is not None:
        numbers = schema.layers or range(shape[schema.layer_axis])
        chosen = len(to_positions(parse_layers(config.layers_for("lstm")), numbers))
        shape[schema.layer_axis] = 1 if config.over == "layer" else chosen
    return int(np.prod(shape))


def build_model(name: ModelName, schema: Schema, target: Target, config: TrainConfig) -> nn.Module:
    """Return the detector for a schema and a target."""
    common: dict[str, Any] = {"outputs": target.outputs, "dropout": config.dropout}
    if name == "lstm":
        axis = schema.layer_axis if config.over == "layer" else None
        return LSTMDetector(step_features(schema, config), layer_axis=axis, per_step=target.level == "step", **common)
    assert schema.x is not None
    features = int(np.prod(schema.x.shape))
    common["edge_features"] = int(np.prod(schema.edge_attr.shape)) if schema.edge_attr is not None else 1
    readout = "last" if config.readout == "auto" else config.readout  # of a configuration that `resolved` has not seen
    common |= {"readout": readout, "per_node": target.level == "node"}
    if name == "gnn_lstm":
        return GNNLSTMDetector(features, **common)
    return GVAELSTMDetector(features, kl_weight=config.kl_weight, **common)


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
