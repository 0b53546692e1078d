"""Process groups and coordinates of a rank: tensor, context, data and pipeline parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_mea.config.parallel_dims import ParallelDims


@dataclass(frozen=True, kw_only=True)
class TensorGroup:
    """The ranks over which the layers' matrices are sharded (tensor parallelism); size 1 is a group of one.

    Args:
        size, rank: number of ranks, and this rank's index among them.
        group: torch process group; None where size is 1.
        sequence_parallel: outside of tensor-parallel regions, activations are sharded along the sequence instead of
            replicated.
    """

    size: int = 1
    rank: int = 0
    group: Any = None
    sequence_parallel: bool = False

    def local_range(self, total: int, rank: int | None = None) -> slice:
        """Rows of `total` that a rank (default: this one) works on, split like torch.chunk: the last may get fewer."""
        rank = self.rank if rank is None else rank
        shard_size = -(-total // self.size)
        return slice(min(rank * shard_size, total), min((rank + 1) * shard_size, total))


NO_TP = TensorGroup()


@dataclass(frozen=True, kw_only=True)
class ContextGroup:
    """The ranks over which the tokens of a sequence are sharded (context parallelism); size 1 is a group of one.

    Of 2 x size chunks rank i holds i and 2 x size - 1 - i, since later tokens see more keys: so causal attention costs
    every rank the same (zigzag, as in Megatron-LM).

    Args:
        size, rank: number of ranks, and this rank's index among them.
        group: torch process group; None where size is 1.
    """

    size: int = 1
    rank: int = 0
    group: Any = None

    def chunks(self, seq: int) -> list[slice]:
        """This rank's tokens of a sequence of `seq`, which 2 x size must divide, in order."""
        if self.size == 1:
            return [slice(0, seq)]

        length = seq // (2 * self.size)
        return [slice(index * length, (index + 1) * length) for index in (self.rank, 2 * self.size - 1 - self.rank)]

    def shard(self, x: torch.Tensor, *, dim: int) -> torch.Tensor:
        """This rank's tokens of a tensor whose dimension `dim` is the sequence."""
        if self.size == 1:
            return x

        return torch.cat([x.narrow(dim, part.start, part.stop - part.start) for part in self.chunks(x.shape[dim])], dim)


NO_CP = ContextGroup()


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Coordinates of this rank: rank = ((pipeline_rank * dims.dp + data_rank) * dims.cp + cp.rank) * dims.tp + tp.rank.

    Args:
        tp, cp: the tensor group and the context group of this rank.
        dims: the sizes of all groups.
        data_rank: index of this rank's part of a batch.
        pipeline_rank: index of this rank's pipeline stage.
        embedding_group: process group of the first and the last stage of this pipeline; None on other stages, or
            where there is one stage.
        mpu: the same as an object of the interface that DeepSpeed calls; its data axis is data x context ranks, all
            of which hold the same parameters.
    """

    tp: TensorGroup
    cp: ContextGroup
    dims: ParallelDims
    data_rank: int
    pipeline_rank: int
    embedding_group: Any
    mpu: Any

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the language-model head."""
        return self.pipeline_rank == self.dims.pp - 1

    @property
    def stage_size(self) -> int:
        """Number of ranks that hold this pipeline stage."""
        return self.dims.dp_cp * self.dims.tp

    @property
    def stage_rank(self) -> int:
        """Index of this rank among those of its pipeline stage."""
        return (self.data_rank * self.dims.cp + self.cp.rank) * self.dims.tp + self.tp.rank
