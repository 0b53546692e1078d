"""The presets that heal a compressed model: what they fit, and the table of docs/compression.md, by `plan`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_mea.config.checks import config_warnings
from megatron_mea.config.load import load_config
from megatron_mea.config.schema import Model
from megatron_mea.huggingface.config_keys import read_config_json
from megatron_mea.huggingface.hf_config import model_section
from megatron_mea.plan.plan import make_plan
from megatron_mea.training.schedule import learning_rate

ROOT = Path(__file__).parents[2]
ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES = {
    "1b": {
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
        **{"tie_word_embeddings": True, "rope_scaling": ROPE | {"factor": 32.0}},
    },
    "8b": {
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
        **{"tie_word_embeddings": False, "rope_scaling": ROPE | {"factor": 8.0}},
    },
}
"""What config.json of Llama-3.2-1B and of Llama-3.1-8B says, beside what both do."""
TOKENS = {"1b": 1e9, "8b": 2e9}
PLANNED = [("1b", 1), ("1b", 8), ("8b", 8), ("8b", 64)]
FLOPS_A_SECOND = 0.4 * 989e12


def save_description(folder: Path, size: str) -> Path:
    """Writes the config.json of the model that is compressed, which is all that `plan` reads of a teacher."""
    folder.mkdir()
    common = {"model_type": "llama", "vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8}
    common |= {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 5e5}
    (folder / "config.json").write_text(json.dumps(common | SHAPES[size]))
    return folder


@pytest.mark.parametrize(("size", "gpus"), PLANNED)
def test_a_preset_heals_its_model_and_the_page_says_what_plan_says(size, gpus, tmp_path):
    teacher = save_description(tmp_path / "imported", size)
    path = ROOT / f"configs/compression-latent-{size}.yaml"
    config = load_config(path, [f"training.distillation.teacher={teacher}"])
    plan = make_plan(config, world_size=gpus)
    assert config_warnings(config, plan.dims) == []

    # Everything but the form of keys and values is the source model's.
    source, _ = model_section(read_config_json(teacher, "--from"))
    compressed = {"attention_variant", "hlc_form", "key_latent_dim", "value_latent_dim"}
    unchanged = Model.model_fields.keys() - compressed
    assert config.model.model_dump(include=unchanged) == source.model_dump(include=unchanged)
    assert plan.cache_bytes / plan.composite_cache_bytes == 0.5

    assert plan.steps * plan.tokens_per_step == pytest.approx(TOKENS[size], rel=1e-3)
    rates = [learning_rate(config, step) for step in (config.schedule.warmup_steps, config.steps)]
    assert rates == [config.optimizer.lr, 0]
    assert config.schedule.warmup_steps == pytest.approx(config.steps / 20, rel=0.01)

    memory, flops = plan.memory[0], plan.flops.total * plan.steps * plan.tokens_per_step
    assert memory.total < 65 * 2**30
    rows = {
        "GPUs = tensor x data": f"{gpus} = {plan.dims.tp} x {plan.dims.dp}",
        "steps x tokens": f"{plan.steps:,} x {plan.tokens_per_step:,}",
        "parameters": f"{plan.parameters.total:,}",
        "of these combinations": f"{plan.parameters.head_combination:,}",
        "cache, bytes a token": f"{plan.cache_bytes:,}",
        "memory of a rank, GiB": f"{memory.total / 2**30:.1f}",
        "of this the teacher": f"{memory.teacher / 2**30:.1f}",
        "FLOPs a token": f"{plan.flops.total:.4g}",
        "of these the teacher's": f"{plan.flops.teacher:.4g}",
        "FLOPs in all": f"{flops:.4g}",
        "hours at 40 %": f"{flops / gpus / FLOPS_A_SECOND / 3600:.1f}",
    }
    lines = (ROOT / "docs/compression.md").read_text().partition("## Healing")[2].splitlines()
    table = {cells[0]: cells[1:] for line in lines if (cells := [cell.strip() for cell in line.strip("|").split("|")])}
    column = PLANNED.index((size, gpus))
    assert {name: table[name][column] for name in rows} == rows
