"""Records of a source, read into texts later, and the broken ones among them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_mea.errors import Problem, UserError

_BATCH = 1 << 18
"""Bytes of text in a batch, where its last record does not exceed it: some 0.1 s for a tokenizer."""

MAX_BROKEN = 0.01
"""The share of records that may be broken and left out."""


class Unreadable(Exception):
    """A record that is no text: found, allowed, how to mend it, and how many lines into the record."""

    def __init__(self, found: str, allowed: str, mend: str = "", line: int = 0) -> None:
        super().__init__(found)
        self.found, self.allowed, self.mend, self.line = found, allowed, mend, line


@dataclass(frozen=True)
class Records:
    """Records of one source, not yet looked into.

    Attributes:
        source: the file or dataset.
        unit: what the numbers count, `line` (from 1) or `row` (from 0).
        numbers: where each record begins.
        records: bytes of a file, or the values of a column.
        read: the texts of a record, given the text key; raises `Unreadable`.
    """

    source: str
    unit: str
    numbers: list[int]
    records: list[Any]
    read: Callable[[Any, str], list[str]]

    def texts(self, text_key: str) -> tuple[list[str], list[Problem]]:
        """The documents, empty ones left out, and what is wrong with each broken record."""
        texts: list[str] = []
        broken = []
        for number, record in zip(self.numbers, self.records, strict=True):
            try:
                texts += [text for text in self.read(record, text_key) if not text.isspace() and text]
            except Unreadable as error:
                where = f"{self.source}, {self.unit} {number + error.line}"
                broken.append(Problem(where, error.found, error.allowed, error.mend))
        return texts, broken


class BrokenRecords:
    """Counts records and the broken ones among them, and ends the work when these are too many.

    Args:
        share: what part of the records may be broken, from 0 to 1.
    """

    def __init__(self, share: float = MAX_BROKEN) -> None:
        self.share, self.read, self.count = share, 0, 0
        self.first: list[Problem] = []

    def add(self, read: int, broken: Sequence[Problem]) -> None:
        """Raises UserError as soon as even 10,000 records could not hold so many broken ones."""
        self.read += read
        self.count += len(broken)
        self.first += broken[: 20 - len(self.first)]
        if self.count > self.share * max(self.read, 10_000):
            raise self._error()

    def close(self) -> None:
        """Raises UserError where, after the last record, too many were broken; else reports them on stderr."""
        if self.count > self.share * self.read:
            raise self._error()
        if self.count:
            print(f"left out {self._summary()}:", file=sys.stderr)
            for problem in self.first:
                print(f"  {problem.where}: {problem.found}", file=sys.stderr)
            if self.count > len(self.first):
                print(f"  ... and {self.count - len(self.first):,} more", file=sys.stderr)

    def _error(self) -> UserError:
        if self.count == 1:
            return UserError.of(self.first)
        return UserError.of(self.first[:3], f"{self._summary()}, and at most {self.share:.2%} may be")

    def _summary(self) -> str:
        return f"{self.count:,} of {self.read:,} lines and rows that are broken"


def batched(
    source: str, unit: str, records: Iterator[tuple[int, Any]], read: Callable[[Any, str], list[str]]
) -> Iterator[Records]:
    """Numbered records of one source in batches of some text."""
    numbers: list[int] = []
    held: list[Any] = []
    size = 0
    for number, record in records:
        numbers.append(number)
        held.append(record)
        size += len(record) if isinstance(record, (bytes, str)) else 1
        if size >= _BATCH:
            yield Records(source, unit, numbers, held, read)
            numbers, held, size = [], [], 0
    if held:
        yield Records(source, unit, numbers, held, read)
