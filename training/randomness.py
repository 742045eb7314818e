"""Seeds and random states of a run."""

from __future__ import annotations

import numpy as np
import torch

NOISE, DROPOUT, BOOTSTRAP = 1000, 2000, 3000  # words that separate seeds by purpose, besides the models' numbers


def seed_of(*words: int) -> int:
    """Return a 63-bit seed from a sequence of words; it is never their sum."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1


def random_states() -> list[torch.Tensor]:
    """Return the random states of this process: that of the CPU, and that of its GPU if it has one."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def set_random_states(states: list[torch.Tensor]) -> None:
    """Set the random states that `random_states` returned."""
    torch.set_rng_state(states[0])
    if len(states) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[1])
