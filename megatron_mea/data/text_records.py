"""How sources are read, batches of raw records that are parsed into texts later, and the count of broken records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_mea.errors import Problem, UserError
from megatron_mea.printing import note

BATCH_BYTES = 1 << 18
"""Bytes of text at which a batch ends: some 0.1 s of work for a tokenizer."""

MAX_BROKEN = 0.01
"""Default share of records that may be broken and left out."""

MAX_DOCUMENT = 64 << 20
"""Default size in bytes of UTF-8 that a document may have."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How sources are read.

    Attributes:
        text_key: the field or column that holds a document's text.
        split: which split of a `datasets` folder or hub name.
        split_at: `file`, each `.txt` is one document, or `blank-lines`, each of its blocks between blank lines is one.
        max_document: size in bytes of UTF-8 that a document may have.
    """

    text_key: str = "text"
    split: str = "train"
    split_at: Literal["file", "blank-lines"] = "file"
    max_document: int = MAX_DOCUMENT

    @property
    def max_record(self) -> int:
        """Bytes of a file that are read for one record: any document fits that is no longer than is allowed.

        JSON can write a byte of UTF-8 as six (`\\u0000`), and may have other fields beside the text.
        """
        return 6 * self.max_document + (16 << 20)


def too_long(*, where: str, got: str, max_document: int, hint: str = "") -> UserError:
    """The error about a document that is longer than `max_document` bytes."""
    return UserError(
        where=where,
        got=got,
        expected=f"a document of at most {max_document:,} bytes of UTF-8",
        hint=hint or "cut it into documents, or allow more with --max-document",
    )


class TooLongDocument(Exception):
    """A document of `size` bytes of UTF-8, more than are allowed."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


class UnreadableRecord(Exception):
    """A record that is no text.

    Args:
        got, expected, hint: as in `errors.Problem`.
        line: lines of the record before the broken one.
    """

    def __init__(self, got: str, expected: str, *, hint: str = "", line: int = 0) -> None:
        super().__init__(got)
        self.got, self.expected, self.hint, self.line = got, expected, hint, line


@dataclass(frozen=True, kw_only=True)
class RecordBatch:
    """Unparsed records of one source.

    Attributes:
        source: the file or dataset.
        unit: `line` (counted from 1) or `row` (from 0).
        numbers: line or row at which each record begins.
        records: bytes of a file, or values of a column.
        parse: (record, text key) -> texts of the record; raises `UnreadableRecord` or `TooLongDocument`.
        max_document: size in bytes of UTF-8 that a document may have.
        size: bytes or characters of all records.
    """

    source: str
    unit: str
    numbers: list[int]
    records: list[Any]
    parse: Callable[[Any, str], list[str]]
    max_document: int
    size: int

    def texts(self, text_key: str) -> tuple[list[str], list[Problem]]:
        """The documents, without empty ones, and one problem for each broken record.

        Raises:
            UserError: a document is too long.
        """
        texts: list[str] = []
        broken, longest = [], self.max_document
        for number, record in zip(self.numbers, self.records, strict=True):
            try:
                for text in self.parse(record, text_key):
                    # A character has four bytes at most: few texts need to be encoded for this.
                    if 4 * len(text) > longest and (size := len(text.encode())) > longest:
                        raise TooLongDocument(size)
                    if text and not text.isspace():
                        texts.append(text)
            except UnreadableRecord as error:
                where = f"{self.source}, {self.unit} {number + error.line}"
                broken.append(Problem(where=where, got=error.got, expected=error.expected, hint=error.hint))
            except TooLongDocument as error:
                raise too_long(
                    where=f"{self.source}, {self.unit} {number}",
                    got=f"a document of {error.size:,} bytes",
                    max_document=self.max_document,
                ) from None

        return texts, broken


class BrokenRecords:
    """Counts records and broken ones, and raises UserError when too many are broken.

    Args:
        max_share: share of the records that may be broken, from 0 to 1.

    Attributes:
        total: records so far.
        count: broken records so far.
        first_problems: problems of the first 20 broken records.
    """

    def __init__(self, max_share: float = MAX_BROKEN) -> None:
        self.max_share, self.total, self.count = max_share, 0, 0
        self.first_problems: list[Problem] = []

    def add(self, records: int, broken: Sequence[Problem]) -> None:
        """Counts `records` records, of which those of `broken` are broken.

        Raises:
            UserError: more are broken than would be allowed of 10,000 records, or of all so far if these are more.
        """
        self.total += records
        self.count += len(broken)
        self.first_problems += broken[: 20 - len(self.first_problems)]

        if self.count > self.max_share * max(self.total, 10_000):
            raise self._too_many_error()

    def close(self) -> None:
        """After the last record: reports the broken ones on stderr, or raises UserError where they are too many."""
        if self.count > self.max_share * self.total:
            raise self._too_many_error()

        if self.count:
            note(f"left out {self._summary()}:")
            for problem in self.first_problems:
                note(f"  {problem.where}: {problem.got}")
            if self.count > len(self.first_problems):
                note(f"  ... and {self.count - len(self.first_problems):,} more")

    def _too_many_error(self) -> UserError:
        if self.count == 1:
            return UserError.from_problems(self.first_problems)
        return UserError.from_problems(
            self.first_problems[:3], f"{self._summary()}, and at most {self.max_share:.2%} may be"
        )

    def _summary(self) -> str:
        return f"{self.count:,} of {self.total:,} lines and rows that are broken"


def batch_records(
    *,
    source: str,
    unit: str,
    records: Iterator[tuple[int, Any]],
    parse: Callable[[Any, str], list[str]],
    max_document: int,
) -> Iterator[RecordBatch]:
    """Groups numbered records of one source into batches of about `BATCH_BYTES`."""
    numbers: list[int] = []
    pending: list[Any] = []
    size = 0

    def batch() -> RecordBatch:
        return RecordBatch(
            source=source,
            unit=unit,
            numbers=numbers,
            records=pending,
            parse=parse,
            max_document=max_document,
            size=size,
        )

    for number, record in records:
        numbers.append(number)
        pending.append(record)
        size += len(record) if isinstance(record, (bytes, str)) else 1

        if size >= BATCH_BYTES:
            yield batch()
            numbers, pending, size = [], [], 0

    if pending:
        yield batch()
