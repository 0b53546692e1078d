"""Process groups and coordinates of a rank: tensor, data and pipeline parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
class Grid:
    """Coordinates of this rank: rank = (pipeline_rank * dims.dp + data_rank) * dims.tp + tp.rank.

    Args:
        tp: the tensor group of this rank.
        dims: the sizes of all groups.
        data_rank: index of this rank's part of a batch.
        pipeline_rank: index of this rank's pipeline stage.
        embedding_group: process group of the first and the last stage of this pipeline; None on other stages, or
            where there is one stage.
        mpu: the same as an object of the interface that DeepSpeed calls.
    """

    tp: TensorGroup
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
        return self.dims.dp * self.dims.tp

    @property
    def stage_rank(self) -> int:
        """Index of this rank among those of its pipeline stage."""
        return self.data_rank * self.dims.tp + self.tp.rank
