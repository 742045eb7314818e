"""The outside of a command: standard streams, working folder and signals, so that each of their faults is one sentence."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

from dali_pipeline.errors import UsageError


class Terminated(BaseException):
    """SIGTERM came: no error, so what catches errors lets it through, and what cleans up does."""

    exit_code = 128 + signal.SIGTERM


def check_outside() -> None:
    """Makes standard streams that fail at no character. Raises UsageError for a closed standard output, or no working folder.

    A closed stream is replaced by one that goes nowhere: else the next file that is opened would have its number, and what a
    library prints would be written into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    closed = sys.stdout is None
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w", encoding="utf-8") for stream in (sys.stdout, sys.stderr))  # noqa: PTH123, SIM115
    if closed:
        raise UsageError("standard output is closed; expected somewhere to print to, if only >/dev/null")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        os.getcwd()  # noqa: PTH109
    except FileNotFoundError:  # with which libraries beneath torch end the process
        raise UsageError("the working folder is gone; go to one that is there") from None


@contextmanager
def terminable() -> Iterator[None]:
    """Within the block a first SIGTERM raises Terminated, unless the program has a handler of its own; a second one kills."""
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != process:  # forked meanwhile: not the process that cleans up
            os.kill(os.getpid(), signal.SIGTERM)
        raise Terminated

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def broken_pipes() -> Iterator[None]:
    """Within the block a broken pipe is BrokenPipeError, where typer would make of it exit code 1, and streams that hide it."""
    streams = sys.stdout, sys.stderr
    try:
        yield
    except SystemExit as end:
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        sys.stdout, sys.stderr = streams
        raise end.__context__ from None


def readable(root: Any) -> str:
    """A path or URL as text that any encoding of text takes; bytes of a name that are no UTF-8 become U+FFFD."""
    return str(root).encode(errors="surrogateescape").decode(errors="replace")


def as_output(path: Path) -> Path:
    """The file that a name given by the user stands for, links followed. Raises UsageError for one that is no regular file."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise UsageError(f"{path} is no regular file; expected the name of a file to be written")
    return target


def say(text: str) -> None:
    """A line on standard error, if that can be written to."""
    with suppress(OSError, ValueError):
        sys.stderr.write(text.encode(errors="backslashreplace").decode() + "\n")
    drained(sys.stderr)


def drained(stream: IO[Any]) -> bool:
    """Whether all that was printed is where it should be. If not, the rest goes nowhere, or Python would end with code 120."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), stream.fileno())
        return False
    return True


def reason_of(error: OSError) -> str:
    """What went wrong, and where, in words."""
    why = error.strerror or str(error) or type(error).__name__
    if error.filename is not None:
        return f"{os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename}: {why}"
    return f"standard output, or a file without a name, failed ({why}); expected free space and an open stream"
