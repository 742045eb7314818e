"""Trainer: train one detector in one process or many; it can be stopped and resumed at any step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import chain
from operator import add
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from dali_pipeline import Dataset, EpochDigest, PipelineError, StepTimer, UsageError
from dali_pipeline.reading.damage import log
from dali_pipeline.runtime.threads import default_threads
from training.build import build_model, make_loader, unfit_records
from training.checkpoint import CheckpointWriter, read_checkpoint
from training.config import MODELS, Conduct, ModelName, TrainConfig, kind_of
from training.folder import checkpoint_path
from training.interrupt import Interrupted, Interrupts
from training.memory import enough_memory
from training.metrics import Predictions, main_metric
from training.objective import Objective
from training.processes import EndedElsewhere, Processes
from training.randomness import DROPOUT, NOISE, random_states, seed_of, set_random_states
from training.resolve import resolved
from training.scoring import Scored, score_batches
from training.statistics import feature_statistics
from training.step import Stepper
from training.target import find_target
from training.threads import measure_threads

HistoryRow = dict[str, float]
OnStep = Callable[[int, torch.Tensor], None]  # steps done in the epoch, the loss, still on the device
CHECK_STEPS = 50  # steps between two checks whether the loss is finite


def best_row(history: Sequence[HistoryRow]) -> HistoryRow:
    """Return the epoch with the highest validation score; among ties that with the lowest validation loss, then the first.

    The loss matters because, on a few records, an early epoch may rank all of them correctly and yet predict one class for all.
    A score of NaN, which a single class gives, ranks last.
    """
    return max(history, key=lambda row: (np.nan_to_num(score_of(row), nan=-np.inf), -row["val_loss"]))


def score_of(row: HistoryRow) -> float:
    """Return the validation score of an epoch: AUROC, or of values R squared."""
    return row["val_r2"] if "val_r2" in row else row["val_auroc"]


class Trainer:
    """Trains `model_name` on `data`, and keeps `<model>-last.pt` and `<model>-best.pt` in `folder`.

    The order of records, the initial weights and every random number depend only on the configuration. The same configuration
    therefore gives the same curve on the same machine, interrupted or not; on a GPU except for the last bits, because its
    atomic additions run in any order. `best_row` chooses the best epoch. With several processes each has a Trainer; the first
    writes the files, and all have the same weights and history.
    """

    def __init__(
        self,
        model_name: ModelName,
        data: Dataset,
        config: TrainConfig,
        folder: Path,
        conduct: Conduct,
        interrupts: Interrupts,
        processes: Processes,
    ) -> None:
        config = processes.first(lambda: resolved(data, config)[0])
        self.target = processes.first(
            lambda: find_target(data, kind_of(model_name), config.target, config.task, layers=config.layers)
        )
        self.name, self.data, self.config, self.folder, self.conduct = model_name, data, config, folder, conduct
        self.interrupts, self.processes = interrupts, processes
        self.loaders = {
            split: make_loader(
                model_name,
                data,
                config,
                split,
                conduct.device,
                num_workers=conduct.num_workers,
                world_size=processes.world_size,
            )
            for split in data.splits
        }
        self.device = self.loaders["train"].device
        self.threads = conduct.threads if isinstance(conduct.threads, int) else default_threads()
        torch.set_num_threads(self.threads)
        self.steps_per_epoch = len(self.loaders["train"])
        torch.manual_seed(seed_of(config.seed, MODELS.index(model_name)))
        self.model = build_model(model_name, data.schema, self.target, config).to(self.device)
        processes.first(lambda: feature_statistics(model_name, data, config)).give(self.model)
        self.objective = Objective(self.target, self.device)
        steps = config.epochs * self.steps_per_epoch
        self.stepper = Stepper(self.model, config, self.objective, steps, self.device, processes)
        if not processes.is_first:  # so that processes drop out different units
            torch.manual_seed(seed_of(config.seed, MODELS.index(model_name), DROPOUT, processes.rank))
        self.epoch = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)  # loss of this process in the epoch so far
        self.loss_count = 0  # valid records in it, over all processes
        self.history: list[HistoryRow] = []
        self.best_score = float("-inf")
        self.best_weights: dict[str, torch.Tensor] = {}
        self.timer = StepTimer(self.device)
        self.writer = CheckpointWriter()
        self.position = self.loaders["train"].state_dict()  # after the last step
        self._before = EpochDigest()  # records of the present epoch that an earlier run delivered
        self.delivered = ""  # sentence about the records of the last epoch
        self._saved = time.monotonic()

    @property
    def last_path(self) -> Path:
        """Path of the checkpoint to continue from."""
        return checkpoint_path(self.folder, self.name, "last")

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.config.epochs

    def train_epoch(self, on_step: OnStep) -> HistoryRow:
        """Train the rest of the current epoch, then validate.

        Args:
            on_step: Called after every step.

        Returns:
            The epoch's row of the history.

        Raises:
            Interrupted: A signal came; `last_path` is saved.
            PipelineError: The loss is not finite, the epoch did not deliver every record once, or a checkpoint cannot be
                written.
        """
        started = time.perf_counter()
        with self.interrupts.deferred():
            try:
                with enough_memory(self.name, self.config.batch_size // self.processes.world_size, self.device):
                    self._train_rest(on_step)
                    predictions = self.predict("val")
            except Interrupted:
                self.save()
                self.writer.wait()
                raise
            except PipelineError:
                self.writer.wait()  # so that earlier checkpoints are on the disk before the error is raised
                raise
            loss_sum = self.processes.sum([float(self.loss_sum)])[0]
            row: HistoryRow = {
                "epoch": self.epoch,
                "train_loss": loss_sum / max(self.loss_count, 1),
                "val_loss": predictions.loss,
            }
            row |= {f"val_{self.target.metric}": main_metric(predictions), "lr": self.stepper.learning_rate}
            row |= {"seconds": time.perf_counter() - started}
            self._end_epoch(row)
        return row

    def _train_rest(self, on_step: OnStep) -> None:
        """Take the remaining steps of the epoch."""
        loader = self.loaders["train"]
        noise_key = seed_of(self.config.seed, NOISE, self.epoch) if self.name == "gvae_lstm" else None
        loader.set_epoch(self.epoch)
        self.model.train()
        for batch in self.timer(loader):
            number = self.position["step"]
            count = loader.num_valid(number)
            share = self.stepper.step(batch, number, count, noise_key)
            self.loss_sum += share.double() * count
            self.loss_count += count
            self.position = loader.state_dict()
            on_step(number + 1, share)
            self.writer.check()
            if (number + 1) % CHECK_STEPS == 0:
                self._check_loss()
            due = self.interrupts.agreed(self._minutes_over())
            if due or (self.conduct.checkpoint_steps and (number + 1) % self.conduct.checkpoint_steps == 0):
                self.save()
        self._check_loss()
        self.delivered = loader.check_digest(self._delivered())

    def _minutes_over(self) -> bool:
        minutes = self.conduct.checkpoint_minutes
        return minutes > 0 and self.processes.is_first and time.monotonic() - self._saved > 60 * minutes

    def _delivered(self) -> EpochDigest:
        """Return the digest of the epoch so far, over all processes and earlier runs."""
        own = self._before + self.loaders["train"].digest if self.position["step"] else EpochDigest()
        return reduce(add, self.processes.gather(own))

    def _check_loss(self) -> None:
        """Raise PipelineError, which names the records, if the loss of an earlier step was not finite."""
        bad_steps = [number for number in self.processes.gather(self.stepper.bad_step) if number is not None]
        if not bad_steps:
            return
        number, loader = min(bad_steps), self.loaders["train"]
        loader.load_state_dict({**self.position, "epoch": self.epoch, "step": number})
        batch = next(iter(loader))
        unfit, ids = (list(chain(*self.processes.gather(names))) for names in (unfit_records(batch), batch.ids))
        if not self.processes.is_first:
            raise EndedElsewhere
        which = f"record {unfit[0]!r} holds values that are no finite numbers" if unfit else "its records hold finite values"
        raise PipelineError(
            f"{self.name}: the loss of epoch {self.epoch + 1}, step {number + 1} (records {', '.join(map(repr, ids[:3]))} …) "
            f"is no finite number; {which}{'' if unfit else ', so try a lower --lr'}; checkpoints are of before"
        )

    def _end_epoch(self, row: HistoryRow) -> None:
        self.history.append(row)
        self.epoch += 1
        self.loss_sum.zero_()
        self.loss_count = 0
        self.loaders["train"].set_epoch(self.epoch)
        self.position, self._before = self.loaders["train"].state_dict(), EpochDigest()
        if best_row(self.history) is row or not self.best_weights:
            self.best_score = score_of(row)
            self.best_weights = {name: weight.detach().cpu().clone() for name, weight in self.model.state_dict().items()}
            self._save_best()
        self.save()

    def predict(self, split: str) -> Predictions:
        """Return the scores of every record of a split, in every process; raise Interrupted on a signal."""
        loader, parts = self.loaders[split], []
        loader.set_epoch(0)
        for part in score_batches(self.model, loader, self.config.precision, self.objective):
            parts.append(part)
            self.interrupts.agreed()
        loader.check_digest(reduce(add, self.processes.gather(loader.digest)))
        predictions = Scored.join(self.processes.gather(Scored.join(parts))).in_file_order(self.target)
        finite_M = np.isfinite(predictions.scores).reshape(len(predictions.scores), -1).all(axis=1)
        unfit = np.unique(np.repeat(np.arange(len(predictions.ids)), predictions.counts)[~finite_M])
        if len(unfit):
            if not self.processes.is_first:
                raise EndedElsewhere
            first = predictions.ids[unfit[0]]
            raise PipelineError(
                f"{self.name}: the score of record {first!r} of {split}, and of {len(unfit) - 1} others, is no "
                "finite number; expected finite values in it, and weights that a low enough --lr keeps finite"
            )
        return predictions

    def _identity(self) -> dict[str, Any]:
        config, schema = self.config.to_dict(self.data), msgspec.to_builtins(self.data.schema)
        return {"name": self.name, "config": config, "schema": schema, "target": msgspec.to_builtins(self.target)}

    def _save_best(self) -> None:
        if self.processes.is_first:
            path = checkpoint_path(self.folder, self.name, "best")
            self.writer.write(path, {**self._identity(), "score": self.best_score, "model": self.best_weights})

    def save(self) -> None:
        """Save everything that a resume needs, in the background, whole or not at all.

        All processes must call it at the same step. Raises PipelineError, and keeps the previous checkpoint, if the loss is not
        finite.
        """
        if self.position["step"]:
            self._check_loss()
        delivered, loss_sum = self._delivered(), self.processes.sum([float(self.loss_sum)])[0]
        random = self.processes.gather(random_states())
        self._saved = time.monotonic()
        if not self.processes.is_first:
            return
        state = {**self._identity(), **self.stepper.state_dict(), "best": self.best_weights, "best_score": self.best_score}
        state |= {"loader": self.position, "delivered": delivered.to_dict(), "epoch": self.epoch, "history": self.history}
        state |= {"loss_sum": loss_sum, "loss_count": self.loss_count, "random": random, "threads": self.threads}
        self.writer.write(self.last_path, state)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint of any number of processes; the first process reads it and sends it to the others.

        Raises UsageError if the file is no checkpoint, or belongs to another run.
        """
        state = self.processes.first(lambda: read_checkpoint(path, self.name, self.config.to_dict(self.data)))
        try:
            self._take(state)
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            if not self.processes.is_first:
                raise EndedElsewhere from None
            reason = str(error).splitlines()[0]
            raise UsageError(f"{path} holds a state that cannot be gone on from ({reason}); name another") from None
        if self.best_weights:
            self._save_best()  # because the checkpoint may be in another folder

    def _take(self, state: dict[str, Any]) -> None:
        self._keep_threads(int(state.get("threads", self.threads)))
        if len(state["history"]) != state["epoch"]:
            raise ValueError(f"{len(state['history'])} rows of history in epoch {state['epoch']}")
        if state["epoch"]:
            self.model.load_state_dict(state["best"])  # raises if the weights do not fit
        self.stepper.load_state_dict(state)
        self.loaders["train"].load_state_dict(state["loader"])
        self.position = state["loader"]
        self.epoch, self.loss_count, self.history = state["epoch"], int(state["loss_count"]), state["history"]
        self.best_score, self.best_weights = float(state["best_score"]), state["best"]
        if self.processes.is_first:  # sums over processes: what was before counts once
            self._before = EpochDigest.from_dict(state["delivered"])
            self.loss_sum.fill_(state["loss_sum"])
        if self.processes.rank < len(state["random"]):
            set_random_states(state["random"][self.processes.rank])
        else:  # more processes than before
            torch.manual_seed(seed_of(self.config.seed, DROPOUT, self.processes.rank, self.epoch, self.position["step"]))

    def _keep_threads(self, before: int) -> None:
        """Use as many threads as the checkpoint, for identical bits, unless the user gave a number."""
        if isinstance(self.conduct.threads, int) and self.threads != before and self.processes.is_first:
            log.warning("%s: goes on with %d threads instead of %d; the last bits may differ", self.name, self.threads, before)
        elif not isinstance(self.conduct.threads, int):
            self.threads = before
            torch.set_num_threads(before)

    def measure_threads(self) -> None:
        """Choose the fastest number of threads on the first batch if --threads is auto; all processes must call it."""
        if self.conduct.threads != "auto" or self.device.type != "cpu":
            return
        loader = self.loaders["train"]
        state = loader.state_dict()
        batch = next(iter(loader))
        loader.load_state_dict(state)
        noise_key = 0 if self.name == "gvae_lstm" else None
        self.threads = measure_threads(self.model, batch, self.config.precision, self.objective, noise_key, self.processes)
        torch.set_num_threads(self.threads)

    def load_best(self) -> None:
        """Load the weights of the best epoch so far."""
        self.model.load_state_dict(self.best_weights)
