"""Text files and JSON lines are cut where they say, and nothing is read ahead of its use."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from support.text_files import TEXTS, WRITERS, lines, read

from megatron_mea.data import line_files
from megatron_mea.data.sources import read_documents
from megatron_mea.errors import UserError


@pytest.mark.parametrize("blank", ["\n", " \n", "\t \n", "\n\n\n", "\n  \n\n"])
def test_blank_lines_separate_documents_of_a_text_file(blank: str, tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text(f"{blank}one\nstill one\n{blank}two\n{blank}  three\n{blank}")
    assert list(read(path)) == ["one\nstill one", "two", "  three"]


def test_a_text_file_is_one_document_where_nothing_else_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbf\n one\r\nstill one\r\n\r\n \n\nthe\rsame\n\n")
    assert list(read_documents([str(path)])) == ["\n one\nstill one\n\n \n\nthe\nsame\n"]

    path.write_bytes(b" \n\n")
    assert list(read_documents([str(path)])) == []

    path.write_bytes(b"one\n\ncaf\xe9\n")
    with pytest.raises(UserError, match=r"book\.txt, line 3\n.*not UTF-8"):
        list(read_documents([str(path)]))


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_text_file_without_a_blank_line_is_one_document(end: str, tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("a\nb\n c" + end)
    assert list(read(path)) == ["a\nb\n c"]


def test_windows_line_ends(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_bytes(b"a\r\nb\r\n\r\nc\r\n")
    (tmp_path / "corpus.jsonl").write_bytes(lines(["a\r\nb"]).replace(b"\n", b"\r\n"))
    assert list(read(tmp_path / "corpus.txt")) == ["a\nb", "c"]
    assert list(read(tmp_path / "corpus.jsonl")) == ["a\r\nb"]


def test_empty_documents_and_blank_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"\n" + lines(["", "a", " \n\t"]) + b"  \n\n" + lines(["b"]) + b"\n")
    assert list(read(path)) == ["a", "b"]


@pytest.mark.parametrize("blank", ["\r\r", "\n\u3000\n", "\r\n\xa0\r\n"])
def test_unusual_blank_lines_separate_documents(blank: str, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_bytes(f"a\rb{blank}c".encode())
    assert list(read(tmp_path / "corpus.txt")) == ["a\nb", "c"]


def test_unusual_line_separators_do_not_cut_a_json_line(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d\x0be"
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False), encoding="utf-8")
    assert list(read(tmp_path / "corpus.jsonl")) == [text]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbftwo\n")
    assert list(read(tmp_path / "a.jsonl", tmp_path / "b.txt")) == ["one", "two"]


@pytest.mark.parametrize("kind", [".jsonl.gz", ".jsonl.zst"])
def test_joined_compressed_files(kind: str, tmp_path: Path) -> None:
    # `cat a.gz b.gz`, and what parallel compressors write, is one file of several streams.
    WRITERS[kind](tmp_path / f"a{kind}", TEXTS[:2])
    WRITERS[kind](tmp_path / f"b{kind}", TEXTS[2:])
    joined = tmp_path / f"joined{kind}"
    joined.write_bytes((tmp_path / f"a{kind}").read_bytes() + (tmp_path / f"b{kind}").read_bytes())
    assert list(read(joined)) == TEXTS


def bytes_read() -> int:
    """Bytes that this process has asked the system for since it began."""
    counters = Path("/proc/self/io")
    if not counters.is_file():
        pytest.skip("needs Linux's /proc/self/io")
    return int(counters.read_text().split("rchar: ")[1].split()[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_the_first_document_costs_little_of_a_large_file(kind: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    texts = [random.bytes(500).hex() for _ in range(20_000)]
    path = tmp_path / f"large{kind}"
    WRITERS[kind](path, texts)
    # Modules that the first use of a reader imports must not count.
    WRITERS[kind](tmp_path / f"small{kind}", ["a", "b"])
    list(read(tmp_path / f"small{kind}"))
    size, before = path.stat().st_size, bytes_read()
    assert size > 9_000_000

    stream = read(path)
    assert next(stream) == texts[0]
    assert bytes_read() - before < size / 10
    assert list(islice(stream, 2000)) == texts[1:2001]
    assert bytes_read() - before < size / 4


@pytest.mark.parametrize("kind", [".jsonl.gz", ".jsonl.zst"])
def test_a_truncated_file_yields_its_documents_before_the_error(kind: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    texts = [random.bytes(50).hex() for _ in range(20_000)]
    path = tmp_path / f"large{kind}"
    WRITERS[kind](path, texts)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    seen: list[str] = []

    with pytest.raises(UserError, match="large"):
        seen.extend(read(path))
    assert 5_000 < len(seen) < 12_000
    assert seen == texts[: len(seen)]


def test_a_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    raw = bytearray(gzip.compress(lines(TEXTS)))
    # The first byte after the header of ten: 7 announces a last block of a kind that does not exist.
    raw[10] = 7
    (tmp_path / "damaged.jsonl.gz").write_bytes(raw)
    with pytest.raises(UserError, match=r"damaged\.jsonl\.gz"):
        list(read(tmp_path / "damaged.jsonl.gz"))


def zstd_frame(contents: bytes, window_log: int) -> bytes:
    """One raw block in a frame with that window (RFC 8878, 3.1.1)."""
    header = b"\x28\xb5\x2f\xfd" + bytes([0, (window_log - 10) << 3])
    return header + (1 | len(contents) << 3).to_bytes(3, "little") + contents


@pytest.mark.parametrize("window_log", [10, 27, 28, 31])
@pytest.mark.parametrize("has_library", [True, False])
def test_long_windows_of_zstd(
    window_log: int, has_library: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_library:
        monkeypatch.setattr(line_files, "zstd", None)
    elif line_files.zstd is None:
        pytest.skip("needs compression.zstd or backports.zstd")

    path = tmp_path / "long.jsonl.zst"
    path.write_bytes(zstd_frame(lines(TEXTS[:3]), 20) + zstd_frame(lines(TEXTS[3:4]), window_log))
    if has_library or window_log <= 27:
        assert list(read(path)) == TEXTS[:4]
        return

    with pytest.raises(UserError, match=r"long\.jsonl\.zst\n.*longer window(.|\n)*zstd --long=31 -dc"):
        list(read(path))


@pytest.mark.parametrize("has_library", [True, False])
def test_a_damaged_zstd_file_is_named(has_library: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_library:
        monkeypatch.setattr(line_files, "zstd", None)
    elif line_files.zstd is None:
        pytest.skip("needs compression.zstd or backports.zstd")

    frame = zstd_frame(lines(TEXTS[:3]), 20)
    for name, damaged in {"kind": b"junk" + frame, "cut": frame[:-5]}.items():
        (tmp_path / f"{name}.jsonl.zst").write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{name}\.jsonl\.zst\n.*not readable"):
            list(read(tmp_path / f"{name}.jsonl.zst"))
