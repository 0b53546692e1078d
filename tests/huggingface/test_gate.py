"""What a stranger's Hugging Face folder may hold: `generate`, `evaluate`, `import` and a run's start refuse alike."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.hf_folders import save_export
from support.source_models import save_source_model

from megatron_mea.cli import main
from megatron_mea.errors import UserError
from megatron_mea.huggingface.hf_config import read_config_json, read_hf_config
from megatron_mea.huggingface.source import load_model

VERBS = ["generate {} --prompt a --max-new-tokens 1", "evaluate {} --data {}", "import {} made"]


@pytest.fixture(scope="module")
def source_folder(tiny, tmp_path_factory) -> Path:
    return save_source_model(kind="llama", folder=tmp_path_factory.mktemp("hf") / "llama", tokenizer=tiny.tokenizer)


@pytest.fixture
def folder(source_folder, tiny, tmp_path, monkeypatch) -> Path:
    """A copy of a small Llama, in the current folder, and the corpus `corpus`."""
    shutil.copytree(source_folder, tmp_path / "llama")
    for suffix in (".bin", ".idx"):
        shutil.copy(tiny.validation.with_suffix(suffix), tmp_path / f"corpus{suffix}")

    monkeypatch.chdir(tmp_path)
    return Path("llama")


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(verb: str, capsys) -> str:
    """What a verb prints to stderr when it refuses `llama`; nothing is left behind."""
    capsys.readouterr()
    assert main(verb.format("llama", "corpus").split()) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert not Path("made").exists()
    return error


CHANGES = {
    "outside": (
        lambda folder: (
            shutil.move(folder / "model.safetensors", "x.safetensors"),
            (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
        ),
        "'../x.safetensors' is no name",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "without model.safetensors; *.safetensors there: none",
    ),
    "one shard, no index": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors"),
        "*.safetensors there: model-00001-of-00002.safetensors",
    ),
    "text as a size": (
        lambda folder: edit_json(folder / "config.json", num_hidden_layers="2"),
        "llama",
    ),
    "a billion layers": (
        lambda folder: edit_json(folder / "config.json", num_hidden_layers=10**9),
        "num_hidden_layers = 1000000000",
    ),
    "a billion labels": (
        lambda folder: edit_json(folder / "config.json", num_labels=10**9),
        "num_labels = 1000000000",
    ),
    "another architecture": (
        lambda folder: edit_json(folder / "config.json", model_type="gpt2"),
        "model_type = gpt2",
    ),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "a JSON list"),
    "deep": (lambda folder: (folder / "config.json").write_text("[" * 10**5 + "]" * 10**5), "unreadable"),
    "large": (lambda folder: (folder / "config.json").write_text('{"a": "' + "x" * (1 << 21) + '"}'), "more than"),
    "odd generation settings": (
        lambda folder: (folder / "generation_config.json").write_text('{"temperature": "hot", "num_beams": -1}'),
        "generation_config.json",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("verb", VERBS)
def test_verbs_refuse_alike(name, verb, folder, capsys):
    change, expected = CHANGES[name]
    change(folder)
    assert expected in refusal(verb, capsys)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("verb", VERBS)
def test_numbers_that_are_not_finite(value, verb, folder, capsys):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight" in refusal(verb, capsys)


def test_integers_are_no_weights(folder, capsys):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones_like(tensors["model.norm.weight"], dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight" in refusal(VERBS[0], capsys)


def test_the_attention_function_is_ours(folder):
    """A folder could name a kernel of the hub."""
    edit_json(folder / "config.json", _attn_implementation="eager")
    model, _, _ = load_model(folder)
    assert model.config._attn_implementation == "sdpa"

    edit_json(folder / "config.json", attn_implementation="kernels-community/flash")
    with pytest.raises(UserError, match="attn_implementation = kernels-community/flash"):
        load_model(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150)
@given(data=st.data())
def test_any_description_is_understood_or_refused(data, source_folder, tmp_path_factory):
    """One key of a sound config.json, or a new one, has any value of JSON."""
    sound = json.loads((source_folder / "config.json").read_text())
    key = data.draw(st.sampled_from([*sorted(sound), "num_labels", "rope_parameters", "quantization_config", "x"]))
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(sound | {key: data.draw(JSON)}))
    for read in (read_config_json, read_hf_config):
        try:
            read(folder, "--from")
        except UserError:
            continue


def test_an_export_of_ours_passes(tmp_path):
    model, _, _ = load_model(save_export(tmp_path / "export"))
    assert model.config.model_type == "mea"
