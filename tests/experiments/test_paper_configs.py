"""configs/paper/ against the paper's settings (section 5.1), for every variant, by `plan`."""

from __future__ import annotations

from pathlib import Path

import pytest

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
