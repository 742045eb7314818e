"""--threads auto: find the number of threads with which steps are fastest, the same for all processes."""

from __future__ import annotations

import copy
import time
from statistics import median

import torch
from torch import nn

from dali_pipeline.runtime.threads import thread_counts
from training.build import autocast, forward
from training.objective import Objective
from training.processes import Processes
from training.randomness import random_states, set_random_states
from training.target import Batch

STEPS = 5  # measured steps per number of threads, after one to warm up
WORTH = 0.9  # more threads are chosen only if they take less than this share of the time


def measure_threads(
    model: nn.Module, batch: Batch, precision: str, objective: Objective, noise_key: int | None, processes: Processes
) -> int:
    """Return the number of torch's threads with which steps on this batch take the least time, over all processes.

    The steps run on a copy of the model, and random states are restored. Costs STEPS + 1 steps per number of threads.
    """
    states, before = random_states(), torch.get_num_threads()
    trial = copy.deepcopy(model).train()
    best, least = 1, float("inf")
    for count in thread_counts():
        torch.set_num_threads(count)
        seconds = [_step(trial, batch, precision, objective, noise_key) for _ in range(STEPS + 1)][1:]
        (total,) = processes.sum([median(seconds)])
        if total < WORTH * least:
            best, least = count, total
    torch.set_num_threads(before)
    set_random_states(states)
    return best


def _step(model: nn.Module, batch: Batch, precision: str, objective: Objective, noise_key: int | None) -> float:
    begun = time.perf_counter()
    with autocast(batch.valid.device, precision):
        output = forward(model, batch, noise_key)
    torch.autograd.backward(objective(output, batch).mean())
    model.zero_grad()
    return time.perf_counter() - begun
