"""The training engine: precision, stop requests, drift of replicas, non-finite losses, and reloading its state."""

from __future__ import annotations

import contextlib
import itertools
import math
from unittest import mock

import numpy as np
import pytest
import torch
from support.distributed import run_distributed
from support.engines import config, layout, new_engine, plain_training, set_state, state, train, train_step
from support.optimizers import sgd

from megatron_mea import optimizers
from megatron_mea.parallel.parameter import parameters_by_name

STEPS = 6


def checks_on_this_rank() -> list[tuple[float, float]]:
    """All checks in a single launch; returns (loss, gradient norm) of each step."""
    from megatron_mea.training.distributed import start_distributed, stop_distributed
    from megatron_mea.training.nonfinite import NonFiniteError
    from megatron_mea.training.rank_env import RankEnv

    torch.set_num_threads(1)
    rank_env = RankEnv.from_environment()
    start_distributed(rank_env)
    curve = train(engine=new_engine(config()), first=1, last=STEPS)

    # A state that is loaded into a new engine resumes bit for bit in bfloat16 too; its masters are float32.
    cases = itertools.product((1, 2, 3), {1, rank_env.world_size})
    for zero, context in cases:
        settings = config(parallel=layout(zero=zero, context=context), training={"precision": "bf16"})
        engine = new_engine(settings)
        bf16_curve = train(engine=engine, first=1, last=3)
        np.testing.assert_allclose(bf16_curve, curve[:3], rtol=0.03)
        saved = state(engine)
        assert all(tensor.dtype == torch.float32 for tensor in saved.values())
        expected = train(engine=engine, first=4, last=STEPS)

        reloaded = new_engine(settings, initialized=False)
        set_state(engine=reloaded, tensors=saved, step=3)
        assert train(engine=reloaded, first=4, last=STEPS) == expected
        after = state(reloaded)
        assert all(torch.equal(tensor, after[name]) for name, tensor in state(engine).items())
        assert not all(torch.equal(tensor, after[name]) for name, tensor in saved.items())

    check_drift()
    check_another_optimizer()
    if rank_env.world_size == 2:
        check_pipeline(curve)

    # A stop request of a single rank stops all.
    assert train_step(engine=reloaded, step=9, lr=1e-3, stop=rank_env.rank == rank_env.world_size - 1).should_stop

    # A loss and a gradient that are not finite stop the step before the update, on all ranks.
    for kind in ("loss", "gradient"):
        for zero, context in sorted({(1, 1), (3, 1), (1, rank_env.world_size)}):
            engine = new_engine(config(parallel=layout(zero=zero, context=context)))
            before = state(engine)
            if kind == "loss":
                hook = engine.model.blocks[0].register_forward_hook(lambda m, i, o: o * math.inf)
            else:
                last = rank_env.rank == rank_env.world_size - 1
                parameter = engine.model.blocks[0].mlp.up_proj.weight
                hook = parameter.register_hook(lambda g, last=last: g * math.nan if last else g)

            with pytest.raises(NonFiniteError, match="the loss is") as error:
                train_step(engine=engine, step=1, lr=1e-3)
            micro_batches = error.value.micro_batches
            if kind == "loss":
                assert list(micro_batches) == list(range(engine.grid.dims.num_micro_batches))
            elif zero == 1:
                name = "model.layers.0.mlp.up_proj.weight"
                assert micro_batches == (dict.fromkeys(range(engine.grid.dims.num_micro_batches), name) if last else {})
            hook.remove()
            assert all(torch.equal(tensor, before[name]) for name, tensor in state(engine).items())

    stop_distributed()
    return curve


def check_pipeline(curve: list[tuple[float, float]]) -> None:
    """The same checks on two pipeline stages, with tied embeddings."""
    from megatron_mea.training.nonfinite import NonFiniteError
    from megatron_mea.training.replicas import ReplicaError, check_replicas

    rank = torch.distributed.get_rank()
    tied = {"tie_word_embeddings": True}
    settings = config(parallel=layout(pipeline=2), model=tied, training={"precision": "bf16"})
    engine = new_engine(settings)
    bf16_curve = train(engine=engine, first=1, last=3)
    np.testing.assert_allclose(bf16_curve, plain_training(config(model=tied))[0][:3], rtol=0.03)
    saved = gather_state(engine)
    expected = train(engine=engine, first=4, last=STEPS)

    reloaded = new_engine(settings, initialized=False)
    set_state(engine=reloaded, tensors=saved, step=3)
    assert train(engine=reloaded, first=4, last=STEPS) == expected
    after = gather_state(reloaded)
    assert all(torch.equal(tensor, after[name]) for name, tensor in gather_state(engine).items())
    assert not all(torch.equal(tensor, after[name]) for name, tensor in saved.items())

    check_replicas(model=reloaded.model, grid=reloaded.grid, config=settings)
    name = "model.embed_tokens.weight"
    if rank == 1:
        parameters_by_name(reloaded.model)[name].data[5, 3] *= 1.5
    with pytest.raises(ReplicaError, match=name):
        check_replicas(model=reloaded.model, grid=reloaded.grid, config=settings)

    engine = new_engine(config(parallel=layout(tensor=2), model=tied, training={"precision": "bf16"}))
    np.testing.assert_allclose(
        train(engine=engine, first=1, last=3), plain_training(config(model=tied))[0][:3], rtol=0.03
    )

    for broken in ("model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight", None):
        engine = new_engine(config(parallel=layout(pipeline=2)))
        before = gather_state(engine)
        hooks = []
        if broken in parameters_by_name(engine.model):
            hooks.append(parameters_by_name(engine.model)[broken].register_hook(lambda g: g * math.nan))
        if broken is None and rank == 1:
            hooks.append(engine.model.norm.register_forward_hook(lambda m, i, o: o * math.inf))

        with pytest.raises(NonFiniteError, match="the loss is") as error:
            train_step(engine=engine, step=1, lr=1e-3)
        micro_batches = error.value.micro_batches
        assert list(micro_batches) == [0, 1, 2, 3]
        # With a bad loss all gradients are bad; the head's comes first in the backward pass.
        assert set(micro_batches.values()) == {broken or "lm_head.weight"}

        for hook in hooks:
            hook.remove()
        after = gather_state(engine)
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        # A failed step leaves nothing behind in the engine.
        np.testing.assert_allclose(train(engine=engine, first=1, last=2), curve[:2], rtol=1e-5)


def gather_state(engine) -> dict[str, torch.Tensor]:
    """The state of all stages, on all ranks; collective."""
    stages: list[dict[str, torch.Tensor]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(stages, state(engine))
    return {name: tensor for stage in stages for name, tensor in stage.items()}


def check_drift() -> None:
    """A bit of a parameter that differs on a rank is noticed by all, whether data or tensor ranks replicate it."""
    from megatron_mea.training.replicas import ReplicaError, check_replicas
    from megatron_mea.training.zero_state import stored_shard

    world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    replicated, sharded = "model.layers.1.self_attn.head_norm.weight", "model.layers.1.mlp.up_proj.weight"
    for size, zero in sorted({(1, 1), (1, 2), (world_size, 1), (world_size, 3)}):
        engine = new_engine(config(parallel=layout(tensor=size, zero=zero)))
        check_replicas(model=engine.model, grid=engine.grid, config=engine.config)
        for name in (replicated, sharded):
            parameter = parameters_by_name(engine.model)[name]
            if rank == world_size - 1:
                stored_shard(parameter).data.view(-1)[3] *= 1 + 2**-23
            has_replica = world_size > 1 and (name == replicated or size == 1)
            with pytest.raises(ReplicaError, match=name) if has_replica else contextlib.nullcontext():
                check_replicas(model=engine.model, grid=engine.grid, config=engine.config)
            # Equal again, for the next parameter.
            if rank == world_size - 1:
                stored_shard(parameter).data.view(-1)[3] *= 1 - 2**-24


def check_another_optimizer() -> None:
    """A row that takes every parameter is trained, and its own state saved and loaded."""
    for zero in (1, 3):
        with mock.patch.object(optimizers, "OPTIMIZERS", (sgd(), *optimizers.OPTIMIZERS)):
            settings = config(parallel=layout(zero=zero))
            engine = new_engine(settings)
            assert isinstance(engine.optimizer.optimizer, torch.optim.SGD)
            train(engine=engine, first=1, last=2)
            saved = state(engine)
            assert {name.split(".")[0] for name in saved} == {"model", "lm_head", "momentum_buffer"}
            expected = train(engine=engine, first=3, last=4)

            reloaded = new_engine(settings, initialized=False)
            set_state(engine=reloaded, tensors=saved, step=2)
            assert train(engine=reloaded, first=3, last=4) == expected


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_engine(world_size):
    curves = run_distributed(checks_on_this_rank, world_size)
    expected, _, _ = plain_training(config())
    for curve in curves:
        np.testing.assert_allclose(curve, expected, rtol=1e-5)
