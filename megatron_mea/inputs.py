"""Reading files that may come from anywhere: a value within limits, or one of two kinds of errors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_MAX_JSON_BYTES = 16 << 20
"""As objects in memory these are up to twenty times as large."""
MAX_LINE_BYTES = 4 << 20
"""A row of metrics with the hashes of the samples of a global batch has some hundred thousand."""


def read_json_object(path: Path, *, max_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: the file cannot be read, or is none.
        ValueError: it is too large, no JSON, nested too deeply, or no object.
    """
    with _open_regular(path) as stream:
        raw = stream.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise ValueError(f"more than {max_bytes:,} bytes")

    return parse_json_object(raw)


def parse_json_object(raw: bytes) -> dict[str, Any]:
    """The object in a JSON text; raises ValueError where it is no JSON, nested too deeply, or no object."""
    try:
        contents = json.loads(raw)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(contents, dict):
        raise ValueError(f"a JSON {type(contents).__name__}")

    return contents


def read_lines(path: Path, *, max_bytes: int = MAX_LINE_BYTES) -> Iterator[bytes]:
    """The lines of a file, one in memory at a time; of one that is longer than `max_bytes` its beginning alone.

    Such a one, and a last one that is being written, come without a line end.

    Raises:
        OSError: the file cannot be read, or is none.
    """
    with _open_regular(path) as stream:
        while line := stream.readline(max_bytes):
            yield line
            while len(line) == max_bytes and not line.endswith(b"\n"):
                line = stream.readline(max_bytes)


def read_last_json_line(path: Path, *, max_bytes: int = MAX_LINE_BYTES) -> dict[str, Any]:
    """The object in the last line of a file, of which nothing else is read.

    Raises:
        OSError: the file cannot be read, or is none.
        ValueError: there is no line, it is longer than `max_bytes`, or it holds no object.
    """
    with _open_regular(path) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - max_bytes))
        lines = stream.read(max_bytes).splitlines()

    return parse_json_object(lines[-1] if lines else b"")


def _open_regular(path: Path) -> BinaryIO:
    if path.exists() and not path.is_file():
        # A pipe would be waited for.
        raise OSError(f"{path} is no regular file")

    return path.open("rb")
