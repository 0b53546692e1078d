"""Asking a run to stop: SIGUSR2, SIGTERM and Ctrl-C end the step in hand, save, and leave with status 0."""

from __future__ import annotations

import os
import signal
from types import FrameType


class StopSignal:
    """Set by the first signal; a second one ends the process at once.

    Installed before torch is imported: a signal that comes during that import would kill the process.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = signal.Signals(number).name
