"""How a command ends: one message and a status, and for the job that started it whether the same would happen again."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator

from megatron_mea.errors import MachineError, RunError, UserError

NOTE = "MEA_FAILURE_FILE"
"""Environment variable with the file that the first process to fail by itself writes; a job reads it at its end."""

_DISTRIBUTED = {"DistBackendError", "DistNetworkError", "DistStoreError"}
_OF_GLOO = re.compile(r"gloo/|Connection (closed|reset) by peer|Timed out waiting \d+ms for (send|recv)")
_OF_GPU = "AcceleratorError"
_WORDY = re.compile(r"^\[[^\]]*\] |\. This is typically.*")
"""Where in its sources gloo gave up, and what it advises."""


def exit_status(work: Callable[[], None]) -> int:
    """Does the work, and says what it fails of: 0 done, 2 the user's input was wrong, 1 anything else.

    What is nobody's mistake is raised, for its traceback.
    """
    try:
        work()
    except BrokenPipeError:
        # `| head` has seen enough. Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        status = 2 if isinstance(error, UserError) else 1
        lost = lost_others(error)
        if not (lost or isinstance(error, MachineError) or type(error).__name__ == _OF_GPU):
            _note(status, error)
        if not (lost or isinstance(error, (UserError, RunError))):
            raise
        if lost or _rank() > 0:
            # Mostly every rank finds the same. Rank 0 says it, and the launcher ends the others meanwhile;
            # what only this rank sees must still be said.
            time.sleep(3)
        prefix = f"rank {_rank()}: " if _rank() else ""
        first = _WORDY.sub("", str(error).strip().partition("\n")[0])
        message = f"another process, or the network to it, is gone: {first}" if lost else error
        print(f"megatron-mea: {prefix}{message}", file=sys.stderr, flush=True)
        return status
    return 0


def lost_others(error: BaseException | None) -> bool:
    """Whether an exception tells of another process that is gone: it is that one's failure, not this one's."""
    return any(
        type(one).__name__ in _DISTRIBUTED or (isinstance(one, RuntimeError) and _OF_GLOO.search(str(one)))
        for one in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _note(status: int, error: BaseException) -> None:
    """Leaves status and message for the job, unless another process was first."""
    if path := os.environ.get(NOTE):
        try:
            with open(path, "x", encoding="utf-8") as stream:
                stream.write(f"{status}\n{type(error).__name__}: {error}\n")
        except OSError:
            pass


def _rank() -> int:
    value = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or ""
    return int(value) if value.isdecimal() else 0
