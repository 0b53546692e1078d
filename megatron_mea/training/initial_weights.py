"""Reads the weights that a run begins with, its own or a teacher's, and refuses what no training mends."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from megatron_mea.checkpoint.tensors import Fragment
from megatron_mea.errors import Problem, UserError
from megatron_mea.huggingface.safetensors_reader import MAX_NAMED
from megatron_mea.huggingface.weights import StoredModel


def read_weights(stored: StoredModel, fragments: Iterable[Fragment], key: str) -> None:
    """Fills this rank's fragments of a stored model's tensors; collective.

    Args:
        key: the configuration key that named the model, for messages.

    Raises:
        UserError: on all ranks, where a tensor has numbers that are not finite in float32.
    """
    fragments = list(fragments)
    stored.read(fragments)

    # Without the copy that `isfinite` makes, and without padding, which nothing was read into.
    local_names = [
        fragment.name
        for fragment in fragments
        if any(not torch.stack(view.aminmax()).isfinite().all() for _, view in fragment.chunks())
    ]
    names_by_rank: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(names_by_rank, local_names)
    names = sorted({name for names in names_by_rank for name in names})
    if names:
        raise UserError.from_problems(
            Problem(
                where=key,
                got=f"{name} in {stored.files.get(name, stored.folder)}, with numbers that are not finite in float32",
                expected="finite numbers",
                hint="take weights from before they diverged",
            )
            for name in names[:MAX_NAMED]
        )
