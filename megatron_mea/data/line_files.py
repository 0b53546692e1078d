"""Text files and JSON lines: cut into raw records within bounds, and records parsed into texts."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from megatron_mea.data.text_records import ReadOptions, RecordBatch, UnreadableRecord, batch_records, too_long
from megatron_mea.errors import UserError

try:
    from compression import zstd
except ImportError:
    try:
        from backports import zstd
    except ImportError:
        # pyarrow's reads windows of up to 128 MiB alone.
        zstd = None

TEXT_KEY_HINT = "give the right one with --text-key"
_LONG_WINDOW = 31
"""Base-2 logarithm of the longest window that zstd has: `zstd --long=31` asks for it."""
_LONG_WINDOW_ERROR = "Frame requires too much memory"
_ERRORS = (OSError, EOFError, zlib.error, *((zstd.ZstdError,) if zstd else ()))


def read_text_file(path: Path, options: ReadOptions) -> Iterator[RecordBatch]:
    """A `.txt`: one document, or those between its blank lines."""
    records, parse = (
        (_read_whole(path, options), _parse_whole)
        if options.split_at == "file"
        else (_read_blocks(path, options), _parse_block)
    )
    return batch_records(source=str(path), unit="line", records=records, parse=parse, max_document=options.max_document)


def read_json_lines(path: Path, options: ReadOptions) -> Iterator[RecordBatch]:
    """JSON lines, an object with a text each."""
    lines = ((number, line) for number, line in _read_lines(path, options) if not line.isspace())
    return batch_records(
        source=str(path), unit="line", records=lines, parse=_parse_json, max_document=options.max_document
    )


def _read_whole(path: Path, options: ReadOptions) -> Iterator[tuple[int, bytes]]:
    # A mark and the last line end are no text, and other line ends become half as long.
    longest = 2 * options.max_document + 8
    try:
        with path.open("rb") as stream:
            raw = stream.read(longest + 1).removeprefix(codecs.BOM_UTF8)
            size = os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise _unreadable(path, error) from None

    if len(raw) > longest - 3 or len(raw) - raw.count(b"\r\n") - 1 > options.max_document:
        raise too_long(
            where=str(path),
            got=f"a document of {size:,} bytes, since each .txt is one",
            max_document=options.max_document,
            hint="cut it at its blank lines with --split-at blank-lines, or allow more with --max-document",
        )

    yield 1, raw


def _parse_whole(raw: bytes, text_key: str) -> list[str]:
    return [_decode_utf8(raw).replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")]


def _read_blocks(path: Path, options: ReadOptions) -> Iterator[tuple[int, bytes]]:
    """The blocks between blank lines, each with the number of its first line."""
    first_line, block, size = 0, [], 0
    for number, line in _read_lines(path, options):
        if not line.isspace():
            first_line = first_line if block else number
            block.append(line)
            size += len(line)
            if size > options.max_record:
                raise _too_long_record(f"{path}, line {first_line}", "a block", options)
        elif block:
            yield first_line, b"".join(block)
            block, size = [], 0

    if block:
        yield first_line, b"".join(block)


def _parse_block(raw: bytes, text_key: str) -> list[str]:
    """The documents of a block: usually one, more where a line of Unicode blanks or a bare \\r separates them."""
    documents: list[list[str]] = [[]]
    for line in io.StringIO(_decode_utf8(raw), newline=None):
        if line.isspace():
            documents.append([])
        else:
            documents[-1].append(line)

    return ["".join(lines).removesuffix("\n") for lines in documents]


def _parse_json(raw: bytes, text_key: str) -> list[str]:
    # Without its newline, of which the message about a truncated string would complain.
    line = _decode_utf8(raw.rstrip(b"\r\n"))
    try:
        record = json.loads(line)
    # Broken JSON, and numbers and nestings beyond Python's limits.
    except (ValueError, RecursionError) as error:
        raise UnreadableRecord(f"broken JSON: {getattr(error, 'msg', error)}", "one JSON object a line") from None

    if not isinstance(record, dict):
        raise UnreadableRecord(f"a JSON {type(record).__name__}", "one JSON object a line")

    if text_key not in record:
        raise UnreadableRecord(
            got=f"the fields {', '.join(record)}", expected=f"text in the field {text_key!r}", hint=TEXT_KEY_HINT
        )

    return parse_value(record[text_key], text_key)


def parse_value(text: Any, text_key: str) -> list[str]:
    """The text of a field or column; an exception that stands there in its place is raised.

    Raises:
        UnreadableRecord: it is no text.
        TooLongDocument: its reader found it too long.
    """
    if isinstance(text, UnicodeDecodeError):
        raise _utf8_error(text)
    if isinstance(text, Exception):
        raise text
    if not isinstance(text, str):
        raise UnreadableRecord(got=type(text).__name__, expected=f"text in the field {text_key!r}", hint=TEXT_KEY_HINT)

    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can escape half of a surrogate pair, which is no character.
        raise UnreadableRecord(f"no Unicode text ({error.reason})", "text that UTF-8 can write") from None

    return [text]


def _decode_utf8(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _utf8_error(error, line=raw.count(b"\n", 0, error.start)) from None


def _utf8_error(error: UnicodeDecodeError, line: int = 0) -> UnreadableRecord:
    return UnreadableRecord(got=f"not UTF-8 ({error.reason})", expected="UTF-8 text", line=line)


def _read_lines(path: Path, options: ReadOptions) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of each line of a file, decompressed where it is `.gz` or `.zst`."""
    longest, number = options.max_record, 1
    try:
        with _open_binary(path) as stream:
            # No more than one byte beyond the bound: a line may have any length, a decompressed one above all.
            read_line = partial(stream.readline, longest + 1)
            line = read_line().removeprefix(codecs.BOM_UTF8)
            while line:
                if len(line) > longest:
                    raise _too_long_record(f"{path}, line {number}", "a line", options)

                yield number, line
                line = read_line()
                number += 1
    except _ERRORS as error:
        raise _unreadable(path, error) from None


def _too_long_record(where: str, record: str, options: ReadOptions) -> UserError:
    got = f"{record} of more than {options.max_record:,} bytes"
    return too_long(where=where, got=got, max_document=options.max_document)


def _unreadable(path: Path, error: Exception) -> UserError:
    if _LONG_WINDOW_ERROR in str(error):
        return UserError(
            where=str(path),
            got="zstd with a longer window than is read here",
            expected="`backports.zstd` in this environment, which reads it",
            hint=f"pip install backports.zstd, or compress anew: zstd --long={_LONG_WINDOW} -dc FILE | zstd",
        )
    return UserError(where=str(path), got=f"not readable: {error}", expected="a readable, whole file")


def _open_binary(path: Path) -> IO[bytes]:
    """A buffered stream of the file's bytes, decompressed as they are read."""
    if path.suffix.lower() in (".gz", ".zst") and path.stat().st_size == 0:
        # Decompression would take it for the end of an intact stream.
        raise EOFError("0 bytes: a truncated archive")

    if path.suffix.lower() == ".gz":
        return io.BufferedReader(gzip.open(path), 1 << 17)

    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_open_zstd(path), 1 << 17)

    return path.open("rb", 1 << 17)


def _open_zstd(path: Path) -> Any:
    if zstd is not None:
        return zstd.ZstdFile(path, options={zstd.DecompressionParameter.window_log_max: _LONG_WINDOW})

    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")
