"""Run work on Ray, on one machine or many, and yield its results in order, like `in_order` of workers.py on one machine.

Ray schedules, watches and repeats tasks. If a worker is killed or a node is lost, the tasks that ran there run again.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dali_pipeline.errors import PipelineError, UsageError
from dali_pipeline.ingest.workers import Advance, Engine, NumWorkers, Work, in_order

T = TypeVar("T")
RETRIES = 3  # repetitions of a task whose worker or node was lost
END_SECONDS = 10  # time that a task may take to stop


class Asks(NamedTuple):
    """Resources of a node that a task reserves."""

    cores: int = 1
    gpus: int = 0


def deal(
    engine: Engine,
    work: Work[T],
    numbers: Sequence[int],
    num_workers: NumWorkers,
    progress: Advance,
    shared: Sequence[Path],
    asks: Callable[[float], Asks] = lambda _: Asks(),
) -> Generator[tuple[int, T], None, None]:
    """Run work with `in_order` on processes of this machine, or with `on_ray`."""
    return on_ray(work, numbers, progress, shared, asks) if engine == "ray" else in_order(work, numbers, num_workers, progress)


def on_ray(
    work: Work[T], numbers: Sequence[int], progress: Advance, shared: Sequence[Path], asks: Callable[[float], Asks]
) -> Generator[tuple[int, T], None, None]:
    """Yield (number, work(number, advance)) in the order of `numbers`; run as many tasks at a time as the cluster has cores.

    The cluster is the one at RAY_ADDRESS, otherwise one that runs on this machine, otherwise a new one on this machine.

    Args:
        work: Function that is pickled once for all tasks; its results are pickled too. A task may run twice at the same time if
            the connection to a node is lost, so each task must write to files of its own.
        numbers: Numbers to work on, each once.
        progress: Called with the sum of the advances of all ended tasks.
        shared: Paths that all nodes must see.
        asks: Returns what a task reserves, given the number of GPUs of the cluster.

    Raises:
        UsageError: A node does not see the folders, or a task fits on no node.
        PipelineError: A task was lost too often. Exceptions of `work` are raised unchanged.
    """
    with _cluster() as ray:
        cores, gpus = asked = asks(ray.cluster_resources().get("GPU", 0))
        _check_fits(ray, asked)
        task = ray.remote(_do).options(num_cpus=cores, num_gpus=gpus, max_retries=RETRIES)
        put = ray.put((work, shared))
        waiting: deque[tuple[int, Any]] = deque()
        remaining, total = iter(numbers), 0
        try:
            while True:
                max_tasks = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)) // cores)  # nodes come and go
                while len(waiting) < max_tasks and (number := next(remaining, None)) is not None:
                    waiting.append((number, task.remote(put, number)))
                if not waiting:
                    break
                number, promise = waiting[0]
                while not ray.wait([promise], timeout=0.5)[0]:
                    pass  # Ctrl-C is handled here
                result, advanced = _get(ray, promise)
                waiting.popleft()
                total += advanced
                progress(total)
                yield number, result
        finally:
            _end(ray, [promise for _, promise in waiting])


def _end(ray: Any, promises: list[Any]) -> None:
    """Interrupt the tasks that have not ended, and wait END_SECONDS for them; the rest ends with the connection.

    Does not use force: Ray 2.60 aborts this process if a task fails while it is killed.
    """
    if promises:
        running = ray.wait(promises, num_returns=len(promises), timeout=0)[1]
        for promise in running:
            ray.cancel(promise)
        if running:
            ray.wait(running, num_returns=len(running), timeout=END_SECONDS)


def _do(put: tuple[Work[T], Sequence[Path]], number: int) -> tuple[T, int]:
    """Run a task; return its result and the sum of its advances."""
    work, shared = put
    for path in shared:
        if not path.exists():
            raise UsageError(f"{path} is not there on node {socket.gethostname()}; expected folders that all nodes share")
    advances: list[int] = []
    return work(number, advances.append), sum(advances)


def _get(ray: Any, promise: Any) -> Any:
    """Return the result of a task, or raise its exception."""
    try:
        return ray.get(promise)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PipelineError | OSError):
            raise error.cause from None
        lines = str(error.cause).strip().split("\n")
        lacks = [line for line in lines if "ModuleNotFoundError" in line or "ImportError" in line]
        if lacks or isinstance(error.cause, ImportError):
            what = (lacks or lines)[-1].strip()
            raise UsageError(f"a node cannot import what tasks need ({what}); install this version there") from None
        raise PipelineError(f"a task ended with {type(error.cause).__name__} ({lines[0]}); its node's log has more") from None
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError) as error:
        why = str(error).strip().split("\n")[0]
        raise PipelineError(f"a task was lost {RETRIES + 1} times ({why}); perhaps its node has too little memory") from None
    except ray.exceptions.RayError as error:
        why = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
        raise PipelineError(f"the Ray cluster does not do ({why}); see `ray status`, then start again") from None


@contextmanager
def _cluster() -> Iterator[Any]:
    """Connect to Ray without its log and usage statistics; afterwards disconnect, unless Ray was connected before."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # avoids a warning about a future change
    try:
        import ray
    except ImportError:
        raise UsageError("the engine 'ray' needs Ray; pip install 'dali_pipeline[ray]' on all nodes") from None
    ours = not ray.is_initialized()
    if ours:
        _check_reached(os.environ.get("RAY_ADDRESS", ""))
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:
            where = os.environ.get("RAY_ADDRESS") or "this machine"
            why = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
            raise UsageError(f"no Ray cluster was reached at {where} ({why}); check RAY_ADDRESS and `ray status`") from None
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _check_reached(address: str) -> None:
    """Raise UsageError if nobody listens at HOST:PORT; Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            why = error.strerror or error
            raise UsageError(f"no Ray cluster was reached at {address} ({why}); check RAY_ADDRESS") from None


def _check_fits(ray: Any, asked: Asks) -> None:
    """Raise UsageError if there are nodes and none has the resources; a cluster without nodes may start some on demand."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0)]
    if nodes and not any(node.get("CPU", 0) >= asked.cores and node.get("GPU", 0) >= asked.gpus for node in nodes):
        resources = f"{asked.cores} cores" + (f" and {asked.gpus} GPU" if asked.gpus else "")
        raise UsageError(f"no node of the Ray cluster has the {resources} that a task asks for; OMP_NUM_THREADS sets its cores")
