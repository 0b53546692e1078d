"""Tokenizer folders: which files travel, and what a copy says of itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny import Tiny
from transformers import AutoTokenizer

from megatron_mea.data.tokenizer import (
    SPECIAL_TOKENS,
    copy_tokenizer,
    limit_length,
    load_tokenizer,
    tokenizer_fingerprint,
    update_tokenizer_config,
)
from megatron_mea.errors import UserError

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "tokenizer.4.0.0.json"),
    *("additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja", "vocab.json", "merges.txt"),
)
OTHER_FILES = (
    *("model.safetensors", "config.json", "generation_config.json", "README.md", "modeling.py", "original/params.json"),
    *("pytorch_model.bin", "tokenizer/tokenizer.json", "additional_chat_templates/notes.txt"),
)


@pytest.mark.parametrize("model_type", ["qwen2", "llama", "mea"])
def test_a_copy_has_what_the_library_knows(model_type: str, tiny: Tiny, tmp_path: Path) -> None:
    """And loads as the same class, though the model beside it decided on it."""
    source = tmp_path / "model"
    for name in (*TOKENIZER_FILES, *OTHER_FILES):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)

    load_tokenizer(tiny.tokenizer).save_pretrained(source)
    (source / "tokenizer_config.json").write_text(json.dumps(SPECIAL_TOKENS))
    (source / "config.json").write_text(json.dumps({"model_type": model_type}))
    template = "{{ messages }}"
    (source / "additional_chat_templates/rag.jinja").write_text(template)
    copy_tokenizer(source, tmp_path / "copy")

    names = {str(file.relative_to(tmp_path / "copy")) for file in (tmp_path / "copy").rglob("*") if file.is_file()}
    assert names == {*TOKENIZER_FILES}
    loaded = [load_tokenizer(folder) for folder in (source, tmp_path / "copy")]
    assert type(loaded[0]) is type(loaded[1])
    assert loaded[1].chat_template["rag"] == template


def test_a_copy_has_the_vocabulary_of_a_class_of_the_library(tmp_path: Path) -> None:
    for name in ("spm.model", "model.safetensors"):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_text(name)

    (tmp_path / "model/tokenizer_config.json").write_text('{"tokenizer_class": "DebertaV2Tokenizer"}')
    copy_tokenizer(tmp_path / "model", tmp_path / "copy")
    assert {file.name for file in (tmp_path / "copy").iterdir()} == {"spm.model", "tokenizer_config.json"}


@pytest.mark.parametrize(
    ("said", "expected"), [(None, 64), (10**30, 64), (1e30, 64), (65, 64), (64, 64), (32, 32), ("many", 64), (0, 64)]
)
def test_the_longest_text(said: object, expected: int, tiny: Tiny, tmp_path: Path) -> None:
    """The context of a model, or less where the tokenizer says so; the rest of its settings stay."""
    load_tokenizer(tiny.tokenizer).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | ({} if said is None else {"model_max_length": said})
    file.write_text(json.dumps(settings))
    limit_length(tmp_path, 64)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == expected
    assert json.loads(file.read_text()) == settings | {"model_max_length": expected}

    file.unlink()
    limit_length(tmp_path, 64)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 64


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "T5Tokenizer", "GPT2Tokenizer", "GemmaTokenizer"])
def test_a_folder_without_its_vocabulary_is_refused(tokenizer_class: str, tmp_path: Path) -> None:
    """The library loads it, and gives no id for any text."""
    config = SPECIAL_TOKENS | {"tokenizer_class": tokenizer_class}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="without a vocabulary"):
        load_tokenizer(tmp_path)


def test_a_longest_text_that_is_no_number_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    copy_tokenizer(tiny.tokenizer, tmp_path)
    update_tokenizer_config(tmp_path, model_max_length="x")
    with pytest.raises(UserError, match="model_max_length = 'x' is no number"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "spm.model", "source.spm", "tokenizer.4.0.0.json"])
def test_a_change_of_any_vocabulary_is_another_tokenizer(name: str, tmp_path: Path) -> None:
    fingerprints = []
    for contents in (None, "a", "b"):
        if contents:
            (tmp_path / name).write_text(contents)
        (tmp_path / "README.md").write_text(str(contents))
        fingerprints.append(tokenizer_fingerprint(tmp_path))
    assert len({*fingerprints}) == 3
