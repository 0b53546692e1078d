"""Commands whose every operation on the disk is made to fail in turn, in this process."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_mea.cli import main
from support.disk import Fault, Recorder, watched_disk

KINDS = ("open", "write", "fsync", "mkdir", "rename", "link")
"""Operations that are made to fail."""

Tree = dict[str, bytes | None]


def read_tree(root: Path) -> Tree:
    """Contents of everything below a folder by its path, None for folders."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in sorted(root.rglob("*"))
    }


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that returns what the first call did, whatever the arguments."""
    results: list[Any] = []

    def call(*arguments: Any, **options: Any) -> Any:
        results[:] = results or [function(*arguments, **options)]
        return results[0]

    return call


def unchanged(before: Tree, after: Tree, _: str) -> str:
    """The problem of a folder after a command that failed: what it holds is not what it held; empty where it is."""
    return difference(before, after)


def difference(expected: Tree, actual: Tree) -> str:
    """The first path that differs; empty where none does."""
    for path in sorted(expected.keys() | actual.keys()):
        if path not in actual:
            return f"{path} is gone"
        if path not in expected:
            return f"{path} is left"
        if expected[path] != actual[path]:
            return f"{path} has changed"

    return ""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command, and what holds after it.

    Args:
        arguments: of megatron-mea; relative paths lie in the folder that is watched.
        check_failed: (tree before, tree after, stderr) -> the problem of a call that failed, or nothing.
        check_done: (tree after a call without a fault, tree after this one) -> the problem of a call that succeeded.
        status: of a call without a fault.
        prints: text that is on stdout where the disk fails (status 1).
    """

    arguments: Sequence[str]
    check_failed: Callable[[Tree, Tree, str], str] = unchanged
    check_done: Callable[[Tree, Tree], str] = field(default=difference)
    status: int = 0
    prints: str = ""

    def __call__(self) -> tuple[int, str, str]:
        """Runs the command; returns status (3: an exception that nobody caught), stdout and stderr."""
        out, err = io.StringIO(), io.StringIO()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main(self.arguments)
            except SystemExit as error:
                status = int(error.code or 0)
            except Exception:
                status = 3
                traceback.print_exc()
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)

        return status, out.getvalue(), err.getvalue()


def fail_everywhere(command: Command, *, root: Path, full: bool) -> int:
    """Runs a command once for each of its operations, which fails, and once more after each; returns how many.

    Of the occurrences of an operation on a file the first, the middle and the last one fail, with `full` all; in turn
    with EIO, once, and with ENOSPC, from there on; with `full` each with both.

    Args:
        root: the current folder, with what the command finds there.

    Raises:
        AssertionError: names every case that went wrong.
    """
    template = root.with_name(f"{root.name}-before")
    shutil.copytree(root, template, symlinks=True)

    def restore() -> None:
        for path in root.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(template, root, symlinks=True, dirs_exist_ok=True)

    before, recorder = read_tree(root), Recorder()
    with watched_disk(root, recorder):
        status, _, err = command()
    assert status == command.status, err

    expected = read_tree(root)
    problems, number = [], 0
    for key, count in Counter(operation.key for operation in recorder.operations if operation.kind in KINDS).items():
        for occurrence in range(1, count + 1) if full else sorted({1, (count + 1) // 2, count}):
            for error in (errno.EIO, errno.ENOSPC) if full else [(errno.EIO, errno.ENOSPC)[number % 2]]:
                number += 1
                restore()
                fault = Fault(key=key, number=occurrence, error=error)
                with watched_disk(root, fault):
                    status, out, err = command()

                case = f"{' '.join(key)}, occurrence {occurrence} of {count}, {os.strerror(error)}"
                problem = _find_problem(
                    command=command, status=status, err=err, before=before, after=read_tree(root), expected=expected
                )
                if status == 1 and command.prints not in out:
                    problem = f"the result is lost: {out}"
                if not fault.raised:
                    problem = f"it did not come to this operation: status {status}, {err}"
                problems += [f"{case}: {problem}"] if problem else []
                if status == 0:
                    # It is done; another call would find a folder that is not free.
                    continue

                status, _, err = command()
                problem = command.check_done(expected, read_tree(root)) if status == command.status else err
                problems += [f"{case}: the next call: {problem}"] if problem else []

    assert not problems, "\n".join(problems)
    return number


def _find_problem(*, command: Command, status: int, err: str, before: Tree, after: Tree, expected: Tree) -> str:
    if status == 0:
        # Where it can do without, it may.
        return command.check_done(expected, after)
    if status not in (1, 2) or err.count("megatron-mea: ") != 1 or "Traceback" in err:
        return f"status {status}, {err}"

    message = err[err.index("megatron-mea: ") :]
    # The message of a mistake has lines for what was got and expected.
    if status == 1 != command.status and not any(os.strerror(error) in message for error in (errno.EIO, errno.ENOSPC)):
        return f"the reason is missing: {message}"
    return command.check_failed(before, after, err)
