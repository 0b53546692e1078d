"""What a refusal must look like: status 2, one message that names the key or the file, no traceback, nothing written.

Tables hold what the message must say: where, found, allowed and perhaps how to mend it. `...` stands for any text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from megatron_mea.errors import Problem

PROBLEM = re.compile(
    r"^error: (?P<where>.*)\n  found:   (?P<found>(?s:.*?))\n  allowed: (?P<allowed>.*)(?:\n  mend:    (?P<mend>.*))?$",
    re.MULTILINE,
)
LAYOUTS = re.compile(r"\n(?:no layout|layouts) of \d+ processes")
PROGRESS_BAR = re.compile(r"^[\r\n]*((prepare|evaluate): [^\r\n]*[\r\n]+)+")


def table(rows: Iterable[tuple]) -> list:
    """Each row as its first entry and the tuple of the others."""
    return [pytest.param(row[0], row[1:], id=str(row[0])[:60]) for row in rows]


class Accepted(BaseException):
    """Raised where training would begin."""


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def edit(path: str | Path, change: Callable[[bytes], bytes] | None) -> None:
    """Changes the bytes of a file, or removes it where there is no change to make."""
    Path(path).write_bytes(change(Path(path).read_bytes())) if change else Path(path).unlink()


def check(problems: Sequence[Problem], *expected: Sequence[str]) -> None:
    """Compares with (where, found, allowed) or (where, found, allowed, mend) of every problem."""
    assert len(problems) == len(expected), problems
    for problem, row in zip(problems, expected, strict=True):
        for name, wanted in zip(("where", "found", "allowed", "mend"), row, strict=False):
            pattern = re.escape(wanted).replace(re.escape("..."), ".*")
            assert re.fullmatch(pattern, getattr(problem, name), re.DOTALL), (name, wanted, problem)


KINDS = ".txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet"
GOOD = b'{"text": "In the beginning"}\n'
TOKENIZER = "tokenizer --vocab-size 384 --out made/new --input"
PREPARE = "prepare --tokenizer tokenizer --workers 1 --out made/new --input"
