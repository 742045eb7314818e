"""What the pretended GPU was asked to do, and by which line of the project."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[2]
Kind = Literal["wait", "pageable copy", "pinned copy", "kernel", "LSTM"]


@dataclass
class Log:
    """Counts by kind, what it was and the line that asked for it. nbytes: copied to the device, by kind of copy."""

    counts: Counter[tuple[Kind, str, str]] = field(default_factory=Counter)
    nbytes: Counter[Kind] = field(default_factory=Counter)
    silent: int = 0

    def add(self, kind: Kind, what: str, nbytes: int = 0) -> None:
        """Count one event."""
        if not self.silent:
            self.counts[kind, what, _line()] += 1
            self.nbytes[kind] += nbytes

    def number(self, kind: Kind) -> int:
        """Return how many events of a kind there were."""
        return sum(count for (one, _, _), count in self.counts.items() if one == kind)

    def lines(self, kind: Kind) -> list[str]:
        """Return the events of a kind as text, the most frequent first."""
        found = [(count, what, line) for (one, what, line), count in self.counts.items() if one == kind]
        return [f"{count} x {what} at {line}" for count, what, line in sorted(found, reverse=True)]

    def clear(self) -> None:
        """Forget what was counted."""
        self.counts.clear()
        self.nbytes.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing inside the block."""
        self.silent += 1
        try:
            yield
        finally:
            self.silent -= 1


LOG = Log()


def _line() -> str:
    """Return the innermost line of the project, without the tests, on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(str(ROOT)) and "/tests/" not in path and "/.venv/" not in path:
            return f"{path.removeprefix(f'{ROOT}/')}:{frame.f_lineno}"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return "tests"
