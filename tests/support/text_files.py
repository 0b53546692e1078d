"""Files of text of every kind, and what is read of them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet

from megatron_mea.data.sources import read_documents
from megatron_mea.data.text_records import BrokenRecords, ReadOptions

TEXTS = [
    "one line",
    "two\nlines",
    "  indented, \u00e9\u65e5\U0001f600 ",
    '"quotes" \\ and {braces}',
    "x" * 5000,
    "last",
]


def lines(texts: Sequence[str], key: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)).encode()


def write_text(path: Path, texts: Sequence[str]) -> None:
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")


def write_jsonl(path: Path, texts: Sequence[str]) -> None:
    path.write_bytes(lines(texts))


def write_gzip(path: Path, texts: Sequence[str]) -> None:
    with gzip.open(path, "wb") as stream:
        stream.write(lines(texts))


def write_zstd(path: Path, texts: Sequence[str]) -> None:
    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write(lines(texts))


def write_parquet(path: Path, texts: Sequence[str]) -> None:
    table = pyarrow.table({"id": range(len(texts)), "text": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=max(2, len(texts) // 100))


WRITERS: dict[str, Callable[[Path, Sequence[str]], None]] = {
    ".txt": write_text,
    ".jsonl": write_jsonl,
    ".jsonl.gz": write_gzip,
    ".jsonl.zst": write_zstd,
    ".parquet": write_parquet,
    ".ndjson": write_jsonl,
    ".ndjson.gz": write_gzip,
    ".ndjson.zst": write_zstd,
    ".json.gz": write_gzip,
    ".json.zst": write_zstd,
}


def read(*sources: str | Path, broken: BrokenRecords | None = None, **options: object) -> Iterator[str]:
    """The documents of `sources`, a `.txt` cut at its blank lines."""
    read_options = ReadOptions(**({"split_at": "blank-lines"} | options))
    return read_documents([str(source) for source in sources], options=read_options, broken=broken)
