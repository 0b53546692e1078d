"""Head-level linear combination, HLC (paper section 4.1): composite heads out of component heads.

Two forms, equal by associativity (eq. 18): on activations, `combine_heads`, or on the projection weights,
`fold_weight`. `HeadCombination` projects a hidden state to composite heads in the cheaper of the two.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mea.parallel.layers import Linear
from megatron_mea.parallel.parameter import Initializer, declare


def combine_heads(components: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Eq. 10 on activations: composite_j = sum_c weight[c, j] component_c.

    Args:
        components: (batch, seq, h', d)
        weight: (h', h)

    Returns:
        (batch, h, seq, d); heads first, as attention wants them: one copy and one matrix product, which was
        measured as the fastest form and saves no more for the backward pass than the components.
    """
    batch, seq, count, dim = components.shape
    # shape: (batch, seq, h', d) -> (h', batch seq d)
    rows = components.permute(2, 0, 1, 3).reshape(count, batch * seq * dim)
    # shape: (h, h') @ (h', batch seq d) -> (h, batch, seq, d) -> (batch, h, seq, d)
    return (weight.t() @ rows).view(-1, batch, seq, dim).transpose(0, 1)


def fold_weight(projection: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Eq. 18, on a projection's weight or bias: the rows of composite head j are sum_c weight[c, j] rows_c.

    Computed in float32 at least and rounded once: in bfloat16 this has one rounding fewer than combining
    activations.

    Args:
        projection: (h' d, hidden) or (h' d,)
        weight: (h', h)

    Returns:
        (h d, hidden) or (h d,)
    """
    accurate = torch.promote_types(projection.dtype, torch.float32)
    with torch.autocast(projection.device.type, enabled=False):
        rows = projection.to(accurate).view(weight.shape[0], -1)
        folded = (weight.to(accurate).t() @ rows).to(projection.dtype)
    return folded.view(-1, *projection.shape[1:])


def folding_is_cheaper(tokens: int, hidden_size: int, num_components: int, num_composites: int) -> bool:
    """Whether folding takes fewer multiplications than combining activations, the projection included.

    Per feature of a head: fold h hidden (h' + tokens) against tokens h' (hidden + h); so with h' = h from
    `hidden_size` tokens on, and practically never where h' < h, since then activations also shrink the projection.
    """
    fold = num_composites * hidden_size * (num_components + tokens)
    combine = tokens * num_components * (hidden_size + num_composites)
    return fold < combine


class HeadCombination(nn.Module):
    """The matrix (h', h) of one HLC, and the projection through it."""

    def __init__(self, name: str, num_components: int, num_composites: int, start: str) -> None:
        super().__init__()
        self.weight = declare(f"{name}.weight", (num_components, num_composites), "hlc", STARTS[start])

    def project(self, hidden_states: torch.Tensor, projection: Linear) -> torch.Tensor:
        """(batch, seq, hidden) -> composite heads (batch, h, seq, d)."""
        batch, seq, hidden = hidden_states.shape
        components, composites = self.weight.shape
        if folding_is_cheaper(batch * seq, hidden, components, composites):
            return self.project_folded(hidden_states, projection)
        return self.project_combined(hidden_states, projection)

    def project_combined(self, hidden_states: torch.Tensor, projection: Linear) -> torch.Tensor:
        batch, seq, _ = hidden_states.shape
        components = projection(hidden_states).view(batch, seq, self.weight.shape[0], -1)
        return combine_heads(components, self.weight)

    def project_folded(self, hidden_states: torch.Tensor, projection: Linear) -> torch.Tensor:
        batch, seq, _ = hidden_states.shape
        bias = None if projection.bias is None else fold_weight(projection.bias, self.weight)
        heads = F.linear(hidden_states, fold_weight(projection.weight, self.weight), bias)
        return heads.view(batch, seq, self.weight.shape[1], -1).transpose(1, 2)


def block_start(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Composite j starts as component floor(j h' / h): the identity where h' = h, grouped queries where h' < h."""
    components, composites = shape
    weight = torch.zeros(shape)
    weight[torch.arange(composites) * components // composites, torch.arange(composites)] = 1.0
    return weight


def orthogonal_start(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Orthogonal rows, scaled by sqrt(h / h') so that a composite head keeps a component's expected size."""
    components, composites = shape
    rotation, upper = torch.linalg.qr(torch.randn(composites, composites, generator=generator))
    # The signs make the rotation uniform (Haar) and independent of the QR implementation's convention.
    return (rotation * upper.diagonal().sign())[:components] * math.sqrt(composites / components)


def normal_start(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Independent normal entries of variance 1 / h'."""
    return torch.randn(shape, generator=generator) * shape[0] ** -0.5


STARTS: dict[str, Initializer] = {
    "block": block_start,
    "orthogonal": orthogonal_start,
    "normal": normal_start,
}
