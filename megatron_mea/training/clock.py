"""A clock for timeouts and timings that stands still while the process does."""

from __future__ import annotations

import threading
import time

TICK_SECONDS = 0.2
"""Seconds between two readings, for which somebody must care."""
_STOP_SECONDS = 2.0
"""A reading that comes so late shows a stop: a thread that waits for a busy machine is not that late."""


class AwakeClock:
    """Seconds for which this process was not stopped, by SIGSTOP, `scontrol suspend` or a machine that sleeps.

    Whoever owns it reads it every `TICK_SECONDS`; a long time between two readings, by any thread, is left out.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read_at = time.monotonic()
        self._awake_seconds, self._stops = 0.0, 0

    def __call__(self) -> float:
        """Seconds since the clock was made."""
        with self._lock:
            seconds = time.monotonic() - self._read_at
            self._read_at += seconds
            if seconds > _STOP_SECONDS:
                self._stops += 1
            else:
                self._awake_seconds += seconds

            return self._awake_seconds

    @property
    def stops(self) -> int:
        """How often the process was stopped up to now."""
        self()
        return self._stops
