"""Helpers for tests of refused commands: status 2, one message that names the key or file, no file changed.

Tables hold the texts of a message: where, got, expected and perhaps a hint. `...` stands for any text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from megatron_mea.errors import Problem

PROBLEM = re.compile(
    r"^error: (?P<where>.*)\n  got:      (?P<got>(?s:.*?))\n  expected: (?P<expected>.*)"
    r"(?:\n  hint:     (?P<hint>.*))?$",
    re.MULTILINE,
)
LAYOUTS = re.compile(r"\n(?:no layout|layouts) of \d+ processes")
PROGRESS_BAR = re.compile(r"^[\r\n]*((prepare|evaluate): [^\r\n]*[\r\n]+)+")


def refusal_params(rows: Iterable[tuple]) -> list:
    """pytest parameters (first entry, tuple of the other entries) of each row, named by the first entry."""
    return [pytest.param(row[0], row[1:], id=str(row[0])[:60]) for row in rows]


class TrainingStarted(BaseException):
    """Raised where training would begin."""


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    """Contents of every file below `folder`, None for folders."""
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def edit_file(path: str | Path, change: Callable[[bytes], bytes] | None) -> None:
    """Applies `change` to the bytes of a file, or removes the file where `change` is None."""
    path = Path(path)
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))


def check_problems(problems: Sequence[Problem], *expected: Sequence[str]) -> None:
    """Compares every problem with its (where, got, expected) or (where, got, expected, hint)."""
    assert len(problems) == len(expected), problems

    for problem, row in zip(problems, expected, strict=True):
        for name, text in zip(("where", "got", "expected", "hint"), row, strict=False):
            pattern = re.escape(text).replace(re.escape("..."), ".*")
            assert re.fullmatch(pattern, str(getattr(problem, name)), re.DOTALL), (name, text, problem)


KINDS = ".txt, .parquet or JSON lines (.jsonl, .ndjson; .jsonl, .ndjson or .json with .gz or .zst)"
GOOD = b'{"text": "In the beginning"}\n'
TOKENIZER = "tokenizer --vocab-size 384 --out made/new --input"
PREPARE = "prepare --tokenizer tokenizer --workers 1 --out made/new --input"
