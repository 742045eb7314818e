"""WorkerProcess: a Python process started by this package, and memory that it shares with the process that started it.

A worker is started as a fresh program, not forked. A forked child has none of its parent's threads, so a library that waits for
one of its own hangs in it: OpenMP does, once torch has computed in the parent. And unlike the processes of `multiprocessing`, a
worker never imports the caller's main module: a script needs no main guard, and a notebook, `python -` and a daemonic process
can start some.
"""

from __future__ import annotations

import mmap
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.spawn import get_executable
from pathlib import Path
from typing import Any

from dali_pipeline.errors import PipelineError

LOOK_SECONDS = 0.5  # between two checks that the parent still exists
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from dali_pipeline.runtime.workerprocess import main; main(*sys.argv[2:])"
_passing = threading.local()  # `descriptors` that pickled objects pass to the worker being started


class SharedBytes:
    """Zeroed memory of `nbytes` bytes, at `memory`, that workers share.

    It is a file without a name, known by its descriptor: a container's small /dev/shm is no limit, and a process that is killed
    leaves nothing behind. Pickled for a worker it is the same memory; pickled for anything else it is new, zeroed memory.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._descriptor = os.memfd_create("dali_pipeline", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        os.ftruncate(self._descriptor, nbytes)
        self.memory = mmap.mmap(self._descriptor, nbytes)

    def __reduce__(self) -> tuple[Callable[..., SharedBytes], tuple[int, ...]]:
        descriptors = getattr(_passing, "descriptors", None)
        if descriptors is None:
            return SharedBytes, (self.nbytes,)
        descriptors.append(self._descriptor)
        return _attach, (self._descriptor, self.nbytes)


def _attach(descriptor: int, nbytes: int) -> SharedBytes:
    """Return the memory behind a descriptor that was passed to this process, which keeps it open until it ends."""
    shared = SharedBytes.__new__(SharedBytes)
    shared.nbytes, shared._descriptor = nbytes, descriptor
    shared.memory = mmap.mmap(descriptor, nbytes)
    return shared


class WorkerProcess:
    """A process that runs `serve(pipe, *arguments)`, and ends with it or with the process that started it.

    Starting costs 0.2 to 0.4 s, of which the caller waits a few milliseconds. A worker ignores Ctrl-C, which the parent
    receives.

    Args:
        serve: Function of a module, called in the worker with its end of the pipe.
        arguments: Further arguments; pickled. `SharedBytes` among them are shared.

    Raises:
        OSError: The system grants no more processes, memory or descriptors.
    """

    def __init__(self, serve: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        _passing.descriptors = descriptors = list[int]()
        try:
            task = pickle.dumps((serve, arguments), protocol=5)
        finally:
            del _passing.descriptors
        self.pipe, theirs = Pipe()
        command = [get_executable(), "-P", "-c", _BOOT, str(Path(__file__).parents[2])]
        # blocked while the worker starts: a Ctrl-C would end it with a traceback before it can ignore the signal
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), *dict.fromkeys(descriptors)],
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self._task: bytes | None = task

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def begin(self) -> None:
        """Send the task: apart from the start, so that several workers start side by side.

        Raises OSError if the worker is gone already.
        """
        assert self._task is not None
        self.pipe.send(sys.path)
        self.pipe.send_bytes(self._task)
        self._task = None

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()

    def join(self) -> None:
        """Wait until the process has ended, and close its pipe."""
        self._process.wait()
        self.pipe.close()

    def how_it_ended(self) -> str:
        """Return `killed by signal 9`, or `exit code 1`, after a wait of at most a second."""
        try:
            code: int | None = self._process.wait(1)
        except subprocess.TimeoutExpired:
            code = None
        return f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def start_workers(count: int, serve: Callable[..., None], arguments: Callable[[], tuple[Any, ...]]) -> list[WorkerProcess]:
    """Start `count` workers side by side, each with its own `arguments()`.

    Raises OSError if one of them cannot be started; then none is left.
    """
    crew: list[WorkerProcess] = []
    try:
        for _ in range(count):
            crew.append(WorkerProcess(serve, arguments()))  # noqa: PERF401, as those before an error are to be ended
        for worker in crew:
            worker.begin()
    except BaseException:
        end_workers(crew)
        raise
    return crew


def end_workers(crew: list[WorkerProcess]) -> None:
    """Kill workers and wait for their ends."""
    for worker in crew:
        worker.kill()
    for worker in crew:
        worker.join()


def as_sent(error: Exception) -> Exception:
    """Return an error that can be pickled; an unexpected one has its traceback as its note."""
    if not isinstance(error, PipelineError | OSError):
        error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return PipelineError(str(error)) if isinstance(error, PipelineError) else RuntimeError(repr(error))
    return error


def main(descriptor: str, parent: str) -> None:
    """Run a worker, from its start to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()
    pipe = Connection(int(descriptor))
    try:
        sys.path[:] = pipe.recv()
        serve, arguments = pickle.loads(pipe.recv_bytes())
        serve(pipe, *arguments)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent has closed the pipe


def _end_with(parent: int) -> None:
    """End this process once its parent is gone."""
    never = threading.Event()
    while os.getppid() == parent:
        never.wait(LOOK_SECONDS)
    os._exit(1)
