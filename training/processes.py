"""Processes: communicate between the processes that torchrun started; costs nothing with one process."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from dali_pipeline import PipelineError, UsageError, World

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
# Never released. Otherwise the C++ part of DistributedDataParallel may be the last owner of a group. It would then end the
# group's thread while it holds the interpreter lock, which that thread may need to free the last tensors. This hung once.
GROUPS: list[Any] = []
PATIENCE = timedelta(hours=6)  # the others wait while the first converts data; a process that ends is noticed at once


class EndedElsewhere(PipelineError):
    """Another process of the run has ended or refused its input, and reports why; has a message only if it may not have."""


class Processes:
    """This process among all. All processes must call every method in the same order."""

    def __init__(self, world: World) -> None:
        self.rank, self.world_size, self.local_rank = world.rank, world.world_size, world.local_rank
        self._asked: tuple[Any, torch.Tensor] | None = None  # the pending reduction of the last `agree`

    @classmethod
    @contextmanager
    def join(cls, device: str) -> Iterator[Processes]:
        """Connect to the other processes if torchrun's variables name any: gloo on the CPU, NCCL between GPUs."""
        processes = cls(World.detect())
        if processes.world_size == 1:
            if ":" in device:
                from dali_pipeline.loaders.device import make_current  # and with it torch, which takes seconds

                make_current(device)
            yield processes
            return
        if "MASTER_ADDR" not in os.environ:
            raise UsageError(f"WORLD_SIZE is {processes.world_size}, but MASTER_ADDR is not set; start with torchrun")
        import torch
        import torch.distributed as dist

        on_gpu = device != "cpu" and torch.cuda.is_available()
        if on_gpu:
            processes._take_gpu(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
        GROUPS.append(dist.group.WORLD)
        try:
            if on_gpu:
                processes._check_gpus()
            yield processes
        except RuntimeError as error:
            if not _is_lost_connection(error):
                raise
            raise EndedElsewhere(f"train.py: process {processes.rank} ends, as another one of the run has ended\n") from None
        finally:
            dist.destroy_process_group()

    def _take_gpu(self, device: str) -> None:
        import torch

        if ":" in device:
            raise UsageError(f"device is {device!r}; with several processes expected cuda, and each takes a GPU of its own")
        # some launchers show every process all GPUs of its node, others its own alone
        torch.cuda.set_device(self.local_rank % torch.cuda.device_count())

    def _check_gpus(self) -> None:
        """Raise UsageError in the first process, and EndedElsewhere in the others, if two share a GPU."""
        import torch

        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        gpus = self.gather((socket.gethostname(), str(getattr(gpu, "uuid", self.rank))))

        def check() -> None:
            for rank, card in enumerate(gpus):
                if (first := gpus.index(card)) != rank:
                    raise UsageError(
                        f"processes {first} and {rank} share GPU {card[1]} of {card[0]}; expected a GPU each: start as many "
                        "processes as there are GPUs, or give --device cpu"
                    )

        self.first(check)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def first(self, make: Callable[[], T]) -> T:
        """Call `make` in the first process, and return its value in all processes.

        If it raises, the first process raises the same and the others EndedElsewhere. The value is pickled.
        """
        if self.world_size == 1:
            return make()
        import torch.distributed as dist

        message: list[Any] = [None, None]
        error: BaseException | None = None
        if self.is_first:
            try:
                message[0] = make()
            except BaseException as caught:
                error, message[1] = caught, "failed"
        dist.broadcast_object_list(message)
        if error is not None:
            raise error
        if message[1]:
            raise EndedElsewhere
        value: T = message[0]
        return value

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank; they are pickled."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all processes, in float64."""
        if self.world_size == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        totals = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(totals)
        return totals.tolist()

    def agree(self, flag: int) -> int:
        """Return the highest flag that any process gave at the previous call; with one process, the present flag.

        All processes get the same answer at the same step. It is sent during the step, so nothing waits for it.
        """
        if self.world_size == 1:
            return flag
        import torch
        import torch.distributed as dist

        agreed = 0
        if self._asked is not None:
            work, highest = self._asked
            work.wait()
            agreed = int(highest)
        highest = torch.tensor(flag)
        self._asked = dist.all_reduce(highest, op=dist.ReduceOp.MAX, async_op=True), highest
        return agreed

    def spread(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return the model such that the backward pass averages gradients over all processes."""
        if self.world_size == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        # no device_ids: with them it would move every input to the GPU, the lengths of sequences too; buffers never change
        return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)

    def unsynchronised(self, engine: torch.nn.Module, apart: bool) -> AbstractContextManager[None]:
        """Return a context in which, if `apart`, a backward pass does not average gradients; a later one averages both."""
        if self.world_size == 1 or not apart:
            return nullcontext()
        context: AbstractContextManager[None] = engine.no_sync()  # type: ignore[operator]
        return context


def _is_lost_connection(error: RuntimeError) -> bool:
    import torch.distributed as dist

    words = ("gloo", "connection closed", "connection reset", "broken pipe", "nccl")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)
