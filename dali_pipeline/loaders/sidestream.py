"""Copy from the host to a GPU without waiting: through pinned memory, one batch ahead, on a separate stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from functools import cache
from itertools import accumulate
from typing import TypeVar

import torch

T = TypeVar("T")
ALIGNED = 16  # bytes: where a tensor of any type may begin


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `values` on the device; to a GPU through pinned memory, so that neither the host nor the GPU waits.

    Costs one copy on the host. torch keeps the pinned memory until the device has read it, then reuses it.
    """
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def to_device_together(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Return tensors on the device; to a GPU in one copy, as views of one tensor there."""
    if device.type != "cuda" or not tensors:
        return list(tensors)
    ends = list(accumulate(-(-tensor.nbytes // ALIGNED) * ALIGNED for tensor in tensors))
    packed = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
    begins = [0, *ends[:-1]]

    def part(memory: torch.Tensor, tensor: torch.Tensor, begin: int) -> torch.Tensor:
        return memory[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    for tensor, begin in zip(tensors, begins, strict=True):
        part(packed, tensor, begin).copy_(tensor)
    moved = packed.to(device, non_blocking=True)
    return [part(moved, tensor, begin) for tensor, begin in zip(tensors, begins, strict=True)]


class UnderWay:
    """Keeps pinned memory alive until a GPU has read it; leaving the `with` block waits for the remaining copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: deque[tuple[torch.cuda.Event, object]] = deque()

    def keep(self, memory: object) -> None:
        """Keep `memory` until the current stream has passed this point; release memory that the stream has read already."""
        if self._device.type == "cuda":
            self._kept.append((torch.cuda.current_stream(self._device).record_event(), memory))
            while self._kept and self._kept[0][0].query():  # type: ignore[no-untyped-call]
                self._kept.popleft()

    def __enter__(self) -> UnderWay:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the block was left early, and another stream than this may still copy
        while self._kept:
            self._kept[0][0].synchronize()
            self._kept.popleft()


def a_batch_ahead(
    batches: Generator[T, None, None], tensors: Callable[[T], Iterable[torch.Tensor]], device: torch.device
) -> Generator[T, None, None]:
    """Yield the same batches, and start the copies of each batch before the previous batch is yielded.

    The GPU work of `batches` runs on a side stream. The caller's stream waits for it, not the caller. The memory of a batch's
    tensors is reused only after the caller's stream has passed. An error is raised after the batches that precede it.

    Args:
        batches: Batches in order; closed at the end.
        tensors: Returns the tensors of a batch.
        device: A GPU.
    """
    side = _side_stream(device)
    held: tuple[T, torch.cuda.Event] | None = None
    failure: BaseException | None = None
    with closing(batches):
        while True:
            coming: tuple[T, torch.cuda.Event] | None = None
            try:
                with torch.cuda.stream(side):
                    coming = next(((batch, side.record_event()) for batch in batches), None)
            except Exception as error:
                failure = error
            if held is not None:
                out, held = [held], None  # no local name keeps a batch alive that the caller has released
                yield _handed_over(*out.pop(), tensors, device)
            if failure is not None:
                raise failure
            if coming is None:
                return
            held, coming = coming, None


def _handed_over(batch: T, ready: torch.cuda.Event, tensors: Callable[[T], Iterable[torch.Tensor]], device: torch.device) -> T:
    current = torch.cuda.current_stream(device)
    current.wait_event(ready)
    for tensor in tensors(batch):
        if tensor.is_cuda:
            tensor.record_stream(current)
    return batch


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream for all epochs, because torch keeps the memory of each stream apart."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
