"""The optimizers, a row each: which parameters one trains, the state that it keeps of them, and how torch builds it.

Engine, checkpoints, disk checks and `plan` read these rows. There is one, which takes every parameter. One that takes
all of them in its place is a row before it; several at once in a model are refused (docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_mea.config import schema
from megatron_mea.parallel.parameter import ParameterSpec

MASTER_BYTES = torch.float32.itemsize
"""Bytes of an element's master weight, which the optimizer updates."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """An optimizer: what it trains, and what it keeps.

    Args:
        name: of the row.
        state: its tensors in the shape of a parameter, by the names that torch gives them, with their types.
        takes: whether it trains a parameter.
        counts_steps: whether torch also keeps the number of updates, as `step`.
        build: parameter groups, the section `optimizer` and the device -> torch's optimizer.
    """

    name: str
    state: Mapping[str, torch.dtype]
    counts_steps: bool
    takes: Callable[[ParameterSpec], bool]
    build: Callable[[list[dict[str, Any]], schema.Optimizer, torch.device], torch.optim.Optimizer]


def _build_adamw(
    groups: list[dict[str, Any]], settings: schema.Optimizer, device: torch.device
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        groups, lr=settings.lr, betas=tuple(settings.betas), eps=settings.eps, fused=device.type == "cuda"
    )


ADAMW = OptimizerSpec(
    name="adamw",
    state={"exp_avg": torch.float32, "exp_avg_sq": torch.float32},
    counts_steps=True,
    takes=lambda spec: True,
    build=_build_adamw,
)
OPTIMIZERS = (ADAMW,)
"""A parameter is trained by the first one that takes it."""


def optimizer_of(spec: ParameterSpec) -> OptimizerSpec:
    """The optimizer that trains a parameter."""
    return next(optimizer for optimizer in OPTIMIZERS if optimizer.takes(spec))


def state_bytes(spec: ParameterSpec) -> int:
    """Bytes of the master weight and the optimizer state of an element of a parameter: its part of a checkpoint."""
    return MASTER_BYTES + sum(dtype.itemsize for dtype in optimizer_of(spec).state.values())


def state_tensor_name(state: str, parameter: str) -> str:
    """The name in a checkpoint of a parameter's optimizer state, such as `exp_avg.model.norm.weight`."""
    return f"{state}.{parameter}"


def is_optimizer_state(name: str) -> bool:
    """Whether a tensor of a checkpoint is optimizer state, and not a weight."""
    return any(name.startswith(f"{state}.") for optimizer in OPTIMIZERS for state in optimizer.state)


def single_optimizer(parameters: Iterable[nn.Parameter]) -> OptimizerSpec:
    """The optimizer that trains all of these parameters.

    Raises:
        ValueError: several do, and DeepSpeed steps a single one.
    """
    optimizers = {row.name: row for row in (optimizer_of(parameter.spec) for parameter in parameters)}
    if len(optimizers) != 1:
        raise ValueError(f"one optimizer has to take every parameter, not {', '.join(optimizers) or 'none'}")

    return next(iter(optimizers.values()))


def parameter_groups(parameters: Iterable[nn.Parameter], settings: schema.Optimizer) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay, norms and biases do not, head combinations as `decay_hlc` says."""
    decayed, exempt = [], []
    for parameter in parameters:
        spec = parameter.spec
        decays = spec.kind == "matrix" and (spec.component != "hlc" or settings.decay_hlc)
        (decayed if decays else exempt).append(parameter)

    return [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]


def build_optimizer(
    groups: list[dict[str, Any]], *, settings: schema.Optimizer, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer of these parameter groups.

    Raises:
        ValueError: as `single_optimizer`.
    """
    optimizer = single_optimizer(parameter for group in groups for parameter in group["params"])
    return optimizer.build(groups, settings, device)


def initial_state(
    optimizer: OptimizerSpec, values: torch.Tensor, *, step_device: torch.device
) -> dict[str, torch.Tensor]:
    """The state of a parameter group, whose master weights lie in one flat tensor, before its first update."""
    step = {"step": torch.zeros((), device=step_device)} if optimizer.counts_steps else {}
    return step | {name: torch.zeros_like(values, dtype=dtype) for name, dtype in optimizer.state.items()}
