"""Begin tokens: in prepared documents, and in what a tokenizer puts around a text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.tiny import Tiny
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from megatron_mea.cli import main
from megatron_mea.config.schema import TrainCorpus
from megatron_mea.data.begin_token import fit_to_documents, fits_documents, tokens_around
from megatron_mea.data.corpora import Corpora
from megatron_mea.data.indexed import IndexedReader
from megatron_mea.data.tokenizer import copy_tokenizer, load_tokenizer

BOS, EOS = {"id": "<s>", "type_id": 0}, {"id": "</s>", "type_id": 0}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}


def template(*parts: dict) -> dict:
    names = {part["SpecialToken"]["id"]: number for number, part in ((1, parts[0]), (2, parts[-1])) if part != TEXT}
    return {
        "type": "TemplateProcessing",
        "single": list(parts),
        "pair": [*parts, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]} for name, number in names.items()},
    }


AROUND = template({"SpecialToken": BOS}, TEXT, {"SpecialToken": EOS})
BEFORE = template({"SpecialToken": BOS}, TEXT)
KINDS = {
    "nothing": (None, {}),
    "before": (BEFORE, {}),
    "around": (AROUND, {}),
    "bytes": ({"type": "Sequence", "processors": [BYTE_LEVEL, BEFORE]}, {}),
    "bytes alone": (BYTE_LEVEL, {}),
    "setting": (None, {"add_bos_token": True, "add_eos_token": True}),
    "llama": (BEFORE, {"tokenizer_class": "LlamaTokenizer"}),
    "llama with settings": (None, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True}),
}
"""Post processor of tokenizer.json, and settings of tokenizer_config.json."""


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Callable[[str], Path]:
    def make(kind: str) -> Path:
        copy_tokenizer(tiny.tokenizer, tmp_path / kind)
        post_processor, settings = KINDS[kind]
        for name, changes in (
            ("tokenizer.json", {"post_processor": post_processor}),
            ("tokenizer_config.json", settings),
        ):
            file = tmp_path / kind / name
            file.write_text(json.dumps(json.loads(file.read_text()) | changes))

        return tmp_path / kind

    return make


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_is_made_to_fit(kind, begins, folder):
    """In transformers and in the library `tokenizers` by itself; one that fits is left as it is."""
    changed = folder(kind)
    before = load_tokenizer(changed)
    files = {file.name: file.read_bytes() for file in changed.iterdir()}
    fit_to_documents(changed, begins=begins)

    loaded = AutoTokenizer.from_pretrained(changed)
    ids = before("And the king", add_special_tokens=False)["input_ids"]
    assert loaded("And the king")["input_ids"] == [1] * begins + ids
    assert loaded("And the king", add_special_tokens=False)["input_ids"] == ids
    assert tokens_around(loaded) == ([1] * begins, [])
    if fits_documents(before, begins=begins):
        assert {file.name: file.read_bytes() for file in changed.iterdir()} == files
    else:
        assert Tokenizer.from_file(str(changed / "tokenizer.json")).encode("And the king").ids == [1] * begins + ids


def test_the_pair_of_texts_has_both(folder):
    """As transformers itself writes it."""
    changed = folder("nothing")
    fit_to_documents(changed, begins=True)
    tokenizer = AutoTokenizer.from_pretrained(changed)
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("And", "the"))
    assert tokenizer("And", "the")["input_ids"] == [1, *first, 1, *second]


@pytest.fixture
def prepared(tiny: Tiny, folder, tmp_path: Path) -> Callable[..., Path]:
    """prepared(kind, *options): the prefix of three documents."""

    def run(kind: str, *options: str) -> Path:
        (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": "a king " * n}) + "\n" for n in (1, 3, 40)))
        out = tmp_path / f"{kind}{len(options)}"
        arguments = ["--input", str(tmp_path / "text.jsonl"), "--tokenizer", str(folder(kind)), "--workers", "1"]
        assert main(["prepare", *arguments, "--out", str(out), *options]) == 0
        return out

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_documents_have_it_with_bos_alone(kind, prepared, capsys, folder):
    plain = IndexedReader(prepared(kind))
    error = capsys.readouterr().err
    # transformers 5 does not follow the settings where there is a tokenizer.json.
    assert ("puts <s> before a text" in error) == (kind in ("before", "around", "bytes", "llama"))

    begun = IndexedReader(prepared(kind, "--bos"))
    assert "warning" not in capsys.readouterr().err
    documents = [np.split(reader.tokens, np.cumsum(reader.lengths)[:-1]) for reader in (plain, begun)]
    for without, with_token in zip(*documents, strict=True):
        assert with_token.tolist() == [1, *without.tolist()]
        assert without[-1] == 2
        assert 1 not in without


def test_bos_needs_a_begin_token(tiny, tmp_path, capsys):
    copy_tokenizer(tiny.tokenizer, tmp_path / "tokenizer")
    file = tmp_path / "tokenizer/tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["bos_token"]
    file.write_text(json.dumps(config))
    arguments = ["--input", str(tiny.train.with_suffix(".jsonl")), "--tokenizer", str(tmp_path / "tokenizer"), "--bos"]
    assert main(["prepare", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert "without a begin token" in capsys.readouterr().err


def test_the_data_tells(tiny, prepared):
    plain, begun = prepared("nothing"), prepared("nothing", "--bos")

    def begins(*prefixes: Path) -> bool | None:
        corpora = [TrainCorpus(path=str(prefix)) for prefix in prefixes]
        return Corpora(
            corpora=corpora, seq_length=16, vocab_size=384, seed=None, key="data.train"
        ).documents_begin_with(1)

    assert begins(plain) is False
    assert begins(begun) is True
    assert begins(begun, plain) is None
    assert begins(tiny.train) is False
