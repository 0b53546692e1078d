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

_GRACE = 5.0
"""Seconds that the other ranks, which hang in the same collective, have to show their stacks too: a launcher kills them
when the first one ends."""


class Watchdog:
    """A thread that waits for `mark` to be called again and again.

    Every rank has one, and a collective that hangs holds all of them, so each shows where it stands.

    Args:
        rank: of this process.
        minutes: without a mark, after which it ends the process with status 1; may be changed.
    """

    def __init__(self, rank: int, minutes: float) -> None:
        self.rank, self.minutes = rank, minutes
        self._stop = threading.Event()
        self.mark()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def mark(self) -> None:
        """Progress was made."""
        self._since = time.monotonic()

    @contextmanager
    def patient(self, minutes: float) -> Iterator[None]:
        """Other minutes, while the rank waits for what may take longer, as a disk does."""
        self.mark()
        self.minutes, before = max(minutes, self.minutes), self.minutes
        yield
        self.mark()
        self.minutes = before

    def close(self) -> None:
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            if time.monotonic() - self._since > 60 * self.minutes:
                sys.stderr.write(self._stacks())
                sys.stderr.flush()
                self._dump_collectives()
                time.sleep(_GRACE)
                os._exit(1)

    def _stacks(self) -> str:
        """One text, so that those of several ranks do not mix, with the rank before every line."""
        with tempfile.TemporaryFile("w+") as stream:
            faulthandler.dump_traceback(stream, all_threads=True)
            stream.seek(0)
            lines = [f"no progress for {self.minutes:g} minutes; the stacks of rank {self.rank}:", *stream]
        return "".join(f"rank {self.rank}: {line.rstrip()}\n" for line in lines)

    def _dump_collectives(self) -> None:
        """What NCCL was doing, for torch's flight recorder analysis, into the file that torch itself would write."""
        import torch

        prefix = os.environ.get("TORCH_FR_DUMP_TEMP_FILE")
        dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
        if prefix and dump is not None:
            # The stacks are out already; this must not keep the process from ending.
            with suppress(Exception):
                Path(f"{prefix}{self.rank}").write_bytes(dump())
