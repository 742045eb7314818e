"""A batch ahead: on a GPU the next batch is on its way, on a stream of its own, while the caller works on the one before."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
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
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    held: tuple[T, torch.cuda.Event] | None = None
    failure: BaseException | None = None
    with closing(batches):
        while True:
            coming: tuple[T, torch.cuda.Event] | None = None
            try:
                with torch.cuda.stream(side):
                    for batch in batches:
                        coming = batch, side.record_event()
                        break
            except Exception as error:
                failure = error
            if held is not None:
                batch, ready = held
                current = torch.cuda.current_stream(device)
                current.wait_event(ready)
                for tensor in tensors(batch):
                    if tensor.is_cuda:
                        tensor.record_stream(current)
                yield batch
            if failure is not None:
                raise failure
            if coming is None:
                return
            held = coming
