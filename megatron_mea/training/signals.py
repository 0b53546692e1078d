"""Stop requests: after SIGUSR2, SIGTERM or Ctrl-C a run finishes its step, saves, and exits with status 0."""

from __future__ import annotations

import os
import signal
import threading
import time

_STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
_REPEAT_SECONDS = 2.0
"""Seconds in which further signals count as repeats of the first: a terminal signals the launcher and every rank, and
the launcher passes the signal on."""


class StopSignal:
    """Set by the first signal (`received` is its name); a second one more than two seconds later ends the process.

    A thread receives them, since a process that waits for another rank or for a disk runs no Python signal handlers,
    and that is when somebody signals twice.

    Create it before torch is imported: a signal during that import would kill the process.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in _STOP_SIGNALS:
            # Without a handler the signal would kill.
            signal.signal(number, lambda number, frame: None)

        threading.Thread(target=self._listen, args=(read_end,), name="signals", daemon=True).start()

    def _listen(self, read_end: int) -> None:
        received_at = 0.0
        while True:
            for number in os.read(read_end, 64):
                if number not in _STOP_SIGNALS:
                    continue

                if self.received is not None and number == signal.SIGTERM and "SLURM_JOB_ID" in os.environ:
                    # SLURM sends it at a job's time limit, and kills by itself if the job takes too long to end.
                    continue

                if self.received is None:
                    self.received, received_at = signal.Signals(number).name, time.monotonic()
                elif time.monotonic() - received_at > _REPEAT_SECONDS:
                    os._exit(128 + number)
