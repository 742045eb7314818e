"""TrainConfig: everything that a run's numbers depend on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import msgspec
import xxhash

from dali_pipeline import Dataset, UsageError
from dali_pipeline.layers import parse_layers

ModelName = Literal["lstm", "gnn_lstm", "gvae_lstm"]
MODELS: tuple[ModelName, ...] = get_args(ModelName)
METRICS = ("auroc", "f1", "precision", "recall", "accuracy")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Hyperparameters of a run. batch_size: global · layers: steps or graphs of each record, as `parse_layers` reads them."""

    models: tuple[ModelName, ...] = MODELS
    epochs: int = 10
    batch_size: int = 32
    lr: float = 1e-3
    dropout: float = 0.3
    weight_decay: float = 0.01
    kl_weight: float = 1e-3
    seed: int = 0
    layers: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name.replace('_', ' ')} is {getattr(self, name)}; expected at least {least}")
        if not self.lr > 0:
            raise UsageError(f"lr is {self.lr}; expected more than 0")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout is {self.dropout}; expected 0 or more and less than 1")
        parse_layers(self.layers)

    def to_dict(self, data: Dataset) -> dict[str, Any]:
        """Plain JSON types, the data set's digest among them."""
        return {**asdict(self), "models": list(self.models), "data_digest": data.digest}

    def folder_name(self, data: Dataset) -> str:
        """A name for the run's folder: the data, the models, and a hash of everything."""
        what = "all" if self.models == MODELS else "+".join(self.models)
        key = xxhash.xxh3_64_hexdigest(msgspec.json.encode(self.to_dict(data), order="sorted"))[:8]
        return f"{data.root.resolve().name}-{what}-{key}"
