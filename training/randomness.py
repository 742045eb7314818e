"""Seeds and random states: where every random number of a run comes from."""

from __future__ import annotations

import numpy as np
import torch

NOISE, DROPOUT, BOOTSTRAP = 1000, 2000, 3000  # purposes of a seed, beside the models' numbers


def seed_of(*words: int) -> int:
    """A 63-bit seed from words: never a sum."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1


def random_states() -> list[torch.Tensor]:
    """Of this process: the CPU's, and its GPU's where it has one."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def set_random_states(states: list[torch.Tensor]) -> None:
    """What `random_states` gave."""
    torch.set_rng_state(states[0])
    if len(states) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[1])
