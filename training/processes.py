"""Processes: those that torchrun started to train together, and what they tell each other. One alone costs nothing."""

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
# Never let go of. DistributedDataParallel's part in C++ may else be a group's last owner: it ends the group's thread while it
# holds the interpreter lock, for which that thread may be waiting, to free the last collective's tensors. A hang, seen once.
GROUPS: list[Any] = []
PATIENCE = timedelta(hours=6)  # the others wait while the first converts data; a process that ends is noticed at once


class EndedElsewhere(PipelineError):
    """Another process of the run has ended or refused its input, and says why; a message only where nobody may have."""


class Processes:
    """This process among all. Every method but `rank` and the like must be called by all of them, in the same order."""

    def __init__(self, world: World) -> None:
        self.rank, self.world_size, self.local_rank = world.rank, world.world_size, world.local_rank
        self._asked: tuple[Any, torch.Tensor] | None = None  # the question of the last `agree`, on its way

    @classmethod
    @contextmanager
    def join(cls, device: str) -> Iterator[Processes]:
        """Meets the others where torchrun's variables name some: gloo on the CPU, NCCL between GPUs."""
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
        """Raises UsageError in the first process, where two share a GPU, told by its UUID; EndedElsewhere in the others."""
        import torch

        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        found = self.gather((socket.gethostname(), str(getattr(gpu, "uuid", self.rank))))

        def check() -> None:
            for rank, one in enumerate(found):
                if (first := found.index(one)) != rank:
                    raise UsageError(
                        f"processes {first} and {rank} share GPU {one[1]} of {one[0]}; expected a GPU each: start as many "
                        "processes as there are GPUs, or give --device cpu"
                    )

        self.first(check)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def first(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process, in all of them; its PipelineError there, EndedElsewhere in the others.

        The value travels pickled, between processes of one run.
        """
        if self.world_size == 1:
            return make()
        import torch.distributed as dist

        told: list[Any] = [None, None]
        error: BaseException | None = None
        if self.is_first:
            try:
                told[0] = make()
            except BaseException as caught:
                error, told[1] = caught, "failed"
        dist.broadcast_object_list(told)
        if error is not None:
            raise error
        if told[1]:
            raise EndedElsewhere
        value: T = told[0]
        return value

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank, in all of them. Travels pickled."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over all processes, in float64."""
        if self.world_size == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        totals = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(totals)
        return totals.tolist()

    def agree(self, flag: int) -> int:
        """The highest flag that any process gave at the call before; alone, this one's at once.

        All get the same answer at the same step. It travels while the step between runs, so asking costs no waiting.
        """
        if self.world_size == 1:
            return flag
        import torch
        import torch.distributed as dist

        agreed = 0
        if self._asked is not None:
            work, told = self._asked
            work.wait()
            agreed = int(told)
        told = torch.tensor(flag)
        self._asked = dist.all_reduce(told, op=dist.ReduceOp.MAX, async_op=True), told
        return agreed

    def spread(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model, its gradients averaged over all processes in the backward pass."""
        if self.world_size == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        # no device_ids: with them it would move every input to the GPU, the lengths of sequences too; buffers never change
        return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)

    def unsynchronised(self, engine: torch.nn.Module, apart: bool) -> AbstractContextManager[None]:
        """Within it, where `apart`, a backward pass leaves gradients where they are, to be averaged with a later one's."""
        if self.world_size == 1 or not apart:
            return nullcontext()
        context: AbstractContextManager[None] = engine.no_sync()  # type: ignore[operator]
        return context


def _is_lost_connection(error: RuntimeError) -> bool:
    import torch.distributed as dist

    words = ("gloo", "connection closed", "connection reset", "broken pipe", "nccl")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)
