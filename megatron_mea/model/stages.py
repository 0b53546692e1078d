"""Splitting layers over pipeline stages: contiguous parts of the model, balanced by the work of its layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_mea.config.schema import Model
from megatron_mea.model.decoder import StageLayers
from megatron_mea.model.flops import layer_flops


def pipeline_stages(config: Model, count: int, *, seq_length: int) -> list[StageLayers]:
    """Splits the layers over `count` stages, at most num_hidden_layers; each goes to `Decoder(stage=...)`.

    A pipeline waits for its slowest stage, so FLOPs of the forward pass are balanced and not parameters: the embedding
    has none, the head's matrix is used by every token, and of an expert layer a token uses a few experts.

    Embedding and head stay with a block: DeepSpeed's gradient norm fails on a rank that holds no parameter it counts,
    such as a tensor rank other than the first with only a norm and a tied matrix.

    Args:
        seq_length: tokens of a sample, on which the work of attention depends.
    """
    _, *work, head = layer_flops(config, seq_length=seq_length)
    work[-1] += head
    # Where that leaves a choice the first stage gets less: it holds the embedding, as large as the head, and the
    # activations of most micro-batches.
    weights = [work[0] + head, *work[1:]]
    return [
        StageLayers(embedding=part.start == 0, blocks=part, head=part.stop == len(work))
        for part in balanced_partition(work, count, weights=weights)
    ]


def balanced_partition(sizes: Sequence[int], count: int, *, weights: Sequence[int] | None = None) -> list[range]:
    """Splits a list into `count` contiguous, non-empty parts, so that the largest sum of a part is minimal.

    Among such partitions it takes one whose sums of `weights`, by default of the sizes, have the smallest sum of
    squares, so that the other parts are even too.
    """
    limit = _smallest_limit(sizes, count)
    weight_sums = _sums_between(sizes if weights is None else weights)
    parts = _sums_between(sizes)
    squares = np.where((parts > 0) & (parts <= limit), weight_sums**2, np.inf)

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


def _sums_between(sizes: Sequence[int]) -> np.ndarray:
    """[start, stop] -> sum of the sizes between, shape (len + 1, len + 1)"""
    borders = np.concatenate([[0.0], np.cumsum(sizes, dtype=np.float64)])
    return borders - borders[:, None]


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
