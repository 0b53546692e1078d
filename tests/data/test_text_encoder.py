"""Long texts are encoded in parts, with exactly the ids of the whole."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from support.limits import PEAK_MEMORY
from support.tokenizer_kinds import ENCODED_WHOLE, LINES, SPLIT_SAFELY

from megatron_mea.data.text_encoder import PART_CHARACTERS, TextEncoder
from megatron_mea.data.tokenizer import train_tokenizer

CORPUS = Path(__file__).parents[2] / "launch/quickstart/validation.jsonl.gz"
FRAGMENTS = [
    *{word for line in LINES for word in line.split()},
    *(" ", " ", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x00", "\u200d"),
    *("\u3002", "\u3001", "\uff0c", ".", ",", "'", "'s", "'S", "\u2019", "_", "-", "``", "''", "(", "~", "\u2581", "x"),
    *("\u0301", "\u0345", "\u3099", "\u1112", "\u1161", "\u11ab", "\u0600", "\u0e33", "\u017f", "\u0130", "\u03a3"),
    "\xdf",
    *("\ufb01", "\ufdfa", "\u2167", "\u00b2", "7", "\u0661", "\U0001f600", "\U0001d400", "\u4e00", "\u30ab", "\ufe0f"),
    *("<s>", "</s>", "<tok>", " <tok> ", "king", " king", "beginning of", "end", " end", "the end ", "<0x41>", "[UNK]"),
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=40).map("".join)
"""Words, separators, and what normalizers and patterns treat in its own way, in any order."""


@cache
def encoders(kind: str, part_characters: int) -> tuple[TextEncoder, TextEncoder]:
    """One that cuts texts, and one that does not."""
    backend = (SPLIT_SAFELY | ENCODED_WHOLE)[kind]().to_str()
    return TextEncoder(backend, part_characters), TextEncoder(backend)


@pytest.mark.parametrize("kind", SPLIT_SAFELY)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS, part_characters=st.sampled_from([1, 2, 5, 13]))
def test_parts_have_the_ids_of_the_whole(kind: str, text: str, part_characters: int) -> None:
    in_parts, whole = encoders(kind, part_characters)
    assert in_parts([text, "a", text]) == whole([text, "a", text])


@pytest.mark.parametrize("kind", SPLIT_SAFELY)
def test_texts_are_cut_often(kind: str) -> None:
    """So that the property is about something: of a text of common words no part is long."""
    in_parts, whole = encoders(kind, 20)
    text = " ".join(random.Random(0).choices(LINES[0].replace(" .", "").replace(" ,", "").split(), k=400))
    starts = [0]
    while starts[-1] < len(text):
        starts.append(in_parts.borders.find(text, starts[-1] + 20))

    assert max(after - before for before, after in pairwise(starts)) < 60
    assert in_parts([text]) == whole([text])


@pytest.mark.parametrize("kind", SPLIT_SAFELY)
def test_every_separator_between_words_of_every_script(kind: str) -> None:
    in_parts, whole = encoders(kind, 3)
    words = [word for line in LINES for word in line.split() if word.isalpha()]
    chance = random.Random(0)
    text = "".join(
        chance.choice(words) + chance.choice([" ", " ", "\n", "\n", "\u3002", "\u3001", ". "]) for _ in range(3000)
    )
    assert in_parts([text]) == whole([text])


@pytest.mark.parametrize("kind", ENCODED_WHOLE)
def test_texts_of_which_nothing_can_be_proven_are_encoded_whole(kind: str) -> None:
    assert encoders(kind, 20)[0].borders is None


def test_a_text_without_a_border_is_encoded_whole() -> None:
    in_parts, whole = encoders("GPT-2", 20)
    for text in ("x" * 500, "1 2 3 " * 100, "a \u0301" * 100, "a  b" * 100):
        assert in_parts([text]) == whole([text])
        assert in_parts.borders.find(text, 20) == len(text)


@pytest.fixture(scope="module")
def own_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "ids-1000"
    train_tokenizer(sources=[str(CORPUS)], vocab_size=1000, out=folder)
    return folder


def test_a_long_text_of_our_own_tokenizer_has_the_ids_of_sentencepiece(own_tokenizer: Path) -> None:
    """With the parts that `prepare` makes, against an encoder that knows nothing of parts."""
    with gzip.open(CORPUS, "rt", encoding="utf-8") as stream:
        text = "\n\n".join(json.loads(line)["text"] for line in stream) + "\u65e5\U0001f600" * 100
    encoder = TextEncoder((own_tokenizer / "tokenizer.json").read_text())
    assert len(text) > 3 * PART_CHARACTERS
    assert encoder.borders.find(text, PART_CHARACTERS) < PART_CHARACTERS + 10

    piece = sentencepiece.SentencePieceProcessor(model_file=str(own_tokenizer / "tokenizer.model"))
    assert encoder([text])[0].tolist() == piece.encode(text)


@pytest.mark.slow
def test_memory_does_not_grow_with_a_text(own_tokenizer: Path) -> None:
    """Encoded whole, eight million characters take two gigabytes."""
    script = f"""
from megatron_mea.data.text_encoder import TextEncoder
encoder = TextEncoder(Path({str(own_tokenizer / "tokenizer.json")!r}).read_text())
encoder(["in the beginning god created the heaven and the earth\\n" * 10_000])
before = peak_memory()
(ids,) = encoder(["in the beginning god created the heaven and the earth\\n" * 150_000])
print(len(ids), peak_memory() - before)
"""
    done = subprocess.run([sys.executable, "-c", PEAK_MEMORY + script], capture_output=True, text=True, check=True)
    tokens, kilobytes = map(int, done.stdout.split())
    assert tokens > 2_000_000
    # Ids, of which the array may be copied as it grows, and the text; a megabyte a part beside them.
    assert kilobytes < 100_000
