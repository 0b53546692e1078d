"""A layout changes speed and memory, not the numbers: 20 steps of every layout against one process in float64."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_distributed
from engines import batches_of, config, layout, new_engine, plain_training, state, train

from megatron_mea.config import Config

STEPS = 20
FORMS = {"activations": 12, "weights": 24}
"""seq_length that makes a micro-batch combine heads as activations or as weights: `folding_is_cheaper`.

Over tensor ranks with ZeRO 0 and 1 and without a pipeline all micro-batches of a step share one fold.
"""

PAIRS = {
    "tp 2": layout(2),
    "tp 2, sequence parallel": layout(2, sequence=True),
    "pp 2": layout(pipeline=2),
    "dp 2, ZeRO 0": layout(zero=0),
    "dp 2, ZeRO 1": layout(zero=1),
    "dp 2, ZeRO 2": layout(zero=2),
    "dp 2, ZeRO 3": layout(zero=3),
}
TRIPLES = {
    "tp 3": layout(3),
    "tp 3, sequence parallel": layout(3, sequence=True),
    "pp 3": layout(pipeline=3),
}
FOURS = {
    "tp 4": layout(4),
    "tp 4, sequence parallel": layout(4, sequence=True),
    "tp 2 x dp 2, ZeRO 1": layout(2, 1),
    "tp 2 x dp 2, ZeRO 2, sequence parallel": layout(2, 2, True),
    "tp 2 x dp 2, ZeRO 3": layout(2, 3),
    "tp 2 x pp 2": layout(2, pipeline=2),
    "tp 2 x pp 2, sequence parallel": layout(2, 0, True, 2),
    "pp 2 x dp 2": layout(pipeline=2),
}
KINDS = {name: FOURS[name] for name in FOURS if name not in ("tp 4", "tp 2 x pp 2", "pp 2 x dp 2")}
EIGHTS = {
    "tp 2 x dp 4": layout(2),
    "pp 2 x dp 4": layout(pipeline=2),
    "tp 2 x pp 2 x dp 2": layout(2, pipeline=2),
    "tp 2 x pp 2 x dp 2, sequence parallel": layout(2, 1, True, 2),
}

TIED = {"tie_word_embeddings": True}
VARIANTS = [
    {"attention_variant": variant, "num_component_heads": heads}
    for variant, heads in (("plain", 4), ("plain_norm", 4), ("mea", 2), ("mea_no_norm", 4))
]
PAIRS_OF_HEADS = {"attention_variant": "differential", "num_component_heads": 4, "head_norm_init": 0.5}
TALKING = {"attention_variant": "talking_heads", "num_component_heads": 4}
ONE_HEAD = {"num_key_value_heads": 1, "num_component_heads": 1}
MODELS = [
    *VARIANTS,
    *(variant | TIED for variant in VARIANTS),
    {"num_component_heads": [1, 2, 3], "qk_norm": True, "attention_bias": True},
    {"hlc_mixes": "keys", "num_component_heads": 4, "vocab_size": 48},
    {"num_key_value_heads": 2, "head_norm_affine": False, "num_hidden_layers": 5},
    ONE_HEAD,
]
"""A vocabulary of 37 divides by no group."""

THREE = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 42, "num_hidden_layers": 5}

Case = tuple[str, dict, dict, str, str]
"""Name, `parallel`, changes of the model, form, activation checkpointing."""


def case(index: int, name: str, parallel: dict, model: dict) -> Case:
    """Forms and checkpointing take turns with the index."""
    return name, parallel, model, list(FORMS)[index % 2], ("none", "full")[index // 2 % 2]


def each(layouts: dict[str, dict], models: list[dict]) -> list[Case]:
    """Every layout with every model."""
    return [
        case(first + second, name, parallel, model)
        for first, (name, parallel) in enumerate(layouts.items())
        for second, model in enumerate(models)
    ]


def once(layouts: dict[str, dict], models: list[dict]) -> list[Case]:
    """Every layout once, with the models in turn."""
    return [case(i, *one, models[i % len(models)]) for i, one in enumerate(layouts.items())]


DEFAULT = {
    2: [
        *once(PAIRS, [VARIANTS[2], VARIANTS[0], TIED, VARIANTS[1] | TIED]),
        ("tp 2, weight form", layout(2), {"num_component_heads": 2}, "weights", "full"),
        ("tp 2, one component head", layout(2), {"num_component_heads": 1}, "activations", "none"),
        ("tp 2, one composite head", layout(2), ONE_HEAD, "weights", "none"),
        ("pp 2, tied", layout(pipeline=2), TIED, "weights", "full"),
        ("tp 2, sequence parallel, pairs", layout(2, sequence=True), PAIRS_OF_HEADS, "weights", "full"),
        ("pp 2, pairs", layout(pipeline=2), PAIRS_OF_HEADS | TIED, "weights", "none"),
        ("pp 2, talking", layout(pipeline=2), TALKING | TIED, "activations", "full"),
        ("dp 2, ZeRO 3, talking", layout(zero=3), TALKING, "weights", "none"),
        ("dp 2, ZeRO 3, selective", layout(zero=3), VARIANTS[2], "weights", "selective"),
        ("tp 2, sequence parallel, selective", layout(2, sequence=True), VARIANTS[2], "weights", "selective"),
        ("pp 2, selective", layout(pipeline=2), PAIRS_OF_HEADS, "activations", "selective"),
        ("tp 2, vocabulary divides", layout(2), {"vocab_size": 48, "num_component_heads": 4}, "weights", "none"),
    ],
    3: once(TRIPLES, [THREE]),
    4: once(KINDS, [VARIANTS[2] | TIED, VARIANTS[3], {"num_key_value_heads": 2}, VARIANTS[2]]),
    8: once({name: EIGHTS[name] for name in EIGHTS if name != "tp 2 x pp 2 x dp 2"}, [TIED]),
}
FULL = {
    2: each(PAIRS, [*MODELS, PAIRS_OF_HEADS])
    + each({name: PAIRS[name] for name in PAIRS if "tp" not in name}, [TALKING, TALKING | TIED]),
    3: each(TRIPLES, [THREE | variant for variant in ({}, TIED, {"num_component_heads": 1}, {"qk_norm": True})]),
    4: each(FOURS, [VARIANTS[0], VARIANTS[1] | TIED, VARIANTS[2] | TIED, VARIANTS[3]])
    + each({name: FOURS[name] for name in FOURS if "tp 4" not in name}, [PAIRS_OF_HEADS | TIED]),
    8: each(EIGHTS, [VARIANTS[0] | TIED, VARIANTS[2]]),
}


def settings_of(case: Case) -> Config:
    _, parallel, model, form, checkpointing = case
    training = {"activation_checkpointing": checkpointing}
    return settings(parallel, model, form, training)


def settings(parallel: dict | None, model: dict, form: str, training: dict | None = None) -> Config:
    """Half of the cases mask documents."""
    return config(parallel, model, STEPS, FORMS[form], form == "weights", training)


def train_cases(cases: list[Case]) -> list[tuple[list[tuple[float, float]], float, dict[str, np.ndarray]]]:
    """What `plain_training` returns, of each case; the parameters are those of this rank's stage."""
    from megatron_mea.model import decoder
    from megatron_mea.training.processes import start_distributed, stop_distributed
    from megatron_mea.training.ranks import Ranks
    from megatron_mea.training.replicas import check_replicas

    torch.set_num_threads(1)
    start_distributed(Ranks.from_environment())
    results = []
    for index, case in enumerate(cases):
        # Every other model makes its loss in chunks, of which a micro-batch leaves a rest.
        decoder.chunk_size = lambda tokens, columns, chunk=(10**9, 7)[index % 2]: min(tokens, chunk)
        engine = new_engine(settings_of(case))
        curve = train(engine, 1, STEPS)
        check_replicas(engine.model, engine.grid, engine.config)
        validation = engine.evaluate(iter(batches_of(engine, STEPS + 1)), engine.accumulation)
        moments = ("exp_avg.", "exp_avg_sq.")
        weights = {name: tensor.numpy() for name, tensor in state(engine).items() if not name.startswith(moments)}
        results.append((curve, validation, weights))
    stop_distributed()
    return results


@functools.cache
def expected_of(model: str, form: str) -> Any:
    return plain_training(settings(None, json.loads(model), form))


def check(world: int, cases: list[Case]) -> None:
    # Every engine leaves process groups behind, whose threads wake one another: no more than a few in one process.
    for start in range(0, len(cases), 8):
        check_some(world, cases[start : start + 8])


def check_some(world: int, cases: list[Case]) -> None:
    ranks = run_distributed(train_cases, world, cases, timeout=120 + 60 * len(cases))
    for index, case in enumerate(cases):
        curve, validation, weights = expected_of(json.dumps(case[2]), case[3])
        found: dict[str, np.ndarray] = {}
        for rank in ranks:
            np.testing.assert_allclose(rank[index][0], curve, rtol=1e-5, err_msg=str(case))
            np.testing.assert_allclose(rank[index][1], validation, rtol=1e-5, err_msg=str(case))
            found |= rank[index][2]
        assert found.keys() == weights.keys(), case
        for name, expected in weights.items():
            # Adam moves a parameter by up to lr = 1e-3 a step: 20 of them agree to a hundredth of one.
            np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-5, err_msg=f"{case} {name}")


@pytest.mark.parametrize("world", DEFAULT)
def test_layouts(world):
    check(world, DEFAULT[world])


@pytest.mark.full
@pytest.mark.parametrize("world", FULL)
def test_all_layouts_with_all_models(world):
    check(world, FULL[world])
