"""Run the parts of benchmarks/gpu_day.py in a worker process, each with a deadline, and receive their messages.

A part is a function `(setup, deadline, report)`. It runs in a worker process, so that a crash in a library, an endless wait, or
a GPU that refuses everything after an illegal access costs that part alone: the next one gets a fresh process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Message = dict[str, Any]  # one key: what it tells
REASON_LENGTH = 300
ENDING_SECONDS, KILLED_SECONDS = 0.5, 5.0  # that a process may take to end by itself, and to be gone once killed


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Device, folder and extent of the measurements.

    Attributes:
        device: `cuda` or `cpu`.
        folder: Scratch folder; the parts share the data sets in it.
        quick: Whether small sets and few combinations are enough, as in a dry run.
    """

    device: str
    folder: Path
    quick: bool


class Deadline:
    """The moment at which a part stops measuring.

    Args:
        seconds: From now on.
        clock: Seconds that never go back.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    @property
    def left_seconds(self) -> float:
        """Seconds until the deadline, or 0 if it has passed."""
        return max(0.0, self._end - self._clock())

    @property
    def passed(self) -> bool:
        """Whether nothing more may begin."""
        return self.left_seconds <= 0


class Report:
    """The messages of a running part. Every message is sent at once, so that it outlives the process.

    Args:
        send: Takes the messages in order.
    """

    def __init__(self, send: Callable[[Message], None]) -> None:
        self._send = send

    def facts(self, **facts: Any) -> None:
        """Send facts by name, in JSON types; a later one replaces an earlier one of the same name."""
        self._send({"facts": facts})

    def add(self, scenario: str, measured: str, unit: str, values: list[float], *, cache: str = "", beside: str = "") -> None:
        """Send a measurement.

        Args:
            scenario: Data and batch size, for example.
            measured: What of it.
            unit: Of the values.
            values: One or more samples.
            cache: `warm` where files lay in the page cache, empty where none are read.
            beside: The `measured` of the same scenario and unit that the values are held against, told before.
        """
        row = {"scenario": scenario, "measured": measured, "unit": unit, "values": values, "cache": cache, "beside": beside}
        self._send({"row": row})

    def failed(self, scenario: str, measured: str, error: BaseException) -> None:
        """Send the reason why something could not be measured."""
        self._send({"failed": {"scenario": scenario, "measured": measured, "why": reason(error)}})

    def left_out(self, count: int, total: int) -> None:
        """Send the number of combinations for which the deadline left no time."""
        self._send({"left_out": {"count": count, "total": total}})


class DeviceLostError(RuntimeError):
    """The GPU refuses all further work of this process."""


def reason(error: BaseException) -> str:
    """Return one line that says what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    name = type(error).__name__
    return f"{name}: {lines[0]}"[:REASON_LENGTH] if lines else name


def run_grid(
    combinations: Sequence[T],
    measure: Callable[[T], None],
    name: Callable[[T], tuple[str, str]],
    setup: Setup,
    deadline: Deadline,
    report: Report,
    least_seconds: Callable[[T], float] = lambda _: 0.0,
) -> None:
    """Measure one combination after the other until the deadline. A failure is reported, and the others still run.

    Args:
        combinations: The most telling ones first.
        measure: Measures one and tells what it found.
        name: Returns scenario and measured of a combination, for a failure.
        setup: Where they run.
        deadline: Looked at before each combination.
        report: Told of failures, and of how many were left out.
        least_seconds: Seconds without which a combination does not begin.

    Raises:
        DeviceLostError: If the device cannot be used any more.
    """
    for number, combination in enumerate(combinations):
        if deadline.left_seconds <= least_seconds(combination):
            report.left_out(len(combinations) - number, len(combinations))
            return
        try:
            measure(combination)
        except Exception as error:  # whatever a library raises on its first day on a GPU
            report.failed(*name(combination), error)
            if not is_usable(setup.device):
                report.left_out(len(combinations) - number - 1, len(combinations))
                raise DeviceLostError(f"the GPU refuses further work after {' '.join(name(combination))}") from error


def is_usable(device: str) -> bool:
    """Return whether the device still works in this process; waits for it."""
    if device == "cpu":
        return True
    try:
        import torch

        torch.cuda.synchronize()
        return float(torch.ones(2, device=device).sum()) == 2
    except Exception:  # a sticky error of CUDA
        return False


def work(setup: Setup, connection: Connection) -> None:
    """Run the parts that the connection names until it ends: the worker process."""
    os.setsid()  # so that what it starts ends with it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with suppress(EOFError):
        while True:
            target, seconds = connection.recv()
            error = ""
            try:
                module, _, function = target.partition(":")
                getattr(import_module(module), function)(setup, Deadline(seconds), Report(connection.send))
            except Exception as caught:  # the others go on
                error = reason(caught)
            usable = is_usable(setup.device)
            connection.send({"end": error, "usable": usable})
            if not usable:
                return


class Worker:
    """The process that runs the parts; it is replaced after it crashed, hung or lost its device."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._process: Any = None
        self._connection: Any = None

    def run(self, target: str, seconds: float, most_seconds: float, take: Callable[[Message], None]) -> str:
        """Run a part.

        Args:
            target: `module:function`.
            seconds: Until its deadline.
            most_seconds: After these it is killed.
            take: Called with each of its messages.

        Returns:
            Why it failed, in a line; empty if it did not.
        """
        end = time.monotonic() + most_seconds
        try:
            if self._process is None:
                self._start()
            self._connection.send((target, seconds))
            while self._connection.poll(max(0.0, end - time.monotonic())):
                message = self._connection.recv()
                if "end" in message:
                    if not message["usable"]:
                        self.stop()
                    error: str = message["end"]
                    return error if message["usable"] else error or "the GPU refuses further work"
                take(message)
        except (EOFError, OSError):
            return f"its process ended with {self.stop()}"
        self.stop()
        return f"not over within {most_seconds:.0f} s, so its process was killed"

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=work, args=(self._setup, other))
        self._process.start()
        other.close()

    def stop(self) -> int | None:
        """End the process and all that it started. Returns its exit code, negative for a signal; None without one."""
        process, self._process = self._process, None
        if process is None:
            return None
        self._connection.close()  # at which an idle one ends
        process.join(ENDING_SECONDS)
        with suppress(ProcessLookupError, PermissionError):  # gone, or not yet a group of its own
            os.killpg(process.pid, signal.SIGKILL)
        if process.is_alive():
            process.kill()
        process.join(KILLED_SECONDS)
        code: int | None = process.exitcode
        return code
