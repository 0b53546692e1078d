"""DeepSpeed's engine as we drive it, on one and two processes, against a plain training loop in float64."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from distributed import run_distributed
from models import SMALL

from megatron_mea.config import Config
from megatron_mea.config.load import parse_config
from megatron_mea.data.corpora import Batch
from megatron_mea.parallel.parameter import named_specs

STEPS, BATCH, SEQ = 6, 8, 12


def config(precision: str = "fp32", parallel: dict | None = None, model: dict | None = None, **optimizer) -> Config:
    return parse_config(
        {
            "model": SMALL
            | {"attention_variant": "mea", "num_component_heads": 2, "initializer_range": 0.1}
            | (model or {}),
            "parallel": parallel or {},
            "data": {"tokenizer": "none", "train": [{"path": "none"}], "seq_length": SEQ},
            "optimizer": {"lr": 1e-3, "eps": 1e-6, "grad_clip": 0.5} | optimizer,
            "schedule": {"warmup_steps": 2},
            "training": {
                "steps": STEPS,
                "global_batch_size": BATCH,
                "micro_batch_size": 2,
                "precision": precision,
                "seed": 3,
            },
            "run": {"dir": "none"},
        }
    )


def global_batch(step: int) -> np.ndarray:
    return np.random.default_rng(step).integers(0, SMALL["vocab_size"], (BATCH, SEQ + 1))


def micro_batches(step: int, rank: int, world: int) -> list[Batch]:
    tokens = global_batch(step).reshape(-1, world, 2, SEQ + 1)[:, rank]
    positions = np.broadcast_to(np.arange(SEQ), (2, SEQ))
    return [Batch(micro[:, :-1], positions, micro[:, 1:]) for micro in tokens]


def plain_training(settings: Config) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step: whole batches, torch's AdamW and clipping, float64."""
    from megatron_mea.model.decoder import Decoder
    from megatron_mea.parallel.parameter import initialize
    from megatron_mea.training.schedule import learning_rate

    model = Decoder(settings.model)
    initialize(model, settings.training.seed)
    model.double()
    named = named_specs(model)
    decayed = [p for n, p in named.items() if n.endswith(("proj.weight", "embed_tokens.weight", "lm_head.weight"))]
    exempt = [p for p in named.values() if not any(p is other for other in decayed)]
    assert len(exempt) == sum("hlc" in name or "norm" in name or name.endswith("bias") for name in named)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": exempt, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=settings.optimizer.eps)
    results = []
    for step in range(1, STEPS + 1):
        tokens = torch.from_numpy(global_batch(step))
        loss = model(tokens[:, :-1], torch.arange(SEQ).expand(BATCH, SEQ), tokens[:, 1:]) / (BATCH * SEQ)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optimizer.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        optimizer.step()
        optimizer.zero_grad()
        results.append((loss.item(), norm.item()))
    return results


def new_engine(settings: Config, initialized: bool = True):
    from megatron_mea.model.decoder import Decoder
    from megatron_mea.model.stages import pipeline_stages
    from megatron_mea.parallel.parameter import initialize
    from megatron_mea.training.engine import Engine
    from megatron_mea.training.pipeline import PipelineEngine
    from megatron_mea.training.processes import build_grid

    grid = build_grid(settings)
    stage = pipeline_stages(settings.model, grid.pipeline_size)[grid.pipeline_rank]
    checkpointing = settings.training.activation_checkpointing == "full"
    model = Decoder(settings.model, checkpointing, grid.tensor, stage)
    if initialized:
        initialize(model, settings.training.seed)
    make = PipelineEngine if grid.pipeline_size > 1 else Engine
    return make(settings, model, torch.device("cpu"), grid)


def train(engine, settings: Config, first: int, last: int) -> list[tuple[float, float]]:
    from megatron_mea.training.schedule import learning_rate

    results = []
    for step in range(first, last + 1):
        result = engine.train_step(batches_of(engine, step), learning_rate(settings, step), False)
        results.append((result.loss, result.grad_norm))
    return results


def batches_of(engine, step: int) -> list[Batch]:
    return micro_batches(step, engine.grid.data_rank, engine.grid.data_size)


def check_layouts(layouts: list[dict], model: dict) -> list[list[tuple[float, float]]]:
    """Trains under every layout; each also goes on from the state of the one before it, and from its own."""
    from megatron_mea.training.processes import start_distributed, stop_distributed
    from megatron_mea.training.ranks import Ranks

    torch.set_num_threads(1)
    start_distributed(Ranks.from_environment())
    curves, state = [], {}
    for layout in layouts:
        settings = config(parallel=layout, model=model)
        if state:
            moved = new_engine(settings, initialized=False)
            moved.load_state(state.__getitem__, updates=3)
            assert all(torch.equal(tensor, state[name]) for name, tensor in moved.state()), layout
            np.testing.assert_allclose(train(moved, settings, 4, STEPS), curves[-1][3:], rtol=1e-5, err_msg=str(layout))
        engine = new_engine(settings)
        curve = train(engine, settings, 1, 3)
        state = {name: tensor.clone() for name, tensor in engine.state()}
        curve += train(engine, settings, 4, STEPS)
        again = new_engine(settings, initialized=False)
        again.load_state(state.__getitem__, updates=3)
        assert train(again, settings, 4, STEPS) == curve[3:], layout
        curves.append(curve)
    stop_distributed()
    return curves


def layout(tensor: int = 1, zero: int = 1, sequence: bool = False, pipeline: int = 1) -> dict:
    return {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "zero_stage": zero,
        "sequence_parallel": sequence,
    }


THREE = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 42}
LAYOUTS = {
    "two ranks": (2, [layout(zero=0), layout(zero=2), layout(zero=3), layout(2), layout(2, 3, True)], {}),
    "tied": (2, [layout(2), layout(zero=3), layout(2, 2, True)], {"tie_word_embeddings": True, "qk_norm": True}),
    "three": (3, [layout(3), layout(3, sequence=True)], THREE),
    "four ranks": (
        4,
        [layout(2, 1), layout(2, 2), layout(2, 3, True), layout(4, 1, True), layout(zero=3)],
        {"attention_bias": True},
    ),
    "more ranks than composite heads": (4, [layout(4), layout(2, 3)], {"num_key_value_heads": 2}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    """Losses and gradient norms of every layout equal those of one process in float64."""
    world, layouts, model = LAYOUTS[name]
    expected = plain_training(config(model=model))
    for curves in run_distributed(check_layouts, world, layouts, model):
        for found, which in zip(curves, layouts, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=str(which))


def checks_on_this_rank() -> list[tuple[float, float]]:
    """Precision, stopping and what is not finite, in one launch; returns (loss, gradient norm) of each step."""
    from megatron_mea.training.engine import NonFiniteError
    from megatron_mea.training.processes import start_distributed, stop_distributed
    from megatron_mea.training.ranks import Ranks

    torch.set_num_threads(1)
    ranks = Ranks.from_environment()
    start_distributed(ranks)
    curve = train(new_engine(config()), config(), 1, STEPS)

    # A state that goes into a fresh engine goes on bit for bit in bfloat16 too; its masters are float32.
    for zero in (1, 2, 3):
        settings = config("bf16", layout(zero=zero))
        engine = new_engine(settings)
        rounded = train(engine, settings, 1, 3)
        np.testing.assert_allclose(rounded, curve[:3], rtol=0.03)
        state = {name: tensor.clone() for name, tensor in engine.state()}
        assert all(tensor.dtype == torch.float32 for tensor in state.values())
        expected = train(engine, settings, 4, STEPS)
        fresh = new_engine(settings, initialized=False)
        fresh.load_state(state.__getitem__, updates=3)
        assert train(fresh, settings, 4, STEPS) == expected
        after = dict(fresh.state())
        assert all(torch.equal(tensor, after[name]) for name, tensor in engine.state())
        assert not all(torch.equal(tensor, after[name]) for name, tensor in state.items())

    check_drift()

    # One rank that asks to stop is heard on all.
    assert fresh.train_step(batches_of(fresh, 9), 1e-3, stop=ranks.rank == ranks.world_size - 1).stop

    # A loss and a gradient that are not finite stop the step before the update, on all ranks.
    for kind in ("loss", "gradient"):
        for zero in (1, 3):
            engine = new_engine(config(parallel=layout(zero=zero)))
            batches = batches_of(engine, 1)
            before = {name: tensor.clone() for name, tensor in engine.state()}
            if kind == "loss":
                hook = engine.model.layers[1].register_forward_hook(lambda m, i, o: o * math.inf)
            else:
                last = ranks.rank == ranks.world_size - 1
                parameter = engine.model.layers[1].mlp.up_proj.weight
                hook = parameter.register_hook(lambda g, last=last: g * math.nan if last else g)
            with pytest.raises(NonFiniteError, match="the loss is") as error:
                engine.train_step(batches, 1e-3, False)
            found = error.value.micro_batches
            if kind == "loss":
                assert list(found) == list(range(len(batches)))
            elif zero == 1:
                name = "model.layers.0.mlp.up_proj.weight"
                assert found == (dict.fromkeys(range(len(batches)), name) if last else {})
            hook.remove()
            assert all(torch.equal(tensor, before[name]) for name, tensor in engine.state())
    stop_distributed()
    return curve


def check_drift() -> None:
    """One bit of one parameter on one rank is noticed by all, whatever holds it: data or tensor ranks."""
    from megatron_mea.training.replicas import ReplicaError, check_replicas

    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    norm, cut = "model.layers.1.self_attn.head_norm.weight", "model.layers.1.mlp.up_proj.weight"
    for size, zero in sorted({(1, 1), (1, 2), (world, 1), (world, 3)}):
        engine = new_engine(config(parallel=layout(size, zero)))
        check_replicas(engine.model, engine.grid, engine.config)
        for name in (norm, cut):
            parameter = named_specs(engine.model)[name]
            if rank == world - 1:
                getattr(parameter, "ds_tensor", parameter).data.view(-1)[3] *= 1 + 2**-23
            shared = world > 1 and (name == norm or size == 1)
            with pytest.raises(ReplicaError, match=name) if shared else contextlib.nullcontext():
                check_replicas(engine.model, engine.grid, engine.config)
            # Alike again, for the next one.
            if rank == world - 1:
                getattr(parameter, "ds_tensor", parameter).data.view(-1)[3] *= 1 - 2**-24


@pytest.mark.parametrize("world_size", [1, 2])
def test_engine(world_size):
    curves = run_distributed(checks_on_this_rank, world_size)
    expected = plain_training(config())
    for curve in curves:
        np.testing.assert_allclose(curve, expected, rtol=1e-5)


def test_head_combinations_are_decayed_on_request():
    from megatron_mea.model.decoder import Decoder
    from megatron_mea.training.engine import _parameter_groups

    for decay_hlc in (False, True):
        settings = config(decay_hlc=decay_hlc)
        decayed, exempt = _parameter_groups(settings, Decoder(settings.model))
        group = decayed if decay_hlc else exempt
        assert any(p.spec.kind == "hlc" for p in group["params"])
        other = exempt if decay_hlc else decayed
        assert not any(p.spec.kind == "hlc" for p in other["params"])
        assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
