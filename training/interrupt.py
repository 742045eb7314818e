"""Interrupts: SIGTERM and Ctrl-C end a run at the next safe place, with a checkpoint and the usual exit code."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from training.processes import Processes


class Interrupted(BaseException):
    """The run was asked to stop: no error, so what catches errors lets it through. exit_code: 128 and the signal's number."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


class Interrupts:
    """Asked by loops between two steps, `agreed` raises Interrupted once a signal came. Elsewhere a signal raises at once.

    With several processes all stop at the same step, whichever got the signal; and as torchrun passes a terminal's signal on,
    so that it comes twice, a second one changes nothing there.
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
        """Within the block a first signal only is noted."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def agreed(self, wish: bool = False) -> bool:
        """Whether any process had a `wish` (below); raises Interrupted, in all, where one was signalled.

        To be called by all processes at every step; with several the answer is about the step before.
        """
        number = self._processes.agree(self._received or int(wish))
        if number > 1:
            raise Interrupted(number)
        return bool(number)
