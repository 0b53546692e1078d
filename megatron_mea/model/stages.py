"""Splitting layers over pipeline stages: contiguous parts of the model, balanced by number of parameters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_mea.config.schema import Model
from megatron_mea.model.decoder import Decoder, StageLayers, single_layers


def pipeline_stages(config: Model, count: int) -> list[StageLayers]:
    """Splits the layers over `count` stages, at most num_hidden_layers; each goes to `Decoder(stage=...)`.

    Embedding and head stay with a block: DeepSpeed's gradient norm fails on a rank that holds no parameter it counts,
    such as a tensor rank other than the first with only a norm and a tied matrix.
    """
    embedding, *blocks, head = layer_sizes(config)
    blocks[0] += embedding
    blocks[-1] += head
    return [
        StageLayers(embedding=part.start == 0, blocks=part, head=part.stop == len(blocks))
        for part in balanced_partition(blocks, count)
    ]


def layer_sizes(config: Model) -> list[int]:
    """Number of parameters of every layer; a tied matrix counts twice, in the embedding and in the head."""
    embedding, *blocks, head = single_layers(config)
    # Blocks differ by their component heads alone.
    block_by_heads = dict(zip(config.component_heads, blocks, strict=True))

    def size(layer: StageLayers) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in Decoder(config, stage=layer).parameters())

    size_by_heads = {heads: size(block) for heads, block in block_by_heads.items()}
    return [size(embedding), *(size_by_heads[heads] for heads in config.component_heads), size(head)]


def balanced_partition(sizes: Sequence[int], count: int) -> list[range]:
    """Splits a list into `count` contiguous, non-empty parts, so that the largest sum of a part is minimal.

    Among such partitions it takes the one with the smallest sum of squares, so that the other parts are even too.
    """
    borders = np.concatenate([[0.0], np.cumsum(sizes, dtype=np.float64)])
    parts = borders - borders[:, None]
    squares = np.where((parts > 0) & (parts <= _smallest_limit(sizes, count)), parts**2, np.inf)

    # Part number n (from 0) begins at n or later, and leaves an item for each part behind it.
    num_starts = len(sizes) - count + 1
    best, choices = np.zeros(1), []
    for number in range(count):
        starts = slice(number, number + len(best))
        totals = best[:, None] + squares[starts, number + 1 : number + 1 + num_starts]
        choices.append(number + totals.argmin(0))
        best = totals.min(0)

    partition, stop = [], len(sizes)
    for number in reversed(range(count)):
        start = int(choices[number][stop - number - 1])
        partition.append(range(start, stop))
        stop = start

    return partition[::-1]


def _smallest_limit(sizes: Sequence[int], count: int) -> int:
    """The smallest sum that no part of a partition into `count` parts need exceed."""
    low, high = max(sizes), sum(sizes)
    while low < high:
        limit = (low + high) // 2
        parts, part = 1, 0
        for size in sizes:
            part += size
            if part > limit:
                parts, part = parts + 1, size

        low, high = (low, limit) if parts <= count else (limit + 1, high)

    return low
