"""Delivery: how batches are to come, as asked for: words and numbers, the device and the type, checked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch

from dali_pipeline.errors import UsageError
from dali_pipeline.format.layers import Layers
from dali_pipeline.runtime.checks import MOST, one_of, shown, truth, whole
from dali_pipeline.runtime.machine import unusable_gpu
from dali_pipeline.runtime.world import World

log = logging.getLogger("dali_pipeline")
Workers = int | Literal["auto"]
OnError = Literal["raise", "skip"]
OnNan = Literal["keep", "raise", "skip"]


class Options(NamedTuple):
    """What a loader was given, as plain Python has it."""

    batch_size: int
    workers: Workers
    shuffle: bool
    bucket_by_length: bool


def check_options(
    *, batch_size: int, workers: Workers, shuffle: bool, bucket_by_length: bool, on_error: OnError, on_nan: OnNan
) -> Options:
    """Raises UsageError for one that is none of what a loader takes."""
    one_of("on_error", on_error, get_args(OnError))
    one_of("on_nan", on_nan, get_args(OnNan))
    auto = isinstance(workers, str) and workers == "auto"
    return Options(
        batch_size=whole("batch_size", batch_size, 1),
        workers="auto" if auto else whole("workers", workers, expected="'auto' or a whole number of at least 0"),
        shuffle=truth("shuffle", shuffle),
        bucket_by_length=truth("bucket_by_length", bucket_by_length),
    )


def resolve_device(device: str | torch.device, world: World) -> torch.device:
    """`auto`: this process's own GPU where there is one, else the CPU. Raises UsageError for a GPU that is not there.

    With `auto`, a GPU that torch cannot use is told in the log named dali_pipeline, once.
    """
    if isinstance(device, str) and device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", world.local_rank % torch.cuda.device_count())
        if why := unusable_gpu():
            _warn_of_cpu(why)
        return torch.device("cpu")
    try:
        found = torch.device(device if isinstance(device, str | torch.device) else "meta")
    except (RuntimeError, TypeError, ValueError):
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise UsageError(f"device is {shown(str(device))}; expected 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if found.type == "cuda" and (why := unusable_gpu()):
        raise UsageError(f"device is {str(device)!r}, but {why}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device is {str(device)!r}, but torch sees {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", torch.cuda.current_device()) if found.type == "cuda" and found.index is None else found


@cache
def _warn_of_cpu(why: str) -> None:
    log.warning("device='auto' is the CPU, although %s", why)


def make_current(device: str) -> None:
    """Make a GPU that is named by its number the one that torch takes where none is named: for random numbers, pinned memory
    and streams. Otherwise they would come from GPU 0, and open a context there. Raises UsageError for one that is not there."""
    found = resolve_device(device, World())
    if found.type == "cuda":
        torch.cuda.set_device(found)


def check_memory(device: torch.device, batch_bytes: int, batch: str) -> None:
    """Raise UsageError where a GPU has no memory for two delivered batches, the one in use and the next; and says how much it
    takes."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    room = free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch hands out what it keeps
    if 2 * batch_bytes > room:
        raise UsageError(
            f"{batch} takes {batch_bytes / 1e9:.2f} GB on {device}, twice that with the next one, and {room / 1e9:.2f} of "
            f"{total / 1e9:.2f} GB are free; expected a smaller batch_size, fewer layers, or a narrower dtype"
        )


def check_delivery(layers: Layers, dtype: torch.dtype) -> Layers:
    """The layers in plain whole numbers; raises UsageError for some that choose nothing in particular, or a dtype that is no
    floating type of torch."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UsageError(f"dtype is {shown(dtype)}; expected a floating type such as torch.float32")
    if layers is None:
        return None
    expected = "a slice, a list of whole numbers, or None"
    try:
        if isinstance(layers, slice):
            begin, end, step = (
                None if each is None else whole("layers", each, -MOST) for each in (layers.start, layers.stop, layers.step)
            )
            if step != 0:
                return slice(begin, end, step)
        elif isinstance(layers, Sequence | np.ndarray) and not isinstance(layers, str | bytes) and np.ndim(layers) == 1:
            return [whole("layers", each, -MOST) for each in layers]
    except (UsageError, ValueError):  # nested lists of different lengths
        pass
    raise UsageError(f"layers are {shown(layers)}; expected {expected}")
