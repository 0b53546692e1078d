"""The optimizers' rows: parameter groups, state, names in checkpoints; and that nothing else names what they own."""

from __future__ import annotations

import pytest
import torch
from support.engines import config
from support.optimizers import sgd

from megatron_mea import optimizers
from megatron_mea.model.decoder import Decoder, parameter_specs
from megatron_mea.optimizers import (
    ADAMW,
    OPTIMIZERS,
    build_optimizer,
    initial_state,
    is_optimizer_state,
    optimizer_of,
    parameter_groups,
    state_bytes,
    state_tensor_name,
)


@pytest.mark.parametrize("decay_hlc", [False, True])
def test_head_combinations_are_decayed_on_request(decay_hlc):
    settings = config(decay_hlc=decay_hlc)
    decayed, exempt = parameter_groups(Decoder(settings.model).parameters(), settings.optimizer)
    group, other = (decayed, exempt) if decay_hlc else (exempt, decayed)
    assert any(p.spec.component == "hlc" for p in group["params"])
    assert not any(p.spec.component == "hlc" for p in other["params"])
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("row", [ADAMW, sgd()], ids=lambda row: row.name)
def test_the_rows_say_what_torch_keeps(row, monkeypatch):
    """Names, types and shapes of the state are those after an update, and so are the bytes that `plan` counts."""
    monkeypatch.setattr(optimizers, "OPTIMIZERS", (row, ADAMW))
    settings = config()
    model = Decoder(settings.model)
    groups = parameter_groups(model.parameters(), settings.optimizer)
    optimizer = build_optimizer(groups, settings=settings.optimizer, device=torch.device("cpu"))
    for parameter in model.parameters():
        parameter.data.zero_()
        parameter.grad = torch.ones_like(parameter)

    optimizer.step()
    for parameter in model.parameters():
        assert optimizer_of(parameter.spec) is row
        state = optimizer.state[parameter]
        initial = initial_state(row, parameter, step_device=torch.device("cpu"))
        assert {name: tensor.dtype for name, tensor in state.items() if name != "step"} == dict(row.state)
        assert {name: (t.shape, t.dtype) for name, t in state.items()} == {
            name: (t.shape, t.dtype) for name, t in initial.items()
        }
        assert not any(tensor.any() for tensor in initial.values())

        held = [parameter, *(state[name] for name in row.state)]
        assert sum(tensor.nbytes for tensor in held) == state_bytes(parameter.spec) * parameter.numel()


def test_two_optimizers_of_a_model_are_refused(monkeypatch):
    """Before DeepSpeed has them, of which it would step one."""
    settings = config()
    groups = parameter_groups(Decoder(settings.model).parameters(), settings.optimizer)
    monkeypatch.setattr(optimizers, "OPTIMIZERS", (sgd(takes=lambda spec: spec.kind == "matrix"), ADAMW))
    with pytest.raises(ValueError, match=r"take every parameter, not (sgd, adamw|adamw, sgd)$"):
        build_optimizer(groups, settings=settings.optimizer, device=torch.device("cpu"))


def test_names_in_checkpoints_are_told_apart():
    names = parameter_specs(config().model)
    assert not any(map(is_optimizer_state, names))
    assert all(is_optimizer_state(state_tensor_name(state, name)) for state in OPTIMIZERS[0].state for name in names)
    assert state_tensor_name("exp_avg", "model.norm.weight") == "exp_avg.model.norm.weight"
