"""Ends a rank that makes no progress, with the stacks of its threads in the log."""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_mea.training.clock import TICK_SECONDS, AwakeClock

_GRACE = 5.0
"""Seconds in which the other ranks, which hang in the same collective, write their stacks too: a launcher kills them
when the first one ends."""


class Watchdog:
    """A thread that ends the process with status 1 when `mark` has not been called for some minutes.

    Every rank has one: a collective that hangs holds all ranks, so each writes where it is. A job that was suspended
    is no hang: the minutes count anew when it goes on.

    Args:
        rank: of this process.
        minutes: without a mark, after which the process ends; may be changed later.

    Attributes:
        clock: kept going by this thread, for other timers.
    """

    def __init__(self, rank: int, minutes: float) -> None:
        self.rank, self.minutes = rank, minutes
        self.clock = AwakeClock()
        self._stop = threading.Event()
        self.mark()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def mark(self) -> None:
        """Records progress: the minutes count from here."""
        self._marked_at = self.clock()

    @contextmanager
    def extend_timeout(self, minutes: float) -> Iterator[None]:
        """Waits for at least `minutes` inside of the context, for work that may take longer, as on a slow disk."""
        self.mark()
        self.minutes, previous = max(minutes, self.minutes), self.minutes
        yield
        self.mark()
        self.minutes = previous

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()

    def _watch(self) -> None:
        stops = self.clock.stops
        while not self._stop.wait(TICK_SECONDS):
            if stops != self.clock.stops:
                # Other ranks may be woken later.
                stops = self.clock.stops
                self.mark()
            elif self.clock() - self._marked_at > 60 * self.minutes:
                try:
                    sys.stderr.write(self._stacks())
                    sys.stderr.flush()
                    self._dump_collectives()
                    time.sleep(_GRACE)
                finally:
                    # Also where the stacks cannot be written.
                    os._exit(1)

    def _stacks(self) -> str:
        """Stacks of all threads as a single text, so that those of several ranks do not mix; each line has the rank."""
        with tempfile.TemporaryFile("w+") as stream:
            faulthandler.dump_traceback(stream, all_threads=True)
            stream.seek(0)
            lines = [f"no progress for {self.minutes:g} minutes; the stacks of rank {self.rank}:", *stream]

        return "".join(f"rank {self.rank}: {line.rstrip()}\n" for line in lines)

    def _dump_collectives(self) -> None:
        """Writes NCCL's recent collectives to the file that torch's flight recorder analysis reads."""
        import torch

        prefix = os.environ.get("TORCH_FR_DUMP_TEMP_FILE")
        dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
        if prefix and dump is not None:
            # The stacks are written already; a failure here must not keep the process from ending.
            with suppress(Exception):
                Path(f"{prefix}{self.rank}").write_bytes(dump())
