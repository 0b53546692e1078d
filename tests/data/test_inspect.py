"""`inspect PREFIX`: right figures of whole data, and status 2 for damage of any file."""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.indexed_by_hand import write_by_hand

from megatron_mea.cli import main
from megatron_mea.data import index_entries
from megatron_mea.data.indexed import IndexedReader
from megatron_mea.data.inspect import _describe_lengths
from megatron_mea.data.metadata import DataMetadata


@pytest.fixture
def prefix(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A copy of prepared data, in the current folder."""
    for kind in ("bin", "idx", "meta.json"):
        shutil.copy(f"{tiny.validation}.{kind}", tmp_path / f"data.{kind}")
    monkeypatch.chdir(tmp_path)
    return "data"


def test_whole_data(prefix, tiny, capsys) -> None:
    reader = IndexedReader(prefix)
    for name in (prefix, f"{prefix}.idx", f"{prefix}.bin"):
        assert main(["inspect", name]) == 0
        rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert rows["documents"] == "3"
        assert rows["tokens"] == f"{reader.tokens.size:,}"
        assert rows["dtype"] == "uint16"
        assert rows["integrity"].startswith("whole")
        assert str(tiny.tokenizer) in rows["tokenizer"]
        assert "validation.jsonl" in rows["input"]
        assert "'text_key': 'text'" in rows["options"]
        middle = sorted(reader.lengths.tolist())[1]
        assert (
            f"median {middle:,.1f}, mean {reader.tokens.size / 3:,.1f}, max {max(reader.lengths):,}" in rows["lengths"]
        )


def test_data_without_checksums_and_a_folder_of_the_same_name(prefix, capsys) -> None:
    Path("data.meta.json").unlink()
    Path("data").mkdir()
    assert main(["inspect", prefix]) == 0
    assert "no PREFIX.meta.json" in capsys.readouterr().out


def flip(name: str, place: int):
    def change() -> None:
        raw = bytearray(Path(name).read_bytes())
        raw[place] ^= 1
        Path(name).write_bytes(raw)

    return change


def edit_metadata(**changes):
    def change() -> None:
        meta = Path("data.meta.json")
        meta.write_text(json.dumps(json.loads(meta.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("change", "where", "got"),
    [
        (flip("data.bin", 5), "data.bin", "SHA-256 "),
        (flip("data.idx", 34), "data.idx", "sequence 0 of "),
        (lambda: Path("data.bin").write_bytes(Path("data.bin").read_bytes()[:-2]), "data.bin", ""),
        (lambda: Path("data.bin").unlink(), "data.bin", "no such file"),
        (lambda: Path("data.idx").unlink(), "data.idx", "no such file"),
        (edit_metadata(documents=4), "data.meta.json", "{'documents': 4,"),
        (edit_metadata(documents="\x1b[2J"), "data.meta.json", "unreadable"),
        (edit_metadata(format_version=7), "data.meta.json", "unreadable (format version 7"),
    ],
)
def test_damage_is_named(change, where, got, prefix, capsys) -> None:
    change()
    assert main(["inspect", prefix]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert f"error: {where}\n  got:      {got}" in output.err
    assert "\x1b" not in output.err


def test_other_data_beside_old_metadata(prefix, capsys) -> None:
    """Sound by itself, but not what was written: documents of other borders."""
    write_by_hand(prefix=Path(prefix), dtype="u2", sequences=[[1], [2, 3]], documents=[0, 1, 2])
    assert main(["inspect", prefix]) == 2
    assert "data.meta.json holds" in capsys.readouterr().err


def test_what_a_stranger_noted_moves_no_cursor(prefix, capsys) -> None:
    recipe = json.loads(Path("data.meta.json").read_text())["recipe"]
    evil = "\x1b[2J"
    edit_metadata(
        versions={evil: evil},
        recipe=recipe | {"sources": [evil], "tokenizer_folder": evil, "tokenizer": evil, "options": {evil: evil}},
    )()
    assert main(["inspect", prefix]) == 0
    assert "\x1b" not in capsys.readouterr().out


@given(st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=20), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_lengths_are_those_of_the_documents(documents: list[list[int]], chunk: int) -> None:
    """Of documents of any number of sequences, in pieces of any size."""
    lengths = [sum(document) for document in documents]
    sequences = [[1] * length for document in documents for length in document]
    borders = [sum(map(len, documents[:index])) for index in range(len(documents) + 1)]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(index_entries, "_CHUNK", chunk)
        write_by_hand(prefix=Path(folder, "x"), dtype="i4", sequences=sequences, documents=borders)
        text = _describe_lengths(IndexedReader(Path(folder, "x")))

    figures = f"min {min(lengths)}, median {statistics.median(lengths):.1f}, mean {statistics.mean(lengths):.1f}"
    assert text == f"{figures}, max {max(lengths)} tokens a document"


def test_no_metadata_is_no_error(tmp_path: Path) -> None:
    assert DataMetadata.read(tmp_path / "none") is None
