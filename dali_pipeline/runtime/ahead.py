"""Work done ahead of its use, in threads of this process, its results in order, and torch's beside them; and what a forked
child must not take down."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, Literal, TypeVar

import torch
from threadpoolctl import ThreadpoolController

from dali_pipeline.runtime.container import allowed_cores
from dali_pipeline.runtime.trace import span

T = TypeVar("T")
R = TypeVar("R")
LONG_RECORD_BYTES = 32 << 10  # from which on a record is copied for longer than Python works on it
AHEAD_BYTES = 96 << 20
_LEFT_TO_THE_PARENT: list[Any] = []


def map_ahead(
    function: Callable[[T], R], items: Iterable[T], threads: int, nbytes: Callable[[T], int] = lambda _: 0
) -> Generator[R, None, None]:
    """`map` in order, `threads` background threads working up to two results ahead each; 0 is the caller's own thread.

    nbytes: bytes of memory that an item's result takes; results ahead take AHEAD_BYTES together at most, so none is ahead of a
    larger one. Closed early, it waits for what is running and leaves no thread behind.
    """
    if not threads:
        for item in items:
            yield _gathered(function, item)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="gather")
    pending: deque[tuple[Any, int]] = deque()
    held = 0
    try:
        for item in items:
            size = nbytes(item)
            while pending and held + size > AHEAD_BYTES:
                held -= pending[0][1]
                yield pending.popleft()[0].result()
            held += size
            pending.append((pool.submit(_gathered, function, item), size))
            if len(pending) > 2 * threads:
                held -= pending[0][1]
                yield pending.popleft()[0].result()
        while pending:
            yield pending.popleft()[0].result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _gathered(function: Callable[[T], R], item: T) -> R:
    with span("gather"):
        return function(item)


def background_threads(device: torch.device, record_bytes: float, num_workers: int | Literal["auto"] = "auto") -> int:
    """Return `workers`, or what "auto" stands for.

    On a GPU that is a quarter of the cores, 4 at most, as one thread gathers 3.5 to 4 GB/s. On a CPU it is one, which overlaps
    with what the caller's thread does with records of such a size; none where that computes on the same one core, or on the
    same two and Python holds it up, which one thread runs at a time, rather than copying.
    """
    if num_workers != "auto":
        return num_workers
    if device.type == "cuda":
        return max(1, min(4, int(allowed_cores()) // 4))
    return 1 if allowed_cores() > (1 if record_bytes >= LONG_RECORD_BYTES else 2) else 0


def cores_beside(busy: int) -> int:
    """Threads that torch may work on in the caller's, while so many others are `busy`."""
    return max(1, int(allowed_cores()) - busy)


def on_threads(count: int) -> AbstractContextManager[object]:
    """Inside, torch works in this thread on so many threads at most; costs 11 us where that is fewer than elsewhere.

    OpenMP cuts work into equal parts, so all wait for the one whose core is busy, and keep their own cores waiting: a cast
    beside a gathering thread on two cores took two threads 1.6 times as long as one alone, and twice the cores' time.
    """
    return nullcontext() if count >= torch.get_num_threads() else _openmp().limit(limits=count)


@cache
def _openmp() -> ThreadpoolController:
    """Torch's, whose limits hold for the calling thread alone."""
    return ThreadpoolController().select(user_api="openmp")


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
