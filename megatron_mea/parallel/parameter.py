"""Declaration of parameters: name, global shape, sharding and initialisation, attached to each as `parameter.spec`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from megatron_mea.parallel.collectives import all_gather
from megatron_mea.parallel.grid import NO_TP, TensorGroup

_INIT_THREADS = 8
"""Threads that initialise parameters, each of which holds a full tensor."""

Component = Literal["embedding", "attention", "hlc", "mlp", "router", "experts", "norm", "lm_head"]
"""The part of the model that a parameter belongs to; `hlc` are all matrices that combine heads, `mlp` is dense."""
Initializer = Callable[[tuple[int, ...], torch.Generator], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class ParameterSpec:
    """Name, shape, sharding and initialisation of a parameter; attached to it as `parameter.spec`.

    Args:
        name: the exported Hugging Face name, the only name that the parameter has anywhere.
        global_shape: shape of the full tensor.
        component: the part of the model that it belongs to.
        kind: decides on weight decay: matrices are decayed, vectors (norms, biases) are not; matrices of the component
            `hlc` only with `optimizer.decay_hlc`.
        initialize: returns the full tensor in float32, drawn from a generator that is seeded by the name; of a stack
            one of its matrices, each from a generator of its own.
        tp: the tensor group of this rank.
        shard_dim: the dimension that is sharded over the tensor group; None where every rank holds the full tensor.
        is_stack: whether the first dimension counts matrices, such as those of experts. A rank draws its own alone.
    """

    name: str
    global_shape: tuple[int, ...]
    component: Component
    kind: Literal["matrix", "vector"]
    initialize: Initializer
    tp: TensorGroup = NO_TP
    shard_dim: int | None = None
    is_stack: bool = False

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's shard, padding included."""
        if self.shard_dim is None:
            return self.global_shape

        return tuple(
            -(-size // self.tp.size) if dim == self.shard_dim else size for dim, size in enumerate(self.global_shape)
        )

    @property
    def global_offset(self) -> tuple[int, ...]:
        """Index of this rank's first element in the full tensor."""
        return tuple(self.tp.rank * size if dim == self.shard_dim else 0 for dim, size in enumerate(self.local_shape))

    def local_shard(self, full: torch.Tensor) -> torch.Tensor:
        """This rank's shard of the full tensor; as large as on any other rank, so the last ones may end in zeros."""
        if self.shard_dim is None or self.tp.size == 1:
            return full

        total = self.global_shape[self.shard_dim]
        rows, padded_size = self.tp.local_range(total), -(-total // self.tp.size)
        shard = full.narrow(self.shard_dim, rows.start, rows.stop - rows.start)

        padding = list(shard.shape)
        padding[self.shard_dim] = padded_size - (rows.stop - rows.start)
        return torch.cat([shard, shard.new_zeros(padding)], self.shard_dim) if padding[self.shard_dim] else shard

    def full_tensor(self, shard: torch.Tensor) -> torch.Tensor:
        """The full tensor, gathered from the shards of all ranks; collective over the tensor group."""
        if self.shard_dim is None or self.tp.size == 1:
            return shard

        return all_gather(shard, dim=self.shard_dim, tp=self.tp).narrow(
            self.shard_dim, 0, self.global_shape[self.shard_dim]
        )


def sharded_parameter(
    *,
    name: str,
    global_shape: tuple[int, ...],
    component: Component,
    kind: Literal["matrix", "vector"],
    initialize: Initializer,
    tp: TensorGroup = NO_TP,
    shard_dim: int | None = None,
    is_stack: bool = False,
) -> nn.Parameter:
    """Returns this rank's shard of a parameter, uninitialised float32, with its `spec` attached."""
    spec = ParameterSpec(
        name=name,
        global_shape=global_shape,
        component=component,
        kind=kind,
        initialize=initialize,
        tp=tp,
        shard_dim=shard_dim,
        is_stack=is_stack,
    )
    parameter = nn.Parameter(torch.empty(spec.local_shape))
    parameter.spec = spec
    # DeepSpeed's gradient norm looks for it: it counts shards on every rank, and replicated parameters once.
    parameter.tensor_model_parallel = shard_dim is not None
    return parameter


def parameters_by_name(module: nn.Module) -> dict[str, nn.Parameter]:
    """Maps exported names to the parameters of `module`, in order of declaration."""
    return {parameter.spec.name: parameter for parameter in module.parameters()}


def init_parameters(module: nn.Module, seed: int) -> None:
    """Fills every parameter from generators seeded by (seed, name), so that values do not depend on the layout.

    The matrices of a stack are each seeded by their index too.
    """

    def fill(parameter: nn.Parameter) -> None:
        spec = parameter.spec
        if not spec.is_stack:
            parameter.data.copy_(spec.local_shard(spec.initialize(spec.global_shape, _generator(seed, spec.name))))
            return

        for index, matrix in enumerate(parameter.data, start=spec.global_offset[0]):
            matrix.copy_(spec.initialize(spec.global_shape[1:], _generator(seed, f"{spec.name}/{index}")))

    # Threads share no generator, so their order changes no value.
    with ThreadPoolExecutor(min(_INIT_THREADS, torch.get_num_threads())) as pool:
        list(pool.map(fill, parameters_by_name(module).values()))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def normal(std: float) -> Initializer:
    """Independent normal elements with this standard deviation."""
    return lambda shape, generator: torch.randn(shape, generator=generator) * std


def constant(value: float) -> Initializer:
    """Elements that all have this value."""
    return lambda shape, generator: torch.full(shape, value)
