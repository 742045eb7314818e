"""Normal noise as a pure function of keys: the same for a record in any batch, order or process."""

from __future__ import annotations

import torch

_STEP, _FIRST, _SECOND = (word - (1 << 64) for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mix(words: torch.Tensor) -> torch.Tensor:
    """Apply the finaliser of SplitMix64 (Steele, Lea and Flood 2014) to int64, which wraps like uint64."""
    words = words + _STEP
    words = (words ^ _shift(words, 30)) * _FIRST
    words = (words ^ _shift(words, 27)) * _SECOND
    return words ^ _shift(words, 31)


def keyed_normal(keys_N: torch.Tensor, columns: int) -> torch.Tensor:
    """Return standard normal values (N, columns) in float32 from each row's int64 key; about 12 operations per value."""
    bits_NZ = mix(keys_N[:, None] + mix(torch.arange(columns, device=keys_N.device)))
    uniform_NZ = (_shift(bits_NZ, 41) * 2 + 1 - (1 << 23)).to(torch.float32) / (1 << 23)  # in (-1, 1), exact, never an end
    return torch.erfinv(uniform_NZ) * 2**0.5


def _shift(words: torch.Tensor, by: int) -> torch.Tensor:
    """Shift to the right and fill with zeros; torch's own shift fills with the sign."""
    return (words >> by) & ((1 << (64 - by)) - 1)
