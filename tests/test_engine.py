"""DeepSpeed's engine as we drive it, on one and two processes, against a plain training loop in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from distributed import run_distributed
from models import SMALL

from megatron_mea.config import Config
from megatron_mea.config.load import parse_config
from megatron_mea.data.corpora import Batch

STEPS, BATCH, SEQ = 6, 8, 12


def config(precision: str = "fp32", **optimizer) -> Config:
    return parse_config(
        {
            "model": SMALL | {"attention_variant": "mea", "num_component_heads": 2, "initializer_range": 0.1},
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
    from megatron_mea.parallel.parameter import initialize, named_specs
    from megatron_mea.training.schedule import learning_rate

    model = Decoder(settings.model)
    initialize(model, settings.training.seed)
    model.double()
    named = named_specs(model)
    decayed = [p for n, p in named.items() if n.endswith(("proj.weight", "embed_tokens.weight", "lm_head.weight"))]
    exempt = [p for p in named.values() if not any(p is other for other in decayed)]
    assert sum("hlc" in name or "norm" in name for name in named) == len(exempt)
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
    from megatron_mea.parallel.parameter import initialize
    from megatron_mea.training.engine import Engine

    model = Decoder(settings.model)
    if initialized:
        initialize(model, settings.training.seed)
    world = torch.distributed.get_world_size()
    return Engine(settings, model, torch.device("cpu"), world)


def train(engine, settings: Config, first: int, last: int) -> list[tuple[float, float]]:
    from megatron_mea.training.schedule import learning_rate

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    results = []
    for step in range(first, last + 1):
        result = engine.train_step(micro_batches(step, rank, world), learning_rate(settings, step), False)
        results.append((result.loss, result.grad_norm))
    return results


def checks_on_this_rank() -> list[tuple[float, float]]:
    """Everything that needs a process group, in one launch; returns (loss, gradient norm) of each step."""
    from megatron_mea.training.engine import NonFiniteError, start_distributed, stop_distributed
    from megatron_mea.training.ranks import Ranks

    torch.set_num_threads(1)
    ranks = Ranks.from_environment()
    start_distributed(ranks)
    settings = config()
    engine = new_engine(settings)
    curve = train(engine, settings, 1, STEPS)

    # A state that goes into a fresh engine goes on bit for bit, in float32 and in bfloat16.
    for precision in ("fp32", "bf16"):
        settings = config(precision)
        engine = new_engine(settings)
        train(engine, settings, 1, 3)
        state = {name: tensor.clone() for name, tensor in engine.state()}
        assert all(tensor.dtype == torch.float32 for tensor in state.values())
        expected = train(engine, settings, 4, STEPS)
        fresh = new_engine(settings, initialized=False)
        fresh.load_state(state.__getitem__, updates=3)
        assert train(fresh, settings, 4, STEPS) == expected
        after = dict(fresh.state())
        assert all(torch.equal(tensor, after[name]) for name, tensor in engine.state())
        assert not all(torch.equal(tensor, after[name]) for name, tensor in state.items())

    # One rank that asks to stop is heard on all.
    result = fresh.train_step(
        micro_batches(9, ranks.rank, ranks.world_size), 1e-3, stop=ranks.rank == ranks.world_size - 1
    )
    assert result.stop

    # A loss and a gradient that are not finite stop the step before the update, on all ranks.
    settings = config()
    batches = micro_batches(1, ranks.rank, ranks.world_size)
    for kind in ("loss", "gradient"):
        engine = new_engine(settings)
        before = {name: tensor.clone() for name, tensor in engine.state()}
        if kind == "loss":
            hook = engine.model.layers[1].register_forward_hook(lambda m, i, o: o * math.inf)
        else:
            parameter = engine.model.layers[1].mlp.up_proj.weight
            hook = parameter.register_hook(lambda g: g * math.nan if ranks.rank == ranks.world_size - 1 else g)
        with pytest.raises(NonFiniteError, match="the loss is") as error:
            engine.train_step(batches, 1e-3, False)
        assert error.value.micro_batches == (list(range(len(batches))) if kind == "loss" else [])
        hook.remove()
        assert all(torch.equal(tensor, before[name]) for name, tensor in engine.state())
    stop_distributed()
    return curve


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
