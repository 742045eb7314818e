"""Delivery: how batches are to come, as asked for: words and numbers, the device and the type, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from dali_pipeline.layers import Layers
from dali_pipeline.schema import UsageError
from dali_pipeline.world import World

Workers = int | Literal["auto"]
OnError = Literal["raise", "skip"]
OnNan = Literal["keep", "raise", "skip"]


def check_options(
    *, batch_size: int, workers: Workers, shuffle: bool, bucket_by_length: bool, on_error: OnError, on_nan: OnNan
) -> None:
    """Raises UsageError for one that is none of what a loader takes."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UsageError(f"batch_size is {batch_size!r}; expected a whole number of at least 1")
    if workers != "auto" and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 0):
        raise UsageError(f"workers is {workers!r}; expected 'auto' or a whole number of at least 0")
    for name, choice in (("shuffle", shuffle), ("bucket_by_length", bucket_by_length)):
        if not isinstance(choice, bool):
            raise UsageError(f"{name} is {choice!r}; expected True or False")
    for name, value, known in (("on_error", on_error, get_args(OnError)), ("on_nan", on_nan, get_args(OnNan))):
        if value not in known:
            raise UsageError(f"{name} is {value!r}; expected {' or '.join(map(repr, known))}")


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
