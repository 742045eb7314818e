"""Environment of a command: standard streams, working folder and signals, each failure of which is one sentence."""

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
    """SIGTERM arrived. It is no Exception, so handlers of errors let it pass, and cleanup code runs."""

    exit_code = 128 + signal.SIGTERM


def check_outside() -> None:
    """Make standard streams that accept any character; raise UsageError for a closed standard output, or no working folder.

    A closed stream is replaced by one to the null device. Otherwise the next file opened would get its number, and what a
    library prints would be written into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # uses the lowest free number
    closed = sys.stdout is None
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w", encoding="utf-8") for stream in (sys.stdout, sys.stderr))  # noqa: PTH123, SIM115
    if closed:
        raise UsageError("standard output is closed; expected somewhere to print to, if only >/dev/null")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        os.getcwd()  # noqa: PTH109
    except FileNotFoundError:  # libraries beneath torch end the process for it
        raise UsageError("the working folder is gone; go to one that is there") from None


@contextmanager
def terminable() -> Iterator[None]:
    """Raise Terminated for the first SIGTERM within the block, unless the program has its own handler; a second one kills."""
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != process:  # forked meanwhile: another process cleans up
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
    """Raise BrokenPipeError for a broken pipe within the block, where typer would end with exit code 1 and hide the streams."""
    streams = sys.stdout, sys.stderr
    try:
        yield
    except SystemExit as end:
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        sys.stdout, sys.stderr = streams
        raise end.__context__ from None


def readable(root: Any) -> str:
    """Return a path or URL as text that any encoding accepts; bytes of a name that are not UTF-8 become U+FFFD."""
    return str(root).encode(errors="surrogateescape").decode(errors="replace")


def as_output(path: Path) -> Path:
    """Return the file that a user's path stands for, links followed; raise UsageError if it is no regular file."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise UsageError(f"{path} is no regular file; expected the name of a file to be written")
    return target


def say(text: str) -> None:
    """Print a line on standard error, if it can be written to."""
    with suppress(OSError, ValueError):
        sys.stderr.write(text.encode(errors="backslashreplace").decode() + "\n")
    drained(sys.stderr)


def drained(stream: IO[Any]) -> bool:
    """Flush a stream; return whether that worked. Otherwise the rest is dropped, or Python would end with code 120."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), stream.fileno())
        return False
    return True


def reason_of(error: OSError) -> str:
    """Return what failed, and where, in words."""
    why = error.strerror or str(error) or type(error).__name__
    if error.filename is not None:
        return f"{os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename}: {why}"
    return f"standard output, or a file without a name, failed ({why}); expected free space and an open stream"
