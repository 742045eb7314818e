"""Delivery: the device and the type that batches come in, as asked for, checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dali_pipeline.layers import Layers
from dali_pipeline.schema import UsageError
from dali_pipeline.world import World


def resolve_device(device: str | torch.device, world: World) -> torch.device:
    """`auto`: this process's own GPU where there is one, else the CPU. Raises UsageError for a GPU that is not there."""
    if device == "auto":
        return (
            torch.device("cuda", world.local_rank % torch.cuda.device_count())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise UsageError(f"device is {str(device)!r}; expected 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device is {str(device)!r}, but torch sees {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", torch.cuda.current_device()) if found.type == "cuda" and found.index is None else found


def check_delivery(layers: Layers, dtype: torch.dtype) -> None:
    """Raises UsageError for layers that choose nothing in particular, or a dtype that is no floating type of torch."""
    whole = isinstance(layers, Sequence) and all(isinstance(each, int) and not isinstance(each, bool) for each in layers)
    if layers is not None and not isinstance(layers, slice) and not whole:
        raise UsageError(f"layers are {layers!r}; expected a slice, a list of whole numbers, or None")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UsageError(f"dtype is {dtype!r}; expected a floating type such as torch.float32")
