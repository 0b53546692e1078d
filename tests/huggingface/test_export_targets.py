"""`export --target stock` and `vllm`: what they write computes what MEA computes, or is refused with a reason."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from support.hf_folders import read_weights, save_export
from support.models import decoder_and_tensors, name_of, small_model
from torch import nn
from transformers import AutoModelForCausalLM

from megatron_mea.checkpoint.folder import CheckpointMetadata
from megatron_mea.cli import main
from megatron_mea.errors import UserError
from megatron_mea.exported.modeling_mea import MEAForCausalLM
from megatron_mea.exported.rotary_mea import rotary_cos_sin
from megatron_mea.huggingface.targets import make_export_target

SETTINGS = {
    "model.num_attention_heads": 4,
    "model.head_dim": 16,
    "model.attention_variant": "mea_no_norm",
    "model.num_component_heads": [1, 2],
    "training.steps": 2,
}


def both(kind: str, case: dict) -> tuple[MEAForCausalLM, nn.Module]:
    """The MEA modeling file and the target's model, in float64, with the same random parameters."""
    model = small_model(**case)
    _, tensors = decoder_and_tensors(model)
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    models = []
    for target in (make_export_target("transformers", model), make_export_target(kind, model)):
        # Through JSON, as if read from a folder.
        config = type(target.config).from_dict(json.loads(target.config.to_json_string()))
        exported_model = target.model_class(config).double().eval()
        exported_tensors = {
            name: recipe.make(*map(tensors.get, recipe.sources)).double() for name, recipe in target.tensors.items()
        }
        assert {name: recipe.shape for name, recipe in target.tensors.items()} == {
            n: t.shape for n, t in exported_tensors.items()
        }

        missing, unexpected = exported_model.load_state_dict(exported_tensors, strict=False)
        assert not unexpected
        assert missing == (["lm_head.weight"] if model.tie_word_embeddings else [])

        exported_model.tie_weights()
        models.append(exported_model)

    return models[0], models[1]


def in_float64(stock: nn.Module, mea: MEAForCausalLM) -> None:
    """transformers' own norms and angles are float32 whatever the model is."""

    def norm(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)

    for module in stock.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = norm.__get__(module)

    stock.model.rotary_emb.forward = lambda x, position_ids: rotary_cos_sin(
        config=mea.config, position_ids=position_ids, dtype=x.dtype
    )


STOCK = {
    "LlamaForCausalLM": {"num_component_heads": 2},
    "Qwen3ForCausalLM": {"num_component_heads": 2, "qk_norm": True},
    "Qwen2ForCausalLM": {"num_component_heads": 2, "attention_bias": True, "head_dim": 4, "hidden_size": 32},
    "MistralForCausalLM": {"num_component_heads": 2, "hidden_size": 20},
}
MORE = [
    *({"hlc_mixes": side} for side in ("keys", "values")),
    {"num_component_heads": [1, 2, 4], "tie_word_embeddings": True},
    {"num_component_heads": 3, "attention_bias": True},
    {"num_component_heads": 3, "attention_bias": True, "qk_norm": True},
    {"attention_variant": "plain"},
    {"attention_variant": "plain", "qk_norm": True},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 16}, "head_dim": 8},
]


@torch.no_grad()
@pytest.mark.parametrize("case", [*STOCK.values(), *MORE], ids=name_of)
def test_stock_equals_mea_in_float64(case):
    case = {"attention_variant": "mea_no_norm"} | case
    mea, stock = both("stock", case)
    ids = torch.randint(0, 37, (2, 50), generator=torch.Generator().manual_seed(5))
    expected = mea(input_ids=ids).logits
    difference = (stock(ids).logits - expected).norm()
    assert difference <= 1e-5 * expected.norm(), "as it is, with float32 norms and angles"

    in_float64(stock, mea)
    torch.testing.assert_close(stock(ids).logits, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("architecture", STOCK)
def test_stock_architectures(architecture):
    target = make_export_target("stock", small_model(attention_variant="mea_no_norm", **STOCK[architecture]))
    assert target.config.architectures == [architecture]
    assert not target.classes
    assert not target.modules
    assert "The saving of the cache is given up: it holds 4 heads a layer" in " ".join(target.notes)
    assert "given up" not in str(make_export_target("stock", small_model(attention_variant="plain")).notes)


WIDE = {"head_dim": 16}
LATENT = {"hlc_form": "latent", "key_latent_dim": [12, 24, 60], "value_latent_dim": [17, 5, 64]}


@torch.no_grad()
@pytest.mark.parametrize(
    "case",
    [
        {"num_component_heads": 2, "attention_variant": "mea"},
        {"num_component_heads": 2, "attention_variant": "mea_no_norm", "attention_bias": True},
        {"num_component_heads": [1, 2, 3], "attention_variant": "mea", "tie_word_embeddings": True},
        {"num_component_heads": [4, 1, 1], "attention_variant": "mea", "head_norm_affine": False},
        {"num_component_heads": 2, "rope_scaling": {"rope_type": "dynamic", "factor": 2}},
        # The narrower of keys and values is padded, up to a multiple of 8; the last layer saves nothing.
        {**LATENT, "attention_variant": "mea", "attention_bias": True},
        {**LATENT, "attention_variant": "mea_no_norm", "rope_scaling": {"rope_type": "dynamic", "factor": 2}},
    ],
    ids=name_of,
)
def test_vllm_equals_mea_in_float64(case):
    """Without a cache, in both attention implementations, and in generation; the cache has the configured shape."""
    mea, served = both("vllm", case | WIDE)
    ids = torch.randint(0, 37, (2, 50), generator=torch.Generator().manual_seed(5))
    expected = mea(input_ids=ids).logits
    for attention in ("sdpa", "eager"):
        served.set_attn_implementation(attention)
        torch.testing.assert_close(served(ids).logits, expected, rtol=1e-11, atol=1e-11)

    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    tokens, output = mea.generate(ids, **settings).sequences, served.generate(ids, **settings)
    assert torch.equal(output.sequences, tokens)

    cache = getattr(output, "cache", None) or output.past_key_values
    shapes = [(1, count * 16) if count < 4 else (4, 16) for count in mea.config.num_component_heads]
    shapes = [(1, 24), (1, 24), (4, 16)] if "hlc_form" in case else shapes
    for layer, shape, configured in zip(cache.layers, shapes, per_layer(served.config), strict=True):
        assert layer.keys.shape[1::2] == layer.values.shape[1::2] == configured == shape


def test_the_note_for_vllm_tells_what_the_cache_holds():
    notes = make_export_target("vllm", small_model(**LATENT | WIDE)).notes
    assert "holds 1.71 times the tokens" in notes[1]
    assert "width 16: FlashAttention; width 24: FlashAttention" in notes[1]
    assert "A token takes 224 numbers of it, for 182 latent ones and 384 of composite heads" in notes[2]


def per_layer(config) -> list[tuple[int, int]]:
    """(heads, width) of each layer's cache, as vLLM reads them."""
    configs = config.per_layer_config
    return [(configs[i].num_key_value_heads, configs[i].head_dim) for i in range(config.num_hidden_layers)]


@pytest.mark.parametrize(
    ("kind", "case", "reason"),
    [
        ("stock", {"attention_variant": "mea", "num_component_heads": 2}, "no stock architecture norms the outputs"),
        ("stock", {"attention_variant": "plain_norm"}, "transformers: no stock architecture norms the outputs"),
        ("stock", {"attention_variant": "plain", "hidden_size": 20, "attention_bias": True}, "Qwen2 heads that make"),
        ("stock", {"attention_variant": "differential"}, "transformers: no stock architecture norms the outputs"),
        ("stock", {"attention_variant": "talking_heads"}, "no stock architecture mixes the scores"),
        ("vllm", {"attention_variant": "differential"}, "transformers: vLLM attends once a layer"),
        ("vllm", {"attention_variant": "talking_heads"}, "transformers: vLLM attends once a layer"),
        ("vllm", {"attention_variant": "plain"}, "stock: this variant caches its heads as they are"),
        ("vllm", {"attention_variant": "plain_norm"}, "transformers: this variant caches its heads as they are"),
        ("stock", {"attention_variant": "gated"}, "transformers: no stock architecture gates the outputs"),
        ("vllm", {"attention_variant": "gated"}, "transformers: this variant caches its heads as they are"),
        ("vllm", {"attention_variant": "mea"}, "leave nothing to save"),
        ("vllm", {"num_component_heads": 2, "qk_norm": True, **WIDE}, "scales every composite key"),
        ("vllm", {"num_component_heads": 1, "head_dim": 12}, "multiples of 8 up to 256"),
        (
            "vllm",
            {"hlc_form": "latent"},
            "transformers: as many latent numbers as composite features (24) leave nothing",
        ),
        ("vllm", {**LATENT, "qk_norm": True, **WIDE}, "scales every composite key"),
        ("vllm", {**LATENT, "value_latent_dim": [8, 8, 48], "head_dim": 12, "key_latent_dim": 8}, "of heads 12 wide"),
        ("stock", {**LATENT, "attention_variant": "mea_no_norm", **WIDE}, "transformers, or vllm"),
    ],
)
def test_refusals(kind, case, reason):
    with pytest.raises(UserError) as refused:
        make_export_target(kind, small_model(**case))
    assert reason in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["stock", "vllm"])
def test_the_command(whole, tmp_path, capsys, kind, dtype):
    """Through the command, loaded as a user loads it; two layers with one and two component heads of two."""
    out = tmp_path / "out"
    assert main(["export", str(whole), str(out), "--target", kind, "--dtype", dtype]) == 0
    output = capsys.readouterr().out
    assert "real tokens differ from the trainer's by at most" in output

    config = json.loads((out / "config.json").read_text())
    card = (out / "README.md").read_text()
    names = {path.name for path in out.iterdir()}
    assert "generation_config.json" in names

    if kind == "stock":
        assert "holds 2 heads a layer, with MEA's own files 1, 2" in output
        assert config["model_type"] == "llama"
        assert "trust_remote_code" not in card
        assert not [name for name in names if name.endswith(".py")]
        assert not [name for name in load_file(out / "model.safetensors") if "hlc" in name]
    else:
        assert "1.33 times the tokens" in output
        assert (config["num_key_value_heads"], config["head_dim"]) == (1, 16)
        assert config["per_layer_config"] == {"1": {"num_key_value_heads": 2}}
        assert "vllm serve" in card

    capsys.readouterr()
    assert main(["generate", str(out), "--prompt", "And the", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("And the")
    assert config["dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[dtype]

    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=kind == "vllm", dtype=torch.float32)
    main(["export", str(whole), str(tmp_path / "own"), "--dtype", dtype])
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "own", trust_remote_code=True, dtype=torch.float32)
    ids = torch.arange(3, 33)[None]
    expected = reference(ids).logits
    tolerance = 1e-4 if (kind, dtype) != ("stock", "bf16") else 0.05
    assert (model(ids).logits - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.slow
def test_a_refused_target_writes_nothing(trained, tmp_path, capsys):
    assert main(["export", str(trained), str(tmp_path / "deep" / "out"), "--target", "stock"]) == 2
    error = capsys.readouterr().err
    assert "--target" in error
    assert "stock, for the variant mea" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "heads"),
    [
        ({"num_component_heads": [1, 2, 4], "head_dim": 32}, "of 32, from 1, 2, 4 component heads"),
        (WIDE | LATENT, "of 16, from 12 to 60 latent numbers of keys and 5 to 64 of values"),
    ],
    ids=["head", "latent"],
)
def test_the_export_for_vllm_comes_back(tmp_path, settings, heads):
    """Its config.json tells of the cache what others tell of the model; the weights are the same."""
    source = save_export(folder=tmp_path / "own", **settings)
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["import", str(source), str(first)]) == 0
    assert main(["export", str(first), str(tmp_path / "served"), "--target", "vllm"]) == 0
    assert f"| 8 query and 4 composite key/value heads {heads} |" in (tmp_path / "served/README.md").read_text()
    assert main(["import", str(tmp_path / "served"), str(second)]) == 0
    assert CheckpointMetadata.read(first).config["model"] == CheckpointMetadata.read(second).config["model"]

    weights, expected = read_weights(first), read_weights(second)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


@pytest.mark.slow
def test_a_folder_is_exported_as_its_import_is(tmp_path, capsys):
    """The temporary checkpoint is removed, and an impossible target is refused before there is one."""
    source, exports = save_export(folder=tmp_path / "own", attention_variant="mea_no_norm", num_component_heads=2), {}
    assert main(["import", str(source), str(tmp_path / "checkpoint")]) == 0
    for name in ("checkpoint", "own"):
        exports[name] = tmp_path / "stock" / name
        assert main(["export", str(tmp_path / name), str(exports[name]), "--target", "stock"]) == 0

    assert "differ from the trainer's by at most" in capsys.readouterr().out

    from_checkpoint, from_folder = (load_file(export / "model.safetensors") for export in exports.values())
    assert from_checkpoint.keys() == from_folder.keys()
    assert all(torch.equal(from_checkpoint[name], from_folder[name]) for name in from_checkpoint)

    assert main(["export", str(exports["own"]), str(tmp_path / "deep/out"), "--target", "vllm"]) == 2
    captured = capsys.readouterr()
    assert "leave nothing to save" in captured.err
    assert "import" not in captured.err

    (source / "model.safetensors").write_bytes(b"")
    assert main(["export", str(source), str(tmp_path / "deep/out")]) == 2
    assert "model.safetensors, unreadable" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"own", "checkpoint", "stock"}
    assert {path.name for path in (tmp_path / "stock").iterdir()} == {"own", "checkpoint"}
