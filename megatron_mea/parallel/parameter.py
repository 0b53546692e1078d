"""Where parameters are declared: one name, one shape, one cut and one initialisation each, read by everybody."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from megatron_mea.parallel.collectives import all_gather
from megatron_mea.parallel.grid import ALONE, TensorGroup

_DRAWING = 8
"""Threads that initialise parameters, each of which holds a whole one."""
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
        tp: the tensor group of this rank.
        shard_dim: the dimension that is cut over the tensor group; None where every rank holds the whole.
    """

    name: str
    shape: tuple[int, ...]
    kind: Literal["matrix", "vector", "hlc"]
    initialize: Initializer
    tp: TensorGroup = ALONE
    shard_dim: int | None = None

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of this rank's part, padding included."""
        if self.shard_dim is None:
            return self.shape
        cut = [-(-size // self.tp.size) if dim == self.shard_dim else size for dim, size in enumerate(self.shape)]
        return tuple(cut)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where this rank's part begins in the global tensor."""
        cut = enumerate(self.local_shape)
        return tuple(self.tp.rank * size if dim == self.shard_dim else 0 for dim, size in cut)

    def local(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of the global tensor; equal on all ranks in size, so the last ones may end in zeros."""
        if self.shard_dim is None or self.tp.size == 1:
            return whole
        total = self.shape[self.shard_dim]
        part, size = self.tp.span(total), -(-total // self.tp.size)
        held = whole.narrow(self.shard_dim, part.start, part.stop - part.start)
        missing = list(held.shape)
        missing[self.shard_dim] = size - (part.stop - part.start)
        return torch.cat([held, held.new_zeros(missing)], self.shard_dim) if missing[self.shard_dim] else held

    def whole(self, local: torch.Tensor) -> torch.Tensor:
        """The global tensor from the parts of all ranks; collective over the tensor group."""
        if self.shard_dim is None or self.tp.size == 1:
            return local
        return all_gather(local, self.shard_dim, self.tp).narrow(self.shard_dim, 0, self.shape[self.shard_dim])


def declare(
    name: str,
    shape: tuple[int, ...],
    kind: str,
    initialize: Initializer,
    tp: TensorGroup = ALONE,
    shard_dim: int | None = None,
) -> nn.Parameter:
    """This rank's part of a parameter, uninitialised float32, with its specification attached."""
    spec = ParameterSpec(name, shape, kind, initialize, tp, shard_dim)
    parameter = nn.Parameter(torch.empty(spec.local_shape))
    parameter.spec = spec
    # What DeepSpeed looks for, so that its gradient norm counts parts on every rank and wholes once.
    parameter.tensor_model_parallel = shard_dim is not None
    return parameter


def named_specs(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `module` by exported name, in order of declaration."""
    return {parameter.spec.name: parameter for parameter in module.parameters()}


def initialize(module: nn.Module, seed: int) -> None:
    """Fills every parameter from a generator seeded by (seed, its name), so that no layout changes it."""

    def fill(parameter: nn.Parameter) -> None:
        spec = parameter.spec
        digest = hashlib.sha256(f"{seed}/{spec.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        parameter.data.copy_(spec.local(spec.initialize(spec.shape, generator)))

    # A generator is drawn from by one thread.
    with ThreadPoolExecutor(min(_DRAWING, torch.get_num_threads())) as pool:
        list(pool.map(fill, named_specs(module).values()))


def normal(std: float) -> Initializer:
    return lambda shape, generator: torch.randn(shape, generator=generator) * std


def constant(value: float) -> Initializer:
    return lambda shape, generator: torch.full(shape, value)
