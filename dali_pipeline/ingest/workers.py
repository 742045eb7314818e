"""Run work in several processes and yield its results in order; the processes end when their parent ends."""

from __future__ import annotations

import pickle
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, TypeAlias, TypeVar

from dali_pipeline.errors import PipelineError
from dali_pipeline.runtime.container import allowed_cores
from dali_pipeline.runtime.workerprocess import WorkerProcess, as_sent, end_workers, start_workers

NumWorkers = int | Literal["auto"]
Engine = Literal["local", "ray"]
Advance = Callable[[int], None]
T = TypeVar("T")
Work: TypeAlias = Callable[[int, Advance], T]
LOOK_SECONDS = 0.2  # between two updates of the progress bar


def in_order(
    work: Work[T], numbers: Sequence[int], num_workers: NumWorkers, progress: Advance
) -> Generator[tuple[int, T], None, None]:
    """Yield (number, work(number, advance)) in the order of `numbers`; work only a few numbers ahead.

    If it is closed early, it kills the processes, so `work` must not leave anything important half-done.

    Args:
        work: Function that calls `advance(n)` as it proceeds. It and its results are pickled.
        numbers: Numbers to work on, each once.
        num_workers: Number of processes; "auto" is one per allowed core. With one process, or one number, the work is done in
            this process.
        progress: Called in this process with the sum of all advances.

    Raises:
        PipelineError: A process was killed. An exception of `work` is raised here, in its number's turn.
    """
    count = min(max(1, int(allowed_cores())) if num_workers == "auto" else num_workers, len(numbers))
    total = 0

    def advance(n: int) -> None:
        nonlocal total
        total += n
        progress(total)

    if count <= 1:
        yield from ((number, work(number, advance)) for number in numbers)
        return
    try:
        task = pickle.dumps(work, protocol=5)  # once for all: it may name a million files
        crew = start_workers(count, _serve, lambda: (task,))
    except OSError as error:
        raise PipelineError(f"{count} worker processes cannot be started ({error.strerror}); use fewer --num-workers") from None
    try:
        yield from _results(crew, numbers, advance)
    finally:
        with _undisturbed():
            end_workers(crew)


def _results(crew: list[WorkerProcess], numbers: Sequence[int], advance: Advance) -> Generator[tuple[int, Any], None, None]:
    """Assign the numbers to the workers, up to two per worker ahead of the next result; yield the results in order."""
    idle, busy = list(crew), dict[Connection, WorkerProcess]()
    answers: dict[int, tuple[Any, BaseException | None]] = {}
    assigned = 0
    for turn, number in enumerate(numbers):
        while number not in answers:
            while idle and assigned < min(len(numbers), turn + 2 * len(crew)):
                worker = idle.pop()
                _ask(worker, numbers[assigned])
                busy[worker.pipe] = worker
                assigned += 1
            for pipe in wait(list(busy), LOOK_SECONDS):
                assert isinstance(pipe, Connection)
                message = _answer(busy[pipe])
                if isinstance(message, int):
                    advance(message)
                else:
                    answered, result, error = message
                    answers[answered] = result, error
                    idle.append(busy.pop(pipe))
        result, error = answers.pop(number)
        if error is not None:
            raise error
        yield number, result


def _ask(worker: WorkerProcess, number: int) -> None:
    try:
        worker.pipe.send(number)
    except OSError:
        raise _died(worker) from None


def _answer(worker: WorkerProcess) -> Any:
    try:
        return worker.pipe.recv()
    except (OSError, EOFError):
        raise _died(worker) from None


def _died(worker: WorkerProcess) -> PipelineError:
    how = worker.how_it_ended()
    return PipelineError(f"a worker process was killed, perhaps for memory ({how}); try again with fewer --num-workers")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore Ctrl-C within the block; otherwise a second Ctrl-C would let the processes outlive the first one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        if handler is not None:  # a handler that Python did not set cannot be set again
            signal.signal(signal.SIGINT, handler)


def _serve(pipe: Connection, task: bytes) -> None:
    """Work in a worker process: for each number received, send the advances as ints, then (number, result, error)."""
    work: Work[Any] = pickle.loads(task)
    total, told, last = 0, 0, time.monotonic()

    def advance(n: int) -> None:
        nonlocal total, told, last
        total += n
        if (now := time.monotonic()) - last >= LOOK_SECONDS:  # a message for each of many small files costs the parent a core
            pipe.send(total - told)
            told, last = total, now

    while True:
        number = pipe.recv()
        try:
            answer = pickle.dumps((number, work(number, advance), None), protocol=5)
        except Exception as error:
            answer = pickle.dumps((number, None, as_sent(error)), protocol=5)
        if total > told:
            pipe.send(total - told)
            told = total
        pipe.send_bytes(answer)
