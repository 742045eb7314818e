"""Work done by several processes, its results in order; where they end with their parent, however that ends."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, TypeVar

from dali_pipeline.schema import PipelineError

Workers = int | Literal["auto"]
Engine = Literal["local", "ray"]
Advance = Callable[[int], None]
T = TypeVar("T")
Work: TypeAlias = Callable[[int, Advance], T]
_PR_SET_PDEATHSIG = 1


def in_order(
    work: Work[T], numbers: Sequence[int], workers: Workers, progress: Advance
) -> Generator[tuple[int, T], None, None]:
    """Yields (number, work(number, advance)) in the order of `numbers`; what works ahead is a few numbers, never all.

    work: calls `advance(n)` as it goes on; in forked processes, so it may be a closure, and its results must pickle.
    progress: called here with the sum of all that was advanced. Closed early, it kills the processes: `work` must leave
    nothing that matters half-done. Raises what `work` raised, PipelineError where a process was killed.
    """
    count = min(len(os.sched_getaffinity(0)) if workers == "auto" else workers, len(numbers))
    if count <= 1:
        total = 0

        def advance(n: int) -> None:
            nonlocal total
            total += n
            progress(total)

        yield from ((number, work(number, advance)) for number in numbers)
        return
    context = multiprocessing.get_context("fork")
    done = context.RawArray("q", max(numbers) + 1)  # a place a number, which one process alone writes: no lock
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(work, done, os.getpid()))
    waiting: deque[tuple[int, Future[Any]]] = deque()
    remaining = iter(numbers)
    try:
        while True:
            while len(waiting) < 2 * count and (number := next(remaining, None)) is not None:
                waiting.append((number, pool.submit(_do, number)))
            if not waiting:
                break
            number, future = waiting.popleft()
            while not wait([future], timeout=0.2).done:
                progress(sum(done))
            progress(sum(done))
            yield number, future.result()
        pool.shutdown()
    except BrokenProcessPool:
        raise PipelineError("a worker process was killed, perhaps for memory; try again with fewer --workers") from None
    finally:
        with _undisturbed():
            for child in set(multiprocessing.active_children()) - others:
                child.kill()
            pool.shutdown(cancel_futures=True)  # they are dead, so this takes no time


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Lets an impatient second Ctrl-C wait for a moment, or the processes would outlive the first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


_inherited: tuple[Callable[[int, Advance], Any], Any] | None = None  # in a worker, by fork


def _begin(work: Callable[[int, Advance], Any], done: Any, parent: int) -> None:
    global _inherited
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    _inherited = work, done


def _do(number: int) -> Any:
    assert _inherited is not None
    work, done = _inherited

    def advance(n: int) -> None:
        done[number] += n

    return work(number, advance)
