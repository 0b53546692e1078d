"""Reading small files that may come from anywhere: a value within limits, or one of two kinds of errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_MAX_JSON_BYTES = 64 << 20
"""A tokenizer of a large vocabulary has 20 million."""


def read_json_object(path: Path, *, max_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: the file cannot be read, or is none.
        ValueError: it is too large, no JSON, nested too deeply, or no object.
    """
    if path.exists() and not path.is_file():
        # A pipe would be waited for.
        raise OSError(f"{path} is no regular file")

    with path.open("rb") as stream:
        raw = stream.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise ValueError(f"more than {max_bytes:,} bytes")

    try:
        contents = json.loads(raw)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(contents, dict):
        raise ValueError(f"a JSON {type(contents).__name__}")

    return contents
