"""`import`: Hugging Face folders become checkpoints that compute the same, whole ones or none, in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.hf_folders import KINDS, LLAMA3, SIZES, YARN, edit_config_json, read_weights, save_export, save_stock_model
from support.limits import PEAK_MEMORY
from support.models import expert_cases, name_of, small_model, variants
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from megatron_mea.checkpoint import tensors
from megatron_mea.checkpoint.folder import CheckpointMetadata, find_corruption
from megatron_mea.checkpoint.tensors import read_tensors, row_chunks, tensor_shapes, weight_shapes, write_tensors
from megatron_mea.cli import main
from megatron_mea.config.load import parse_config, parse_model
from megatron_mea.config.variants import VARIANTS
from megatron_mea.data.tokenizer import copy_tokenizer, load_tokenizer
from megatron_mea.exported.modeling_mea import MEAForCausalLM
from megatron_mea.huggingface.hf_config import from_hf_config, to_hf_config
from megatron_mea.huggingface.model_folder import ModelFolder


def model_settings(export: Path) -> dict[str, Any]:
    """config.json without what is no part of the model."""
    config_json = json.loads((export / "config.json").read_text())
    return {key: value for key, value in config_json.items() if key not in ("auto_map", "pad_token_id")}


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A folder's tensors with those of experts in stacks: gate_proj's rows, then up_proj's."""
    rest = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    layers = {name.partition(".experts.")[0] for name in tensors.keys() - rest.keys()}
    for layer in layers:
        count = sum(name.startswith(f"{layer}.experts.") for name in tensors) // 3
        gate, up, down = (
            torch.stack([tensors[f"{layer}.experts.{expert}.{kind}_proj.weight"] for expert in range(count)])
            for kind in ("gate", "up", "down")
        )
        rest |= {f"{layer}.experts.gate_up_proj": torch.cat([gate, up], 1), f"{layer}.experts.down_proj": down}

    return rest


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    """Logits (2, 60, vocab) in float64, by transformers' own class or by ours."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    loader = MEAForCausalLM if kind == "mea" else AutoModelForCausalLM
    # Grouped products of experts are none of float64.
    model = loader.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    ids = torch.randint(0, model.config.vocab_size, (2, 60), generator=torch.Generator().manual_seed(5))
    return model.eval()(ids, use_cache=False).logits


@pytest.mark.slow
class TestStock:
    """Llama, Mistral, Qwen2 and Qwen3 of transformers' own classes, in and out."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_in_and_out_with_equal_logits(self, kind, tmp_path, capsys):
        source = save_stock_model(kind, tmp_path / kind)
        checkpoint, out = tmp_path / "deep" / "checkpoint", tmp_path / "out"
        assert main(["import", str(source), str(checkpoint)]) == 0
        assert find_corruption(checkpoint) is None
        assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint"]

        weights, expected = read_weights(checkpoint), load_file(source / "model.safetensors")
        expected = stacked(expected)
        added = {name for name in weights if "hlc" in name}
        assert len(added) == 2 * sum(name.endswith("input_layernorm.weight") for name in weights)
        assert weights.keys() - added == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        assert all(torch.equal(weights[name], torch.eye(len(weights[name]))) for name in added)

        assert main(["export", str(checkpoint), str(out)]) == 0
        assert "random tokens differ from the trainer's by at most" in capsys.readouterr().out

        expected_logits, actual_logits = logits(source), logits(out)
        # Their norms and angles are float32, whatever the weights are.
        assert (actual_logits - expected_logits).norm() <= 2e-6 * expected_logits.norm()
        assert expected_logits.std() > 0.1

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_stock_export_is_the_source_bit_for_bit(self, kind, tmp_path):
        source, out = save_stock_model(kind, tmp_path / kind), tmp_path / "out"
        assert main(["import", str(source), str(tmp_path / "checkpoint")]) == 0
        assert main(["export", str(tmp_path / "checkpoint"), str(out), "--target", "stock"]) == 0
        expected, actual = (load_file(folder / "model.safetensors") for folder in (source, out))

        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[name], actual[name]) for name in expected)
        assert torch.equal(logits(source), logits(out))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_masters_are_float32(self, dtype, tmp_path, capsys):
        source = save_stock_model(kind="llama", folder=tmp_path / "llama", dtype=dtype, max_shard_size="20KB")
        assert len(list(source.glob("*.safetensors"))) > 1

        assert main(["import", str(source), str(tmp_path / "out")]) == 0
        assert ("is in float64, and is rounded" in capsys.readouterr().err) == (dtype == torch.float64)

        expected = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).state_dict()
        for name, tensor in read_weights(tmp_path / "out").items():
            if name in expected:
                assert tensor.dtype == torch.float32
                assert torch.equal(tensor, expected[name].float())

    def test_a_description_as_transformers_4_wrote_it(self, tmp_path):
        source = save_stock_model("llama-3.2", tmp_path / "llama")
        rope = LLAMA3 | {"original_max_position_embeddings": 32}
        rope["type"] = rope.pop("rope_type")
        edit_config_json(source, "rope_parameters", "dtype", rope_theta=1e4, rope_scaling=rope, torch_dtype="float32")
        new = save_stock_model("llama-3.2", tmp_path / "new")
        configs = []
        for folder in (source, new):
            assert main(["import", str(folder), str(folder) + "-out"]) == 0
            configs.append(CheckpointMetadata.read(Path(f"{folder}-out")).config["model"])

        assert configs[0] == configs[1]
        assert configs[0]["rope_scaling"]["rope_type"] == "llama3"

    def test_what_early_llamas_hold_beside_their_weights(self, tmp_path, capsys):
        """Constants of RoPE are left out; a tied matrix that is there twice is taken once, if the two are equal."""
        source = save_stock_model("qwen2-tied", tmp_path / "model")
        file = source / "model.safetensors"
        stored = load_file(file)
        twice = stored | {
            "lm_head.weight": stored["model.embed_tokens.weight"].clone(),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
        }
        save_file(twice, file, {"format": "pt"})
        assert main(["import", str(source), str(tmp_path / "out")]) == 0
        assert "lm_head.weight" not in weight_shapes(tmp_path / "out")

        twice["lm_head.weight"][-1, -1] += 1e-3
        save_file(twice, file, {"format": "pt"})
        capsys.readouterr()
        assert main(["import", str(source), str(tmp_path / "other")]) == 2
        message = capsys.readouterr().err

        assert "lm_head.weight in" in message
        assert "tie_word_embeddings" in message

    def test_evaluate_and_generate_give_what_the_source_gives(self, tiny, tmp_path, capsys):
        source = save_stock_model("mistral", tmp_path / "model")
        copy_tokenizer(tiny.tokenizer, source)
        assert main(["import", str(source), str(tmp_path / "checkpoint")]) == 0
        results = []
        for model in (source, tmp_path / "checkpoint"):
            capsys.readouterr()
            assert main(["evaluate", str(model), "--data", str(tiny.validation)]) == 0
            evaluated = json.loads(capsys.readouterr().out)
            assert main(["generate", str(model), "--prompt", "And the", "--max-new-tokens", "8"]) == 0
            results.append((evaluated["tokens"], evaluated["cross_entropy"], capsys.readouterr().out))

        assert results[0][::2] == results[1][::2]
        assert results[0][1] == pytest.approx(results[1][1], rel=1e-6)

        assert main(["evaluate", str(tmp_path / "checkpoint")]) == 2
        assert main(["inspect", str(tmp_path / "checkpoint")]) == 0
        assert "imported from model (mistral, F32); no moments" in capsys.readouterr().out

    def test_a_tokenizer_with_more_ids_than_the_model(self, tiny, tmp_path, capsys):
        """Such as one to which a padding token was added afterwards."""
        source = save_stock_model(kind="llama", folder=tmp_path / "model", vocab_size=300)
        load_tokenizer(tiny.tokenizer).save_pretrained(source)
        tokenizer = load_tokenizer(source)
        tokenizer.add_special_tokens({"pad_token": "<padding>"})
        tokenizer.save_pretrained(source)
        assert main(["import", str(source), str(tmp_path / "checkpoint")]) == 0
        assert "the tokenizer has 385 ids, and the model only 300" in capsys.readouterr().err

        assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "out")]) == 0
        config = json.loads((tmp_path / "out/config.json").read_text())
        assert config["pad_token_id"] == config["eos_token_id"] == 2

        capsys.readouterr()
        assert main(["generate", str(tmp_path / "checkpoint"), "--prompt", "And the Lord"]) == 2
        assert "ids below 300" in capsys.readouterr().err

    def test_generation_settings_and_chat_template_go_in_and_out(self, tiny, tmp_path):
        """They are copied: a model for chats ends with several tokens, of which a tokenizer knows one."""
        source = save_stock_model("llama", tmp_path / "model")
        copy_tokenizer(tiny.tokenizer, source)
        (source / "chat_template.jinja").write_text("{% for one in messages %}{{ one['content'] }}{% endfor %}")
        # transformers loads what it would not save: sampling settings without sampling.
        settings = {"eos_token_id": [2, 7], "temperature": 0.6, "top_p": 0.9, "transformers_version": "4.42.3"}
        (source / "generation_config.json").write_text(json.dumps(settings))
        assert main(["import", str(source), str(tmp_path / "checkpoint")]) == 0

        assert find_corruption(tmp_path / "checkpoint") is None
        assert ModelFolder.locate(tmp_path / "checkpoint").as_transformers().generation_config.eos_token_id == [2, 7]

        for target in ("transformers", "stock"):
            assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / target), "--target", target]) == 0
            for name in ("generation_config.json", "chat_template.jinja"):
                assert (tmp_path / target / name).read_bytes() == (source / name).read_bytes()

    @pytest.mark.parametrize("kind", ["llama", "qwen2"])
    def test_a_tokenizer_stays_what_the_whole_folder_makes_of_it(self, kind, tiny, tmp_path):
        """Without a `tokenizer_class` config.json decides, which a checkpoint does not hold."""
        source = save_stock_model(kind, tmp_path / "model")
        copy_tokenizer(tiny.tokenizer, source)
        file = source / "tokenizer_config.json"
        tokenizer_config = json.loads(file.read_text())
        del tokenizer_config["tokenizer_class"]
        file.write_text(json.dumps(tokenizer_config))
        assert main(["import", str(source), str(tmp_path / "out")]) == 0
        text = "And  the\n123 Lord"
        ids = [load_tokenizer(folder)(text)["input_ids"] for folder in (source, tmp_path / "out/tokenizer")]
        assert ids[0] == ids[1]


@pytest.mark.slow
class TestVariants:
    @pytest.mark.parametrize("variant", ["plain", "plain_norm", "mea", "mea_no_norm"])
    def test_of_a_stock_model(self, variant, tmp_path, capsys):
        source, checkpoint = save_stock_model("qwen3", tmp_path / "qwen3"), tmp_path / "out"
        assert main(["import", str(source), str(checkpoint), "--variant", variant]) == 0
        normed = variant in ("plain_norm", "mea")
        assert ("the logits are other ones" in capsys.readouterr().err) == normed

        weights = read_weights(checkpoint)
        gains = [tensor for name, tensor in weights.items() if "head_norm" in name]
        assert len(gains) == 2 * normed
        assert all((gain == 1).all() for gain in gains)
        assert any("hlc" in name for name in weights) == variant.startswith("mea")

        assert main(["export", str(checkpoint), str(tmp_path / "export")]) == 0
        expected, actual = logits(source), logits(tmp_path / "export")
        difference = (actual - expected).norm() / expected.norm()
        assert (difference > 0.01) if normed else (difference < 2e-6)

    @pytest.mark.parametrize("case", [*variants(), *expert_cases()], ids=name_of)
    def test_an_export_comes_back_bit_for_bit(self, case, tmp_path):
        source = save_export(tmp_path / "export", **case)
        for number in range(2):
            checkpoint, exported_again = tmp_path / f"checkpoint-{number}", tmp_path / f"again-{number}"
            assert main(["import", str(source), str(checkpoint)]) == 0
            assert main(["export", str(checkpoint), str(exported_again)]) == 0
            expected, actual = (load_file(folder / "model.safetensors") for folder in (source, exported_again))

            assert expected.keys() == actual.keys()
            assert all(expected[name].dtype == actual[name].dtype for name in expected)
            assert all(torch.equal(expected[name], actual[name]) for name in expected)
            assert model_settings(source) == model_settings(exported_again)

            source = exported_again

        assert torch.equal(logits(tmp_path / "export"), logits(source))

    def test_the_export_of_a_run(self, trained, tmp_path):
        """The tokenizer comes back too; from float32 and bfloat16."""
        for dtype in ("fp32", "bf16"):
            first, second, checkpoint = (tmp_path / f"{name}-{dtype}" for name in ("first", "second", "checkpoint"))
            assert main(["export", str(trained), str(first), "--dtype", dtype]) == 0
            assert main(["import", str(first), str(checkpoint)]) == 0
            assert main(["export", str(checkpoint), str(second), "--dtype", dtype]) == 0
            names = {path.name for path in first.iterdir()}
            assert names == {path.name for path in second.iterdir()}

            for name in names - {"README.md"}:
                assert (first / name).read_bytes() == (second / name).read_bytes()

        run = trained / "checkpoints/step_00000002"
        imported, expected = read_weights(tmp_path / "checkpoint-fp32"), read_weights(run)
        assert imported.keys() == expected.keys()
        assert all(torch.equal(imported[name], expected[name]) for name in expected)

        models = [
            parse_config(CheckpointMetadata.read(folder).config, needs_data=False).model
            for folder in (run, tmp_path / "checkpoint-fp32")
        ]
        assert models[0] == models[1]

    @pytest.mark.parametrize(
        ("source_variant", "allowed"),
        [
            ("plain", {"plain", "plain_norm", "mea", "mea_no_norm"}),
            ("plain_norm", {"plain_norm", "mea"}),
            ("mea_no_norm", {"mea", "mea_no_norm"}),
            ("mea", {"mea"}),
            ("differential", {"differential"}),
            ("talking_heads", {"talking_heads"}),
            ("gated", {"gated"}),
        ],
    )
    def test_of_an_export_none_drops_parameters(self, source_variant, allowed, tmp_path, capsys):
        source = save_export(tmp_path / "export", attention_variant=source_variant)
        stored = load_file(source / "model.safetensors")
        for variant in VARIANTS:
            if variant not in allowed:
                assert main(["import", str(source), str(tmp_path / variant), "--variant", variant]) == 2
                assert f"error: --variant\n  got:      {variant}\n" in capsys.readouterr().err
                continue

            assert main(["import", str(source), str(tmp_path / variant), "--variant", variant]) == 0
            weights = read_weights(tmp_path / variant)
            assert all(torch.equal(weights[name], stored[name]) for name in stored)

        near = f"{source_variant}s"
        assert main(["import", str(source), str(tmp_path / "none"), "--variant", near]) == 2
        err = capsys.readouterr().err
        assert f"got:      {near}\n" in err
        assert source_variant not in allowed or f"did you mean {source_variant}?\n" in err


@given(data=st.data())
def test_a_description_means_the_model_that_was_described(data):
    """Whatever the settings are, config.json and back is the identity."""
    rope = data.draw(
        st.sampled_from(
            [None, LLAMA3 | {"original_max_position_embeddings": 16}, {"rope_type": "dynamic", "factor": 2.0}]
        )
        | st.builds(
            lambda factor, truncate: (
                YARN | {"factor": factor, "truncate": truncate, "original_max_position_embeddings": 8}
            ),
            st.floats(1, 64),
            st.booleans(),
        )
    )
    settings = data.draw(st.sampled_from(variants())) | {
        "rope_scaling": rope,
        "rope_theta": data.draw(st.floats(1.0, 1e7)),
        "rms_norm_eps": data.draw(st.floats(1e-8, 1e-3)),
        "hlc_init": data.draw(st.sampled_from(["block", "normal"])),
    }
    if not settings["attention_variant"].startswith("mea") or settings.get("hlc_form") == "latent":
        del settings["hlc_init"]

    model = parse_model(small_model(**settings).model_dump(mode="json"))
    config = json.loads(to_hf_config(model).to_json_string())
    assert parse_model(from_hf_config(type(to_hf_config(model)).from_dict(config))) == model


class TestPieces:
    @given(shape=st.lists(st.integers(1, 9), min_size=1, max_size=2), most=st.integers(1, 40))
    def test_pieces_make_up_the_whole(self, shape, most):
        seen = torch.zeros(shape, dtype=torch.int)
        for offsets, size in row_chunks(tuple(shape), most):
            box = tuple(slice(first, first + count) for first, count in zip(offsets, size, strict=True))
            assert seen[box].shape == size
            assert seen[box].numel() <= max(most, seen[0].numel())
            seen[box] += 1

        assert (seen == 1).all()

    def test_what_is_written_is_read(self, tmp_path, monkeypatch):
        expected = {"matrix": torch.randn(7, 5), "vector": torch.randn(11)}
        monkeypatch.setattr(tensors, "row_chunks", lambda shape: row_chunks(shape, 10))

        def read(name, *, offsets, shape):
            return expected[name][
                tuple(slice(offset, offset + size) for offset, size in zip(offsets, shape, strict=True))
            ].clone()

        shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
        write_tensors(folder=tmp_path, shapes=shapes, read=read)
        assert tensor_shapes(tmp_path) == shapes
        assert len(list(tmp_path.glob("*.distcp"))) == 4 + 2

        actual = read_tensors(tmp_path, shapes)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)

    @pytest.mark.slow
    def test_no_more_than_pieces_are_in_memory(self, tmp_path):
        """112 MB in float32, 56 MB in bfloat16, and the process grows by less than 40 MB."""
        sizes = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
        config = CONFIG_MAPPING["llama"](**SIZES | sizes | {"num_key_value_heads": 8, "head_dim": 128})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)

        model.to_empty(device="cpu")
        for parameter in model.parameters():
            torch.nn.init.ones_(parameter)

        model.save_pretrained(tmp_path / "model")
        del model
        script = (
            "import sys\n"
            "from megatron_mea.huggingface.importing import import_model\n"
            "from megatron_mea.huggingface.model_folder import ModelFolder\n"
            "import_model(ModelFolder.locate(sys.argv[1]), sys.argv[3])\n"
            "before = peak_memory()\n"
            "import_model(ModelFolder.locate(sys.argv[2]), sys.argv[4])\n"
            "print(peak_memory() - before)\n"
        )
        small = save_stock_model("llama", tmp_path / "small")
        done = subprocess.run(
            [sys.executable, "-c", PEAK_MEMORY + script, small, tmp_path / "model", tmp_path / "a", tmp_path / "b"],
            capture_output=True,
            text=True,
        )

        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < 40_000
