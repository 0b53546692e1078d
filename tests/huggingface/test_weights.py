"""Sources of `run.init_from` against the model of the run: refusals, warnings, and the files that are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from megatron_mea.checkpoint.folder import COMPLETE, META
from megatron_mea.checkpoint.tensors import Fragment
from megatron_mea.cli import main
from megatron_mea.config.load import parse_config
from megatron_mea.config.schema import Model
from megatron_mea.errors import UserError
from megatron_mea.exported.modeling_mea import MEAForCausalLM
from megatron_mea.huggingface import weights
from megatron_mea.huggingface.hf_config import to_hf_config
from megatron_mea.huggingface.model_folder import ModelFolder
from megatron_mea.huggingface.weights import open_weights

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
COMMON = SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rms_norm_eps": 1e-5}
KINDS = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
}
"""Hugging Face models, and what the section `model` or their own configuration must say beside SIZES."""


def model(**settings) -> Model:
    return Model(**SIZES | settings)


def plain_model(kind: str, **settings) -> Model:
    variant_keys = {key: value for key, value in KINDS[kind].items() if key in Model.model_fields}
    return model(**{"attention_variant": "plain"} | variant_keys | settings)


def save_stock_model(kind: str, folder: Path, **sharding) -> Path:
    config = CONFIG_MAPPING[kind](**COMMON | {key: value for key, value in KINDS[kind].items() if key != "qk_norm"})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, **sharding)
    return folder


def save_export(folder: Path, **settings) -> Path:
    torch.manual_seed(0)
    MEAForCausalLM(to_hf_config(model(**settings))).save_pretrained(folder)
    return folder


def edit_config_json(folder: Path, *without: str, **changes) -> None:
    """Changes config.json: removes the keys `without`, and sets others."""
    file = folder / "config.json"
    config_json = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config_json.items() if key not in without}))


def problems(folder: Path, model: Model) -> list[tuple[str, str]]:
    """(where, got) of every problem for which `open_weights` refuses a folder."""
    with pytest.raises(UserError) as refused:
        open_weights(folder, model)
    return [(problem.where, str(problem.got)) for problem in refused.value.problems]


@pytest.mark.parametrize("kind", KINDS)
def test_another_variant_is_refused_where_no_name_tells(kind, tmp_path):
    """The head norm without a gain adds no parameter to a plain model, and computes something else."""
    source = save_stock_model(kind, tmp_path / kind)
    assert open_weights(source, plain_model(kind)).warnings == []
    normed = plain_model(kind=kind, attention_variant="plain_norm", head_norm_affine=False)
    assert problems(source, normed) == [("model.attention_variant", "plain_norm")]
    assert ("model.attention_variant", "mea") in problems(source, plain_model(kind, attention_variant="mea"))


def test_another_width_of_gates_is_refused(tmp_path):
    """With one feature a head the shapes are the same."""
    source = save_export(folder=tmp_path / "export", attention_variant="gated", gate_width="head")
    assert open_weights(source, model(attention_variant="gated", gate_width="head")).warnings == []
    assert ("model.gate_width", "feature") in problems(source, model(attention_variant="gated"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hlc_form": "head"}, [("model.hlc_form", "head")]),
        ({"key_latent_dim": 4}, [("model.key_latent_dim", "[4, 4]")]),
        ({"value_latent_dim": [6, 5]}, [("model.value_latent_dim", "[6, 5]")]),
        (
            {"key_latent_dim": 4, "value_latent_dim": 5},
            [("model.key_latent_dim", "[4, 4]"), ("model.value_latent_dim", "[5, 5]")],
        ),
        ({"key_frequencies": [[1, 2], [2, 1]]}, [("model.key_frequencies", "[2, 1] in layer 1")]),
        ({"num_hidden_layers": 3}, [("model.num_hidden_layers", "3")]),
    ],
    ids=str,
)
def test_other_latent_numbers_are_named_by_their_key_alone(changes, expected, tmp_path):
    """A line for each setting, and none for the tensors of every layer."""
    latent = {"hlc_form": "latent", "key_latent_dim": 6, "value_latent_dim": 7}
    source = save_export(folder=tmp_path / "export", **latent)
    assert open_weights(source, model(**latent)).warnings == []
    assert problems(source, model(**latent | changes)) == expected


def test_a_description_that_leaves_out_its_variant_has_the_default(tmp_path):
    source = save_export(folder=tmp_path / "export", attention_variant="mea", head_norm_affine=False)
    assert open_weights(source, model(head_norm_affine=False)).warnings == []
    edit_config_json(source, "attention_variant")
    assert open_weights(source, model(head_norm_affine=False)).warnings == []
    assert problems(source, model(attention_variant="mea_no_norm")) == [("model.attention_variant", "mea_no_norm")]


@pytest.mark.parametrize(
    ("settings", "changes", "keys"),
    [
        ({}, {"rms_norm_eps": 1e-6}, ["rms_norm_eps"]),
        ({}, {"head_norm_eps": 1e-6}, ["head_norm_eps"]),
        ({}, {"rope_theta": 1e4}, ["rope_parameters"]),
        ({}, {"max_position_embeddings": 4096}, []),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            {"max_position_embeddings": 4096},
            ["max_position_embeddings"],
        ),
        # Nothing that has no effect is told or refused.
        ({"attention_variant": "plain"}, {"head_norm_eps": 1e-6, "head_norm_affine": False, "hlc_mixes": "keys"}, []),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_changes_the_function_alone_is_told(settings, changes, keys, tmp_path):
    source = save_export(tmp_path / "export", **settings)
    warnings = open_weights(source, model(**settings | changes)).warnings
    assert [warning.split(" is ")[0] for warning in warnings] == [f"model.{key}" for key in keys]


def test_a_value_that_a_description_leaves_out_is_the_one_of_its_model_type(tmp_path):
    source = save_stock_model("llama", tmp_path / "llama")
    edit_config_json(source, "rms_norm_eps", "rope_parameters", "head_dim", num_key_value_heads=None)
    assert ModelFolder.locate(source).settings().num_key_value_heads == 4
    name = "model.layers.0.self_attn.k_proj.weight"
    assert problems(source, plain_model("llama"))[0] == ("run.init_from", f"{name} of shape (8, 16) in {source}")

    edit_config_json(source, num_key_value_heads=2)
    assert [line.split(", and ")[1] for line in open_weights(source, plain_model("llama")).warnings] == [
        f"{{'rope_type': 'default', 'rope_theta': 10000.0}} in {source}",
        f"1e-06 in {source}",
    ]

    # The keys of transformers 4.
    edit_config_json(source, rope_theta=500000.0, rope_scaling={"type": "linear", "factor": 2.0}, rms_norm_eps=1e-5)
    scaled = plain_model("llama", rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert open_weights(source, scaled).warnings == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = gelu"),
        ({"sliding_window": 8}, "sliding_window = 8"),
        ({"num_attention_heads": "four"}, "num_attention_heads = 'four'"),
        ({"model_type": "gpt2"}, "model_type = gpt2"),
    ],
)
def test_a_description_of_another_function_is_refused(changes, expected, tmp_path):
    source = save_stock_model("mistral", tmp_path / "mistral")
    edit_config_json(source, **changes)
    [(where, got)] = problems(source, plain_model("mistral"))
    assert where == "run.init_from"
    assert expected in got


class TestAddedRows:
    """A run with a larger vocabulary than its source, such as one whose tokenizer got tokens afterwards."""

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("kind", ["folder", pytest.param("checkpoint", marks=pytest.mark.slow)])
    def test_are_the_mean_row(self, kind, tied, tmp_path, monkeypatch):
        monkeypatch.setattr(weights, "_ROWS_BYTES", 4 * 16 * 5)
        source = save_export(tmp_path / "export", tie_word_embeddings=tied)
        stored = load_file(source / "model.safetensors")
        if kind == "checkpoint":
            assert main(["import", str(source), str(tmp_path / "checkpoint")]) == 0
            source = tmp_path / "checkpoint"

        opened = open_weights(source, model(vocab_size=35, tie_word_embeddings=tied))
        assert "the rows that are added to the embeddings, 3, are the mean" in opened.warnings[0]

        # (first row, first column, rows, columns, first element, elements) of shards; rows beyond 35 are padding.
        shards = [(0, 0, 36, 16, 0, 576), (30, 0, 6, 16, 7, 50), (33, 0, 3, 16, 0, 48), (0, 8, 36, 8, 250, 38)]
        for name in ("model.embed_tokens.weight", "lm_head.weight")[: 2 - tied]:
            full = torch.zeros(36, 16)
            full[:32], full[32:35] = stored[name], stored[name].mean(0)
            for row, column, rows, columns, start, count in shards:
                values = torch.zeros(count)
                opened.stored.fill(
                    [
                        Fragment(
                            name=name,
                            global_shape=(35, 16),
                            global_offset=(row, column),
                            local_shape=(rows, columns),
                            start=start,
                            values=values,
                        )
                    ]
                )
                expected = full[row : row + rows, column : column + columns].flatten()[start : start + count]
                torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-7)

    def test_a_smaller_vocabulary_is_refused(self, tmp_path):
        source = save_export(tmp_path / "export")
        assert problems(source, model(vocab_size=31)) == [
            ("run.init_from", f"{name} of shape (32, 16) in {source}")
            for name in ("model.embed_tokens.weight", "lm_head.weight")
        ]


class TestFiles:
    """The files that transformers would read, and no others."""

    def test_what_the_index_does_not_name_is_not_read(self, tmp_path):
        """Some publish the same weights once more under other names."""
        source = save_stock_model(kind="llama", folder=tmp_path / "llama", max_shard_size="5KB")
        assert not (source / "model.safetensors").exists()
        assert len(list(source.glob("*.safetensors"))) > 1
        save_file({"layers.0.attention.wq.weight": torch.zeros(16, 16)}, source / "consolidated.safetensors")
        open_weights(source, plain_model("llama"))

    def test_what_stands_beside_a_single_file_is_not_read(self, tmp_path):
        source = save_stock_model("llama", tmp_path / "llama")
        save_file({"layers.0.attention.wq.weight": torch.zeros(16, 16)}, source / "consolidated.safetensors")
        open_weights(source, plain_model("llama"))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("index", "expected"),
        [
            ("{", "unreadable"),
            ('{"weight_map": ["a"]}', "unreadable"),
            ('{"weight_map": {"a": 3}}', "unreadable"),
            ('{"weight_map": {"a": "b.safetensors"}}', "without b.safetensors; there: none"),
            ('{"weight_map": {"a": "../x.safetensors"}}', "'../x.safetensors' is no name"),
            ('{"weight_map": {"a": "x.bin"}}', "'x.bin' is no name"),
            ('{"weight_map": {}}', "it names no file"),
        ],
    )
    def test_an_index_that_is_none_is_refused(self, index, expected, tmp_path):
        source = save_stock_model(kind="llama", folder=tmp_path / "llama", max_shard_size="5KB")
        (source / "model.safetensors.index.json").write_text(index)
        [(where, got)] = problems(source, plain_model("llama"))
        assert where == "run.init_from"
        assert expected in got

    def test_a_shard_that_lacks_a_tensor_is_refused(self, tmp_path):
        source = save_stock_model("llama", tmp_path / "llama")
        tensors = load_file(source / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, source / "model.safetensors")
        assert problems(source, plain_model("llama")) == [("run.init_from", f"{source} without lm_head.weight")]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_damage_is_a_users_error_on_every_rank_that_meets_it(damage, trained, tmp_path):
    """Each of two ranks verifies its share; what describes the tensors is read by both."""
    checkpoint = trained / "checkpoints/step_00000002"
    model = parse_config(json.loads((checkpoint / META).read_text())["config"]).model
    for name in json.loads((checkpoint / COMPLETE).read_text())["sha256"]:
        if (name, damage) == (META, "missing"):
            continue

        copy = tmp_path / name.replace("/", "-")
        shutil.copytree(checkpoint, copy)
        content = (copy / name).read_bytes()
        middle = len(content) // 2
        (copy / name).unlink()
        if damage != "missing":
            rest = bytes([content[middle] ^ 1]) + content[middle + 1 :]
            (copy / name).write_bytes(content[:middle] + (rest if damage == "flipped" else b""))

        problems_by_rank = []
        for rank in range(2):
            try:
                open_weights(path=copy, model=model, rank=rank, world_size=2)
            except UserError as error:
                problems_by_rank.append(error.problems)

        reason = "is missing" if damage == "missing" else "does not match its checksum"
        assert {str(problem.got) for problems in problems_by_rank for problem in problems} == {
            f"{copy}: {name} {reason}"
        }
        assert len(problems_by_rank) == (2 if name in (META, ".metadata") else 1)
