"""Stepper: take one step of training with any precision, number of pieces and number of processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException  # raised by torch.compile; it has no public name

from dali_pipeline.loaders.loader import Loader
from dali_pipeline.reading.damage import log
from dali_pipeline.runtime.trace import span
from training.build import autocast, build_model, forward
from training.config import ModelName, TrainConfig
from training.objective import Objective
from training.pieces import cut
from training.processes import Processes
from training.randomness import random_states, set_random_states
from training.target import Batch, Target

ENDLESS = 10**9  # steps


def compile_reason(error: Exception) -> str:
    """Return in a few words why torch.compile failed: the last cause, without advice."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def trial(
    name: ModelName, loader: Loader[Any], config: TrainConfig, target: Target, processes: Processes
) -> tuple[Stepper, Callable[[Batch], torch.Tensor]]:
    """Return, for measurements, the stepper of a new model with an endless schedule, and a callable that takes a step."""
    model = build_model(name, loader.data.schema, target, config).to(loader.device)
    stepper = Stepper(model, config, Objective(target, loader.device), ENDLESS, loader.device, processes)
    noise_key = 0 if name == "gvae_lstm" else None
    return stepper, lambda batch: stepper.step(batch, 0, len(batch) * processes.world_size, noise_key)


class Stepper:
    """A model with its optimizer, schedule and scaler; the state that a checkpoint keeps.

    The loss is the sum over the valid records of all processes divided by their number, so one, two or four processes, and
    any number of pieces, give the same gradients. Nothing in a step waits for the GPU.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        objective: Objective,
        total_steps: int,
        device: torch.device,
        processes: Processes,
    ) -> None:
        self.model, self.config, self.device, self.processes = model, config, device, processes
        self.objective = objective
        # compiled with the first batch, which shows whether the model can be compiled
        self._engine = None if config.compile else processes.spread(model)
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(self._optimizer, config.lr, total_steps=total_steps)
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16" and device.type == "cuda")
        self._bad_step = torch.full((), -1, device=device)  # the first step whose loss or gradient was not finite

    def step(self, batch: Batch, number: int, count: int, noise_key: int | None) -> torch.Tensor:
        """Take one step.

        Args:
            batch: Batch of this process.
            number: Number of the step in its epoch, from 0.
            count: Number of valid records over all processes.
            noise_key: Key of the epoch's noise, or None.

        Returns:
            This process's share of the loss, (), on the device; the sum over processes is the loss.
        """
        self._optimizer.zero_grad(set_to_none=True)
        share = torch.zeros((), device=self.device)
        pieces = cut(batch, self.config.accumulate)
        if self._engine is None:  # not by its truth: a compiled module asks for a length that the model does not have
            self._engine = self._compiled(pieces[0], noise_key)
        engine = self._engine
        for piece in pieces:
            with self.processes.unsynchronised(engine, apart=piece is not pieces[-1]):
                with span("forward"), autocast(self.device, self.config.precision):
                    output = forward(engine, piece, noise_key)
                losses_B = self.objective(output, piece)
                own = (losses_B * piece.valid).sum() / max(count, 1)
                # times the number of processes, because gradients are averaged over them
                with span("backward"):
                    torch.autograd.backward(self._scaler.scale(own * self.processes.world_size))
            share = share + own.detach()
        self._scaler.unscale_(self._optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm or torch.inf)
        bad = ~torch.isfinite(share)
        if not self._scaler.is_enabled():  # the scaler skips such a step
            bad |= ~torch.isfinite(norm)
        self._bad_step = torch.where((self._bad_step < 0) & bad, number, self._bad_step)
        with span("optimizer"):
            self._scaler.step(self._optimizer)
            self._scaler.update()
        self._schedule.step()
        return share

    def _compiled(self, piece: Batch, noise_key: int | None) -> nn.Module:
        """Return the compiled model; if a process cannot compile it, log why and return the model uncompiled."""
        engine: nn.Module = torch.compile(self.model, dynamic=True)  # type: ignore[assignment]
        states, reason = random_states(), ""
        try:
            with autocast(self.device, self.config.precision):
                forward(engine, piece, noise_key)
        except TorchDynamoException as error:
            reason = compile_reason(error)
        set_random_states(states)
        reasons = [text for text in self.processes.gather(reason) if text]
        if not reasons:
            return self.processes.spread(engine)
        torch.compiler.reset()
        if self.processes.is_first:
            log.warning("--compile: the model cannot be compiled here (%s); training goes on without", reasons[0])
        return self.processes.spread(self.model)

    @property
    def bad_step(self) -> int | None:
        """The first step of the epoch whose loss or gradient was not finite, or None. Waits for the GPU."""
        number = int(self._bad_step)
        return None if number < 0 else number

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return float(self._schedule.get_last_lr()[0])

    def state_dict(self) -> dict[str, Any]:
        """Return the states of model, optimizer, schedule and scaler."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state that `state_dict` returned; ignores other keys."""
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["scheduler"])
        self._scaler.load_state_dict(state["scaler"])
