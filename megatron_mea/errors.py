"""The user's mistakes: everything that a user can get wrong ends in one `UserError`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Args:
        where: the dotted key of the configuration, the option or the file.
        found: what stands there.
        allowed: what may stand there.
        mend: how to mend it, where `allowed` does not say it already.
    """

    where: str
    found: object
    allowed: str
    mend: str = ""

    def __str__(self) -> str:
        lines = [f"error: {self.where}", f"  found:   {self.found}", f"  allowed: {self.allowed}"]
        return "\n".join(lines + ([f"  mend:    {self.mend}"] if self.mend else []))


class RunError(RuntimeError):
    """Ends a command with one message and exit status 1: something failed that is not the user's input."""


class MachineError(RunError):
    """A node, a GPU or a network that does not do what it must: the same work may succeed on another one."""


class UserError(Exception):
    """Ends a command with one message on stderr and exit status 2, without a traceback."""

    def __init__(self, where: str, found: object, allowed: str, mend: str = "") -> None:
        self.problems = [Problem(where, found, allowed, mend)]
        super().__init__(str(self.problems[0]))

    @classmethod
    def of(cls, problems: Iterable[Problem], footer: str = "") -> UserError:
        """One error out of several problems, which the user then mends in one go; `footer` ends the message."""
        problems = list(problems)
        error = cls(problems[0].where, problems[0].found, problems[0].allowed, problems[0].mend)
        error.problems = problems
        error.args = ("\n".join([*map(str, problems), *([footer] if footer else [])]),)
        return error

    def __reduce__(self) -> tuple:
        # Rank 0 sends what it finds to the others.
        return _again, (self.problems, str(self))


def _again(problems: list[Problem], message: str) -> UserError:
    error = UserError.of(problems)
    error.args = (message,)
    return error
