"""The device that batches go to: found, made torch's current one, and asked whether its memory is enough."""

from __future__ import annotations

import logging
from functools import cache

import torch

from dali_pipeline.errors import UsageError
from dali_pipeline.runtime.checks import shown
from dali_pipeline.runtime.machine import unusable_gpu
from dali_pipeline.runtime.world import World

log = logging.getLogger("dali_pipeline")


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
