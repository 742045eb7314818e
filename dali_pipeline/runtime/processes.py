"""Processes that work ahead: results in order, their large arrays in memory that is shared and used again, the rest by pipe.

The memory is not a file of /dev/shm, so a container's small one is no limit.
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
ARENAS = 2  # a worker: one that it fills while the other is used up
_ALIGNED = 64


class Arena(Buffers):
    """Shared memory of a size, handed out from its begin; what it has no room for is memory of the process's own."""

    def __init__(self, shared: SharedBytes) -> None:
        super().__init__()
        self._shared = shared
        self._bytes = np.frombuffer(shared.memory, np.uint8)
        self._used = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Arena, (self._shared,)

    def clear(self) -> None:
        """Everything may be handed out again."""
        self._used = 0

    def take(self, nbytes: int, phase: int = 0) -> Array:
        """`nbytes` bytes, uint8, `phase` bytes behind a multiple of 64."""
        begin = -(-self._used // _ALIGNED) * _ALIGNED + phase % _ALIGNED
        if begin + nbytes > len(self._bytes):
            return np.empty(nbytes, np.uint8)
        self._used = begin + nbytes
        return self._bytes[begin : begin + nbytes]

    def dumps(self, result: object) -> bytes:
        """The result, but for arrays that lie in the arena: of these only where."""
        places: list[tuple[int, int]] = []
        base = self._bytes.ctypes.data

        def outside(buffer: pickle.PickleBuffer) -> bool:
            array = np.frombuffer(buffer.raw(), np.uint8)
            begin = array.ctypes.data - base
            inside = len(array) > 0 and 0 <= begin < len(self._bytes)
            if inside:
                places.append((begin, len(array)))
            return not inside

        body = pickle.dumps(result, protocol=5, buffer_callback=outside)
        return pickle.dumps((places, body))

    def loads(self, message: bytes) -> Any:
        """What `dumps` was given, in another process; it holds until the arena is filled again."""
        places, body = pickle.loads(message)
        return pickle.loads(body, buffers=[self._bytes[begin : begin + size] for begin, size in places])


class _Worker:
    """One process, and its arenas that wait for work."""

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
            "use fewer workers or workers=0"
        )


def map_in_processes(
    work: Callable[[T, Buffers], R], items: Iterable[T], num_workers: int, arena_bytes: int
) -> Generator[R, None, None]:
    """`map` in order by so many processes, each up to two results ahead; a result holds until the next is asked for.

    work: may take what is large in its result from the memory that it is handed · arena_bytes: of it, for one result; a larger
    one goes through a pipe. Raises what `work` raises, PipelineError for a worker that died. Closed early, leaves no process.
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
                f"({error.strerror}); expected memory for them: use fewer workers or workers=0"
            ) from error
        crew = [_Worker(process, own) for process, own in zip(processes, arenas, strict=True)]
        left = iter(items)
        asked: deque[tuple[_Worker, int]] = deque()
        free = deque((worker, arena) for arena in range(ARENAS) for worker in crew)
        while True:
            while free and (item := next(left, None)) is not None:
                worker, arena = free.popleft()
                worker.ask(item, arena)
                asked.append((worker, arena))
            if not asked:
                return
            worker, arena = asked.popleft()
            result = worker.answer(arena)
            if isinstance(result, BaseException):
                raise result
            yield result
            del result
            free.append((worker, arena))
    finally:
        if os.getpid() == owner:  # a process forked meanwhile has none of them
            end_workers(processes)


def _serve(pipe: Connection, work: Callable[[Any, Buffers], object], arenas: list[Arena]) -> None:
    """Answer each (item, arena) with the result, or the error, and when it was worked on, in a worker."""
    while True:
        item, arena = pipe.recv()
        arenas[arena].clear()
        begin = time.perf_counter()  # of all processes the same clock
        try:
            answer = arenas[arena].dumps((work(item, arenas[arena]), begin, time.perf_counter()))
        except Exception as error:
            answer = arenas[arena].dumps((as_sent(error), begin, time.perf_counter()))
        pipe.send_bytes(answer)
