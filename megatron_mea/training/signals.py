"""Stop requests: after SIGUSR2, SIGTERM, SIGHUP or Ctrl-C a run finishes its step, saves, and exits with status 0."""

from __future__ import annotations

import os
import signal
import stat
import threading
import time

_STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
_REPEAT_SECONDS = 2.0
"""Seconds in which further signals count as repeats of the first: a terminal signals the launcher and every rank, and
the launcher passes the signal on."""
LAUNCHER_VARIABLE = "MEA_LAUNCHER_PIPE"
"""Environment variable with the descriptor of a pipe whose other end the launcher alone holds, so that it reads as
ended when the launcher is gone, even by SIGKILL."""


def hangup_signals() -> list[signal.Signals]:
    """SIGHUP, which a closed terminal sends; nothing where it is ignored, as nohup has it."""
    return [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]


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
        self._numbers = (*_STOP_SIGNALS, *hangup_signals())
        for number in self._numbers:
            # Without a handler the signal would kill.
            signal.signal(number, lambda number, frame: None)

        threading.Thread(target=self._listen, args=(read_end,), name="signals", daemon=True).start()
        if (launcher := _launcher_pipe()) is not None:
            threading.Thread(target=self._stop_with_launcher, args=(launcher,), name="launcher", daemon=True).start()

    def _listen(self, read_end: int) -> None:
        received_at = 0.0
        while True:
            for number in os.read(read_end, 64):
                if number not in self._numbers:
                    continue

                if self.received is not None and self._comes_by_itself(number):
                    continue

                if self.received is None:
                    self.received, received_at = signal.Signals(number).name, time.monotonic()
                elif time.monotonic() - received_at > _REPEAT_SECONDS:
                    os._exit(128 + number)

    def _stop_with_launcher(self, pipe: int) -> None:
        """Sends this process SIGTERM when the launcher is gone, unless it stops already: that must not end its save."""
        while os.read(pipe, 64):
            pass

        if self.received is None:
            os.kill(os.getpid(), signal.SIGTERM)

    @staticmethod
    def _comes_by_itself(number: int) -> bool:
        """Whether the signal may follow another one without anybody's wish to interrupt a save.

        SLURM sends TERM at a job's time limit, and kills by itself if the job takes too long to end; a terminal that
        is closed may send HUP after whatever else has ended it.
        """
        return number == signal.SIGHUP or (number == signal.SIGTERM and "SLURM_JOB_ID" in os.environ)


def _launcher_pipe() -> int | None:
    """The descriptor in `LAUNCHER_VARIABLE`, which is for this process alone; None where it is no pipe."""
    value = os.environ.pop(LAUNCHER_VARIABLE, "")
    try:
        return int(value) if value.isdecimal() and stat.S_ISFIFO(os.fstat(int(value)).st_mode) else None
    except (OSError, OverflowError):
        # A wrapper between the launcher and this process has closed it.
        return None
