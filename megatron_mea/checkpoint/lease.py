"""Who writes a run folder: of two jobs the one that came last, and the other stops."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

LEASE = ".lease"
_PATIENCE = 1.0
"""Seconds between two looks at the file."""


def holder(run_dir: Path) -> str | None:
    """The job that has a run folder and has not said that it has ended, in words."""
    found = Lease(run_dir).read()
    return None if found is None or found.get("ended") or _is_dead(found) else _in_words(found)


class Lease:
    """The right to write into a run folder, for rank 0 of a job: a file that names the job.

    Taking it takes it away from the job that had it, which notices at the end of its step or before it publishes
    a checkpoint, and stops: a queue that starts a job twice must not end with two stopped jobs, and a lease that a
    killed job has left must not keep its successor out.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / LEASE
        self.token = uuid.uuid4().hex[:8]
        self._looked, self._lost_to = 0.0, ""

    def take(self) -> str | None:
        """Takes the lease; returns the job that may still be writing, in words."""
        earlier = self.read()
        self._write({"ended": False})
        if earlier is None or earlier.get("ended") or _is_dead(earlier):
            return None
        return _in_words(earlier)

    def lost_to(self, now: bool = True) -> str:
        """The job that has taken the lease since, in words; empty while it is ours.

        Args:
            now: look at the file, and do not trust a look that is less than a second old.
        """
        if self._lost_to or not (now or time.monotonic() - self._looked > _PATIENCE):
            return self._lost_to
        self._looked = time.monotonic()
        found = self.read()
        if found is not None and found["token"] != self.token:
            self._lost_to = _in_words(found)
        return self._lost_to

    def end(self) -> None:
        """Says that this job writes no more."""
        if not self.lost_to():
            self._write({"ended": True})

    def read(self) -> dict[str, Any] | None:
        """What the file says, whoever has written it."""
        try:
            found = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and "token" in found else None

    def _write(self, state: dict[str, Any]) -> None:
        mine = {
            "token": self.token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        scratch = self._path.with_name(f"{LEASE}-{self.token}")
        scratch.write_text(json.dumps(mine | state) + "\n")
        scratch.replace(self._path)


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the job is known to have ended: its process ran here and is gone."""
    if holder.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return False


def _in_words(holder: dict[str, Any]) -> str:
    job = f"job {holder['job']}, " if holder.get("job") else ""
    return f"{job}process {holder.get('pid')} on {holder.get('host')} (since {holder.get('since')})"
