"""TrainConfig: everything that a run's numbers depend on."""

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
ARCHITECTURE = 2  # of the detectors: 2 standardises features; runs of another one are not gone on with
OLD_WORDS = {"lanes": "num_partitions"}
METRICS = ("auroc", "average_precision", "f1", "precision", "recall", "accuracy", "ece")


def kind_of(name: str) -> Kind:
    """The kind of record that a model takes."""
    return "sequences" if name == "lstm" else "graphs"


@dataclass(frozen=True, kw_only=True)
class Conduct:
    """How a run is carried out: what changes no number, but for the last bits of some.

    threads: torch's per process, "auto" for those that measure best, None for `default_threads`; those of a checkpoint that a
    run goes on from stay, unless a number is given · checkpoint_steps: 0 for none between the minutes and epochs' ends.
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

    batch_size: records a step, over all processes and pieces · layers: steps or graphs of each record, as `parse_layers` reads
    them · num_partitions: disjoint sets of the training split's shards, so that each node reads its own · accumulate: pieces
    that each process's part of a batch goes through the model in · clip_norm: greatest norm of all gradients together, 0 for
    any.
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
    num_partitions: int = 1
    precision: Precision = "fp32"
    accumulate: int = 1
    clip_norm: float = 1.0
    compile: bool = False

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("seed", 0), ("accumulate", 1), ("num_partitions", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name.replace('_', ' ')} is {getattr(self, name)}; expected at least {least}")
        if not 0 < self.lr < math.inf:
            raise UsageError(f"lr is {self.lr}; expected more than 0")
        for name in ("weight_decay", "kl_weight", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name.replace('_', ' ')} is {getattr(self, name)}; expected 0 or more")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout is {self.dropout}; expected 0 or more and less than 1")
        parse_layers(self.layers)

    def check_shares(self, world_size: int) -> None:
        """Raises UsageError unless a batch divides by the processes, and each one's part by the pieces."""
        if self.batch_size % (world_size * self.accumulate):
            shared = f"{world_size} processes" + (f" times --accumulate {self.accumulate}" if self.accumulate > 1 else "")
            raise UsageError(f"batch size {self.batch_size} does not divide by {shared}; expected a multiple")

    def to_dict(self, data: Dataset) -> dict[str, Any]:
        """Plain JSON types, the data set's digest among them."""
        told = {**asdict(self), "models": list(self.models), "data_digest": data.digest, "architecture": ARCHITECTURE}
        if self.num_partitions == 1:  # as before there were any, so that older runs go on
            del told["num_partitions"]
        return told

    @staticmethod
    def in_new_words(stored: dict[str, Any]) -> dict[str, Any]:
        """Return a stored configuration with the words of today."""
        return {OLD_WORDS.get(name, name): value for name, value in stored.items()}

    def folder_name(self, data: Dataset) -> str:
        """A name for the run's folder: the data, the models, and a hash of everything."""
        what = "all" if self.models == MODELS else "+".join(self.models)
        old = {new: word for word, new in OLD_WORDS.items()}  # so that a folder keeps its name
        told = {old.get(name, name): value for name, value in self.to_dict(data).items()}
        key = xxhash.xxh3_64_hexdigest(msgspec.json.encode(told, order="sorted"))[:8]
        return f"{readable(data.root.resolve().name)}-{what}-{key}"
