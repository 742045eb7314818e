"""Work done ahead of its use, in threads of this process, its results in order; and what a forked child must not take down."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from dali_pipeline.container import allowed_cores
from dali_pipeline.trace import span

T = TypeVar("T")
R = TypeVar("R")
_LEFT_TO_THE_PARENT: list[Any] = []


def map_ahead(function: Callable[[T], R], items: Iterable[T], threads: int) -> Generator[R, None, None]:
    """`map` in order, `threads` background threads working up to two results ahead each; 0 is the caller's own thread.

    Closed early, it waits for what is running and leaves no thread behind.
    """
    if not threads:
        for item in items:
            yield _gathered(function, item)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="gather")
    pending: deque[Any] = deque()
    try:
        for item in items:
            pending.append(pool.submit(_gathered, function, item))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _gathered(function: Callable[[T], R], item: T) -> R:
    with span("gather"):
        return function(item)


def background_threads(device: torch.device) -> int:
    """One, which overlaps with a step; none where that computes on the same two cores, for then a thread only costs."""
    return 1 if device.type == "cuda" or allowed_cores() > 2 else 0


@contextmanager
def belonging_to_this_process(thing: Any) -> Iterator[None]:
    """Where the block ends in a process forked meanwhile, keeps `thing` alive there.

    Taken down, a DALI pipeline would wait for threads that the child has not, and torch's iterator end the parent's workers.
    """
    process = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != process:
            _LEFT_TO_THE_PARENT.append(thing)
