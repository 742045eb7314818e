"""Interrupts: SIGTERM and Ctrl-C end a run at the next safe place, with a checkpoint and the usual exit code."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """The run was asked to stop: no error, so what catches errors lets it through. exit_code: 128 and the signal's number."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


class Interrupts:
    """Asked by loops between two steps, `check` raises Interrupted once a signal came. Elsewhere a signal raises at once."""

    def __init__(self) -> None:
        self._received = 0
        self._deferred = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._deferred and not self._received:
            self._received = number
            return
        raise Interrupted(number)  # outside a loop, or a second time: now

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block a first signal only is noted."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def check(self) -> None:
        """Raises Interrupted where a signal was noted."""
        if self._received:
            raise Interrupted(self._received)
