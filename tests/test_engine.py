"""DeepSpeed's engine as we drive it: precision, stopping, drift, what is not finite, and the state that goes on."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from distributed import run_distributed
from engines import config, layout, new_engine, plain_training, set_state, state, train, train_step

from megatron_mea.parallel.parameter import named_specs

STEPS = 6


def checks_on_this_rank() -> list[tuple[float, float]]:
    """Precision, stopping and what is not finite, in one launch; returns (loss, gradient norm) of each step."""
    from megatron_mea.training.engine import NonFiniteError
    from megatron_mea.training.processes import start_distributed, stop_distributed
    from megatron_mea.training.ranks import Ranks

    torch.set_num_threads(1)
    ranks = Ranks.from_environment()
    start_distributed(ranks)
    curve = train(new_engine(config()), 1, STEPS)

    # A state that goes into a fresh engine goes on bit for bit in bfloat16 too; its masters are float32.
    for zero in (1, 2, 3):
        settings = config(layout(zero=zero), training={"precision": "bf16"})
        engine = new_engine(settings)
        rounded = train(engine, 1, 3)
        np.testing.assert_allclose(rounded, curve[:3], rtol=0.03)
        saved = state(engine)
        assert all(tensor.dtype == torch.float32 for tensor in saved.values())
        expected = train(engine, 4, STEPS)
        fresh = new_engine(settings, initialized=False)
        set_state(fresh, saved, updates=3)
        assert train(fresh, 4, STEPS) == expected
        after = state(fresh)
        assert all(torch.equal(tensor, after[name]) for name, tensor in state(engine).items())
        assert not all(torch.equal(tensor, after[name]) for name, tensor in saved.items())

    check_drift()
    if ranks.world_size == 2:
        check_pipeline(curve)

    # One rank that asks to stop is heard on all.
    assert train_step(fresh, 9, 1e-3, ranks.rank == ranks.world_size - 1).stop

    # A loss and a gradient that are not finite stop the step before the update, on all ranks.
    for kind in ("loss", "gradient"):
        for zero in (1, 3):
            engine = new_engine(config(parallel=layout(zero=zero)))
            before = state(engine)
            if kind == "loss":
                hook = engine.model.layers[1].register_forward_hook(lambda m, i, o: o * math.inf)
            else:
                last = ranks.rank == ranks.world_size - 1
                parameter = engine.model.layers[1].mlp.up_proj.weight
                hook = parameter.register_hook(lambda g, last=last: g * math.nan if last else g)
            with pytest.raises(NonFiniteError, match="the loss is") as error:
                train_step(engine, 1, 1e-3)
            found = error.value.micro_batches
            if kind == "loss":
                assert list(found) == list(range(engine.accumulation))
            elif zero == 1:
                name = "model.layers.0.mlp.up_proj.weight"
                assert found == (dict.fromkeys(range(engine.accumulation), name) if last else {})
            hook.remove()
            assert all(torch.equal(tensor, before[name]) for name, tensor in state(engine).items())
    stop_distributed()
    return curve


def check_pipeline(curve: list[tuple[float, float]]) -> None:
    """The same for two stages: the state in bfloat16, tied embeddings, what is not finite on one stage."""
    from megatron_mea.training.engine import NonFiniteError
    from megatron_mea.training.replicas import ReplicaError, check_replicas

    rank = torch.distributed.get_rank()
    tied = {"tie_word_embeddings": True}
    settings = config(layout(pipeline=2), tied, training={"precision": "bf16"})
    engine = new_engine(settings)
    rounded = train(engine, 1, 3)
    np.testing.assert_allclose(rounded, plain_training(config(model=tied))[0][:3], rtol=0.03)
    saved = whole_state(engine)
    expected = train(engine, 4, STEPS)
    fresh = new_engine(settings, initialized=False)
    set_state(fresh, saved, updates=3)
    assert train(fresh, 4, STEPS) == expected
    after = whole_state(fresh)
    assert all(torch.equal(tensor, after[name]) for name, tensor in whole_state(engine).items())
    assert not all(torch.equal(tensor, after[name]) for name, tensor in saved.items())

    check_replicas(fresh.model, fresh.grid, settings)
    name = "model.embed_tokens.weight"
    if rank == 1:
        named_specs(fresh.model)[name].data[5, 3] *= 1.5
    with pytest.raises(ReplicaError, match=name):
        check_replicas(fresh.model, fresh.grid, settings)

    engine = new_engine(config(layout(2), tied, training={"precision": "bf16"}))
    np.testing.assert_allclose(train(engine, 1, 3), plain_training(config(model=tied))[0][:3], rtol=0.03)

    for wrong in ("model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight", None):
        engine = new_engine(config(layout(pipeline=2)))
        before = whole_state(engine)
        hooks = []
        if wrong in named_specs(engine.model):
            hooks.append(named_specs(engine.model)[wrong].register_hook(lambda g: g * math.nan))
        if wrong is None and rank == 1:
            hooks.append(engine.model.layers[-1].register_forward_hook(lambda m, i, o: o * math.inf))
        with pytest.raises(NonFiniteError, match="the loss is") as error:
            train_step(engine, 1, 1e-3)
        found = error.value.micro_batches
        assert list(found) == [0, 1, 2, 3]
        # All gradients are bad where the loss is; the head's comes first in the backward pass.
        assert set(found.values()) == {wrong or "lm_head.weight"}
        for hook in hooks:
            hook.remove()
        after = whole_state(engine)
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        # What was wrong once does no harm afterwards.
        np.testing.assert_allclose(train(engine, 1, 2), curve[:2], rtol=1e-5)


def whole_state(engine) -> dict[str, torch.Tensor]:
    """The state of all stages, on all ranks."""
    stages: list[dict[str, torch.Tensor]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(stages, state(engine))
    return {name: tensor for stage in stages for name, tensor in stage.items()}


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
    expected, _, _ = plain_training(config())
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
