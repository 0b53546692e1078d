"""Names that somebody else chose are printed without what a terminal would obey."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.source_models import save_source_model

from megatron_mea.cli import main
from megatron_mea.printing import printable

RED, SHOWN = "\x1b[31m", "\\x1b[31m"


@given(st.text(st.characters(codec=None)))
def test_what_is_printed_is_obeyed_by_no_terminal(text):
    shown = printable(text)
    assert all(character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs") for character in shown)
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    shown.encode()

    if text.isprintable():
        assert shown == text
    assert printable(shown) == shown


def test_text_stays_as_it_is():
    for text in ("straight\n\ttext", "日本語 עברית 🙂", "a\u200db", ""):
        assert printable(text) == text

    assert printable("\r\x00\x7f\x9b\udcff\u202e") == "\\r\\x00\\x7f\\x9b\\udcff\\u202e"


def tensor_name(tiny) -> list[str]:
    folder = save_source_model(kind="llama", folder=Path("llama"), tokenizer=tiny.tokenizer)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{RED}odd.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return ["import", "llama", "imported"]


def file_name(tiny) -> list[str]:
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("some text\n")
    Path(f"texts/{RED}.odd").touch()
    return ["prepare", "--input", "texts", "--tokenizer", str(tiny.tokenizer), "--out", "data", "--workers", "1"]


def configuration_key(tiny) -> list[str]:
    Path("odd.yaml").write_text('"\\e[31m": 1\n')
    return ["plan", "odd.yaml"]


def architecture(tiny) -> list[str]:
    Path("odd").mkdir()
    Path("odd/config.json").write_text(json.dumps({"model_type": RED}))
    return ["generate", "odd", "--prompt", "a"]


def folder_name(tiny) -> list[str]:
    Path(RED).mkdir()
    return ["report", RED, "--out", "page.html"]


@pytest.mark.parametrize("make", [tensor_name, file_name, configuration_key, architecture, folder_name])
def test_a_name_with_an_escape_sequence(make, tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    main(make(tiny))
    printed = "".join(capfd.readouterr())
    assert "\x1b[31m" not in printed
    assert SHOWN in printed
