"""What `import` refuses: one message that names it, status 2, and nothing written."""

from __future__ import annotations

import io
import json
import resource
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.hf_folders import edit_config_json, save_export, save_stock_model

from megatron_mea.cli import main
from megatron_mea.data.tokenizer import copy_tokenizer
from megatron_mea.errors import UserError
from megatron_mea.huggingface import importing
from megatron_mea.huggingface.model_folder import ModelFolder, StoredTensors


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder a kind; copy one before changing it."""
    root = tmp_path_factory.mktemp("models")
    for kind in ("llama", "mistral", "qwen2", "qwen3"):
        save_stock_model(kind, root / kind)
    save_export(root / "mea", attention_variant="mea")
    save_export(root / "latent", attention_variant="mea", hlc_form="latent", key_latent_dim=12)
    return root


@pytest.fixture
def refuse(models, tmp_path, capsys):
    """refuse(kind, change, *options): the message about a copy of a model that `change` has changed."""

    def run(kind: str, change, *options: str) -> str:
        source = tmp_path / "source"
        shutil.copytree(models / kind, source)
        change(source)
        before = sorted(tmp_path.rglob("*"))
        assert main(["import", str(source), str(tmp_path / "deep/out"), *options]) == 2
        captured = capsys.readouterr()

        assert captured.out == ""
        assert captured.err.startswith("megatron-mea: ")
        assert "error: " in captured.err
        assert "Traceback" not in captured.err
        assert sorted(tmp_path.rglob("*")) == before

        return captured.err

    return run


WINDOW = {"use_sliding_window": True, "sliding_window": 64, "layer_types": None}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("llama", {"model_type": "mixtral"}, "model_type = mixtral"),
        ("llama", {"model_type": ["llama"]}, "model_type = ['llama']"),
        ("qwen3", {"num_experts": 8}, "num_experts = 8"),
        ("qwen3", {"attention_bias": True}, "attention_bias = True"),
        ("llama", {"attention_bias": True}, "attention_bias = True"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = gelu"),
        ("llama", {"is_causal": False}, "is_causal = False"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config = gptq"),
        ("mistral", {"sliding_window": 64}, "sliding_window = 64"),
        ("qwen2", WINDOW | {"max_window_layers": 1}, "sliding_window = 64"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types = 'chunked_attention'"),
        ("llama", {"rope_parameters": YARN | {"rope_type": "longrope"}}, "config.json"),
        ("llama", {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "'proportional'"),
        ("llama", {"rope_parameters": YARN | {"stretch": 3}}, "rope_parameters.stretch = 3"),
        ("llama", {"rope_parameters": YARN | {"factor": 0.5}}, "rope_scaling.factor = 0.5"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("llama", {"head_dim": 7}, "`head_dim`=7"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ("mea", {"intermediate_size": 10**30}, f"intermediate_size = {10**30}"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads = 0"),
        ("llama", {"num_attention_heads": "four"}, "num_attention_heads = 'four'"),
        ("llama", {"rms_norm_eps": -1.0}, "rms_norm_eps = -1.0"),
        ("mea", {"num_component_heads": [5, 4, 4]}, "num_component_heads = 5"),
        ("mea", {"attention_variant": "singing_heads"}, "singing_heads"),
        ("mea", {"num_key_value_heads": 3}, "num_attention_heads = 8"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_another_function_is_named_by_its_key(kind, changes, expected, refuse):
    message = refuse(kind, lambda folder: edit_config_json(folder, **changes))
    assert "error: HF_DIR" in message
    assert "config.json" in message
    assert expected in message


def change_tensors(change):
    """A change of a model folder that changes its tensors."""

    def run(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})

    return run


LAYER = "model.layers.1.self_attn"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "change", "expected"),
    [
        ("llama", lambda tensors: tensors.pop(f"{LAYER}.o_proj.weight"), f"without {LAYER}.o_proj.weight"),
        ("qwen2", lambda tensors: tensors.pop(f"{LAYER}.k_proj.bias"), f"without {LAYER}.k_proj.bias"),
        ("qwen3", lambda tensors: tensors.update({f"{LAYER}.o_proj.bias": torch.ones(16)}), f"{LAYER}.o_proj.bias in"),
        (
            "llama",
            lambda tensors: tensors.update({"lm_head.weight": torch.ones(384, 15)}),
            "lm_head.weight of shape (384, 1",
        ),
        ("llama", lambda tensors: tensors.update({"lm_head.weight": torch.ones(())}), "lm_head.weight of shape ()"),
        (
            "llama",
            lambda tensors: tensors.update({"lm_head.weight": torch.ones(384, 16, dtype=torch.int8)}),
            "of type I8",
        ),
        (
            "mea",
            lambda tensors: tensors.pop("model.layers.0.self_attn.hlc_k.weight"),
            "without model.layers.0.self_attn.hlc",
        ),
    ],
    ids=["missing", "no-bias", "bias", "shape", "scalar", "integers", "no-combination"],
)
def test_tensors_that_do_not_fit_are_named(kind, change, expected, refuse):
    assert expected in refuse(kind, change_tensors(change))


@pytest.mark.parametrize(
    ("change", "got", "expected"),
    [
        (lambda frequency: frequency.flip(0), "[0] = 2 in ", "0, by "),
        (lambda frequency: frequency.index_fill(0, torch.tensor(3), torch.nan), "[3] = nan in ", "1, by "),
        (lambda frequency: frequency[:3, None].clone(), " of shape (3, 1) in ", "(6,), by "),
    ],
    ids=["other", "nan", "shape"],
)
def test_frequencies_that_are_not_those_of_config_json(change, got, expected, refuse):
    """transformers alone would compute with the file's, which an import drops."""
    name = f"{LAYER}.hlc_k.frequency"
    error = refuse("latent", change_tensors(lambda tensors: tensors.update({name: change(tensors[name])})))
    assert f" {name}{got}" in error
    assert f"expected: {expected}" in error


@pytest.mark.parametrize("read", ["tensors", "as_transformers"])
def test_frequencies_are_compared_wherever_a_folder_is_read(read, models, tmp_path):
    shutil.copytree(models / "latent", tmp_path / "latent")
    name = "model.layers.0.self_attn.hlc_k.frequency"
    change_tensors(lambda tensors: tensors.update({name: tensors[name] + 1}))(tmp_path / "latent")
    with pytest.raises(UserError, match=name):
        getattr(ModelFolder.locate(tmp_path / "latent"), read)()


@pytest.mark.parametrize("number", [torch.nan, torch.inf, 1e39])
def test_numbers_that_are_not_finite(number, models, tmp_path, capsys):
    """1e39 is infinite in float32. Found when the tensor is read, after the warnings."""
    source = tmp_path / "source"
    shutil.copytree(models / "llama", source)
    change_tensors(
        lambda tensors: tensors.update({"model.norm.weight": torch.full((16,), number, dtype=torch.float64)})
    )(source)
    assert main(["import", str(source), str(tmp_path / "deep/out")]) == 2

    assert "got:      model.norm.weight in " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]


def test_a_folder_of_other_names_gets_a_short_message(refuse):
    def rename(tensors: dict) -> None:
        for name in list(tensors):
            tensors[f"transformer.{name}"] = tensors.pop(name)

    message = refuse("llama", change_tensors(rename))
    assert "26 more such tensors" in message
    assert message.count("error: ") == 17


def index(text: str):
    def run(folder: Path) -> None:
        shutil.move(folder / "model.safetensors", folder / "model-1.safetensors")
        shutil.copy(folder / "model-1.safetensors", folder.parent / "model-2.safetensors")
        shutil.copy(folder / "model-1.safetensors", folder / "model-2.safetensors")
        (folder / "model.safetensors.index.json").write_text(text)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda folder: shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin"),
            "pytorch_model.bin may run code",
        ),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("[]"), "unreadable"),
        (lambda folder: (folder / "config.json").write_text("{}"), "unreadable (no key 'model_type')"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff{}"), "unreadable"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 64), "model.safetensors, unreadable"),
        (index('{"weight_map": {"a": "../model-2.safetensors"}}'), "'../model-2.safetensors' is no name"),
        (index('{"weight_map": {"a": "model-3.safetensors"}}'), "without model-3.safetensors; there: none"),
        (index('{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'), "each tensor once"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "which does not load"),
        (lambda folder: (folder / "generation_config.json").write_text("{"), "generation_config.json, unreadable"),
        (lambda folder: (folder / "generation_config.json").write_text("[]"), "generation_config.json, unreadable"),
    ],
    ids=[
        "pickle",
        "no-config",
        "list",
        "dict",
        "bytes",
        "cut",
        "outside",
        "no-shard",
        "twice",
        "tokenizer",
        "cut2",
        "list2",
    ],
)
def test_files(change, expected, refuse):
    assert expected in refuse("llama", change)


def test_a_tokenizer_without_an_end_of_document(tiny, refuse):
    def change(folder: Path) -> None:
        copy_tokenizer(tiny.tokenizer, folder)
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (folder / name).is_file():
                tokenizer_config = json.loads((folder / name).read_text())
                tokenizer_config.pop("eos_token", None)
                (folder / name).write_text(json.dumps(tokenizer_config))

    assert "without an eos token" in refuse("llama", change)


@pytest.mark.slow
def test_code_of_a_folder_is_not_run(models, tmp_path, capsys, monkeypatch):
    """Nor does anything ask whether it may be: `y` on stdin is no consent."""
    source = tmp_path / "source"
    shutil.copytree(models / "llama", source)
    (source / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    names = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    edit_config_json(source, auto_map=names)
    assert main(["import", str(source), str(tmp_path / "out")]) == 0
    assert "code of its own (auto_map), which is not run: imported as a llama" in capsys.readouterr().err

    edit_config_json(source, auto_map=names, model_type="another")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    for command in (["import", str(source), str(tmp_path / "again")], ["generate", str(source), "--prompt", "a"]):
        assert main(command) == 2

    assert not (tmp_path / "ran").exists()


class TestPlace:
    @pytest.mark.slow
    def test_what_is_there_stays(self, models, tmp_path, capsys):
        (tmp_path / "file").write_text("mine")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder/file").write_text("mine")
        for name in ("file", "folder"):
            assert main(["import", str(models / "llama"), str(tmp_path / name)]) == 2
            assert f"error: {tmp_path / name}\n" in capsys.readouterr().err

        assert (tmp_path / "file").read_text() == (tmp_path / "folder/file").read_text() == "mine"

        (tmp_path / "empty").mkdir()
        assert main(["import", str(models / "llama"), str(tmp_path / "empty")]) == 0
        assert main(["inspect", str(tmp_path / "empty")]) == 0
        capsys.readouterr()
        assert main(["import", str(tmp_path / "empty"), str(tmp_path / "again")]) == 2
        assert "a checkpoint already" in capsys.readouterr().err

        assert main(["import", str(tmp_path / "nowhere"), str(tmp_path / "again")]) == 2
        message = capsys.readouterr().err
        assert "no such folder" in message
        assert "hf download" in message

    def test_too_small_a_disk_is_seen_before(self, refuse, monkeypatch):
        usage = namedtuple("usage", "free")
        monkeypatch.setattr(importing.shutil, "disk_usage", lambda place: usage(10_000_000))
        assert "0.010 GB free" in refuse("llama", lambda folder: None)

    def test_a_disk_that_is_full_leaves_nothing(self, models, tmp_path, capsys):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            status = main(["import", str(models / "llama"), str(tmp_path / "deep/out")])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        assert status == 1
        assert f"{tmp_path}/deep/out cannot be written: " in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_an_end_half_way_leaves_nothing(self, models, tmp_path, monkeypatch):
        def interrupted(stored, name, *, offsets, shape):
            if "layers.1" in name:
                raise SystemExit(143)
            return torch.zeros(shape)

        monkeypatch.setattr(StoredTensors, "read_tensor", interrupted)
        with pytest.raises(SystemExit):
            main(["import", str(models / "llama"), str(tmp_path / "deep/out")])

        assert not list(tmp_path.iterdir())
