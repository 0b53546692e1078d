"""configs/paper/ against the paper's settings (sections 5.1 and 5.2), for every variant, by `plan`."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mea.compression.budget import parse_layers
from megatron_mea.config.checks import config_warnings
from megatron_mea.config.load import load_config
from megatron_mea.config.variants import VARIANTS
from megatron_mea.experiments.sweep import combinations
from megatron_mea.plan.plan import as_json, make_plan
from megatron_mea.training.schedule import learning_rate

CONFIGS = Path(__file__).parents[2] / "configs/paper"
GPU = 80 * 2**30
VARIANT_OVERRIDES = {"talking_heads": ["training.micro_batch_size=1", "training.activation_checkpointing=full"]}
"""Further settings that a variant needs, as the file says."""
GATES = 16 * 2048 * 32 * 64
"""Parameters that `gated` has beyond Llama's: a matrix as large as `q_proj` in every layer."""


def shape(*, heads: int, kv: int, dim: int, hidden: int, inner: int, layers: int, vocab: int) -> int:
    """Parameters of an untied Llama of this shape."""
    attention = 2 * hidden * dim * (heads + kv)
    return 2 * vocab * hidden + layers * (attention + 3 * hidden * inner + 2 * hidden) + hidden


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_1b_runs(variant):
    config = load_config(
        str(CONFIGS / "1b.yaml"), [f"model.attention_variant={variant}", *VARIANT_OVERRIDES.get(variant, [])]
    )
    plan = as_json(make_plan(config, world_size=64))
    llama = shape(heads=32, kv=8, dim=64, hidden=2048, inner=8192, layers=16, vocab=128256)
    llama += GATES if variant == "gated" else 0
    assert 0 <= plan["parameters"]["total"] - llama < 1e-4 * llama
    assert plan["memory_per_rank_bytes"][0]["total"] < 0.8 * GPU
    assert config.tokens_per_step == pytest.approx(2e7, rel=0.05)
    assert config.steps * config.tokens_per_step == pytest.approx(5e11, rel=1e-4)
    assert [learning_rate(config, step) for step in (500, 1000, config.steps)] == pytest.approx([1.5e-3, 3e-3, 3e-4])
    assert (config.optimizer.weight_decay, config.model.tie_word_embeddings) == (0.1, False)


def test_the_selection_of_a_learning_rate(tmp_path):
    rates = ["1e-4", "5e-4", "1e-3", "3e-3"]
    variants = [variant for variant in VARIANTS if variant not in VARIANT_OVERRIDES]
    configs, _ = combinations(
        path=str(CONFIGS / "selection.yaml"),
        overrides=[],
        variants=variants,
        learning_rates=rates,
        seeds=[],
        out=tmp_path,
    )
    assert len(configs) == 4 * len(variants)

    base = load_config(str(CONFIGS / "1b.yaml"))
    for config in configs:
        assert as_json(make_plan(config, world_size=64))["memory_per_rank_bytes"][0]["total"] < 0.8 * GPU
        assert config.tokens_per_step * config.steps == pytest.approx(5e10, rel=1e-3)
        assert config.schedule.warmup_steps == 1000
        assert {learning_rate(config, step) for step in (1000, 1500, config.steps)} == {config.optimizer.lr}
        # Everything else is the 1B run's.
        assert config.data == base.data
        assert config.model == base.model.model_copy(update={"attention_variant": config.model.attention_variant})
        assert config.training.global_batch_size == base.training.global_batch_size


QWEN3_30B_A3B = 30_532_122_624
"""Its parameters. A head of keys or values has 128 x 2048."""


@pytest.mark.parametrize("name", ["full", "half", "deep", "recovery"])
def test_the_compressed_mixture_of_experts(name):
    path = CONFIGS / f"qwen3-30b-a3b-{name}.yaml"
    text, config = path.read_text(), load_config(str(path))
    halved = parse_layers("full" if name == "recovery" else name, 48)
    assert config.model.component_heads == [2 if layer in halved else 4 for layer in range(1, 49)]

    # Steps of 68 million tokens, to within 2 %.
    assert config.tokens_per_step == pytest.approx(6.8e7, rel=0.02)
    assert config.steps * config.tokens_per_step == pytest.approx(1e12 if name == "recovery" else 2.2e10, rel=0.01)
    assert [learning_rate(config, step) for step in (config.schedule.warmup_steps, config.steps)] == [1.6e-5, 0]

    for gpus, gibibytes in ((8, 139), (64, 80), (512, 80)):
        plan = make_plan(config, world_size=gpus)
        assert config_warnings(config, plan.dims) == []

        even, worst = (max(stage.total for stage in memory) for memory in (plan.memory, plan.worst_case_memory))
        assert worst < 0.85 * gibibytes * 2**30
        assert f"{gpus} GPUs {even / 2**30:.1f} {worst / 2**30:.1f}" in " ".join(text.split())

    removed = QWEN3_30B_A3B - plan.parameters.total
    assert removed == len(halved) * 2 * 2 * 128 * 2048 - plan.parameters.head_combination
    assert plan.parameters.active == pytest.approx(3.3e9, rel=0.02)
