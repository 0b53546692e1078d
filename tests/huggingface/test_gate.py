"""What a stranger's Hugging Face folder may hold: `generate`, `evaluate`, `import` and a run's start refuse alike."""

from __future__ import annotations

import json
import math
import resource
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.foreign import VALUES, examples
from support.hf_folders import LLAMA3, save_export
from support.limits import within_limits
from support.source_models import save_source_model
from transformers import CONFIG_MAPPING

from megatron_mea.checkpoint.folder import seal
from megatron_mea.cli import main
from megatron_mea.config.load import parse_model
from megatron_mea.config.schema import MAX_LAYERS, MAX_SIZE
from megatron_mea.errors import UserError
from megatron_mea.huggingface.config_keys import KNOWN_KEYS, STOCK_MODEL_TYPES, read_config_json
from megatron_mea.huggingface.hf_config import model_section, to_hf_config, transformers_config
from megatron_mea.huggingface.importing import import_model
from megatron_mea.huggingface.model_folder import HFFolder, ModelFolder
from megatron_mea.huggingface.targets import make_export_target

OLD_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
WINDOW = {"use_sliding_window": True, "sliding_window": 512}
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
    "an id that is none": (
        lambda folder: (folder / "generation_config.json").write_text('{"bos_token_id": "x"}'),
        "bos_token_id = 'x'",
    ),
    "odd generation settings": (
        lambda folder: (folder / "generation_config.json").write_text('{"temperature": "hot", "num_beams": -1}'),
        "generation_config.json",
    ),
    "an adapter": (
        lambda folder: (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}'),
        "adapter_config.json: an adapter of peft",
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


@pytest.mark.parametrize("broken", [["model.norm.weight"], ["lm_head.weight", "model.norm.weight"]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_all_tensors_that_are_no_weights_are_named(dtype, broken, folder, capsys):
    """Integers, and numbers that are not finite."""
    tensors = load_file(folder / "model.safetensors")
    for name in broken:
        tensors[name] = (tensors[name] / 0).to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    error = refusal(VERBS[0], capsys)
    assert all(f"{name} in llama/model.safetensors" in error for name in broken)
    assert error.count("error: ") == len(broken)


def test_the_attention_function_is_ours(folder):
    """A folder could name a kernel of the hub."""
    edit_json(folder / "config.json", _attn_implementation="eager")
    model = ModelFolder.locate(folder).as_transformers()
    assert model.config._attn_implementation == "sdpa"

    edit_json(folder / "config.json", attn_implementation="kernels-community/flash")
    with pytest.raises(UserError, match="attn_implementation = kernels-community/flash"):
        ModelFolder.locate(folder)


@pytest.fixture(scope="module")
def descriptions(tmp_path_factory) -> dict[str, dict]:
    """A sound config.json of every architecture."""
    folder = tmp_path_factory.mktemp("descriptions")
    model = parse_model({"num_component_heads": 2, "num_hidden_layers": 2})
    configs = {"mea": to_hf_config(model), "mea_vllm": make_export_target("vllm", model).config}
    configs |= {name: CONFIG_MAPPING[name](num_hidden_layers=2) for name in STOCK_MODEL_TYPES}
    contents = {}
    for name, config in configs.items():
        config.save_pretrained(folder / name)
        contents[name] = json.loads((folder / name / "config.json").read_text())

    return contents


NESTED = {
    "rope_parameters": st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("rope_type", "rope_theta", "factor", "long_factor", "truncate", "x"), VALUES)
    ),
    "per_layer_config": st.dictionaries(st.sampled_from(["0", "1", "7", "a"]), st.dictionaries(st.text(), VALUES)),
}
NESTED["rope_scaling"] = NESTED["rope_parameters"]


@examples(300)
@given(data=st.data())
def test_any_description_is_understood_or_refused(data, descriptions, tmp_path_factory):
    """One or two keys of a sound config.json, or new ones, have any value of JSON."""
    contents = dict(data.draw(st.sampled_from(list(descriptions.values()))))
    keys = [*sorted(contents), *KNOWN_KEYS, "x", "", "a.b\n\ud800", "attribute_map", "__class__"]
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=2)):
        contents[key] = data.draw(VALUES | NESTED.get(key, st.nothing()))

    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(contents))
    for read in (read_config_json, lambda *arguments: model_section(read_config_json(*arguments))):
        problems = []
        with within_limits():
            try:
                read(folder, "--from")
            except UserError as error:
                problems = error.problems

        assert all(problem.where == "--from" for problem in problems)
        assert all(str(folder / "config.json") in str(problem.got) for problem in problems)


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


@pytest.mark.parametrize("key", [*SIZES, "num_hidden_layers"])
def test_no_memory_is_taken_by_the_sizes_of_a_description(key, folder):
    """They are compared with the tensors of the folder first, by the run's start too."""
    largest = MAX_LAYERS if key == "num_hidden_layers" else MAX_SIZE
    edit_json(folder / "config.json", **{key: largest})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (HFFolder.as_transformers, HFFolder.tensors, lambda source: import_model(source, "made")):
        with pytest.raises(UserError, match=key if key == "num_hidden_layers" else "of shape|config.json"):
            read(HFFolder(folder, "run.init_from"))

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


PUBLISHED = {
    "llama-2": {"pad_token_id": 0, "pretraining_tp": 1, "rope_scaling": None, "rope_theta": 10000.0},
    "llama-3.1": {"rope_scaling": LLAMA3, "rope_theta": 500000, "eos_token_id": [1, 8, 9], "mlp_bias": False},
    "llama-yarn": {"rope_scaling": OLD_YARN | {"finetuned": True}},
    "mistral": {"sliding_window": 4096, "attention_dropout": 0.0, "_flash_attn_2_enabled": True},
    "qwen2": {"use_sliding_window": False, "max_window_layers": 28, "sliding_window": 131072, "tie_word_embeddings": 0},
    "qwen2-windows": WINDOW | {"layer_types": ["full_attention", "sliding_attention"]},
    "qwen3": {"head_dim": 128, "attention_bias": False, "layer_types": ["full_attention"] * 2, "sliding_window": None},
    "mea": {
        "dtype": "float32",
        "auto_map": {"AutoConfig": "configuration_mea.MEAConfig"},
        "num_component_heads": [3, 1],
    },
    "mea_vllm": {"per_layer_config": {"1": {"num_key_value_heads": 4, "head_dim": 64}}},
}
"""Keys of config.json files that transformers 4 and 5 wrote for published models."""
OF_TRANSFORMERS_4 = {
    "_name_or_path": "a/b",
    "architectures": ["A"],
    "_attn_implementation_autoset": True,
    "id2label": {"0": "a"},
    "label2id": {"a": 0},
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
    "return_dict": True,
    "pruned_heads": {},
    "is_encoder_decoder": False,
    "max_length": 20,
    "top_k": 50,
    "is_decoder": False,
    "chunk_size_feed_forward": 0,
    "quantization_config": None,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_transformers_writes_is_understood(name, descriptions, tmp_path):
    contents = descriptions[name.partition("-")[0]] | OF_TRANSFORMERS_4 | PUBLISHED[name]
    contents["tie_word_embeddings"] = bool(contents["tie_word_embeddings"])
    (tmp_path / "config.json").write_text(json.dumps(contents))
    config_json = read_config_json(tmp_path, "--from")
    assert config_json.warnings == ()
    assert config_json.settings.keys() <= contents.keys()
    assert not config_json.settings.keys() & OF_TRANSFORMERS_4.keys()

    config = transformers_config(config_json)
    for key in ("eos_token_id", "layer_types", "head_dim", "num_component_heads"):
        if key in PUBLISHED[name]:
            assert getattr(config, key) == contents[key]


@pytest.mark.parametrize("kind", STOCK_MODEL_TYPES)
def test_what_is_left_out_is_said_once(kind, descriptions, tmp_path):
    changes = {
        "sliding_window": None,
        "x": 1,
        "hlc_form": "latent",
        "pad_token_id": -1,
        "eos_token_id": [2, 10**9],
        "attention_dropout": 0.1,
    }
    (tmp_path / "config.json").write_text(json.dumps(descriptions[kind] | changes))
    warnings = model_section(read_config_json(tmp_path, "--from"))[1]
    assert [warning.split("config.json: ")[1].split(" is ")[0] for warning in warnings] == [
        f"eos_token_id = {[2, 10**9]}",
        "pad_token_id = -1",
        f"keys that a {kind} does not have are ignored: x, hlc_form",
        "attention_dropout = 0.1",
    ]
    assert read_config_json(tmp_path, "--from").settings["eos_token_id"] == [2]


@pytest.mark.parametrize("changes", [{"hlc_rank": 4}, {"hlc_rank": 4, "x": 1}])
def test_an_export_of_another_version_is_refused_by_its_keys(changes, descriptions, tmp_path):
    """They may stand for another computation, which shapes need not show."""
    (tmp_path / "config.json").write_text(json.dumps(descriptions["mea"] | changes))
    with pytest.raises(UserError) as refused:
        read_config_json(tmp_path, "--from")

    assert [str(problem.got).split("config.json: ")[1].split(" = ")[0] for problem in refused.value.problems] == [
        *changes
    ]


def test_a_key_that_is_left_out_reaches_no_library(folder, capsys):
    """Not by way of the tokenizer either, whose class transformers would choose by all of config.json."""
    edit_json(folder / "config.json", id2label=5, x={"y": 1}, num_labels=3, return_dict=[])
    assert main(["generate", "llama", "--prompt", "a", "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().err.count("keys that a llama does not have are ignored: x") == 1


@pytest.mark.parametrize("prompt", ["\udcff", "caf\udce9 au lait", "a" * 300 + "\udcff\udcfe"])
def test_a_prompt_that_is_no_text(prompt, folder, capsys):
    """Bytes of the command line that are no UTF-8, before the model is looked at."""
    assert main(["generate", "llama", "--prompt", prompt]) == 2
    error = capsys.readouterr().err
    assert "error: --prompt" in error
    assert "\\udc" in error or len(prompt) > 200


UNSAID = ("cache_implementation", "return_dict_in_generate")
"""They change no text."""
FOREIGN_SETTINGS = {
    "stop_strings": ["x"],
    "bad_words_ids": [[10**6]],
    "forced_eos_token_id": 10**6,
    "cache_implementation": "quantized",
    "return_dict_in_generate": True,
    "dola_layers": "high",
    "constraints": [1],
}


@pytest.mark.parametrize("key", FOREIGN_SETTINGS)
@pytest.mark.parametrize("is_imported", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_generation_settings_that_are_not_used_are_left_out(key, is_imported, folder, capsys):
    """They need code of the hub, another library or a tokenizer, or end the generation by an exception."""
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [2], "min_length": 0, "diversity_penalty": 0.0, "guidance_scale": 1}))
    if is_imported:
        import_model(ModelFolder.locate(folder), "made")
        folder, file = Path("made"), Path("made/generation_config.json")

    def output() -> tuple[str, str]:
        capsys.readouterr()
        # A checkpoint's file is looked at as it is, so its checksum is not what this is about.
        (folder / "COMPLETE").unlink(missing_ok=True)
        if is_imported:
            seal(folder)
        assert main(["generate", str(folder), "--prompt", "In the", "--max-new-tokens", "4"]) == 0
        return capsys.readouterr()

    expected = output()
    assert "generation_config.json" not in expected.err
    edit_json(file, **{key: FOREIGN_SETTINGS[key]})
    out, error = output()
    assert out == expected.out
    assert (f"keys that are not used here are ignored: '{key}'" in error) == (key not in UNSAID)


def test_an_export_of_ours_passes(tmp_path):
    model = ModelFolder.locate(save_export(tmp_path / "export")).as_transformers()
    assert model.config.model_type == "mea"
