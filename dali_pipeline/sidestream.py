"""A batch ahead: on a GPU the next batch is on its way, on a stream of its own, while the caller works on the one before."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")


def a_batch_ahead(
    batches: Generator[T, None, None], tensors: Callable[[T], Iterable[torch.Tensor]], device: torch.device
) -> Generator[T, None, None]:
    """The same batches; each is asked for, and its copies are begun, before the one before it is handed out.

    What `batches` does on the GPU runs on a side stream. The caller's stream waits for it there, not the caller, and memory of
    `tensors` is not used again before the caller's stream has passed. An error comes behind the batches before it.
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
                out, held = [held], None  # no name here keeps a batch that the caller has let go
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
    """One for all epochs: torch keeps the memory of each stream apart."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
