"""Work done ahead of its use in background threads, with results in order, and torch's number of threads beside them."""

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
LONG_RECORD_BYTES = 32 << 10  # for larger records, copying takes longer than Python's work
AHEAD_BYTES = 96 << 20
_LEFT_TO_THE_PARENT: list[Any] = []


def map_ahead(
    function: Callable[[T], R],
    items: Iterable[T],
    threads: int,
    nbytes: Callable[[T], int] = lambda _: 0,
    name: str = "gather",
) -> Generator[R, None, None]:
    """Map a function over items in order; background threads work up to two results ahead each.

    Closed early, it waits for running calls and leaves no thread behind.

    Args:
        function: Function of one item.
        items: The items.
        threads: Number of background threads; 0 runs in the caller's thread.
        nbytes: Function from an item to the bytes of its result. Results ahead take at most AHEAD_BYTES together, so none is
            ahead of a larger one. Default: 0 bytes.
        name: Name of the work in a trace. Default: "gather".
    """
    if not threads:
        for item in items:
            yield _spanned(function, item, name)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="gather")
    results: deque[tuple[Any, int]] = deque()
    bytes_ahead = 0
    try:
        for item in items:
            size = nbytes(item)
            while results and bytes_ahead + size > AHEAD_BYTES:
                bytes_ahead -= results[0][1]
                yield results.popleft()[0].result()
            bytes_ahead += size
            results.append((pool.submit(_spanned, function, item, name), size))
            if len(results) > 2 * threads:
                bytes_ahead -= results[0][1]
                yield results.popleft()[0].result()
        while results:
            yield results.popleft()[0].result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _spanned(function: Callable[[T], R], item: T, name: str) -> R:
    with span(name):
        return function(item)


def background_threads(device: torch.device, record_bytes: float, num_workers: int | Literal["auto"] = "auto") -> int:
    """Return `num_workers`, or the number that "auto" stands for.

    On a GPU it is a quarter of the cores, at most 4, because one thread gathers 3.5 to 4 GB/s. On a CPU it is one thread, which
    overlaps with the caller's work on records. It is none on one core. On two cores it is none for short records, on which
    Python, which one thread runs at a time, takes longer than copying.
    """
    if num_workers != "auto":
        return num_workers
    if device.type == "cuda":
        return max(1, min(4, int(allowed_cores()) // 4))
    return 1 if allowed_cores() > (1 if record_bytes >= LONG_RECORD_BYTES else 2) else 0


def cores_beside(busy: int) -> int:
    """Return the threads that torch may use in the caller's thread while `busy` others work."""
    return max(1, int(allowed_cores()) - busy)


def on_threads(count: int) -> AbstractContextManager[object]:
    """Limit torch in this thread to `count` threads inside the block; costs 11 us if that is fewer than elsewhere.

    OpenMP cuts work into equal parts, so all threads wait for the one whose core is busy, and keep their own cores waiting. A
    cast beside a gathering thread on two cores took two threads 1.6 times as long as one, and twice the cores' time.
    """
    return nullcontext() if count >= torch.get_num_threads() else _openmp().limit(limits=count)


@cache
def _openmp() -> ThreadpoolController:
    """Return the controller of torch's OpenMP, whose limits hold for the calling thread alone."""
    return ThreadpoolController().select(user_api="openmp")


@contextmanager
def belonging_to_this_process(thing: Any) -> Iterator[None]:
    """Keep `thing` alive in a process that was forked within the block.

    If it were destroyed there, a DALI pipeline would wait for threads that the child does not have, and torch's iterator would
    end the parent's workers.
    """
    process = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != process:
            _LEFT_TO_THE_PARENT.append(thing)
