"""Reads the weights that a run begins with, its own or a teacher's, and refuses what no training mends."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist

from megatron_mea.checkpoint.tensors import Fragment
from megatron_mea.huggingface.model_folder import StoredTensors


def read_weights(stored: StoredTensors, fragments: Iterable[Fragment]) -> None:
    """Fills this rank's fragments of a model's tensors; collective.

    Raises:
        UserError: on all ranks, where a tensor has numbers that are not finite in float32.
    """
    names_by_rank: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(names_by_rank, stored.read(fragments))
    stored.refuse_not_finite(sorted({name for names in names_by_rank for name in names}))
