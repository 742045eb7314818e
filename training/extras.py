"""Extras: write the optional files of a run; if one cannot be written, the run goes on without it."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

log = logging.getLogger("dali_pipeline")


@contextmanager
def extra(what: Path) -> Iterator[None]:
    """Turn any exception within the block into one line in the log."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        log.warning("%s cannot be made (%s); the run goes on without", what, reason)


class Board:
    """Writes figures by epoch to a file for TensorBoard, until one cannot be written.

    Does not use torch's SummaryWriter, which writes in a thread that prints tracebacks. purge_step: epoch of the resume.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        self._folder = folder
        self._records: RecordWriter | None = None
        with extra(folder):
            folder.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
            self._records = RecordWriter((folder / name).open("wb"))
        self._write(
            Event(file_version="brain.Event:2"), Event(step=purge_step, session_log=SessionLog(status=SessionLog.START))
        )

    def note(self, epoch: int, figures: Mapping[str, float]) -> None:
        """Write the figures of an epoch; they are in the file when this returns."""
        values = [Summary.Value(tag=name, simple_value=figure) for name, figure in figures.items()]
        self._write(Event(step=epoch, summary=Summary(value=values)))

    def close(self) -> None:
        """Close the file."""
        if self._records is not None:
            with extra(self._folder):
                self._records.close()

    def _write(self, *events: Event) -> None:
        records, self._records = self._records, None
        if records is None:
            return
        with extra(self._folder):
            for event in events:
                event.wall_time = time.time()
                records.write(event.SerializeToString())
            records.flush()
            self._records = records
        if self._records is None:
            with suppress(OSError):
                records.close()
