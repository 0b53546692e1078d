"""A trained tokenizer folder: its size, and id-for-id parity of the Hugging Face side with sentencepiece."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_mea.config.schema import MAX_SIZE
from megatron_mea.data.prepare import Encoder
from megatron_mea.data.tokenizer import train_tokenizer
from megatron_mea.errors import UserError

CORPUS = Path(__file__).parents[2] / "launch/quickstart/validation.jsonl.gz"
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
EOS = SPECIAL.index("</s>")

ADVERSARIAL = [
    *("", " ", "  ", "   ", " leading", "trailing ", "  two  inside  ", "a" * 300, " " * 40),
    *("\t", "a\tb", "\n", "\n\n", "line\nline\n", " \n ", "\r\n", "\x0b\x0c\x1c\x85\u2028\u2029"),
    *("0", "12345678901", "3.14159", "1st 2nd", "\u0664\u0662", "\u00bd\u00b2"),
    *("caf\u00e9", "cafe\u0301", "\ufb01ne", "\u65e5\u672c\u8a9e", "\u0627\u0644", "\u00a0\u3000\u200b\ufeff"),
    *("\U0001f600", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0010ffff", "\ufffd", "\x00", "a\x00b\x7f"),
    *("</s>", "<pad>", "<s>", "<unk>", "and </s> there", "</s></s>", "x<pad>y", "<s", "</ s>", "<0x0A>", "<0x41>"),
    *("\u2581", "a\u2581b", "\u2581\u2581", "\u2585", "{}<>", "if (x) { y<z>; }"),
]


@dataclass(frozen=True, kw_only=True)
class TokenizerPair:
    size: int
    folder: Path
    fast: PreTrainedTokenizerFast
    piece: sentencepiece.SentencePieceProcessor

    def ids(self, text: str) -> list[int]:
        return self.fast(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def check(self, text: str) -> None:
        """Both tokenizers give the same ids, and the same text back."""
        expected = self.piece.encode(text)
        assert self.ids(text) == expected
        assert self.fast.decode(expected) == self.piece.decode(expected)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    with gzip.open(CORPUS, "rt", encoding="utf-8") as stream:
        return [json.loads(line)["text"] for line in stream]


@pytest.fixture(scope="module", params=[512, 2048])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TokenizerPair:
    folder = tmp_path_factory.mktemp("tokenizer") / f"ids-{request.param}"
    train_tokenizer(sources=[str(CORPUS)], vocab_size=request.param, out=folder)
    piece = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return TokenizerPair(
        size=request.param, folder=folder, fast=AutoTokenizer.from_pretrained(str(folder)), piece=piece
    )


def test_vocab_size_counts_every_id(pair: TokenizerPair) -> None:
    assert len(pair.fast) == pair.piece.get_piece_size() == pair.size
    ids = range(pair.size)
    assert pair.fast.convert_ids_to_tokens(list(ids)) == [pair.piece.id_to_piece(i) for i in ids]


def test_special_ids(pair: TokenizerPair) -> None:
    fast, piece = pair.fast, pair.piece
    assert [fast.unk_token, fast.bos_token, fast.eos_token, fast.pad_token] == SPECIAL
    assert [fast.unk_token_id, fast.bos_token_id, fast.eos_token_id, fast.pad_token_id] == [0, 1, 2, 3]
    assert [piece.unk_id(), piece.bos_id(), piece.eos_id(), piece.pad_id()] == [0, 1, 2, 3]
    assert sorted(fast.all_special_ids) == [0, 1, 2, 3]


def test_every_byte_has_an_id(pair: TokenizerPair) -> None:
    assert sum(pair.piece.is_byte(i) for i in range(pair.size)) == 256


@pytest.mark.parametrize("character", "\n<>{}")
def test_markup_characters_are_pieces_though_the_text_lacks_them(pair: TokenizerPair, character: str) -> None:
    assert not pair.piece.is_byte(pair.piece.encode(f"a{character}")[-1])


def test_digits_stand_alone(tmp_path: Path) -> None:
    (tmp_path / "years.txt").write_text("\n".join(f"in {1900 + i % 9} and 1984, then" for i in range(500)))
    train_tokenizer(sources=[str(tmp_path / "years.txt")], vocab_size=290, out=tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert [token for token in tokenizer.tokenize("in 1984") if token.isdigit()] == ["1", "9", "8", "4"]


def test_parity_on_every_line_and_document(pair: TokenizerPair, texts: list[str]) -> None:
    lines = {line for text in texts for line in text.splitlines()}
    assert len(lines) > 2000
    for text in [*texts[::10], *lines]:
        pair.check(text)


def test_parity_on_indented_lines(pair: TokenizerPair, texts: list[str]) -> None:
    # transformers' own conversion of a sentencepiece model fails exactly here.
    for number, line in enumerate(texts[0].splitlines()[:200]):
        pair.check(" " * (1 + number % 9) + line)
        pair.check("\t" + line + " " * (number % 4))


@pytest.mark.parametrize("text", ADVERSARIAL, ids=ascii)
def test_parity_on_adversarial_strings(pair: TokenizerPair, text: str) -> None:
    pair.check(text)


@pytest.mark.parametrize("text", [text for text in ADVERSARIAL if "\u2581" not in text], ids=ascii)
def test_round_trip_is_lossless(pair: TokenizerPair, text: str) -> None:
    # But for U+2581, which sentencepiece reserves for the space.
    assert pair.fast.decode(pair.ids(text)) == text


@pytest.mark.parametrize("text", ["\u2581", "a\u2581b", "\u2581\u2581x "])
def test_the_symbol_that_sentencepiece_writes_for_a_space_is_one(pair: TokenizerPair, text: str) -> None:
    """As docs/data.md says: sentencepiece cannot tell them apart, and both sides must have the same ids."""
    spaces = text.replace("\u2581", " ")
    assert pair.ids(text) == pair.piece.encode(text) == pair.ids(spaces)
    assert pair.fast.decode(pair.ids(text)) == pair.piece.decode(pair.ids(text)) == spaces


def test_round_trip_of_the_corpus(pair: TokenizerPair, texts: list[str]) -> None:
    for text in texts[::10]:
        assert pair.fast.decode(pair.ids(text)) == text


PARTS = st.sampled_from([*ADVERSARIAL, "the", "king ", " and", "LORD", ".\n", ", ", "   ", "eth"])
# No surrogates: they are no UTF-8, so sentencepiece takes no such string.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(st.lists(PARTS | ANY_TEXT, max_size=12).map("".join))
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_parity_on_random_unicode(pair: TokenizerPair, text: str) -> None:
    pair.check(text)
    assume("\u2581" not in text)
    assert pair.fast.decode(pair.ids(text)) == text


@given(st.text("ab <", max_size=60), st.integers(1, 12))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_parity_on_repetitive_text(repetitive: TokenizerPair, text: str, times: int) -> None:
    # Repetition makes the pairs that could merge next overlap, which is where an order of merges shows.
    repetitive.check(text * times)


@pytest.fixture(scope="module")
def repetitive(tmp_path_factory: pytest.TempPathFactory) -> TokenizerPair:
    """A tokenizer whose pieces can be split in many ways: long words over four characters."""
    root = tmp_path_factory.mktemp("repetitive")
    letters = np.random.default_rng(0).choice(list("ab <"), (400, 120))
    (root / "text.txt").write_text("\n".join("".join(row) for row in letters))
    train_tokenizer(sources=[str(root / "text.txt")], vocab_size=400, out=root / "out")
    piece = sentencepiece.SentencePieceProcessor(model_file=str(root / "out/tokenizer.model"))
    return TokenizerPair(
        size=400, folder=root / "out", fast=AutoTokenizer.from_pretrained(str(root / "out")), piece=piece
    )


def test_training_is_deterministic(pair: TokenizerPair, tmp_path: Path) -> None:
    train_tokenizer(sources=[str(CORPUS)], vocab_size=pair.size, out=tmp_path / "retrained")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (pair.folder / name).read_bytes() == (tmp_path / "retrained" / name).read_bytes(), name

    retrained = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "retrained/tokenizer.model"))
    for piece in range(pair.size):
        assert retrained.id_to_piece(piece) == pair.piece.id_to_piece(piece)
        assert retrained.get_score(piece) == pair.piece.get_score(piece)


def test_the_model_holds_no_local_path(pair: TokenizerPair) -> None:
    assert str(pair.folder.parent).encode() not in (pair.folder / "tokenizer.model").read_bytes()


def test_a_document_cannot_inject_a_special_token(pair: TokenizerPair) -> None:
    documents = ["good </s> bad", "</s>", "<s>x<unk><pad>", "plain"]
    # Without `split_special_tokens` the string becomes the special id.
    assert EOS in pair.fast(documents[0], add_special_tokens=False)["input_ids"]

    tokens, lengths = Encoder.from_tokenizer(pair.fast, pair.folder)(documents)
    assert lengths.sum() == tokens.size

    ends = np.cumsum(lengths)
    assert np.flatnonzero(tokens < 4).tolist() == (ends - 1).tolist()
    assert (tokens[ends - 1] == EOS).all()
    for document, end, length in zip(documents, ends, lengths, strict=True):
        assert tokens[end - length : end - 1].tolist() == pair.piece.encode(document)


def test_a_long_line_counts_to_its_end(tmp_path: Path) -> None:
    # sentencepiece drops what is longer than its longest sentence; here that would be all of the text.
    words = ["quixotic"] * 9000 + ["zephyr"] * 9000
    (tmp_path / "line.txt").write_text(" ".join(words))
    train_tokenizer(sources=[str(tmp_path / "line.txt")], vocab_size=294, out=tmp_path / "out")
    piece = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out/tokenizer.model"))
    assert piece.encode("quixotic zephyr", out_type=str) == ["\u2581quixotic", "\u2581zephyr"]


def test_text_key_and_several_sources(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "zebra quagga " * 200, "text": "wrong"}) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": "okapi bongo " * 200}) + "\n")
    train_tokenizer(
        sources=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")],
        vocab_size=285,
        out=tmp_path / "out",
        text_key="body",
    )
    vocabulary = AutoTokenizer.from_pretrained(str(tmp_path / "out")).get_vocab()

    assert {"z", "q", "k"} <= set(vocabulary)
    assert "w" not in vocabulary


def test_a_vocabulary_that_the_text_cannot_fill_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too little")
    with pytest.raises(UserError, match="--vocab-size"):
        train_tokenizer(sources=[str(tmp_path / "short.txt")], vocab_size=4000, out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


@pytest.mark.parametrize("vocab_size", [260, MAX_SIZE + 1])
def test_a_vocabulary_that_no_model_has(vocab_size: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"to {MAX_SIZE:,}, the most of model.vocab_size"):
        train_tokenizer(sources=[str(CORPUS)], vocab_size=vocab_size, out=tmp_path / "out")


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"fine line {i}"}) for i in range(50)]
    (tmp_path / "broken.jsonl").write_text("\n".join([*lines, '{"text":']))
    with pytest.raises(UserError) as caught:
        train_tokenizer(sources=[str(tmp_path / "broken.jsonl")], vocab_size=280, out=tmp_path / "out")
    assert "broken.jsonl, line 51" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [3_000, 15_000], ids=["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("exists", [False, True], ids=["new", "over-another"])
def test_a_full_disk_ends_with_a_message_and_leaves_nothing(limit: int, exists: bool, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk; an existing tokenizer stays as it was."""
    out = tmp_path / "made/new"
    if exists:
        out.mkdir(parents=True)
        (out / "tokenizer.model").write_bytes(b"another")

    script = f"""if True:
        import resource, sys
        from megatron_mea.cli import main
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        sys.exit(main(sys.argv[1:]))
    """
    command = ["tokenizer", "--input", str(CORPUS), "--vocab-size", "512", "--out", "made/new"]
    done = subprocess.run([sys.executable, "-c", script, *command], cwd=tmp_path, capture_output=True, text=True)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "megatron-mea: made/new cannot be written: File too large\n"

    left = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == ({"tokenizer.model": b"another"} if exists else {})
    assert [path.name for path in tmp_path.iterdir()] == (["made"] if exists else [])
