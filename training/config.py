"""TrainConfig: the settings on which the numbers of a run depend."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import msgspec
import xxhash

from dali_pipeline import Dataset, UsageError
from dali_pipeline.format.layers import parse_layers
from dali_pipeline.runtime.outside import readable
from dali_pipeline.types import Kind

ModelName = Literal["lstm", "gnn_lstm", "gvae_lstm"]
MODELS: tuple[ModelName, ...] = get_args(ModelName)
Precision = Literal["fp32", "bf16", "fp16"]
# version of the detectors; 2 standardises features, 3 those of edges too. Runs of another version are not continued
ARCHITECTURE = 3
OLD_WORDS = {"lanes": "num_partitions"}
Task = Literal["binary", "multiclass", "multilabel", "regression"]
TASKS: tuple[Task, ...] = get_args(Task)
METRICS = ("auroc", "average_precision", "f1", "precision", "recall", "accuracy", "ece", "fpr95")
VALUE_METRICS = ("mae", "rmse", "r2", "spearman")
Over = Literal["auto", "layer", "token"]
Readout = Literal["auto", "last", "mean", "sum", "max"]


def metrics_of(task: str) -> tuple[str, ...]:
    """Return the names of the metrics of a task, in the order of the table."""
    return VALUE_METRICS if task == "regression" else METRICS


def kind_of(name: str) -> Kind:
    """Return the kind of record that a model takes."""
    return "sequences" if name == "lstm" else "graphs"


@dataclass(frozen=True, kw_only=True)
class Conduct:
    """Settings that change no number of a run, except for last bits.

    Attributes:
        device: "auto", "cpu", "cuda" or "cuda:N".
        num_workers: Threads or processes that read ahead, or "auto".
        threads: Number of torch threads per process; "auto" measures the best number, None is `default_threads`. A resumed run
            keeps the number of its checkpoint, unless a number is given here.
        checkpoint_minutes: Minutes between checkpoints within an epoch; 0 for none.
        checkpoint_steps: Steps between checkpoints within an epoch; 0 for none.

    Raises:
        UsageError: A value is below 0.
    """

    device: str = "auto"
    num_workers: int | Literal["auto"] = "auto"
    threads: int | str | None = None
    checkpoint_minutes: float = 10.0
    checkpoint_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("checkpoint_minutes", "checkpoint_steps"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name.replace('_', ' ')} is {getattr(self, name)}; expected at least 0")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Hyperparameters of a run.

    Attributes:
        models: Names of the detectors to train.
        epochs: Number of passes over the training split.
        batch_size: Records per step, over all processes and pieces.
        lr: Highest learning rate of the one-cycle schedule.
        dropout: Dropout rate.
        weight_decay: Weight decay of AdamW.
        kl_weight: Weight of the KL divergence in the loss of gvae_lstm.
        seed: Seed of weights, dropout, order and folds.
        layers: Steps or graphs of each record to use, in the form that `parse_layers` reads; None for all.
        target: What to predict: "label", "record.NAME", "step.NAME" or "node.NAME".
        task: "binary", "multiclass", "multilabel" or "regression"; None for what the target's type says.
        over: What the LSTM runs over where a step has layers: the "layer" axis of the last step, or the "token" axis; "auto"
            chooses by the target.
        token_layers: Layers that the LSTM reads of each token, if others than `layers`.
        readout: How the nodes of a graph become one row: "last", "mean", "sum" or "max"; "auto" chooses by the edges.
        num_partitions: Number of disjoint sets of shards of the training split, so that each process or node reads its own.
            "auto" is the largest power of two up to 8 that divides the batch and leaves 4 shards for each; otherwise 1.
        precision: Precision of the forward pass.
        accumulate: Number of pieces into which each process's part of a batch is split.
        clip_norm: Maximum norm of all gradients together; 0 turns clipping off.
        compile: Whether to compile the model.

    Raises:
        UsageError: A value is out of range.
    """

    models: tuple[ModelName, ...] = MODELS
    epochs: int = 10
    batch_size: int = 32
    lr: float = 1e-3
    dropout: float = 0.3
    weight_decay: float = 0.01
    kl_weight: float = 1e-3
    seed: int = 0
    layers: str | None = None
    target: str = "label"
    task: str | None = None
    over: Over = "auto"
    token_layers: str | None = None
    readout: Readout = "auto"
    num_partitions: int | Literal["auto"] = "auto"
    precision: Precision = "fp32"
    accumulate: int = 1
    clip_norm: float = 1.0
    compile: bool = False

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("seed", 0), ("accumulate", 1), ("num_partitions", 1)):
            if getattr(self, name) != "auto" and getattr(self, name) < least:
                raise UsageError(f"{name.replace('_', ' ')} is {getattr(self, name)}; expected at least {least}")
        if not 0 < self.lr < math.inf:
            raise UsageError(f"lr is {self.lr}; expected more than 0")
        for name in ("weight_decay", "kl_weight", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name.replace('_', ' ')} is {getattr(self, name)}; expected 0 or more")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout is {self.dropout}; expected 0 or more and less than 1")
        parse_layers(self.layers)

    @property
    def level(self) -> str:
        """What has one target each: "record", "step" or "node"."""
        return "record" if self.target == "label" else self.target.partition(".")[0]

    def layers_for(self, name: str) -> str | None:
        """Return the layers that a model reads."""
        return self.token_layers if name == "lstm" and self.token_layers is not None else self.layers

    def check_shares(self, world_size: int) -> None:
        """Raise UsageError unless the batch size is a multiple of the number of processes times `accumulate`."""
        if self.batch_size % (world_size * self.accumulate):
            shared = f"{world_size} processes" + (f" times --accumulate {self.accumulate}" if self.accumulate > 1 else "")
            raise UsageError(f"batch size {self.batch_size} does not divide by {shared}; expected a multiple")

    def to_dict(self, data: Dataset) -> dict[str, Any]:
        """Return the settings and the data set's digest in plain JSON types."""
        settings = {**asdict(self), "models": list(self.models), "data_digest": data.digest, "architecture": ARCHITECTURE}
        if self.num_partitions in (1, "auto"):  # like before the setting existed, so that older runs continue
            del settings["num_partitions"]
        return settings

    @staticmethod
    def in_new_words(stored: dict[str, Any]) -> dict[str, Any]:
        """Return a stored configuration with the present names of its settings."""
        return {OLD_WORDS.get(name, name): value for name, value in stored.items()}

    def folder_name(self, data: Dataset) -> str:
        """Return the name of the run's folder: the data, the models, and a hash of all settings."""
        models = "all" if self.models == MODELS else "+".join(self.models)
        old = {new: word for word, new in OLD_WORDS.items()}  # so that a folder keeps its name
        settings = {old.get(name, name): value for name, value in self.to_dict(data).items()}
        key = xxhash.xxh3_64_hexdigest(msgspec.json.encode(settings, order="sorted"))[:8]
        return f"{readable(data.root.resolve().name)}-{models}-{key}"
