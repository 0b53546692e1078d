"""Whose failure it is: this process's own, which would come again, or that of another process or of a machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

NOTE = "MEA_FAILURE_FILE"
"""Environment variable with the file that the first process that fails by itself writes; a job reads it at its end."""

_DISTRIBUTED = {"DistBackendError", "DistNetworkError", "DistStoreError"}
_GPU = "AcceleratorError"
_OF_GLOO = re.compile(r"gloo/|Connection (closed|reset) by peer|Timed out waiting \d+ms for (send|recv)")


def lost_others(error: BaseException) -> bool:
    """Whether an exception tells of another process, or of a network, that is gone."""
    return any(
        type(one).__name__ in _DISTRIBUTED or (isinstance(one, RuntimeError) and _OF_GLOO.search(str(one)))
        for one in _chain(error)
    )


def note_failure(status: int, error: BaseException) -> None:
    """Leaves exit status and message for the job that started this process, unless another one was first.

    What a GPU reports is left out: mostly another GPU does not report it.
    """
    path = os.environ.get(NOTE)
    if path and type(error).__name__ != _GPU:
        try:
            with open(path, "x", encoding="utf-8") as stream:
                stream.write(f"{status}\n{type(error).__name__}: {error}\n")
        except OSError:
            pass


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
