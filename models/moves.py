"""Copy from the host to a GPU without waiting."""

from __future__ import annotations

import torch


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `values` on the device: to a GPU through pinned memory, so that neither the host nor the GPU waits."""
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
