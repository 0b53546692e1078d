"""Mixtures of experts on every kind of layout: losses, norms and every count equal one process in float64."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.distributed import run_distributed
from support.engines import (
    config,
    layout,
    new_engine,
    plain_training,
    rank_batches,
    set_state,
    state,
    train,
    train_step,
)
from support.hf_folders import save_stock_model
from support.models import SMALL
from transformers import AutoModelForCausalLM

from megatron_mea.config import Config
from megatron_mea.parallel.grid import TensorGroup
from megatron_mea.parallel.parameter import normal, parameters_by_name, sharded_parameter
from megatron_mea.training import nonfinite

pytestmark = pytest.mark.slow

STEPS = 12
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "mlp_only_layers": [1],
    "qk_norm": True,
    "router_aux_loss_coef": 0.5,
}
SEQUENCE = {"balance": "sequence", "router_z_loss_coef": 0.05}
BATCH = {"balance": "batch", "router_z_loss_coef": 0.05}
NONE = {"balance": "none"}
FULL, SELECTIVE = {"activation_checkpointing": "full"}, {"activation_checkpointing": "selective"}
NOT_OF_THE_CURVE = ("activation_checkpointing", "micro_batch_size")

Case = tuple[str, dict, dict]
"""Name, sections `parallel` and `training`."""
CASES: dict[int, list[Case]] = {
    2: [
        ("tp 2", layout(tensor=2), BATCH),
        ("tp 2, sequence parallel", layout(tensor=2, sequence=True), SEQUENCE | SELECTIVE),
        ("pp 2, micro-batches of 4", layout(pipeline=2), BATCH | FULL | {"micro_batch_size": 4}),
        ("dp 2, ZeRO 1", layout(zero=1), NONE),
        ("dp 2, ZeRO 2, micro-batches of 1", layout(zero=2), SEQUENCE | FULL | {"micro_batch_size": 1}),
        ("dp 2, ZeRO 3, micro-batches of 1", layout(zero=3), BATCH | SELECTIVE | {"micro_batch_size": 1}),
        ("dp 2, ZeRO 0, micro-batches of 4", layout(zero=0), SEQUENCE | {"micro_batch_size": 4}),
        ("cp 2", layout(context=2), SEQUENCE | SELECTIVE),
        ("cp 2, ZeRO 3", layout(context=2, zero=3), BATCH | FULL),
    ],
    4: [
        ("tp 4, sequence parallel", layout(tensor=4, sequence=True), BATCH | FULL),
        ("tp 2 x dp 2, ZeRO 2, sequence parallel", layout(tensor=2, zero=2, sequence=True), SEQUENCE),
        ("tp 2 x dp 2, ZeRO 3", layout(tensor=2, zero=3), SEQUENCE | FULL),
        ("cp 2 x tp 2, sequence parallel", layout(context=2, tensor=2, sequence=True), SEQUENCE | FULL),
        ("tp 2 x pp 2, sequence parallel", layout(tensor=2, sequence=True, pipeline=2), BATCH),
    ],
}


def case_settings(parallel: dict | None, training: dict) -> Config:
    model = EXPERTS | ({"router_aux_loss_coef": 0} if training["balance"] == "none" else {})
    return config(parallel=parallel, model=model, steps=STEPS, seq_length=16, training=training)


def train_cases(cases: list[Case]) -> list[tuple[list[tuple[float, ...]], float, dict[str, np.ndarray]]]:
    """Curve, validation loss, and weights and counts of each case; the first case is resumed half-way."""
    from megatron_mea.training.distributed import start_distributed, stop_distributed
    from megatron_mea.training.rank_env import RankEnv
    from megatron_mea.training.replicas import check_replicas
    from megatron_mea.training.teacher import open_teacher

    torch.set_num_threads(1)
    start_distributed(RankEnv.from_environment())
    results = []
    for _, parallel, training in cases:
        settings = case_settings(parallel, training)
        engine = new_engine(settings, teacher=open_teacher(settings))
        half = STEPS // 2
        curve = train(engine=engine, first=1, last=half)
        # Validation in the middle counts nothing.
        engine.evaluate(iter(rank_batches(engine, 1)), engine.grid.dims.num_micro_batches)
        if (parallel, training) == cases[0][1:]:
            # Resumes: weights, moments and counts are all that a step needs of those before it.
            tensors, counts = state(engine), engine.routers.state()
            engine = new_engine(settings, initialized=False)
            set_state(engine=engine, tensors=tensors, step=half)
            engine.routers.load_state(json.loads(json.dumps(counts)))

        curve += train(engine=engine, first=half + 1, last=STEPS)
        check_replicas(model=engine.model, grid=engine.grid, config=engine.config)
        validation = engine.evaluate(iter(rank_batches(engine, STEPS + 1)), engine.grid.dims.num_micro_batches)
        tensors = {name: tensor for name, tensor in state(engine).items() if not name.startswith("exp_avg")}
        tensors |= {f"counts.{layer}": torch.tensor(counts) for layer, counts in engine.routers.state().items()}
        results.append((curve, validation, {name: tensor.numpy() for name, tensor in tensors.items()}))

    if torch.distributed.get_world_size() == 2:
        check_nonfinite_experts()

    stop_distributed()
    return results


def check_nonfinite_experts() -> None:
    """Their numbers are in the message, whichever rank holds them."""
    from megatron_mea.training.nonfinite import NonFiniteError, describe_nonfinite
    from megatron_mea.training.zero_state import stored_shard, stored_start

    gate_up, down = (f"model.layers.2.mlp.experts.{stack}_proj" for stack in ("gate_up", "down"))
    for parallel in (layout(tensor=2), layout(zero=3)):
        settings = case_settings(parallel, BATCH)
        engine = new_engine(settings)
        for name, experts in ((gate_up, (1, 6)), (down, (6,))):
            parameter = parameters_by_name(engine.model)[name]
            spec, shard = parameter.spec, stored_shard(parameter).data.view(-1)
            for expert in experts:
                # The last element of its matrix.
                index = (
                    (expert + 1 - spec.global_offset[0]) * math.prod(spec.local_shape[1:]) - 1 - stored_start(parameter)
                )
                if 0 <= index < len(shard):
                    shard[index] = math.nan

        with pytest.raises(NonFiniteError) as error:
            train_step(engine=engine, step=1, lr=1e-3)

        data = SimpleNamespace(step=1, samples=np.arange(8).reshape(4, 2))
        corpora = SimpleNamespace(describe=lambda samples: "a corpus")
        message = describe_nonfinite(error.value, data=data, config=settings, corpora=corpora, model=engine.model)
        assert f"parameters that are not finite: {gate_up} (experts 1, 6), {down} (expert 6)\n" in message


def test_many_experts_that_are_not_finite_are_counted():
    parameter = sharded_parameter(
        name="experts",
        global_shape=(20, 2, 3),
        component="experts",
        kind="matrix",
        initialize=normal(1.0),
        tp=TensorGroup(size=2, rank=1, group=None),
        shard_dim=0,
        is_stack=True,
    )
    experts = nonfinite._nonfinite_experts(parameter.spec, torch.full((10, 2, 3), torch.inf))
    assert experts == set(range(10, 20))
    assert nonfinite._with_experts("it", experts) == "it (experts 10, 11, 12, 13, 14, 15, 16, 17 and 2 more)"


@functools.cache
def reference(training: str) -> Any:
    """Results of `plain_training`; the section `training` as JSON, for the cache."""
    settings = case_settings(None, json.loads(training))
    distillation = settings.training.distillation
    return plain_training(settings, stock_logits(distillation.teacher) if distillation is not None else None)


def stock_logits(folder: Path) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Logits of transformers' own class in float64."""
    settings = {"dtype": torch.float64, "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, **settings)

    @torch.no_grad()
    def logits(input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids, position_ids=position_ids).logits

    return logits


@pytest.mark.parametrize("world_size", CASES)
def test_layouts(world_size, tmp_path):
    cases = CASES[world_size]
    if world_size == 2:
        teacher = save_stock_model("qwen3_moe", tmp_path / "teacher", vocab_size=SMALL["vocab_size"])
        distillation = {"teacher": str(teacher), "weight": 0.7, "temperature": 2.0}
        cases = [*cases, ("tp 2, a teacher with experts", layout(tensor=2), BATCH | {"distillation": distillation})]

    results = run_distributed(train_cases, world_size, cases, timeout=120 + 60 * len(cases))
    for index, (name, _, training) in enumerate(cases):
        curve_training = {key: value for key, value in training.items() if key not in NOT_OF_THE_CURVE}
        expected_curve, expected_validation, expected = reference(json.dumps(curve_training))
        tensors: dict[str, np.ndarray] = {}
        for result in results:
            curve, validation, rank_tensors = result[index]
            np.testing.assert_allclose(curve, expected_curve, rtol=1e-5, err_msg=name)
            np.testing.assert_allclose(validation, expected_validation, rtol=1e-5, err_msg=name)
            tensors |= rank_tensors

        assert tensors.keys() == expected.keys(), name
        for tensor, values in expected.items():
            tolerance = 0 if tensor.startswith("counts") else 1e-5
            np.testing.assert_allclose(tensors[tensor], values, rtol=0, atol=tolerance, err_msg=f"{name} {tensor}")
