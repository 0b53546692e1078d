"""Where parameters are declared: one name, one global shape and one initialisation each, read by everybody."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

Initializer = Callable[[tuple[int, ...], torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class ParameterSpec:
    """What the rest of the program knows of a parameter; attached to it as `parameter.spec`.

    Args:
        name: the exported Hugging Face name, the only name that the parameter has anywhere.
        shape: the global shape.
        kind: decides on weight decay: matrices are decayed, vectors (norms, biases) and head combinations
            are not, the latter unless `optimizer.decay_hlc`.
        initialize: makes the global tensor in float32 from a generator that is seeded by the name.
    """

    name: str
    shape: tuple[int, ...]
    kind: Literal["matrix", "vector", "hlc"]
    initialize: Initializer


def declare(name: str, shape: tuple[int, ...], kind: str, initialize: Initializer) -> nn.Parameter:
    """An uninitialised float32 parameter with its specification attached."""
    parameter = nn.Parameter(torch.empty(shape))
    parameter.spec = ParameterSpec(name, shape, kind, initialize)
    return parameter


def named_specs(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `module` by exported name, in order of declaration."""
    return {parameter.spec.name: parameter for parameter in module.parameters()}


@torch.no_grad()
def initialize(module: nn.Module, seed: int) -> None:
    """Fills every parameter from a generator seeded by (seed, its name), so that no layout changes it."""
    for name, parameter in named_specs(module).items():
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        parameter.copy_(parameter.spec.initialize(parameter.spec.shape, generator))


def normal(std: float) -> Initializer:
    return lambda shape, generator: torch.randn(shape, generator=generator) * std


def constant(value: float) -> Initializer:
    return lambda shape, generator: torch.full(shape, value)
