"""World: rank and world size of this process, detected in one place."""

from __future__ import annotations

import os
from dataclasses import dataclass

from dali_pipeline.errors import UsageError
from dali_pipeline.runtime.checks import MOST, whole

FORKED = (
    "this loader was in use before the process forked, and threads do not survive a fork; "
    "go on in the process that began, or make a loader in the new one"
)


class WorkersRefused(UsageError):
    """Error for a loader that is iterated inside a torch worker.

    Its message is always the same one sentence: torch creates the error of a worker again in the main process, with the whole
    traceback of the worker as its message.
    """

    def __init__(self, *_: object) -> None:
        super().__init__("this loader has workers of its own; wrap it with DataLoader(loader, batch_size=None, num_workers=0)")


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all that train together.

    Attributes:
        rank: Number of this process over all nodes, 0 to world_size - 1. Default: 0.
        world_size: Number of processes. Default: 1.
        local_rank: Number of this process within its node; chooses the GPU of `device="auto"`. Default: 0.
        local_world_size: Number of these processes on this node, as far as is known. Default: 1.

    Raises:
        UsageError: The rank or the world size is not a whole number in its range.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    def __post_init__(self) -> None:
        for name in ("rank", "world_size"):
            object.__setattr__(self, name, whole(name, getattr(self, name), -MOST, expected="a whole number"))
        if self.world_size < 1:
            raise UsageError(f"world_size is {self.world_size}; expected at least 1")
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"rank is {self.rank}; expected 0 to {self.world_size - 1} for a world size of {self.world_size}")

    @classmethod
    def detect(cls, rank: int | None = None, world_size: int | None = None) -> World:
        """Find rank and world size.

        They come from the arguments, otherwise from an initialised process group of torch, otherwise from torchrun's
        environment variables, otherwise they are those of one process.

        Args:
            rank: Number of this process; given together with `world_size`. Default: None.
            world_size: Number of processes. Default: None.

        Returns:
            The `World`.

        Raises:
            UsageError: Only one of the two is given, or a variable is not a number.

        Costs torch's import unless both are given.
        """
        if (rank is None) != (world_size is None):
            raise UsageError("give both rank and world_size, or neither")
        if rank is None or world_size is None:
            import torch.distributed as dist

            if dist.is_available() and dist.is_initialized():
                rank, world_size = dist.get_rank(), dist.get_world_size()
            else:
                rank, world_size = _variable("RANK", 0), _variable("WORLD_SIZE", 1)
        world_size = whole("world_size", world_size, -MOST, expected="a whole number")
        local = max(1, _variable("LOCAL_WORLD_SIZE", world_size))
        return cls(rank=rank, world_size=world_size, local_rank=_variable("LOCAL_RANK", 0), local_world_size=local)


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"environment variable {name} is {text!r}; expected a whole number") from None
