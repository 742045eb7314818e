"""Report in one sentence that a GPU has too little memory for a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dali_pipeline import PipelineError


@contextmanager
def enough_memory(name: str, batch_size: int, device: torch.device) -> Iterator[None]:
    """Turn torch's out-of-memory error within the block into a PipelineError that says how much memory was in use.

    Args:
        name: The detector.
        batch_size: Records per step of this process.
        device: Device that it computes on.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        wanted = str(error).split(". ")[1] if ". " in str(error) else str(error)
        total, used = torch.cuda.mem_get_info(device)[1], torch.cuda.max_memory_allocated(device)
        raise PipelineError(
            f"{name}: a step on {batch_size} records takes more memory than {device} has: {used / 1e9:.2f} of "
            f"{total / 1e9:.2f} GB were in use at most, and then it {wanted[:1].lower()}{wanted[1:]}; take a smaller "
            "--batch-size, or --accumulate 2 or more to go through it in pieces"
        ) from None
