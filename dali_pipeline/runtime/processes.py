"""Worker processes that work ahead: results in order, large arrays in shared memory that is reused, the rest by pipe.

The memory is not a file of /dev/shm, so the small one of a container is no limit.
"""

from __future__ import annotations

import os
import pickle
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import numpy as np

from dali_pipeline.errors import PipelineError
from dali_pipeline.runtime import trace
from dali_pipeline.runtime.memory import Buffers
from dali_pipeline.runtime.workerprocess import SharedBytes, WorkerProcess, as_sent, end_workers, start_workers
from dali_pipeline.types import Array

T = TypeVar("T")
R = TypeVar("R")
ARENAS = 2  # per worker: it fills one while the other is in use
_ALIGNED = 64


class Arena(Buffers):
    """Shared memory of fixed size, allocated from its begin. A request that does not fit gets memory of this process."""

    def __init__(self, shared: SharedBytes) -> None:
        super().__init__()
        self._shared = shared
        self._bytes = np.frombuffer(shared.memory, np.uint8)
        self._used = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Arena, (self._shared,)

    def clear(self) -> None:
        """Free all allocations."""
        self._used = 0

    def take(self, nbytes: int, phase: int = 0) -> Array:
        """Return `nbytes` bytes, uint8, `phase` bytes after a multiple of 64."""
        begin = -(-self._used // _ALIGNED) * _ALIGNED + phase % _ALIGNED
        if begin + nbytes > len(self._bytes):
            return np.empty(nbytes, np.uint8)
        self._used = begin + nbytes
        return self._bytes[begin : begin + nbytes]

    def dumps(self, result: object) -> bytes:
        """Pickle the result; for arrays in the arena, only their locations."""
        locations: list[tuple[int, int]] = []
        base = self._bytes.ctypes.data

        def outside(buffer: pickle.PickleBuffer) -> bool:
            array = np.frombuffer(buffer.raw(), np.uint8)
            begin = array.ctypes.data - base
            inside = len(array) > 0 and 0 <= begin < len(self._bytes)
            if inside:
                locations.append((begin, len(array)))
            return not inside

        body = pickle.dumps(result, protocol=5, buffer_callback=outside)
        return pickle.dumps((locations, body))

    def loads(self, message: bytes) -> Any:
        """Unpickle, in another process, what `dumps` returned; valid until the arena is filled again."""
        locations, body = pickle.loads(message)
        return pickle.loads(body, buffers=[self._bytes[begin : begin + size] for begin, size in locations])


class _Worker:
    """One process, and its arenas."""

    def __init__(self, process: WorkerProcess, arenas: list[Arena]) -> None:
        self.process, self.pipe, self.arenas = process, process.pipe, arenas

    def ask(self, item: object, arena: int) -> None:
        try:
            self.pipe.send((item, arena))
        except (OSError, EOFError):
            raise self.died() from None

    def answer(self, arena: int) -> Any:
        try:
            message = self.pipe.recv_bytes()
        except (OSError, EOFError):
            raise self.died() from None
        answer, begin, end = self.arenas[arena].loads(message)
        trace.add("gather", begin, end, worker=self.process.pid)
        return answer

    def died(self) -> PipelineError:
        return PipelineError(
            f"a worker process of the graph loader died ({self.process.how_it_ended()}); expected enough memory for it: "
            "use a smaller num_workers, or num_workers=0"
        )


def map_in_processes(
    work: Callable[[T, Buffers], R], items: Iterable[T], num_workers: int, arena_bytes: int
) -> Generator[R, None, None]:
    """Map a function over items in order in processes, each up to two results ahead; a result is valid until the next one.

    Closed early, it leaves no process behind.

    Args:
        work: Function of an item and of memory, from which it may take the large arrays of its result.
        items: The items.
        num_workers: Number of processes.
        arena_bytes: Shared memory per result; a larger result goes through a pipe.

    Raises:
        PipelineError: A worker died, or cannot be started. Errors of `work` are raised as they are.
    """
    owner, processes, arenas = os.getpid(), list[WorkerProcess](), list[list[Arena]]()

    def arguments() -> tuple[Any, ...]:
        arenas.append([Arena(SharedBytes(arena_bytes)) for _ in range(ARENAS)])
        return work, arenas[-1]

    try:
        try:
            processes = start_workers(num_workers, _serve, arguments)
        except OSError as error:
            raise PipelineError(
                f"{num_workers} worker processes with {ARENAS} x {arena_bytes >> 20} MiB of shared memory each cannot be had "
                f"({error.strerror}); expected memory for them: use a smaller num_workers, or num_workers=0"
            ) from error
        workers = [_Worker(process, worker_arenas) for process, worker_arenas in zip(processes, arenas, strict=True)]
        remaining = iter(items)
        running: deque[tuple[_Worker, int]] = deque()
        free = deque((worker, arena) for arena in range(ARENAS) for worker in workers)
        while True:
            while free and (item := next(remaining, None)) is not None:
                worker, arena = free.popleft()
                worker.ask(item, arena)
                running.append((worker, arena))
            if not running:
                return
            worker, arena = running.popleft()
            result = worker.answer(arena)
            if isinstance(result, BaseException):
                raise result
            yield result
            del result
            free.append((worker, arena))
    finally:
        if os.getpid() == owner:  # a process forked meanwhile owns none of them
            end_workers(processes)


def _serve(pipe: Connection, work: Callable[[Any, Buffers], object], arenas: list[Arena]) -> None:
    """Answer each (item, arena) in a worker with the result, or the error, and the begin and end of the work."""
    while True:
        item, arena = pipe.recv()
        arenas[arena].clear()
        begin = time.perf_counter()  # the same clock in all processes
        try:
            answer = arenas[arena].dumps((work(item, arenas[arena]), begin, time.perf_counter()))
        except Exception as error:
            answer = arenas[arena].dumps((as_sent(error), begin, time.perf_counter()))
        pipe.send_bytes(answer)
