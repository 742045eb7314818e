"""Interrupts: end a run at SIGTERM or Ctrl-C at the next safe step, with a checkpoint and the usual exit code."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from training.processes import Processes


class Interrupted(BaseException):
    """The run was asked to stop; a BaseException, so that handlers of errors let it pass. exit_code: 128 + signal."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


class Interrupts:
    """Handles signals: loops call `agreed` between two steps, which raises Interrupted. Elsewhere a signal raises at once.

    With several processes all stop at the same step, whichever process got the signal. A second signal is then ignored, because
    torchrun passes the signal of a terminal on, so that it arrives twice.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._received = 0
        self._deferred = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self._received = self._received, number
        if again and self._processes.world_size > 1:
            return
        if again or not self._deferred:  # a second time, or outside a loop: now
            raise Interrupted(number)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note a first signal within the block."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def agreed(self, wish: bool = False) -> bool:
        """Return whether any process had a `wish`; raise Interrupted in all processes if one got a signal.

        All processes must call it at every step. With several processes the answer is about the step before.
        """
        number = self._processes.agree(self._received or int(wish))
        if number > 1:
            raise Interrupted(number)
        return bool(number)
