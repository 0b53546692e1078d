"""Asking a run to stop: SIGUSR2, SIGTERM and Ctrl-C end the step in hand, save, and leave with status 0."""

from __future__ import annotations

import os
import signal
import threading
import time

_NUMBERS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
_SAME_WISH = 2.0
"""Seconds. A terminal signals the launcher and every rank, and the launcher passes the signal on."""


class StopSignal:
    """Set by the first signal; a second one, more than a moment later, ends the process at once.

    A thread hears them, since a process that waits for another rank, or for a disk, runs no handler of Python's: that
    is when somebody signals twice.

    Made before torch is imported: a signal that comes during that import would kill the process.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        heard, written = os.pipe()
        os.set_blocking(written, False)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        for number in _NUMBERS:
            # Without a handler the signal would kill.
            signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._listen, args=(heard,), name="signals", daemon=True).start()

    def _listen(self, heard: int) -> None:
        since = 0.0
        while True:
            for number in os.read(heard, 64):
                if number not in _NUMBERS:
                    continue
                if self.received is not None and number == signal.SIGTERM and "SLURM_JOB_ID" in os.environ:
                    # At the limit of a job, or on its way out: SLURM kills by itself what takes too long.
                    continue
                if self.received is None:
                    self.received, since = signal.Signals(number).name, time.monotonic()
                elif time.monotonic() - since > _SAME_WISH:
                    os._exit(128 + number)
