"""Trainer: one detector from its first step to its test scores, stopped and resumed at any step."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from dali_pipeline import (
    Dataset,
    EpochDigest,
    GraphBatch,
    GraphLoader,
    PipelineError,
    SequenceBatch,
    SequenceLoader,
    StepTimer,
)
from dali_pipeline.layers import parse_layers
from dali_pipeline.loader import Loader
from models import GNNLSTMDetector, GVAELSTMDetector, LSTMDetector, Output
from training.checkpoint import read_checkpoint, write_checkpoint
from training.config import MODELS, ModelName, TrainConfig
from training.folder import checkpoint_path
from training.interrupt import Interrupted, Interrupts
from training.metrics import Predictions, area_under_roc

HistoryRow = dict[str, float]
Batch = SequenceBatch | GraphBatch
OnStep = Callable[[int, int, float], None]  # steps done of how many, loss


class Trainer:
    """Trains `model_name` on `data`, keeping `<model>-last.pt` and `<model>-best.pt` in `folder`.

    The order of records, the weights at the start and every random number depend on the configuration alone, so the same
    configuration gives the same curve on the same machine, interrupted or not. Best is the highest validation AUROC.
    """

    def __init__(
        self, model_name: ModelName, data: Dataset, config: TrainConfig, folder: Path, device: str, interrupts: Interrupts
    ) -> None:
        self.name, self.data, self.config, self.folder, self.interrupts = model_name, data, config, folder, interrupts
        self.loaders = {split: make_loader(model_name, data, config, split, device) for split in data.splits}
        self.device = self.loaders["train"].device
        self.steps_per_epoch = len(self.loaders["train"])
        torch.manual_seed(_seed(config.seed, MODELS.index(model_name)))
        self.model = build_model(model_name, data, config).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        total = config.epochs * self.steps_per_epoch
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, config.lr, total_steps=total)
        self.epoch = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64)  # of the epoch so far, over valid records
        self.loss_count = 0
        self.history: list[HistoryRow] = []
        self.best_auroc = -1.0
        self.best_weights: dict[str, torch.Tensor] = {}
        self.timer = StepTimer()
        self._position = self.loaders["train"].state_dict()
        self._before = EpochDigest()  # of what an earlier process delivered of the epoch under way
        self.delivered = ""  # of the last epoch, in words

    @property
    def last_path(self) -> Path:
        """The checkpoint to go on from."""
        return checkpoint_path(self.folder, self.name, "last")

    @property
    def best_path(self) -> Path:
        """The checkpoint with the highest validation AUROC."""
        return checkpoint_path(self.folder, self.name, "best")

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.config.epochs

    def train_epoch(self, on_step: OnStep) -> HistoryRow:
        """The rest of the current epoch, then validation; returns the epoch's row of the history.

        On a signal saves `last_path` and raises Interrupted. Raises PipelineError where the loss is no number any more, or the
        records delivered, interruptions included, were not those of the split, each once.
        """
        started = time.perf_counter()
        loader = self.loaders["train"]
        loader.set_epoch(self.epoch)
        with self.interrupts.deferred():
            try:
                self.model.train()
                for batch in self.timer(loader):
                    loss = self._step(batch)
                    self._position = loader.state_dict()
                    on_step(self._position["step"], self.steps_per_epoch, loss)
                    self.interrupts.check()
                self.delivered = loader.check_digest(self._before + loader.digest)
                found = self.predict("val")
            except Interrupted:
                self.save(self.last_path)
                raise
            train_loss = float(self.loss_sum) / max(self.loss_count, 1)
            if not np.isfinite(train_loss):
                raise PipelineError(f"{self.name}: the loss of epoch {self.epoch} is {train_loss}; try a lower --lr")
            auroc = area_under_roc(found)
            row: HistoryRow = {"epoch": self.epoch, "train_loss": train_loss, "val_loss": found.loss, "val_auroc": auroc}
            row |= {"lr": float(self.scheduler.get_last_lr()[0]), "seconds": time.perf_counter() - started}
            self.history.append(row)
            self.epoch += 1
            self.loss_sum.zero_()
            self.loss_count = 0
            loader.set_epoch(self.epoch)
            self._position, self._before = loader.state_dict(), EpochDigest()
            if auroc > self.best_auroc:
                self.best_auroc = auroc
                self.best_weights = {name: weight.detach().cpu().clone() for name, weight in self.model.state_dict().items()}
                self._save_best()
            self.save(self.last_path)
        self.interrupts.check()
        return row

    def _step(self, batch: Batch) -> float:
        output = forward(self.model, batch)
        losses_B = record_losses(output, batch.labels) + output.penalty_B
        valid_B = batch.valid.to(losses_B.dtype)
        count = int(batch.valid.sum())
        loss = (losses_B * valid_B).sum() / max(count, 1)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        value = float(loss.detach())
        self.loss_sum += value * count
        self.loss_count += count
        return value

    @torch.inference_mode()
    def predict(self, split: str) -> Predictions:
        """Scores of every record of a split, each once; on a signal raises Interrupted."""
        self.model.eval()
        ids: list[str] = []
        logits, labels, losses = [], [], []
        loader = self.loaders[split]
        loader.set_epoch(0)
        for batch in loader:
            output = forward(self.model, batch)
            valid = batch.valid
            ids += [one for one, real in zip(batch.ids, valid.tolist(), strict=True) if real]
            logits.append(output.logits_BK[valid].float().cpu())
            labels.append(batch.labels[valid].cpu())
            losses.append((record_losses(output, batch.labels) + output.penalty_B)[valid].cpu())
            self.interrupts.check()
        loader.check_digest(loader.digest)
        logits_RK = torch.cat(logits)
        scores = (logits_RK[:, 0].sigmoid() if logits_RK.shape[1] == 1 else logits_RK.softmax(dim=1)).numpy()
        return Predictions(ids=ids, scores=scores, labels=torch.cat(labels).numpy(), loss=float(torch.cat(losses).mean()))

    def _save_best(self) -> None:
        identity = {"name": self.name, "config": self.config.to_dict(self.data), "val_auroc": self.best_auroc}
        write_checkpoint(self.best_path, {**identity, "model": self.best_weights})

    def save(self, path: Path) -> None:
        """Everything that going on needs, the best weights too; whole or not at all; loads with `weights_only=True`."""
        delivered = self._before + self.loaders["train"].digest if self._position["step"] else EpochDigest()
        state = {
            "name": self.name,
            "config": self.config.to_dict(self.data),
            "best": self.best_weights,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "loader": self._position,
            "delivered": delivered.to_dict(),
            "epoch": self.epoch,
            "loss_sum": self.loss_sum,
            "loss_count": self.loss_count,
            "history": self.history,
            "best_auroc": self.best_auroc,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        write_checkpoint(path, state)

    def restore(self, path: Path) -> None:
        """Goes on where `save(path)` was. Raises UsageError for a file that is no checkpoint, or one of another run."""
        state = read_checkpoint(path, self.name, self.config.to_dict(self.data))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.loaders["train"].load_state_dict(state["loader"])
        self._position, self._before = state["loader"], EpochDigest.from_dict(state["delivered"])
        self.epoch, self.loss_count = state["epoch"], state["loss_count"]
        self.loss_sum = state["loss_sum"]
        self.history, self.best_auroc, self.best_weights = state["history"], state["best_auroc"], state["best"]
        if self.best_weights:
            self._save_best()  # the folder may be another one than the checkpoint's
        torch.set_rng_state(state["random"])
        if state["random_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random_cuda"])

    def load_best(self) -> None:
        """Takes the weights of the best epoch so far."""
        self.model.load_state_dict(self.best_weights)


def make_loader(name: ModelName, data: Dataset, config: TrainConfig, split: str, device: str) -> Loader[Any]:
    """The loader of a split for a model: shuffled for training, in file order else. Raises UsageError for a device or layers
    that are not there."""
    common: dict[str, Any] = {
        "split": split,
        "batch_size": config.batch_size,
        "shuffle": split == "train",
        "seed": config.seed,
        "layers": parse_layers(config.layers),
        "device": device,
    }
    return SequenceLoader(data, **common) if name == "lstm" else GraphLoader(data, **common)


def build_model(name: ModelName, data: Dataset, config: TrainConfig) -> nn.Module:
    """The detector for the data's schema and number of classes."""
    schema, classes = data.schema, data.num_classes
    if name == "lstm":
        assert schema.sequence is not None
        return LSTMDetector(int(np.prod(schema.sequence.shape)), classes, dropout=config.dropout)
    assert schema.x is not None
    features = int(np.prod(schema.x.shape))
    edges = int(np.prod(schema.edge_attr.shape)) if schema.edge_attr is not None else 1
    if name == "gnn_lstm":
        return GNNLSTMDetector(features, classes, edge_features=edges, dropout=config.dropout)
    return GVAELSTMDetector(features, classes, edge_features=edges, dropout=config.dropout, kl_weight=config.kl_weight)


def forward(model: nn.Module, batch: Batch) -> Output:
    """A batch of either kind through its detector."""
    if isinstance(batch, SequenceBatch):
        output: Output = model(batch.sequences, batch.lengths)
    else:
        output = model(batch.graphs, batch.graphs_per_record, batch.last_node)
    return output


def record_losses(output: Output, labels_B: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each record, (B,)."""
    logits_BK = output.logits_BK
    if logits_BK.shape[1] == 1:
        return functional.binary_cross_entropy_with_logits(logits_BK[:, 0], labels_B.to(logits_BK.dtype), reduction="none")
    return functional.cross_entropy(logits_BK, labels_B, reduction="none")


def _seed(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)
