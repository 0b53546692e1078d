"""Standard output and error of a command, where a pipe is closed or not read, a terminal is gone, or a disk is full.

A training goes on, and what it prints goes to a file of its run folder. Another verb ends, since its result goes there.
"""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import stat
import sys
import time
from contextlib import suppress
from pathlib import Path

from megatron_mea.errors import RunError
from megatron_mea.run_folder import RunFolder

READER_GONE = 128 + signal.SIGPIPE
"""Exit status where the reader of standard output has closed its pipe: what a shell reports of a program that SIGPIPE
ends."""
_PATIENCE_SECONDS = 60.0
"""For which a training waits for a console that takes nothing, such as a pager that nobody scrolls."""


def guard_console() -> None:
    """Replaces the interpreter's standard streams by ones with the rules of this module.

    Streams that somebody else put in their place, such as a test that captures them, stay.
    """
    _open_closed_descriptors()
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text_stream(_StandardStream(1, name="standard output", is_result=True), like=sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text_stream(_StandardStream(2, name="standard error", is_result=False), like=sys.stderr)


def outlive_console(run_dir: Path) -> None:
    """From here on neither stream ends the command: what one cannot take goes to console.log of the run folder.

    Nothing is created before that: while there is no folder, such lines are lost.
    """
    for stream in (sys.stdout, sys.stderr):
        raw = getattr(getattr(stream, "buffer", None), "raw", None)
        if isinstance(raw, _StandardStream):
            raw.run_dir = run_dir


class _StandardStream(io.FileIO):
    """A standard stream as bytes, with an answer to a write that fails.

    With a `run_dir` its descriptor is moved to the folder's console.log, so that libraries write there too. Without one
    it drops what it cannot write.

    Args:
        name: of the stream, for messages.
        is_result: without a `run_dir` the first failure ends the command: SystemExit where the reader is gone, else
            RunError.
    """

    def __init__(self, descriptor: int, *, name: str, is_result: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.run_dir: Path | None = None
        self._name, self._ends_command = name, is_result

    def write(self, data: bytes) -> int:
        try:
            return self._write(data)
        except OSError as error:
            if self.run_dir is not None:
                # The log's own disk may be full: then this line is lost, and the next one may not be.
                with suppress(OSError):
                    self._move_to_log(RunFolder(self.run_dir).console_log, error)
                    return self._write(data)
            elif self._ends_command:
                # Python writes once more when it ends.
                self._ends_command = False
                if isinstance(error, BrokenPipeError):
                    raise SystemExit(READER_GONE) from None
                raise RunError(f"{self._name} cannot be written: {error.strerror}") from None

        return len(data)

    def _write(self, data: bytes) -> int:
        """Writes what the descriptor takes; raises OSError where a training would have to wait for it for long."""
        patience = None if self.run_dir is None else _PATIENCE_SECONDS
        while select.select([], [self], [], patience)[1]:
            # None: another program has made the terminal non-blocking, for all who share it.
            if (written := super().write(data[: self._atomic_size(len(data))])) is not None:
                return written

        raise TimeoutError(errno.ETIMEDOUT, f"nobody has read it for {patience:g} s")

    def _atomic_size(self, size: int) -> int:
        """Bytes of `size` that one write may have: a pipe with room takes PIPE_BUF, and makes a longer write wait."""
        is_file = stat.S_ISREG(os.fstat(self.fileno()).st_mode)
        return size if is_file or self.run_dir is None else min(size, select.PIPE_BUF)

    def _move_to_log(self, path: Path, error: OSError) -> None:
        """Points the descriptor to `path`, unless it does already; raises OSError where that cannot be opened."""
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            if not os.path.sameopenfile(log, self.fileno()):
                os.dup2(log, self.fileno())
                reason = f"{self._name} of process {os.getpid()} cannot be written ({error.strerror})"
                self._write(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {reason}: it goes on here\n".encode())
        finally:
            os.close(log)


def _open_closed_descriptors() -> None:
    """Opens descriptors 0 to 2 that the caller had closed, so that no file of ours takes such a number.

    For reading: a write fails as it would on the closed one.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)  # noqa: FBT003


def _text_stream(raw: _StandardStream, *, like: io.TextIOWrapper | None) -> io.TextIOWrapper:
    """A text stream that writes every line at once, in the encoding of `like`; escapes what that encoding lacks."""
    encoding = like.encoding if like else "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace", line_buffering=True)
