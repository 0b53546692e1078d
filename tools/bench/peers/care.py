"""CARE (arXiv 2603.17946): covariance-aware low rank of keys and values, with ranks that differ by layer.

Taken: the SVD of C^(1/2) W^T with C = E[x x^T], shrunk towards its mean diagonal, and the inverse root afterwards; the
"adjusted" ranks, dealt out one at a time from a constant on, for keys and for values by themselves, to the layer whose
next squared singular value is the largest part of what is still lost there, s(r) = sigma_(r+1)^2 / sum_(m>r) sigma_m^2.
Keys and values are rebuilt before RoPE, as for the paper's figures of one shot, and values are absorbed in decoding.

The constant, bounds and shrinkage are open. Tried on calibration text at half of the cache, a thousandth loses less
than the tenth of the authors' code (github.com/FutureMLS-Lab/CARE), and s(r) alone less than with its weights for depth
and cost. Since s(r) rises towards full rank, bounds decide, so latent.py tries several on calibration text, with even
ranks ("CARE-U") among them. Left out: healing, and the decoupled key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .layers import RebuiltLayer
from .low_rank import output_energies
from .palu import palu_layer

DAMPING = 1e-3
"""Of the mean diagonal of C."""


def damped(moment: torch.Tensor) -> torch.Tensor:
    """C plus `DAMPING` times its mean diagonal."""
    return moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


def care_layer(
    key: torch.Tensor, value: torch.Tensor, moment: torch.Tensor, *, key_rank: int, value_rank: int
) -> RebuiltLayer:
    """A layer of low-rank keys and values; arguments as those of `palu_layer`."""
    return palu_layer(key, value, damped(moment), key_rank=key_rank, value_rank=value_rank)


def care_energies(weight: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Squared singular values of C^(1/2) W^T, descending."""
    return output_energies(weight, damped(moment))


def adjusted_ranks(energies: Sequence[torch.Tensor], *, budget: int, spread: float) -> list[int]:
    """Ranks of all layers, for keys or for values, with the sum `budget`, by what one more takes of the rest.

    Args:
        energies: of each layer, descending.
        spread: at least 1; ranks lie between the even one divided by it, and multiplied by it.
    """
    num_layers, full = len(energies), len(energies[0])
    even = budget / num_layers
    least, largest = max(math.floor(even / spread), 1), min(math.ceil(even * spread), full)
    lost = [layer.flip(0).cumsum(0).flip(0).clamp(min=1e-300) for layer in energies]

    ranks = [least] * num_layers
    for _ in range(budget - sum(ranks)):
        scores = [
            (layer[rank] / rest[rank]).item() if rank < largest else -1.0
            for layer, rest, rank in zip(energies, lost, ranks, strict=True)
        ]
        ranks[scores.index(max(scores))] += 1

    return ranks
