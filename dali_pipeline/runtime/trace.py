"""Trace: what a run did when, in which thread, as a file that ui.perfetto.dev and chrome://tracing open."""

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
MOST_EVENTS = 500_000  # some 50 MB, about what the viewers take
HELD_SECONDS, HELD_EVENTS = 1.0, 1000  # what waits in memory, and is all that SIGKILL takes
_END = b"\n]\n"
_NOTHING = nullcontext()
_active: Trace | None = None  # one a process, as with logging: threads write to it without being handed it
log = logging.getLogger("dali_pipeline")


@dataclass
class _Track:
    thread: threading.Thread
    number: int
    end: float  # of its last event


class Trace(AbstractContextManager["Trace"]):
    """Writes to `path` every `span` of this process, and what a StepTimer times, until the end of the block.

        with dp.Trace("trace.json"):
            for batch in timer(loader):
                train(batch)

    An array of complete events (Trace Event Format), closed at every write, so that the file of an interrupted run opens too.
    It is written to once a second, where something happens, and ends with `most` events: memory and disk are bounded. An event
    costs some microseconds; a span while no trace is written, less than one. Raises UsageError for a path that cannot be
    written, and for a trace within another; a disk that fills up ends the trace, with a line in the log, and not the run.
    """

    def __init__(self, path: str | os.PathLike[str], most: int = MOST_EVENTS) -> None:
        self.path, self._most = Path(path), most

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
        self._lock, self._process, self._began = threading.Lock(), os.getpid(), time.perf_counter()
        self._held: list[dict[str, Any]] = []
        self._tracks: dict[str, list[_Track]] = {}  # by the threads' name
        self._workers: set[int] = set()
        self._events, self._at, self._wrote, self._open = 0, 0, self._began, True
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
        if self._events > self._most:
            log.warning("%s holds the first %d of %d events", self.path, self._most, self._events)

    def add(self, name: str, begin: float, end: float, worker: int | None = None) -> None:
        """What happened from `begin` to `end`, as time.perf_counter has them, in this thread, or in the process `worker`."""
        if os.getpid() != self._process:  # forked meanwhile; the file is the parent's
            return
        with self._lock:
            self._events += 1
            if not self._open or self._events > self._most:
                return
            if worker and worker not in self._workers:
                self._workers.add(worker)
                self._name("process_name", worker, worker, "worker process")
                self._name("thread_name", worker, worker, "gather")
            thread = worker or self._line(threading.current_thread(), begin, end)
            event: dict[str, Any] = {"name": name, "ph": "X", "ts": round((begin - self._began) * 1e6, 3)}
            event |= {"dur": round((end - begin) * 1e6, 3), "pid": worker or self._process, "tid": thread}
            self._held.append(event)
            if len(self._held) >= HELD_EVENTS or end - self._wrote >= HELD_SECONDS:
                self._write()

    def _line(self, thread: threading.Thread, begin: float, end: float) -> int:
        """The thread's line in the picture: that of an ended one of its name, or a new one, as every epoch has its own."""
        tracks = self._tracks.setdefault(thread.name, [])
        for track in tracks:
            if track.thread is thread or (not track.thread.is_alive() and track.end <= begin):
                track.thread, track.end = thread, end
                return track.number
        number = self._process  # as viewers know the main thread
        if thread is not threading.main_thread():
            number += 1 + sum(map(len, self._tracks.values()))
        tracks.append(_Track(thread, number, end))
        self._name("thread_name", self._process, number, thread.name)
        return number

    def _name(self, what: str, process: int, thread: int, name: str) -> None:
        self._held.append({"name": what, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}})

    def _write(self) -> None:
        """What is held, over the end of the array, and a new end, in one call."""
        self._wrote = time.perf_counter()
        if not self._open or not self._held:
            return
        lines = (b",\n" if self._at else b"[\n") + b",\n".join(json.dumps(event).encode() for event in self._held)
        self._held = []
        try:
            if os.pwrite(self._fd, lines + _END, self._at) == len(lines + _END):
                self._at += len(lines)
                return
            why = "the disk is full"
        except OSError as error:
            why = str(error.strerror)
        self._open = False
        with suppress(OSError):
            os.ftruncate(self._fd, self._at)
            os.pwrite(self._fd, _END, self._at)
        log.warning("the trace %s ends early (%s); the run goes on", self.path, why)


def span(name: str, when: bool = True) -> AbstractContextManager[None]:
    """A block that a trace shows under this name, in its thread; nothing at all while none is written, or not `when`."""
    return _Span(_active, name) if when and _active is not None else _NOTHING


def spans(name: str, items: Iterable[T]) -> Iterator[T]:
    """The items; a span for each while it is waited for."""
    iterator = iter(items)
    while True:
        with span(name):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def add(name: str, begin: float, end: float, worker: int | None = None) -> None:
    """`Trace.add` of the trace that is being written, if one is."""
    if _active is not None:
        _active.add(name, begin, end, worker)


class _Span(AbstractContextManager[None]):
    def __init__(self, trace: Trace, name: str) -> None:
        self._trace, self._name = trace, name

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._trace.add(self._name, self._begin, time.perf_counter())
