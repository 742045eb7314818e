"""Processes that work ahead: results in order, their large arrays in memory that is shared and used again, the rest by pipe.

The memory is anonymous, mapped before the fork: no file of /dev/shm, so a container's small one is no limit.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import pickle
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import numpy as np

from dali_pipeline import trace
from dali_pipeline.memory import Buffers
from dali_pipeline.schema import Array, PipelineError

T = TypeVar("T")
R = TypeVar("R")
ARENAS = 2  # a worker: one that it fills while the other is used up
_ALIGNED = 64


class Arena(Buffers):
    """Shared memory of a size, handed out from its begin; what it has no room for is memory of the process's own."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.memory = mmap.mmap(-1, nbytes)
        self._bytes = np.frombuffer(self.memory, np.uint8)
        self._used = 0

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
    """One process, its pipe, and its arenas that wait for work."""

    def __init__(self, work: Callable[[Any, Buffers], object], arena_bytes: int) -> None:
        context = multiprocessing.get_context("fork")  # no main guard needed; workers touch neither CUDA nor DALI
        self.arenas = [Arena(arena_bytes) for _ in range(ARENAS)]
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, self.arenas, theirs, self.pipe), daemon=True)
        self.process.start()
        theirs.close()

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
        self.process.join(1)
        code = self.process.exitcode
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return PipelineError(
            f"a worker process of the graph loader died ({how}); expected enough memory for it: use fewer workers or workers=0"
        )


def map_in_processes(
    work: Callable[[T, Buffers], R], items: Iterable[T], workers: int, arena_bytes: int
) -> Generator[R, None, None]:
    """`map` in order by so many processes, each up to two results ahead; a result holds until the next is asked for.

    work: may take what is large in its result from the memory that it is handed · arena_bytes: of it, for one result; a larger
    one goes through a pipe. Raises what `work` raises, PipelineError for a worker that died. Closed early, leaves no process.
    """
    owner, crew = os.getpid(), list[_Worker]()
    try:
        try:
            for _ in range(workers):
                crew.append(_Worker(work, arena_bytes))
        except OSError as error:
            raise PipelineError(
                f"{workers} worker processes with {ARENAS} x {arena_bytes >> 20} MiB of shared memory each cannot be had "
                f"({error.strerror}); expected memory for them: use fewer workers or workers=0"
            ) from error
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
            for worker in crew:
                worker.process.kill()
            for worker in crew:
                worker.process.join()
                worker.pipe.close()


def _serve(work: Callable[[Any, Buffers], object], arenas: list[Arena], pipe: Connection, theirs: Connection) -> None:
    """What a worker does until the pipe is closed."""
    theirs.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C, and ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        try:
            item, arena = pipe.recv()
            arenas[arena].clear()
            begin = time.perf_counter()  # of all processes the same clock
            try:
                answer = arenas[arena].dumps((work(item, arenas[arena]), begin, time.perf_counter()))
            except Exception as error:
                answer = arenas[arena].dumps((error, begin, time.perf_counter()))
            pipe.send_bytes(answer)
        except (EOFError, OSError):
            return
