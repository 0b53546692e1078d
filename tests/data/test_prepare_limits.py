"""What `prepare` refuses and warns of: long documents and tiny ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_mea.cli import main
from megatron_mea.data.prepare import prepare
from megatron_mea.data.text_records import ReadOptions
from megatron_mea.data.tokenizer import train_tokenizer
from megatron_mea.errors import UserError

CORPUS = Path(__file__).parents[2] / "launch/quickstart/validation.jsonl.gz"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "ids-300"
    train_tokenizer(sources=[str(CORPUS)], vocab_size=400, out=folder)
    return folder


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_long_document_is_refused_before_anything_is_published(workers: int, tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "corpus.jsonl"
    texts = [*["in the beginning " * 100] * 300, "x" * 2001]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"sources": [str(source)], "tokenizer_folder": tokenizer, "workers": workers, "max_broken": 1}

    with pytest.raises(UserError, match=r"corpus\.jsonl, line 301\n.*2,001 bytes\n.*at most 2,000 bytes"):
        prepare(prefix=tmp_path / "out", options=ReadOptions(max_document=2000), **options)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]
    assert prepare(prefix=tmp_path / "out", options=ReadOptions(max_document=2001), **options)[0] == 301


def test_options_of_the_command(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("In the beginning God created the heaven and the earth.\n\n" * 100)
    command = ["--input", "book.txt", "--max-document", "6000", "--out"]
    encode = ["prepare", "--tokenizer", str(tokenizer), "--workers", "1"]

    for more, documents in (([], 1), (["--split-at", "file"], 1), (["--split-at", "blank-lines"], 100)):
        assert main([*encode, *command, f"out{documents}", *more]) == 0
        out, err = capsys.readouterr()
        assert f"{documents} documents" in out
        assert "warning" not in err
        assert main(["tokenizer", *command, "new", "--vocab-size", "290", *more]) == 0
        capsys.readouterr()

    for verb in (encode, ["tokenizer", "--vocab-size", "290"]):
        assert main([*verb, "--input", "book.txt", "--out", "x", "--max-document", "5000"]) == 2
        assert "a document of 5,600 bytes" in capsys.readouterr().err
        for wrong in ("0", "1073741825"):
            assert main([*verb, "--input", "book.txt", "--out", "x", "--max-document", wrong]) == 2
            assert "--max-document" in capsys.readouterr().err


def test_tiny_documents_are_warned_of(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, texts, warned in (
        ("fragments", ["a b"] * 20, True),
        ("documents", ["in the beginning god created the heaven and the earth"] * 20, False),
        ("one", ["a"], False),
    ):
        (tmp_path / name).with_suffix(".jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        source = str(tmp_path / f"{name}.jsonl")
        documents, tokens, _ = prepare(sources=[source], tokenizer_folder=tokenizer, prefix=tmp_path / name)
        assert (tokens / documents - 1 < 16) == (warned or name == "one")
        err = capsys.readouterr().err
        assert err.startswith(f"warning: a document has {tokens / documents - 1:.1f} tokens") if warned else not err
