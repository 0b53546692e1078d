"""argparse with declared types, and one message for all mistakes of a command line that can be seen at once."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from megatron_mea.errors import Problem, UserError, did_you_mean, shorten


@dataclass(frozen=True, kw_only=True)
class WrongValue:
    """Returned by a type in place of a value that it refuses, so that argparse goes on to the other arguments."""

    got: object
    expected: str
    hint: str = ""


def int_range(low: int, high: int | None = None, unit: str = "") -> Callable[[str], int | WrongValue]:
    """A type: whole numbers from `low` to `high`, which None leaves open; `unit` is named in the message."""
    expected = f"at least {low:,}" if high is None else f"{low:,} to {high:,} {unit}".rstrip()
    return _number(int, lambda value: low <= value <= (math.inf if high is None else high), expected)


def float_where(accepts: Callable[[float], bool], expected: str) -> Callable[[str], float | WrongValue]:
    """A type: numbers that `accepts` takes, which `expected` describes."""
    return _number(float, accepts, expected)


def _number(kind: type, accepts: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            noun = "a whole number" if kind is int else "a number"
            return WrongValue(got=shorten(text), expected=f"{noun}, {expected}")

        return value if accepts(value) else WrongValue(got=value, expected=expected)

    return parse


def one_of(*choices: str) -> Callable[[str], str | WrongValue]:
    """A type: one of `choices`, which are named in the usage and offered by a shell's completion."""

    def parse(text: str) -> str | WrongValue:
        if text in choices:
            return text
        return WrongValue(got=shorten(text), expected=" or ".join(choices), hint=did_you_mean(text, choices))

    parse.choices = choices
    return parse


def file_ending(suffix: str) -> Callable[[str], str | WrongValue]:
    """A type: names of files that end in `suffix`."""
    wrong = f"a file that ends in {suffix}"
    return lambda text: text if Path(text).suffix == suffix else WrongValue(got=text, expected=wrong)


def utf8(text: str) -> str | WrongValue:
    """A type: text. Bytes of the command line that are no UTF-8 arrive as halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return WrongValue(got=shorten(text), expected="text in UTF-8")

    return text


def comma_separated(text: str) -> list[str]:
    """A type: words with commas between them; none in an empty text."""
    return text.split(",") if text else []


class Parser(argparse.ArgumentParser):
    """Takes options and positional arguments in any order, and raises UserError where argparse would exit.

    Attributes:
        option_hint: a hint for an unknown option, from its name and the names of all options.
    """

    def __init__(self, **settings: Any) -> None:
        self.option_hint: Callable[[str, list[str]], str] = did_you_mean
        self._rest = ""
        self._check_rest: Callable[[str], str | WrongValue] = str
        self._declared: list[argparse.Action] = []
        self._needs: dict[str, str] = {}
        self._excludes: dict[str, str] = {}
        super().__init__(exit_on_error=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def add_argument(
        self,
        *names: str,
        needs: str = "",
        excludes: str = "",
        completer: Callable[..., Sequence[str]] | None = None,
        **settings: Any,
    ) -> argparse.Action:
        """Declares an argument as argparse does.

        Args:
            completer: values for a shell to offer, as argcomplete calls it; None: files, or the choices of `one_of`.
            needs: option without which this one says nothing.
            excludes: option that cannot be given beside this one.
        """
        # Not argparse's own `choices`, which would refuse a WrongValue at once.
        choices = getattr(settings.get("type"), "choices", None)
        if choices:
            settings["metavar"] = f"{{{','.join(choices)}}}"

        action = super().add_argument(*names, **settings)
        self._declared.append(action)
        if completer or choices:
            action.completer = completer or (lambda **_: choices)

        self._needs[action.dest], self._excludes[action.dest] = needs, excludes
        return action

    def pass_on(self, name: str, *, needs: str = "", check: Callable[[str], str | WrongValue]) -> None:
        """Lets the words behind `--` be the value `name`; `check` returns a WrongValue for those that it refuses."""
        self._rest, self._needs[name], self._check_rest = name, needs, check

    def parse(self, words: Sequence[str]) -> dict[str, Any]:
        """Values of all declared arguments by their names.

        Raises:
            UserError: of every mistake; where argparse cannot read on, of those before it.
        """
        values = argparse.Namespace()
        if self._rest:
            end = words.index("--") if "--" in words else len(words)
            words, passed_on = words[:end], words[end + 1 :]
            setattr(values, self._rest, passed_on)

        # argparse would stop at the first of them that is missing, and not name what else is wrong.
        required = [action for action in self._declared if action.required]
        self.usage = self.usage or self.format_usage().partition("usage: ")[2]
        for action in required:
            action.required = False

        try:
            _, surplus = self.parse_known_args(words, values)
            surplus = self._take_intermixed(surplus, values)
            mistakes = [*self._contradictions(values), *self._mismatches(values, surplus, required)]
        except argparse.ArgumentError as error:
            mistakes = [self._unreadable(error, words)]

        if mistakes:
            last = mistakes[-1]
            mistakes[-1] = replace(last, hint=" ".join(filter(None, (last.hint, f"see {self.prog} --help"))))
        if problems := [*self._wrong_values(values), *mistakes]:
            raise UserError.from_problems(problems)

        return vars(values)

    def error(self, message: str) -> NoReturn:
        """Raises what argparse raises for other mistakes; where it calls this depends on Python's version."""
        raise argparse.ArgumentError(None, message)

    def _take_intermixed(self, surplus: Sequence[str], values: argparse.Namespace) -> list[str]:
        """Gives the last positional argument the words behind an option, which argparse leaves over; returns the rest.

        Behind a `--` all are positional. `parse_intermixed_args` of Python 3.11 loses it.
        """
        end = surplus.index("--") if "--" in surplus else len(surplus)
        words, behind = surplus[:end], surplus[end + 1 :]
        several = [action for action in self._declared if not action.option_strings and action.nargs in ("+", "*")]
        if not several:
            return [*words, *behind]

        dest = several[0].dest
        positional = [word for word in words if not _is_option(word)]
        setattr(values, dest, [*(getattr(values, dest) or []), *positional, *behind])
        return [word for word in words if _is_option(word)]

    def _wrong_values(self, values: argparse.Namespace) -> Iterator[Problem]:
        for action in self._declared:
            value = getattr(values, action.dest, None)
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, WrongValue):
                    yield Problem(where=_name(action), got=item.got, expected=item.expected, hint=item.hint)

        for word in getattr(values, self._rest, []):
            if isinstance(wrong := self._check_rest(word), WrongValue):
                yield Problem(where=f"-- {word}", got=wrong.got, expected=wrong.expected, hint=wrong.hint)

    def _contradictions(self, values: argparse.Namespace) -> Iterator[Problem]:
        names = {action.dest: _name(action) for action in self._declared} | {self._rest: "--"}
        dests = {name: dest for dest, name in names.items()}
        given = [dest for dest in names if getattr(values, dest, None) not in (None, False, [])]
        for dest in given:
            needed, excluded = self._needs.get(dest), self._excludes.get(dest)
            if needed and dests[needed] not in given:
                yield Problem(where=names[dest], got=f"no {needed}", expected=f"{needed} too, or neither")
            if excluded and dests[excluded] in given:
                yield Problem(where=f"{excluded}, {names[dest]}", got="both", expected="one of them")

    def _mismatches(
        self, values: argparse.Namespace, surplus: Sequence[str], required: Sequence[argparse.Action]
    ) -> Iterator[Problem]:
        """Words that no argument takes, and required arguments without a value."""
        unknown = [word.partition("=")[0] for word in surplus if _is_option(word)]
        options = [name for action in self._declared for name in action.option_strings]
        for name in unknown:
            hint = self.option_hint(name, options)
            yield Problem(where=name, got="an unknown option", expected=f"options of `{self.prog}`", hint=hint)

        if not unknown:
            positional = [_name(action) for action in self._declared if not action.option_strings]
            for word in surplus:
                yield Problem(where=word, got="an argument too many", expected=" ".join((self.prog, *positional)))

        for action in required:
            # The value of an unknown option may stand in the place of a positional argument.
            if getattr(values, action.dest, None) in (None, []) and (action.option_strings or not unknown):
                described = f"{_usage(action)}: {action.help}" if action.help else _usage(action)
                yield Problem(where=_name(action), got="nothing", expected=described)

    def _unreadable(self, error: argparse.ArgumentError, words: Sequence[str]) -> Problem:
        action = next((action for action in self._declared if error.argument_name in _argparse_names(action)), None)
        if action is None:
            return Problem(where=self.prog, got=error.message, expected="an option in full")

        if not error.message.startswith("expected "):
            value = error.message.removeprefix("ignored explicit argument ")
            return Problem(where=_name(action), got=f"the value {value}", expected=f"{_usage(action)} without a value")

        # argparse takes a value for an option where it begins with a dash and is no plain number.
        options = [name for declared in self._declared for name in declared.option_strings]
        hints = [
            f"did you mean {option}={value}?"
            for option, value in pairwise(words)
            if _is_option(option)
            and any(name.startswith(option) for name in action.option_strings)
            and _is_option(value)
            and not any(name.startswith(value.partition("=")[0]) for name in options)
        ]
        return Problem(where=_name(action), got="no value", expected=_usage(action), hint=hints[0] if hints else "")


def _is_option(word: str) -> bool:
    return word.startswith("-") and word.strip("-") != ""


def _argparse_names(action: argparse.Action) -> tuple[str, ...]:
    return ("/".join(action.option_strings),) if action.option_strings else (str(action.metavar), action.dest)


def _name(action: argparse.Action) -> str:
    return action.option_strings[-1] if action.option_strings else str(action.metavar)


def _usage(action: argparse.Action) -> str:
    """How an argument is written, as `--tokens N ...`."""
    words = [_name(action)]
    if action.option_strings and action.nargs != 0:
        words.append(str(action.metavar or action.dest.upper()))

    return " ".join([*words, *(["..."] if action.nargs in ("+", "*") else [])])
