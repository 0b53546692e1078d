"""Exit status and message of a command, and the failure file that tells its job whether a retry would fail again."""

from __future__ import annotations

import atexit
import errno
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from megatron_mea.errors import MachineError, RunError, UserError, shorten
from megatron_mea.printing import note

FAILURE_FILE_VARIABLE = "MEA_FAILURE_FILE"
"""Environment variable with the file that the first process to fail by itself writes; a job reads it at its end."""

_PEER_SECONDS = 3
"""For which a process whose peer is gone leaves it to that one to say why."""
_RANK_0_SECONDS = 10
"""For which other ranks leave the message to rank 0, where all fail alike and the launcher ends the others meanwhile.

A failure of one rank alone must still be printed; on a busy machine ranks start seconds apart.
"""
_DISTRIBUTED_ERRORS = {"DistBackendError", "DistNetworkError", "DistStoreError"}
_GPU_ERROR = "AcceleratorError"
_USER_ERRORS = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR)
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_MACHINE_ERRORS = (errno.EIO, errno.ESTALE)
"""A disk or the network to it fails, which another node may not see."""
_MIN_OPEN_FILES = 256
_OPEN_FILES = 65_536
_GLOO_ERROR = re.compile(r"gloo/|Connection (closed|reset) by peer|Timed out waiting \d+ms for (send|recv)")
_GLOO_NOISE = re.compile(r"^\[[^\]]*\] |\. This is typically.*")
"""The source location in front of gloo's messages, and the advice at their end."""


def exit_status(work: Callable[[], None]) -> int:
    """Runs `work` and prints why it failed; returns 0 (done), 2 (the user's input was wrong) or 1 (anything else).

    Unexpected exceptions are raised again, for their traceback.
    """
    try:
        _allow_open_files()
        try:
            work()
        finally:
            # What is left there fails here, and not when Python ends.
            sys.stdout.flush()
    except Exception as exception:
        error = _explain(exception)
        status = 2 if isinstance(error, UserError) else 1
        peer_failed = is_peer_failure(error)
        if not (peer_failed or isinstance(error, MachineError) or type(error).__name__ == _GPU_ERROR):
            _write_failure_file(status, error)
        if not (peer_failed or isinstance(error, (UserError, RunError))):
            raise

        if peer_failed:
            time.sleep(_PEER_SECONDS)
        elif _rank() > 0:
            time.sleep(_RANK_0_SECONDS)

        prefix = f"rank {_rank()}: " if _rank() else ""
        first_line = _GLOO_NOISE.sub("", str(error).strip().partition("\n")[0])
        message = f"another process, or the network to it, is gone: {first_line}" if peer_failed else error
        note(f"megatron-mea: {prefix}{message}")
        return status

    return 0


def end_with_status(work: Callable[[], int]) -> int:
    """Calls `work` and returns its status, with which this process then ends, also as a member of a process group.

    The threads of a group that is not left may abort a process while Python is torn down, with another status. So such
    a process ends before that: after its own threads, such as the one that writes a checkpoint, and what is registered
    with `atexit`.
    """
    status: int | None = None

    def leave() -> None:
        distributed = sys.modules.get("torch.distributed")
        if status is not None and distributed is not None and distributed.is_initialized():
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()
            os._exit(status)

    # What is registered first is called last.
    atexit.register(leave)
    status = work()
    return status


def is_peer_failure(error: BaseException | None) -> bool:
    """Whether `error` or one of its causes says that another process is gone, so that this process is not to blame."""
    return any(
        type(cause).__name__ in _DISTRIBUTED_ERRORS
        or (isinstance(cause, RuntimeError) and _GLOO_ERROR.search(str(cause)))
        for cause in _cause_chain(error)
    )


def _allow_open_files() -> None:
    """Raises the soft limit of open files towards the hard one: shells begin with 1,024 and fewer.

    Raises:
        UserError: the hard limit is too low. Among what would fail is torch's store, which waits for ever then.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # RLIM_INFINITY is -1.
    possible = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if 0 <= soft < possible:
        resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
    if possible < _MIN_OPEN_FILES:
        raise _open_files_error()


def _open_files_error() -> UserError:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return UserError(
        where="ulimit -n",
        got=f"{limit} open files for a process",
        expected=f"at least {_MIN_OPEN_FILES}, and one more for each file of data and weights",
        hint=f"ulimit -n {_OPEN_FILES} before the command, or the cluster's limits (LimitNOFILE of slurmd)",
    )


def _explain(error: Exception) -> Exception:
    """The message of an error that the operating system's limits, permissions or disks cause; others as they are."""
    if any(
        getattr(cause, "errno", None) in (errno.EMFILE, errno.ENFILE) or os.strerror(errno.EMFILE) in str(cause)
        for cause in _cause_chain(error)
    ):
        return _open_files_error()

    if isinstance(error, MemoryError):
        return RunError(f"the memory of this machine does not suffice: {error or 'an allocation failed'}")

    if isinstance(error, OSError) and error.filename is not None:
        name = shorten(os.fsdecode(error.filename))
        if error.errno in _USER_ERRORS:
            return UserError(where=name, got=error.strerror, expected="a path that can be used here")
        if error.errno in _DISK_ERRORS:
            return RunError(f"{name}: {error.strerror}")
        if error.errno in _MACHINE_ERRORS:
            return MachineError(f"{name}: {error.strerror}")

    return error


def _cause_chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _write_failure_file(status: int, error: BaseException) -> None:
    """Writes status and message for the job, unless another process was first."""
    if path := os.environ.get(FAILURE_FILE_VARIABLE):
        try:
            with open(path, "x", encoding="utf-8") as stream:
                stream.write(f"{status}\n{type(error).__name__}: {error}\n")
        except OSError:
            pass


def _rank() -> int:
    value = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or ""
    return int(value) if value.isdecimal() else 0
