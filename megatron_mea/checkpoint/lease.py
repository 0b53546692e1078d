"""The lease of a run folder: of two jobs the one that took it last writes, and the other stops."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from megatron_mea.errors import shorten
from megatron_mea.inputs import read_json_object
from megatron_mea.outputs import write_file
from megatron_mea.run_folder import RunFolder

_MAX_BYTES, _MAX_WORD = 1 << 16, 100
_CACHE_SECONDS = 1.0
"""Seconds for which `Lease.new_holder` may reuse what it read."""


def lease_holder(run_dir: Path) -> str | None:
    """A description of the job that holds the lease of a run folder; None where it has ended or is dead."""
    state = Lease(run_dir).read()
    return None if state is None or state.get("ended") or _is_dead(state) else _describe(state)


class Lease:
    """The right to write into a run folder, for rank 0 of a job: a file that names the job.

    A job that takes the lease ends that of the previous holder, which notices at the end of its step or before it
    publishes a checkpoint, and stops: a queue that starts a job twice must not end with two stopped jobs, and the lease
    of a killed job must not keep its successor out.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = RunFolder(run_dir).lease
        self.token = uuid.uuid4().hex[:8]
        self._read_at, self._new_holder = 0.0, ""

    def take(self) -> str | None:
        """Takes the lease; returns a description of the previous holder if it may still be writing."""
        previous = self.read()
        self._write({"ended": False})
        if previous is None or previous.get("ended") or _is_dead(previous):
            return None

        return _describe(previous)

    def new_holder(self, *, cached: bool = False) -> str:
        """A description of the job that has taken the lease since; empty while this job holds it.

        Args:
            cached: the file need not be read again within a second.
        """
        if self._new_holder or (cached and time.monotonic() - self._read_at <= _CACHE_SECONDS):
            return self._new_holder

        self._read_at = time.monotonic()
        state = self.read()
        if state is not None and state["token"] != self.token:
            self._new_holder = _describe(state)

        return self._new_holder

    def end(self) -> None:
        """Records that this job writes no more."""
        if not self.new_holder():
            self._write({"ended": True})

    def read(self) -> dict[str, Any] | None:
        """The content of the file, whichever job has written it; None where it is missing or unreadable."""
        try:
            state = read_json_object(self._path, max_bytes=_MAX_BYTES)
        except (OSError, ValueError):
            return None

        return state if isinstance(state.get("token"), str) else None

    def _write(self, status: dict[str, Any]) -> None:
        """Replaces the file with the facts of this job, and whether it has ended."""
        state = {
            "token": self.token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        write_file(self._path, json.dumps(state | status) + "\n")


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the job is known to have ended: its process ran on this host and is gone."""
    if holder.get("host") != socket.gethostname():
        return False

    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return False

    return False


def _describe(holder: dict[str, Any]) -> str:
    """The job, process, host and start of a lease, for messages."""
    facts = {key: _as_word(holder.get(key)) for key in ("job", "pid", "host", "since")}
    job = f"job {facts['job']}, " if holder.get("job") else ""
    return f"{job}process {facts['pid']} on {facts['host']} (since {facts['since']})"


def _as_word(value: object) -> str:
    """A fact of a lease for a message: another program may have written anything there."""
    text = str(value)
    return text if text.isascii() and text.isprintable() and len(text) <= _MAX_WORD else shorten(ascii(text), _MAX_WORD)
