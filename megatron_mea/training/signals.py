"""Asking a run to stop: SIGUSR2, SIGTERM and Ctrl-C end the step in hand, save, and leave with status 0."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType


class StopSignal:
    """Set by the first signal; a second one, a while later, ends the process at once.

    A terminal signals the launcher and every rank, and the launcher passes the signal on, so what follows within
    two seconds is the same wish.

    Installed before torch is imported: a signal that comes during that import would kill the process.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._since = 0.0
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._since > 2:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
