"""Palu (arXiv 2407.21118): keys and values of low rank before RoPE, rebuilt at each step.

Taken: the decomposition of W_k and W_v of a group of heads, with the whitening of the inputs that SVD-LLM has (section
3.1 and 3.2: G-LRD of several heads, J-LRD of all, M-LRD of one), and ranks in proportion to the Fisher information,
the root of the mean square of a projection's gradients, averaged over its elements (section 3.3); values are absorbed
by what follows attention. Left out: quantisation with Hadamard matrices, and rounding of ranks to multiples of 32,
which would miss the size of the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .layers import RebuiltLayer
from .low_rank import factorise_outputs


def palu_layer(
    key: torch.Tensor,
    value: torch.Tensor,
    moment: torch.Tensor,
    *,
    key_rank: int,
    value_rank: int,
    groups: int = 1,
) -> RebuiltLayer:
    """A layer of low-rank keys and values.

    Args:
        key, value: projections (h d, D) to the composite heads.
        moment: E[x x^T], (D, D), of their inputs.
        key_rank, value_rank: cached numbers; of several groups each gets an equal part, rounded down.
        groups: of heads that share latent numbers: 1 for all heads together, h for each by itself.
    """
    sides = (key, key_rank), (value, value_rank)
    (key_selection, key_expansion), (value_selection, value_expansion) = (
        factorise_outputs(weight, moment, rank=rank // groups, groups=groups) for weight, rank in sides
    )
    return RebuiltLayer(
        key_selection=key_selection,
        key_expansion=key_expansion,
        value_selection=value_selection,
        value_expansion=value_expansion,
    )


def proportional_ranks(scores: Sequence[float], *, budget: int, largest: int) -> list[int]:
    """Ranks from 1 to `largest` in proportion to the scores, with the sum `budget`.

    What a full projection cannot use goes to the others in proportion as well; the paper's code deals it out evenly.
    """
    if not len(scores) <= budget <= largest * len(scores):
        raise ValueError(f"a budget of {budget} for {len(scores)} projections of 1 to {largest}")

    low, high = 0.0, largest * len(scores) / min(score for score in scores if score > 0)
    for _ in range(200):
        factor = (low + high) / 2
        total = sum(min(max(factor * score, 1.0), largest) for score in scores)
        low, high = (factor, high) if total < budget else (low, factor)

    exact = [min(max(high * score, 1.0), largest) for score in scores]
    ranks = [math.floor(rank + 1e-9) for rank in exact]
    by_remainder = sorted(range(len(ranks)), key=lambda index: ranks[index] - exact[index])
    for index in by_remainder[: budget - sum(ranks)]:
        ranks[index] += 1

    return ranks
