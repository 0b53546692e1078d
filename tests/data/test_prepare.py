"""`prepare`: the same corpus for every number of workers, equal to sentencepiece's own encoding, or none at all."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from megatron_mea.cli import main
from megatron_mea.data.indexed import IndexedReader
from megatron_mea.data.prepare import prepare
from megatron_mea.data.tokenizer import train_tokenizer
from megatron_mea.errors import UserError

CORPUS = Path(__file__).parents[2] / "launch/quickstart/validation.jsonl.gz"
EOS = 2


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Documents of very different lengths, more than wait at once for two workers (8 batches of 128)."""
    with gzip.open(CORPUS, "rt", encoding="utf-8") as stream:
        whole = [json.loads(line)["text"] for line in stream]
    short = [line for text in whole for line in text.splitlines() if line.strip()][:1500]
    return [*short[:300], *whole[:20], "</s>", "a </s> b <pad>", "\n x", "\u65e5\U0001f600", *short[300:]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "ids-512"
    train_tokenizer([str(CORPUS)], 512, folder)
    return folder


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def encoded(tokenizer: Path, texts: list[str]) -> list[list[int]]:
    """Every document's ids by sentencepiece alone, and the end-of-document id after each."""
    piece = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
    return [[*piece.encode(text), EOS] for text in texts]


def stored(prefix: Path) -> list[list[int]]:
    reader = IndexedReader(prefix)
    starts = np.cumsum(reader.lengths)[:-1]
    return [document.tolist() for document in np.split(np.asarray(reader.tokens), starts)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_equal_to_an_independent_encoding(tokenizer: Path, texts: list[str], tmp_path: Path) -> None:
    source = write(tmp_path / "corpus.jsonl", texts)
    counts = prepare([source], tokenizer, tmp_path / "out", workers=1)
    expected = encoded(tokenizer, texts)
    assert counts == (len(expected), sum(map(len, expected)))
    assert stored(tmp_path / "out") == expected
    reader = IndexedReader(tmp_path / "out")
    assert reader.dtype == np.uint16
    assert reader.documents.tolist() == list(range(len(expected) + 1))
    # The end-of-document id stands after each document, and nowhere else.
    assert np.flatnonzero(reader.tokens == EOS).tolist() == (np.cumsum(reader.lengths) - 1).tolist()
    assert names(tmp_path) == ["corpus.jsonl", "out.bin", "out.idx"]


def test_workers_do_not_change_a_byte(tokenizer: Path, texts: list[str], tmp_path: Path) -> None:
    # Long documents first, so that the first batch is the last one to be ready.
    source = write(tmp_path / "corpus.jsonl", sorted(texts, key=len, reverse=True))
    for workers in (1, 2):
        prepare([source], tokenizer, tmp_path / f"out-{workers}", workers=workers)
    for kind in ("bin", "idx"):
        assert (tmp_path / f"out-1.{kind}").read_bytes() == (tmp_path / f"out-2.{kind}").read_bytes()
    assert names(tmp_path) == ["corpus.jsonl", "out-1.bin", "out-1.idx", "out-2.bin", "out-2.idx"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failing_source_leaves_nothing(workers: int, tokenizer: Path, texts: list[str], tmp_path: Path) -> None:
    whole = write(tmp_path / "corpus.jsonl", texts[:300])
    lines = Path(whole).read_text().splitlines(keepends=True)
    # Beyond the first batch, so that something has been written by then.
    Path(whole).write_text("".join([*lines[:250], '{"text": "cut of\n', *lines[250:]]))
    out = tmp_path / "made/here/out"
    with pytest.raises(UserError, match=r"corpus\.jsonl, line 251"):
        prepare([whole], tokenizer, out, workers=workers)
    # The folders that were made for it are gone too.
    assert names(tmp_path) == ["corpus.jsonl"]
    if workers == 1:
        Path(whole).write_text("".join(lines))
        prepare([whole], tokenizer, out, workers=workers)
        assert stored(out) == encoded(tokenizer, texts[:300])
        assert names(out.parent) == ["out.bin", "out.idx"]


def test_a_failing_source_keeps_what_was_there(tokenizer: Path, texts: list[str], tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good.jsonl", texts[:5]), write(tmp_path / "bad.jsonl", texts[5:10])
    prepare([good], tokenizer, tmp_path / "out")
    before = [(tmp_path / f"out.{kind}").read_bytes() for kind in ("bin", "idx")]
    with Path(bad).open("a") as stream:
        stream.write("[1, 2]\n")
    with pytest.raises(UserError, match=r"bad\.jsonl, line 6"):
        prepare([good, bad], tokenizer, tmp_path / "out")
    assert [(tmp_path / f"out.{kind}").read_bytes() for kind in ("bin", "idx")] == before
    assert names(tmp_path) == ["bad.jsonl", "good.jsonl", "out.bin", "out.idx"]


def test_a_folder_of_the_same_name_is_no_hindrance(tokenizer: Path, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    prepare([write(tmp_path / "corpus.jsonl", texts[:2])], tokenizer, tmp_path / "out")
    assert stored(tmp_path / "out") == encoded(tokenizer, texts[:2])
    assert names(tmp_path) == ["corpus.jsonl", "out", "out.bin", "out.idx"]


def test_sources_without_text_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "corpus.jsonl", ["", " \n"])
    with pytest.raises(UserError, match="no text"):
        prepare([source], tokenizer, tmp_path / "out")
    assert names(tmp_path) == ["corpus.jsonl"]


def test_command(
    tokenizer: Path,
    texts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Imported here, because it takes seconds.
    import datasets

    (tmp_path / "a.jsonl").write_text(json.dumps({"body": texts[0], "text": "wrong"}) + "\n")
    parts = {"train": [texts[1]], "validation": texts[2:4]}
    folder = datasets.DatasetDict({name: datasets.Dataset.from_dict({"body": part}) for name, part in parts.items()})
    folder.save_to_disk(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    options = ["--text-key", "body", "--split", "validation", "--workers", "1"]
    assert (
        main(["prepare", "--input", "a.jsonl", "b", "--tokenizer", str(tokenizer), "--out", "deep/out", *options]) == 0
    )
    expected = encoded(tokenizer, [texts[0], *texts[2:4]])
    assert stored(tmp_path / "deep/out") == expected
    out = capsys.readouterr().out
    assert "deep/out" in out
    assert f"3 documents, {sum(map(len, expected)):,} tokens" in out


def test_text_that_is_no_unicode_is_named(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"text": "fine"}\n{"text": "half a pair: \\ud83d"}\n')
    with pytest.raises(UserError, match=r"corpus\.jsonl, line 2"):
        prepare([str(tmp_path / "corpus.jsonl")], tokenizer, tmp_path / "out")
    assert names(tmp_path) == ["corpus.jsonl"]


@pytest.mark.parametrize("delay", [1.5, 6.0])
def test_an_interrupted_prepare_leaves_nothing(tmp_path, tokenizer, delay):
    """Ctrl-C reaches the whole group, also while workers start; SIGTERM reaches the command alone."""
    source = tmp_path / "big.jsonl"
    source.write_text('{"text": "In the beginning God created the heaven and the earth. "}\n' * 3_000_000)
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        arguments = ["prepare", "--input", str(source), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "out/x")]
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_mea", *arguments, "--workers", "2"],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        time.sleep(delay)
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == status, err
        assert "Traceback" not in err
        assert not (tmp_path / "out").exists()
