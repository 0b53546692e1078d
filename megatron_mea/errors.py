"""Exceptions that end a command with one message: `UserError` (status 2), `RunError` and `MachineError` (status 1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One mistake in the user's input.

    Args:
        where: the dotted key of the configuration, the option or the file.
        got: the value that stands there.
        expected: the values that are allowed there.
        hint: how to fix it, where `expected` does not say it already.
    """

    where: str
    got: object
    expected: str
    hint: str = ""

    def __str__(self) -> str:
        lines = [f"error: {self.where}", f"  got:      {self.got}", f"  expected: {self.expected}"]
        return "\n".join(lines + ([f"  hint:     {self.hint}"] if self.hint else []))


class RunError(RuntimeError):
    """Ends a command with one message and exit status 1: a failure that the user's input did not cause."""


class MachineError(RunError):
    """A node, a GPU or a network is broken: the same work may succeed on another one."""


def shorten(value: object, limit: int = 200) -> str:
    """repr of a value for a message, its middle left out where that is long."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 4 :]}"


def did_you_mean(
    got: str, known: Iterable[str], synonyms: Mapping[str, str] | None = None, *, misspelt: bool = False
) -> str:
    """A hint at the known names that `got` stands for elsewhere, or at the one it resembles; empty where there is none.

    Args:
        synonyms: {known name: words of others for it, with spaces between}.
        misspelt: whether `got` may resemble a synonym too.
    """
    got, known = got.lower(), list(known)
    words = {name: (synonyms or {}).get(name, "").split() for name in known}
    meant = [name for name in known if got in words[name]]
    if not meant:
        spelt = {name: [name, *(words[name] if misspelt else [])] for name in known}
        likeness = {word: _likeness(got, word) for spellings in spelt.values() for word in spellings}
        nearest = max(likeness, key=likeness.__getitem__, default="")
        meant = [name for name in known if nearest in spelt[name] and likeness[nearest]]

    return f"did you mean {' or '.join(meant)}?" if meant else ""


def _likeness(got: str, word: str) -> float:
    """Share of letters that two names have in common, in their order; 0 where a resemblance is by chance."""
    got, word = got.lstrip("-"), word.lstrip("-")
    ratio = SequenceMatcher(None, word, got).ratio()
    is_part_or_turned = got in word or word in got or sorted(got) == sorted(word)
    return ratio if ratio >= (0.6 if is_part_or_turned else 0.7) else 0.0


class UserError(Exception):
    """Ends a command with one message on stderr and exit status 2, without a traceback."""

    def __init__(self, *, where: str, got: object, expected: str, hint: str = "") -> None:
        self.problems = [Problem(where=where, got=got, expected=expected, hint=hint)]
        super().__init__(str(self.problems[0]))

    @classmethod
    def from_problems(cls, problems: Iterable[Problem], footer: str = "") -> UserError:
        """One error that reports several problems (at least one) at once; `footer` ends the message."""
        problems = list(problems)
        first = problems[0]
        error = cls(where=first.where, got=first.got, expected=first.expected, hint=first.hint)
        error.problems = problems

        error.args = ("\n".join([*map(str, problems), *([footer] if footer else [])]),)
        return error

    def __reduce__(self) -> tuple:
        # Rank 0 pickles its error to send it to the other ranks.
        return _rebuild, (self.problems, str(self))


def _rebuild(problems: list[Problem], message: str) -> UserError:
    error = UserError.from_problems(problems)
    error.args = (message,)
    return error
