"""A layout changes speed and memory, not the losses: 20 steps of every layout against one process in float64."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import pytest
import torch
from support.distributed import run_distributed
from support.engines import config, layout, new_engine, plain_training, rank_batches, state, train

from megatron_mea.config import Config

pytestmark = pytest.mark.slow

STEPS = 20
FORMS = {"activations": 12, "weights": 24}
"""seq_length at which a micro-batch combines heads as activations or as weights: `folding_is_cheaper`.

Over tensor ranks with ZeRO 0 and 1 and without a pipeline all micro-batches of a step share one fold.
"""

PAIRS = {
    "tp 2": layout(tensor=2),
    "tp 2, sequence parallel": layout(tensor=2, sequence=True),
    "pp 2": layout(pipeline=2),
    "dp 2, ZeRO 0": layout(zero=0),
    "dp 2, ZeRO 1": layout(zero=1),
    "dp 2, ZeRO 2": layout(zero=2),
    "dp 2, ZeRO 3": layout(zero=3),
    "cp 2, ZeRO 1": layout(context=2),
    "cp 2, ZeRO 2": layout(context=2, zero=2),
    "cp 2, ZeRO 3": layout(context=2, zero=3),
}
TRIPLES = {
    "tp 3": layout(tensor=3),
    "tp 3, sequence parallel": layout(tensor=3, sequence=True),
    "pp 3": layout(pipeline=3),
    "cp 3": layout(context=3),
}
FOURS = {
    "tp 4": layout(tensor=4),
    "tp 4, sequence parallel": layout(tensor=4, sequence=True),
    "tp 2 x dp 2, ZeRO 1": layout(tensor=2, zero=1),
    "tp 2 x dp 2, ZeRO 2, sequence parallel": layout(tensor=2, zero=2, sequence=True),
    "tp 2 x dp 2, ZeRO 3": layout(tensor=2, zero=3),
    "tp 2 x pp 2": layout(tensor=2, pipeline=2),
    "tp 2 x pp 2, sequence parallel": layout(tensor=2, zero=0, sequence=True, pipeline=2),
    "pp 2 x dp 2": layout(pipeline=2),
    "cp 2 x dp 2, ZeRO 1": layout(context=2),
    "cp 2 x dp 2, ZeRO 2": layout(context=2, zero=2),
    "cp 2 x dp 2, ZeRO 3": layout(context=2, zero=3),
    "cp 2 x tp 2, sequence parallel": layout(context=2, tensor=2, sequence=True, zero=2),
    "cp 2 x pp 2": layout(context=2, pipeline=2),
}
KINDS = {name: FOURS[name] for name in FOURS if "cp" not in name and name not in ("tp 4", "tp 2 x pp 2", "pp 2 x dp 2")}
CONTEXT = {name: FOURS[name] for name in FOURS if "cp" in name}
EIGHTS = {
    "tp 2 x dp 4": layout(tensor=2),
    "pp 2 x dp 4": layout(pipeline=2),
    "tp 2 x pp 2 x dp 2": layout(tensor=2, pipeline=2),
    "tp 2 x pp 2 x cp 2, sequence parallel": layout(tensor=2, pipeline=2, context=2, sequence=True),
    "tp 2 x pp 2 x dp 2, sequence parallel": layout(tensor=2, zero=1, sequence=True, pipeline=2),
}

TIED = {"tie_word_embeddings": True}
VARIANTS = [
    {"attention_variant": variant, "num_component_heads": heads}
    for variant, heads in (("plain", 4), ("plain_norm", 4), ("mea", 2), ("mea_no_norm", 4))
]
PAIRS_OF_HEADS = {"attention_variant": "differential", "num_component_heads": 4, "head_norm_init": 0.5}
TALKING = {"attention_variant": "talking_heads", "num_component_heads": 4}
GATED = {"attention_variant": "gated", "num_component_heads": 4}
LATENT = {
    "hlc_form": "latent",
    "num_component_heads": None,
    "key_latent_dim": 10,
    "value_latent_dim": [7, 24, 16],
}
ONE_HEAD = {"num_key_value_heads": 1, "num_component_heads": 1}
MODELS = [
    *VARIANTS,
    *(variant | TIED for variant in VARIANTS),
    {"num_component_heads": [1, 2, 3], "qk_norm": True, "attention_bias": True},
    {"hlc_mixes": "keys", "num_component_heads": 4, "vocab_size": 48},
    {"num_key_value_heads": 2, "head_norm_affine": False, "num_hidden_layers": 5},
    ONE_HEAD,
]
"""No tensor group divides the vocabulary of 37."""

THREE = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 42, "num_hidden_layers": 5}

Case = tuple[str, dict, dict, str, str]
"""Name, `parallel`, changes of the model, form, activation checkpointing."""


def case(*, index: int, name: str, parallel: dict, model: dict) -> Case:
    """A case whose form and activation checkpointing take turns with the index."""
    return name, parallel, model, list(FORMS)[index % 2], ("none", "full")[index // 2 % 2]


def cross(layouts: dict[str, dict], models: list[dict]) -> list[Case]:
    """Every layout with every model."""
    return [
        case(index=first + second, name=name, parallel=parallel, model=model)
        for first, (name, parallel) in enumerate(layouts.items())
        for second, model in enumerate(models)
    ]


def once(layouts: dict[str, dict], models: list[dict]) -> list[Case]:
    """Every layout once, with the models in turn."""
    return [
        case(index=index, name=name, parallel=parallel, model=models[index % len(models)])
        for index, (name, parallel) in enumerate(layouts.items())
    ]


DEFAULT = {
    2: [
        *once(PAIRS, [VARIANTS[2], VARIANTS[0], TIED, VARIANTS[1] | TIED]),
        ("tp 2, weight form", layout(tensor=2), {"num_component_heads": 2}, "weights", "full"),
        ("tp 2, one component head", layout(tensor=2), {"num_component_heads": 1}, "activations", "none"),
        ("tp 2, one composite head", layout(tensor=2), ONE_HEAD, "weights", "none"),
        ("pp 2, tied", layout(pipeline=2), TIED, "weights", "full"),
        ("tp 2, sequence parallel, pairs", layout(tensor=2, sequence=True), PAIRS_OF_HEADS, "weights", "full"),
        ("pp 2, pairs", layout(pipeline=2), PAIRS_OF_HEADS | TIED, "weights", "none"),
        ("pp 2, talking", layout(pipeline=2), TALKING | TIED, "activations", "full"),
        ("dp 2, ZeRO 3, talking", layout(zero=3), TALKING, "weights", "none"),
        ("tp 2, sequence parallel, gated", layout(tensor=2, sequence=True), GATED, "weights", "selective"),
        ("pp 2, gated", layout(pipeline=2), GATED | TIED | {"gate_width": "head"}, "weights", "full"),
        ("dp 2, ZeRO 3, gated", layout(zero=3), GATED | {"gate_width": "head"}, "activations", "none"),
        ("tp 2, sequence parallel, latent", layout(tensor=2, sequence=True), LATENT, "weights", "full"),
        ("pp 2, latent", layout(pipeline=2), LATENT | TIED, "activations", "none"),
        ("dp 2, ZeRO 3, latent, q/k norm", layout(zero=3), LATENT | {"qk_norm": True}, "activations", "selective"),
        ("cp 2, ZeRO 3, latent", layout(context=2, zero=3), LATENT, "activations", "none"),
        ("dp 2, ZeRO 3, selective", layout(zero=3), VARIANTS[2], "weights", "selective"),
        ("tp 2, sequence parallel, selective", layout(tensor=2, sequence=True), VARIANTS[2], "weights", "selective"),
        ("pp 2, selective", layout(pipeline=2), PAIRS_OF_HEADS, "activations", "selective"),
        ("tp 2, vocabulary divides", layout(tensor=2), {"vocab_size": 48, "num_component_heads": 4}, "weights", "none"),
        ("cp 2, ZeRO 1, q/k norm", layout(context=2), VARIANTS[2] | {"qk_norm": True}, "weights", "selective"),
        ("cp 2, ZeRO 3, talking", layout(context=2, zero=3), TALKING, "weights", "full"),
    ],
    3: once(TRIPLES, [THREE]),
    4: [
        *once(KINDS, [VARIANTS[2] | TIED, VARIANTS[3], {"num_key_value_heads": 2}, VARIANTS[2]]),
        *once(CONTEXT, [VARIANTS[2], PAIRS_OF_HEADS, VARIANTS[3], {"num_component_heads": 1}, VARIANTS[2] | TIED]),
        ("cp 4", layout(context=4), VARIANTS[2] | {"qk_norm": True}, "weights", "selective"),
    ],
    8: once({name: EIGHTS[name] for name in EIGHTS if name != "tp 2 x pp 2 x dp 2"}, [TIED]),
}
FULL = {
    2: cross(PAIRS, [*MODELS, PAIRS_OF_HEADS, GATED])
    + cross({name: PAIRS[name] for name in PAIRS if "tp" not in name}, [TALKING, TALKING | TIED]),
    3: cross(TRIPLES, [THREE | variant for variant in ({}, TIED, {"num_component_heads": 1}, {"qk_norm": True})]),
    4: cross(FOURS, [VARIANTS[0], VARIANTS[1] | TIED, VARIANTS[2] | TIED, VARIANTS[3]])
    + cross({name: FOURS[name] for name in FOURS if "tp 4" not in name}, [PAIRS_OF_HEADS | TIED])
    + cross({name: FOURS[name] for name in FOURS if "tp" not in name}, [TALKING | TIED]),
    8: cross(EIGHTS, [VARIANTS[0] | TIED, VARIANTS[2]]),
}


def case_settings(case: Case) -> Config:
    _, parallel, model, form, checkpointing = case
    training = {"activation_checkpointing": checkpointing}
    return settings(parallel=parallel, model=model, form=form, training=training)


def settings(*, parallel: dict | None, model: dict, form: str, training: dict | None = None) -> Config:
    """The weight form comes with a document mask."""
    return config(
        parallel=parallel,
        model=model,
        steps=STEPS,
        seq_length=FORMS[form],
        document_mask=form == "weights",
        training=training,
    )


def train_cases(cases: list[Case]) -> list[tuple[list[tuple[float, float]], float, dict[str, np.ndarray]]]:
    """The results of each case, as `plain_training` returns them; the parameters are those of this rank's stage."""
    from megatron_mea.model import decoder
    from megatron_mea.parallel import zero
    from megatron_mea.training.distributed import start_distributed, stop_distributed
    from megatron_mea.training.rank_env import RankEnv
    from megatron_mea.training.replicas import check_replicas

    torch.set_num_threads(1)
    start_distributed(RankEnv.from_environment())
    # So that ZeRO 3 partitions the projections of small models, and as in large ones not what combines heads.
    zero.PERSISTENCE_THRESHOLD = 100

    results = []
    for index, case in enumerate(cases):
        # Every other case computes its loss in chunks that do not divide a micro-batch.
        decoder.chunk_size = lambda tokens, columns, chunk=(10**9, 7)[index % 2]: min(tokens, chunk)
        engine = new_engine(case_settings(case))
        curve = train(engine=engine, first=1, last=STEPS)
        check_replicas(model=engine.model, grid=engine.grid, config=engine.config)
        validation = engine.evaluate(iter(rank_batches(engine, STEPS + 1)), engine.grid.dims.num_micro_batches)
        moments = ("exp_avg.", "exp_avg_sq.")
        weights = {name: tensor.numpy() for name, tensor in state(engine).items() if not name.startswith(moments)}
        results.append((curve, validation, weights))

    stop_distributed()
    return results


@functools.cache
def reference(model: str, form: str) -> Any:
    """Results of `plain_training`; the changes of the model as JSON, for the cache."""
    return plain_training(settings(parallel=None, model=json.loads(model), form=form))


def check(world_size: int, cases: list[Case]) -> None:
    # Every engine leaves process groups behind, whose threads wake one another: so a few engines in a process.
    for start in range(0, len(cases), 8):
        check_in_one_launch(world_size, cases[start : start + 8])


def check_in_one_launch(world_size: int, cases: list[Case]) -> None:
    results = run_distributed(train_cases, world_size, cases, timeout=120 + 60 * len(cases))
    for index, case in enumerate(cases):
        expected_curve, expected_validation, expected_weights = reference(json.dumps(case[2]), case[3])
        weights: dict[str, np.ndarray] = {}
        for result in results:
            curve, validation, rank_weights = result[index]
            np.testing.assert_allclose(curve, expected_curve, rtol=1e-5, err_msg=str(case))
            np.testing.assert_allclose(validation, expected_validation, rtol=1e-5, err_msg=str(case))
            weights |= rank_weights

        assert weights.keys() == expected_weights.keys(), case
        for name, expected in expected_weights.items():
            # Adam moves a parameter by up to lr = 1e-3 a step: 20 steps agree to a hundredth of a step.
            np.testing.assert_allclose(weights[name], expected, rtol=0, atol=1e-5, err_msg=f"{case} {name}")


@pytest.mark.parametrize("world_size", DEFAULT)
def test_layouts(world_size):
    check(world_size, DEFAULT[world_size])


@pytest.mark.full
@pytest.mark.parametrize("world_size", FULL)
def test_all_layouts_with_all_models(world_size):
    check(world_size, FULL[world_size])
