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
        """The part of `total` rows that a rank holds: equal parts, the last ones shorter, as torch.chunk cuts."""
        rank = self.rank if rank is None else rank
        part = -(-total // self.size)
        return slice(min(rank * part, total), min((rank + 1) * part, total))


ALONE = TensorGroup()


@dataclass(frozen=True)
class Grid:
    """Where this rank stands: rank = data_rank * tensor size + tensor rank.

    Args:
        tensor: the ranks that share its matrices.
        data_rank, data_size: which samples of a batch it sees, of how many parts.
        mpu: the object that tells DeepSpeed the same.
    """

    tensor: TensorGroup
    data_rank: int
    data_size: int
    mpu: Any
