"""Which ranks do what: the only place that knows a process group's members."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TensorGroup:
    """The ranks that share the layers' matrices between them (tensor parallelism); size 1 is a group of one.

    Args:
        size, rank: number of ranks, and which of them this is.
        group: torch process group; None where size is 1.
        sequence_parallel: between the matrices, activations are cut along the sequence instead of repeated.
    """

    size: int = 1
    rank: int = 0
    group: Any = None
    sequence_parallel: bool = False

    def span(self, total: int, rank: int | None = None) -> slice:
        """The part of `total` rows that a rank works on: equal parts, the last ones shorter, as torch.chunk cuts."""
        rank = self.rank if rank is None else rank
        part = -(-total // self.size)
        return slice(min(rank * part, total), min((rank + 1) * part, total))


ALONE = TensorGroup()


@dataclass(frozen=True)
class Grid:
    """Where this rank stands: rank = (pipeline_rank * data_size + data_rank) * tensor.size + tensor.rank.

    Args:
        tensor: the ranks that share its matrices.
        data_rank, data_size: which samples of a batch it sees, of how many parts.
        pipeline_rank, pipeline_size: which stage's layers it holds, of how many.
        ends: process group of the first and the last stage of this pipeline; None on other stages, or where there
            is one stage.
        mpu: the object that tells DeepSpeed the same.
    """

    tensor: TensorGroup
    data_rank: int
    data_size: int
    pipeline_rank: int
    pipeline_size: int
    ends: Any
    mpu: Any

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def stage_size(self) -> int:
        """How many ranks hold this stage."""
        return self.data_size * self.tensor.size

    @property
    def stage_rank(self) -> int:
        return self.data_rank * self.tensor.size + self.tensor.rank
