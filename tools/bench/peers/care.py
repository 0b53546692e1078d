"""CARE (arXiv 2603.17946): covariance-aware low rank of keys and values, with ranks that differ by layer.

Taken: the SVD of C^(1/2) W^T with C = E[x x^T] plus a tenth of its mean diagonal, and the inverse root afterwards; the
"adjusted" ranks, dealt out one at a time, for keys and for values by themselves, to the layer whose squared singular
value is the largest part of what is still lost there. The order of layers, sqrt(layers from there on / their mean), and
the cost, sqrt(rank / least rank), by which the authors' code (github.com/FutureMLS-Lab/CARE, c3c2126) weighs that part
are taken too, with its bounds of half and double the even rank. Keys and values are rebuilt before RoPE, as for the
paper's figures of one shot, and values are absorbed in decoding. Left out: healing, and the decoupled key.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import torch

from .layers import RebuiltLayer
from .low_rank import output_energies
from .palu import palu_layer

DAMPING = 0.1
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


def adjusted_ranks(energies: Sequence[torch.Tensor], *, budget: int) -> list[int]:
    """Ranks of all layers, for keys or for values, with the sum `budget`, by what one more takes of the rest.

    Args:
        energies: of each layer, descending.
    """
    num_layers, full = len(energies), len(energies[0])
    even = budget / num_layers
    least, largest = max(math.floor(even / 2), 1), min(math.ceil(2 * even), full)
    lost = [layer.flip(0).cumsum(0).flip(0).clamp(min=1e-300) for layer in energies]

    def score(layer: int, rank: int) -> float:
        """The part of the lost energy that rank + 1 takes, weighted; larger is better."""
        depth = math.sqrt((num_layers - layer) / ((num_layers + 1) / 2))
        return (energies[layer][rank] / lost[layer][rank]).item() * depth / math.sqrt(rank / least)

    ranks = [least] * num_layers
    heap = [(-score(layer, least), layer) for layer in range(num_layers) if least < largest]
    heapq.heapify(heap)
    for _ in range(budget - sum(ranks)):
        _, layer = heapq.heappop(heap)
        ranks[layer] += 1
        if ranks[layer] < largest:
            heapq.heappush(heap, (-score(layer, ranks[layer]), layer))

    return ranks
