"""Trace: what a run did when, in which thread, as a file for ui.perfetto.dev and chrome://tracing."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from dali_pipeline.errors import UsageError

T = TypeVar("T")
MOST_EVENTS = 500_000  # some 50 MB, about what the viewers can open
FLUSH_SECONDS, FLUSH_EVENTS = 1.0, 1000  # events buffered in memory, which is all that SIGKILL loses
_END = b"\n]\n"
_NOTHING = nullcontext()
_active: Trace | None = None  # one per process, as with logging, so that all threads write to it
log = logging.getLogger("dali_pipeline")


@dataclass
class _Track:
    """Row of a thread in the picture."""

    thread: threading.Thread
    number: int
    end: float  # end of its last event


class Trace(AbstractContextManager["Trace"]):
    """Write every `span` of this process, and the times of a StepTimer, to a file until the end of the block.

    The file is an array of complete events (Trace Event Format), closed at every write, so the file of an interrupted run opens
    too. It is written once per second, or per 1000 events, while something happens. A disk that fills up ends the trace with a
    line in the log, and not the run.

    Costs some microseconds per event, and less than one per span while no trace is written. Memory and disk are bounded by
    `most`.

    Args:
        path: File to write.
        most: Largest number of events. Default: 500,000, some 50 MB.

    Raises:
        UsageError: The path cannot be written, or another trace is being written.

    Examples:
        >>> with dp.Trace("trace.json"):  # doctest: +SKIP
        ...     for batch in timer(loader):
        ...         train(batch)
    """

    def __init__(self, path: str | os.PathLike[str], most: int = MOST_EVENTS) -> None:
        self.path, self._max_events = Path(path), most

    def __enter__(self) -> Trace:
        global _active
        if _active is not None:
            raise UsageError(f"a trace is being written to {_active.path}; expected one at a time, so end it first")
        try:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        except OSError as error:
            raise UsageError(
                f"{self.path} cannot be written ({error.strerror}); expected the name of a file in a folder that is there"
            ) from None
        self._lock, self._process, self._begin_seconds = threading.Lock(), os.getpid(), time.perf_counter()
        self._buffered: list[dict[str, Any]] = []
        self._tracks: dict[str, list[_Track]] = {}  # by name of the threads
        self._workers: set[int] = set()
        self._events, self._end_offset, self._last_write, self._open = 0, 0, self._begin_seconds, True
        self._name("process_name", self._process, self._process, Path(sys.argv[0]).name or "python")
        self._write()
        _active = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        global _active
        _active = None
        if os.getpid() != self._process:
            return
        with self._lock:
            self._write()
            self._open = False
            os.close(self._fd)
        if self._events > self._max_events:
            log.warning("%s holds the first %d of %d events", self.path, self._max_events, self._events)

    def add(self, name: str, begin: float, end: float, worker: int | None = None) -> None:
        """Add an event.

        Args:
            name: Name of the event.
            begin: Begin, in seconds of `time.perf_counter`.
            end: End, in the same seconds.
            worker: Process id of the worker that it happened in. Default: None, for the current thread.
        """
        if os.getpid() != self._process:  # forked meanwhile; the file is the parent's
            return
        with self._lock:
            self._events += 1
            if not self._open or self._events > self._max_events:
                return
            if worker and worker not in self._workers:
                self._workers.add(worker)
                self._name("process_name", worker, worker, "worker process")
                self._name("thread_name", worker, worker, "gather")
            thread = worker or self._line(threading.current_thread(), begin, end)
            event: dict[str, Any] = {"name": name, "ph": "X", "ts": round((begin - self._begin_seconds) * 1e6, 3)}
            event |= {"dur": round((end - begin) * 1e6, 3), "pid": worker or self._process, "tid": thread}
            self._buffered.append(event)
            if len(self._buffered) >= FLUSH_EVENTS or end - self._last_write >= FLUSH_SECONDS:
                self._write()

    def _line(self, thread: threading.Thread, begin: float, end: float) -> int:
        """Return the thread's row in the picture: the row of an ended thread of its name, or a new one."""
        tracks = self._tracks.setdefault(thread.name, [])
        for track in tracks:
            if track.thread is thread or (not track.thread.is_alive() and track.end <= begin):
                track.thread, track.end = thread, end
                return track.number
        number = self._process  # viewers take this number for the main thread
        if thread is not threading.main_thread():
            number += 1 + sum(map(len, self._tracks.values()))
        tracks.append(_Track(thread, number, end))
        self._name("thread_name", self._process, number, thread.name)
        return number

    def _name(self, what: str, process: int, thread: int, name: str) -> None:
        self._buffered.append({"name": what, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}})

    def _write(self) -> None:
        """Write the buffered events over the end of the array, and a new end, in one call."""
        self._last_write = time.perf_counter()
        if not self._open or not self._buffered:
            return
        lines = (b",\n" if self._end_offset else b"[\n") + b",\n".join(json.dumps(event).encode() for event in self._buffered)
        self._buffered = []
        try:
            if os.pwrite(self._fd, lines + _END, self._end_offset) == len(lines + _END):
                self._end_offset += len(lines)
                return
            why = "the disk is full"
        except OSError as error:
            why = str(error.strerror)
        self._open = False
        with suppress(OSError):
            os.ftruncate(self._fd, self._end_offset)
            os.pwrite(self._fd, _END, self._end_offset)
        log.warning("the trace %s ends early (%s); the run goes on", self.path, why)


def span(name: str, when: bool = True) -> AbstractContextManager[None]:
    """Mark a block that a trace shows under a name, in its thread. It does nothing while no trace is written.

    Args:
        name: Name of the block.
        when: Whether to mark it. Default: True.

    Returns:
        A context manager.

    Costs less than a microsecond while no trace is written, some microseconds otherwise.
    """
    return _Span(_active, name) if when and _active is not None else _NOTHING


def spans(name: str, items: Iterable[T]) -> Iterator[T]:
    """Yield the items, with a span around the wait for each."""
    iterator = iter(items)
    while True:
        with span(name):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def add(name: str, begin: float, end: float, worker: int | None = None) -> None:
    """Call `Trace.add` of the trace that is being written, if there is one."""
    if _active is not None:
        _active.add(name, begin, end, worker)


class _Span(AbstractContextManager[None]):
    """Context manager that adds its block to a trace."""

    def __init__(self, trace: Trace, name: str) -> None:
        self._trace, self._name = trace, name

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._trace.add(self._name, self._begin, time.perf_counter())
