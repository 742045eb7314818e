"""Pinned memory of the pretended GPU, and the copies that are under way."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import torch

_PINNED: list[torch.Tensor] = []  # never freed, as torch keeps pinned memory
_EMPTY = torch.empty


@dataclass
class Transfers:
    """Copies under way, in order. To the host: (target, values); to the device: (address of the source, bytes of it)."""

    to_host: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    to_device: list[tuple[int, bytes]] = field(default_factory=list)

    def finish(self, to_host: int | None = None, to_device: int | None = None) -> None:
        """End the first so many of them, or all; AssertionError for a source that was written to meanwhile."""
        ending, self.to_host = self.to_host[:to_host], self.to_host[len(self.to_host[:to_host]) :]
        for target, values in ending:
            target.copy_(values)
        sources, self.to_device = self.to_device[:to_device], self.to_device[len(self.to_device[:to_device]) :]
        for address, expected in sources:
            assert ctypes.string_at(address, len(expected)) == expected, "pinned memory was used again during a copy from it"


TRANSFERS = Transfers()


def pinned_empty(*size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return pinned memory of any content."""
    made = _EMPTY(*size, dtype=dtype)
    _PINNED.append(made)
    return made


def pinned_like(values: torch.Tensor) -> torch.Tensor:
    """Return a copy of the values in pinned memory."""
    made = values.clone(memory_format=torch.contiguous_format)
    _PINNED.append(made)
    return made


def is_pinned(tensor: torch.Tensor) -> bool:
    """Return whether a tensor lies in pinned memory, whoever made the tensor; one without elements lies nowhere."""
    begin = tensor.data_ptr()
    return not tensor.numel() or any(
        own.data_ptr() <= begin < own.data_ptr() + own.untyped_storage().nbytes() for own in _PINNED
    )


def is_under_way(values: torch.Tensor, source: torch.Tensor | None = None) -> torch.Tensor:
    """Note a copy that ends with the next synchronisation. Without a source it is one to the host, whose target comes back."""
    if source is not None:
        if source.is_contiguous() and source.numel():
            TRANSFERS.to_device.append((source.data_ptr(), ctypes.string_at(source.data_ptr(), source.nbytes)))
        return values
    target = pinned_like(torch.zeros_like(values))
    TRANSFERS.to_host.append((target, values.clone()))
    return target


def forget() -> None:
    """Forget all pinned memory and what is under way."""
    _PINNED.clear()
    TRANSFERS.to_host.clear()
    TRANSFERS.to_device.clear()
