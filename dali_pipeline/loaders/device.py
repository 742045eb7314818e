"""Find the device that batches go to, make it torch's current one, and check that its memory is enough."""

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
    """Return the torch device that `device` names.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N". "auto" is the GPU of this process if there is one, otherwise the CPU. If
            torch cannot use the GPU, "auto" says so once in the log named dali_pipeline.
        world: Ranks; the local rank chooses the GPU.

    Raises:
        UsageError: The device is unknown, or torch cannot use it.
    """
    if isinstance(device, str) and device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", world.local_rank % torch.cuda.device_count())
        if why := unusable_gpu():
            _warn_of_cpu(why)
        return torch.device("cpu")
    try:
        resolved = torch.device(device if isinstance(device, str | torch.device) else "meta")
    except (RuntimeError, TypeError, ValueError):
        resolved = torch.device("meta")
    if resolved.type not in ("cpu", "cuda"):
        raise UsageError(f"device is {shown(str(device))}; expected 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if resolved.type == "cuda" and (why := unusable_gpu()):
        raise UsageError(f"device is {str(device)!r}, but {why}")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device is {str(device)!r}, but torch sees {torch.cuda.device_count()} GPUs")
    if resolved.type == "cuda" and resolved.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return resolved


@cache
def _warn_of_cpu(why: str) -> None:
    log.warning("device='auto' is the CPU, although %s", why)


def make_current(device: str) -> None:
    """Make a GPU torch's current one, for random numbers, pinned memory and streams.

    Otherwise torch would take them from GPU 0 and open a context there. Raises UsageError for a GPU that is not there.
    """
    resolved = resolve_device(device, World())
    if resolved.type == "cuda":
        torch.cuda.set_device(resolved)


def check_memory(device: torch.device, batch_bytes: int, batch: str) -> None:
    """Raise UsageError if a GPU has too little memory for two delivered batches: the one in use and the next."""
    if device.type == "cuda" and 2 * batch_bytes > available_memory(device):
        raise UsageError(
            f"{batch} takes {batch_bytes / 1e9:.2f} GB on {device}, twice that with the next one, and {_free(device)}; "
            "expected a smaller batch_size, fewer layers, or a narrower dtype"
        )


def check_window(device: torch.device, window_bytes: int) -> None:
    """Raise UsageError if a GPU has too little memory for a resident window."""
    if device.type == "cuda" and window_bytes > available_memory(device):
        raise UsageError(
            f"the resident window takes {window_bytes / 1e9:.2f} GB on {device}, and {_free(device)}; expected a smaller "
            "window_bytes, fewer layers, or a narrower dtype"
        )


def available_memory(device: torch.device) -> int:
    """Return the bytes of a GPU that torch can still hand out: free ones, and those that it keeps for itself."""
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + reserved)


def _free(device: torch.device) -> str:
    total = torch.cuda.mem_get_info(device)[1]
    return f"{available_memory(device) / 1e9:.2f} of {total / 1e9:.2f} GB are free"
