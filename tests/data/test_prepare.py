"""`prepare`: the same corpus for every number of workers, equal to sentencepiece's own encoding, or none at all."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
from support.dying_encoder import DyingEncoder
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megatron_mea.cli import main
from megatron_mea.data import text_records
from megatron_mea.data.indexed import IndexedReader
from megatron_mea.data.prepare import Encoder, _encode_batches, prepare
from megatron_mea.data.sources import read_documents, record_batches
from megatron_mea.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_mea.errors import RunError, UserError

CORPUS = Path(__file__).parents[2] / "launch/quickstart/validation.jsonl.gz"
EOS = 2


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Documents of very different lengths, more than wait at once for two workers (8 batches of 128)."""
    with gzip.open(CORPUS, "rt", encoding="utf-8") as stream:
        long = [json.loads(line)["text"] for line in stream]
    short = [line for text in long for line in text.splitlines() if line.strip()][:1500]
    return [*short[:300], *long[:20], "</s>", "a </s> b <pad>", "\n x", "\u65e5\U0001f600", *short[300:]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "ids-512"
    train_tokenizer(sources=[str(CORPUS)], vocab_size=512, out=folder)
    return folder


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def reference_ids(tokenizer: Path, texts: list[str]) -> list[list[int]]:
    """Every document's ids by sentencepiece alone, and the end-of-document id after each."""
    piece = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
    return [[*piece.encode(text), EOS] for text in texts]


def read_corpus(prefix: Path) -> list[list[int]]:
    reader = IndexedReader(prefix)
    starts = np.cumsum(reader.lengths)[:-1]
    return [document.tolist() for document in np.split(np.asarray(reader.tokens), starts)]


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_equal_to_an_independent_encoding(tokenizer: Path, texts: list[str], tmp_path: Path) -> None:
    source = write(tmp_path / "corpus.jsonl", texts)
    counts = prepare(sources=[source], tokenizer_folder=tokenizer, prefix=tmp_path / "out", workers=1)
    expected = reference_ids(tokenizer, texts)
    assert counts == (len(expected), sum(map(len, expected)), True)
    assert read_corpus(tmp_path / "out") == expected

    reader = IndexedReader(tmp_path / "out")
    assert reader.dtype == np.uint16
    assert reader.document_indices.tolist() == list(range(len(expected) + 1))
    # The end-of-document id stands after each document, and nowhere else.
    assert np.flatnonzero(reader.tokens[:] == EOS).tolist() == (np.cumsum(reader.lengths) - 1).tolist()
    assert file_names(tmp_path) == ["corpus.jsonl", "out.bin", "out.idx", "out.meta.json"]


@pytest.mark.slow
def test_workers_do_not_change_a_byte(
    tokenizer: Path,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # More batches than wait at once, each file more than one, and broken lines in two of them.
    monkeypatch.setattr(text_records, "BATCH_BYTES", 1 << 12)
    # Long documents first, so that the first batch is the last one to be ready.
    ordered = sorted(texts, key=len, reverse=True)
    inputs = [write(tmp_path / f"{name}.jsonl", ordered[part::3]) for part, name in enumerate("abc")]
    for path in inputs[:2]:
        Path(path).write_text("oops\n" + Path(path).read_text() + "[]\n")

    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(Path(inputs[2]).read_bytes()))
    column = pyarrow.array([*(text.encode() for text in texts[:50]), None, b"\xff"]).view("string")
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "e.parquet")
    (tmp_path / "f.txt").write_text("\n\n".join(texts[:50]))
    inputs += [str(tmp_path / name) for name in ("d.jsonl.gz", "e.parquet", "f.txt")]

    assert len(list(record_batches(inputs))) > 30

    reports = []
    for workers in (1, 2, 3):
        prepare(
            sources=inputs,
            tokenizer_folder=tokenizer,
            prefix=tmp_path / f"out-{workers}",
            workers=workers,
        )
        reports.append(capfd.readouterr().err)

    assert "left out 6 of " in reports[0]
    assert reports[0] == reports[1] == reports[2]

    for kind in ("bin", "idx", "meta.json"):
        first, *others = [(tmp_path / f"out-{workers}.{kind}").read_bytes() for workers in (1, 2, 3)]
        assert [other == first for other in others] == [True, True]
    assert read_corpus(tmp_path / "out-3") == reference_ids(tokenizer, list(read_documents(inputs)))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_failing_source_leaves_nothing(workers: int, tokenizer: Path, texts: list[str], tmp_path: Path) -> None:
    source = write(tmp_path / "corpus.jsonl", texts[:300])
    lines = Path(source).read_text().splitlines(keepends=True)
    # Beyond the first batch, so that something has been written by then.
    Path(source).write_text("".join([*lines[:250], '{"text": "cut of\n', *lines[250:]]))
    out = tmp_path / "made/here/out"

    with pytest.raises(UserError, match=r"corpus\.jsonl, line 251"):
        prepare(sources=[source], tokenizer_folder=tokenizer, prefix=out, workers=workers, max_broken=0)
    # The folders that were made for it are gone too.
    assert file_names(tmp_path) == ["corpus.jsonl"]

    if workers == 1:
        Path(source).write_text("".join(lines))
        prepare(sources=[source], tokenizer_folder=tokenizer, prefix=out, workers=workers)
        assert read_corpus(out) == reference_ids(tokenizer, texts[:300])
        assert file_names(out.parent) == ["out.bin", "out.idx", "out.meta.json"]


def test_a_failing_source_keeps_what_was_there(tokenizer: Path, texts: list[str], tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good.jsonl", texts[:5]), write(tmp_path / "bad.jsonl", texts[5:10])
    prepare(sources=[good], tokenizer_folder=tokenizer, prefix=tmp_path / "out")
    before = [(tmp_path / f"out.{kind}").read_bytes() for kind in ("bin", "idx")]
    with Path(bad).open("a") as stream:
        stream.write("[1, 2]\n")

    with pytest.raises(UserError, match=r"bad\.jsonl, line 6"):
        prepare(sources=[good, bad], tokenizer_folder=tokenizer, prefix=tmp_path / "out", force=True)
    assert [(tmp_path / f"out.{kind}").read_bytes() for kind in ("bin", "idx")] == before
    assert file_names(tmp_path) == ["bad.jsonl", "good.jsonl", "out.bin", "out.idx", "out.meta.json"]


def test_a_folder_of_the_same_name_is_no_hindrance(tokenizer: Path, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    prepare(sources=[write(tmp_path / "corpus.jsonl", texts[:2])], tokenizer_folder=tokenizer, prefix=tmp_path / "out")
    assert read_corpus(tmp_path / "out") == reference_ids(tokenizer, texts[:2])
    assert file_names(tmp_path) == ["corpus.jsonl", "out", "out.bin", "out.idx", "out.meta.json"]


def test_sources_without_text_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "corpus.jsonl", ["", " \n"])
    with pytest.raises(UserError, match="no text"):
        prepare(sources=[source], tokenizer_folder=tokenizer, prefix=tmp_path / "out")
    assert file_names(tmp_path) == ["corpus.jsonl"]


def test_command(
    tokenizer: Path,
    texts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Imported here, because it takes seconds.
    import datasets

    (tmp_path / "a.jsonl").write_text(json.dumps({"body": texts[0], "text": "wrong"}) + "\noops\n")
    parts = {"train": [texts[1]], "validation": texts[2:4]}
    folder = datasets.DatasetDict({name: datasets.Dataset.from_dict({"body": part}) for name, part in parts.items()})
    folder.save_to_disk(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    options = ["--text-key", "body", "--split", "validation", "--workers", "1", "--max-broken", "0.5"]
    # A second --input adds to the first.
    inputs = ["--input", "a.jsonl", "b", "--input", "a.jsonl"]

    assert main(["prepare", *inputs, "--tokenizer", str(tokenizer), "--out", "deep/out", *options]) == 0

    expected = reference_ids(tokenizer, [texts[0], *texts[2:4], texts[0]])
    assert read_corpus(tmp_path / "deep/out") == expected

    out, err = capsys.readouterr()
    assert "a.jsonl, line 2: broken JSON" in err
    assert "deep/out" in out
    assert f"4 documents, {sum(map(len, expected)):,} tokens" in out


def test_text_that_is_no_unicode_is_named(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"text": "fine"}\n{"text": "half a pair: \\ud83d"}\n')
    with pytest.raises(UserError, match=r"corpus\.jsonl, line 2"):
        prepare(sources=[str(tmp_path / "corpus.jsonl")], tokenizer_folder=tokenizer, prefix=tmp_path / "out")
    assert file_names(tmp_path) == ["corpus.jsonl"]


def byte_level(folder: Path) -> PreTrainedTokenizerFast:
    """Another kind of tokenizer, whose file brings along truncation, padding and a token that begins every text."""
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>", "<pad>"])
    backend.train_from_iterator(["in the beginning", "the end of the beginning"], trainer)
    backend.add_tokens(["beginning of"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.enable_truncation(7)
    backend.enable_padding(length=9, pad_id=2, pad_token="<pad>")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)
    return load_tokenizer(folder)


def test_ids_are_those_of_transformers(texts: list[str], tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    encoder = Encoder.from_tokenizer(tokenizer, tmp_path)
    assert encoder.backend

    samples = [*texts[290:330], "the beginning of <s>the end</s>", " <pad> ", "\x00", ""]
    expected = [
        [*tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], tokenizer.eos_token_id]
        for text in samples
    ]

    assert max(map(len, expected)) > 1000

    # Without a backend transformers itself encodes.
    for copy in (pickle.loads(pickle.dumps(encoder)), dataclasses.replace(encoder, backend="")):
        tokens, lengths = copy(samples)
        assert lengths.tolist() == [len(ids) for ids in expected]
        assert tokens.tolist() == [token for ids in expected for token in ids]
        assert [array.size for array in copy([])] == [0, 0]


class CustomTokenizer(PreTrainedTokenizerFast):
    def _encode_plus(self, *arguments, **settings):
        return super()._encode_plus(*arguments, **settings)


def test_a_tokenizer_with_code_of_its_own_keeps_it(tokenizer: Path) -> None:
    assert not Encoder.from_tokenizer(CustomTokenizer.from_pretrained(tokenizer), tokenizer).backend


def test_ids_with_gaps_get_a_type_that_holds_them(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "far": 70_000}, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path / "gaps")
    prepare(
        sources=[write(tmp_path / "corpus.jsonl", ["a far a"])],
        tokenizer_folder=tmp_path / "gaps",
        prefix=tmp_path / "out",
    )

    assert read_corpus(tmp_path / "out") == [[0, 70_000, 0, 1]]


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "kind"), [(10_000, "bin"), (500_000, "idx")])
def test_a_full_disk_ends_with_a_message_and_leaves_nothing(
    limit: int, kind: str, tokenizer: Path, texts: list[str], tmp_path: Path
) -> None:
    """A limit on the size of a file stands in for the disk; of short documents the index is the larger file."""
    source = write(tmp_path / "corpus.jsonl", texts if kind == "bin" else ["a"] * 40_000)
    script = f"""if True:
        import resource, sys
        from megatron_mea.cli import main
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        sys.exit(main(sys.argv[1:]))
    """
    command = ["prepare", "--input", source, "--tokenizer", str(tokenizer), "--out", "made/x", "--workers", "1"]
    done = subprocess.run([sys.executable, "-c", script, *command], cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"megatron-mea: made/x.{kind} cannot be written: File too large"
    assert "Traceback" not in done.stderr
    assert file_names(tmp_path) == ["corpus.jsonl"]


def children(pid: int) -> list[int]:
    stats = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
    return [int(stat.split()[0]) for stat in stats if int(stat.rpartition(")")[2].split()[1]) == pid]


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(*, condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@contextlib.contextmanager
def prepare_in_progress(tmp_path: Path, tokenizer: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that prepares more text than it can finish, with two workers, and has written some of it."""
    (tmp_path / "big.jsonl").write_text('{"text": "In the beginning God created the heaven. "}\n' * 1_000_000)
    command = ["prepare", "--input", "big.jsonl", "--tokenizer", str(tokenizer), "--out", "x", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_mea", *command], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )

    try:
        wait_until(condition=lambda: any(path.stat().st_size for path in tmp_path.glob("x.bin.tmp-*")))
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc to see processes")
def test_a_killed_prepare_leaves_nothing_that_looks_finished(tokenizer: Path, texts: list[str], tmp_path: Path) -> None:
    with prepare_in_progress(tmp_path, tokenizer) as process:
        workers = children(process.pid)
        assert len(workers) >= 2
    assert not (tmp_path / "x.bin").exists()
    assert not (tmp_path / "x.idx").exists()

    wait_until(condition=lambda: not any(map(alive, workers)))
    # The next run removes the leftovers.
    assert len(file_names(tmp_path)) == 3

    prepare(sources=[write(tmp_path / "corpus.jsonl", texts[:20])], tokenizer_folder=tokenizer, prefix=tmp_path / "x")
    assert read_corpus(tmp_path / "x") == reference_ids(tokenizer, texts[:20])
    assert file_names(tmp_path) == ["big.jsonl", "corpus.jsonl", "x.bin", "x.idx", "x.meta.json"]


def list_of_one(text_key: str) -> tuple[list[str], list]:
    """The texts of a batch, and its broken records."""
    return [text_key], []


@pytest.mark.slow
def test_a_worker_that_dies_while_it_sends_ends_the_work_too() -> None:
    """The pool would wait for the rest of its message for ever."""
    batches = [SimpleNamespace(texts=list_of_one, records=["text"], size=4) for _ in range(3)]
    encoded = _encode_batches(batches=batches, encoder=DyingEncoder(), text_key="text", workers=2)
    with pytest.raises(RunError, match="a worker died"):
        list(encoded)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc to see processes")
def test_a_dead_worker_ends_the_work_with_a_message(tokenizer: Path, tmp_path: Path) -> None:
    with prepare_in_progress(tmp_path, tokenizer) as process:
        # The first child watches over shared resources; the workers come after it.
        os.kill(max(children(process.pid)), signal.SIGKILL)
        _, err = process.communicate(timeout=300)

    assert process.returncode == 1
    assert "a worker died" in err
    assert "Traceback" not in err
    assert file_names(tmp_path) == ["big.jsonl"]
