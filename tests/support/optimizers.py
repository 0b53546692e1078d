"""A second optimizer, as somebody may add it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_mea.optimizers import OptimizerSpec
from megatron_mea.parallel.parameter import ParameterSpec


def sgd(takes: Callable[[ParameterSpec], bool] = lambda spec: True) -> OptimizerSpec:
    """SGD with momentum, of one state and no count of updates."""
    return OptimizerSpec(
        name="sgd",
        state={"momentum_buffer": torch.float32},
        counts_steps=False,
        takes=takes,
        build=lambda groups, settings, device: torch.optim.SGD(groups, lr=settings.lr, momentum=0.9),
    )
