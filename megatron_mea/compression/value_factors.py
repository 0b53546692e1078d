"""Factors of latent values: the numbers from which the composite value heads follow as nearly as can be, by any matrix.

Values are mixed behind attention, so nothing has to commute with a rotation. What counts is the error of the attention
layer's output: with u the attended values of all heads, their second moment M = E[u u^T] and the weight G (block
diagonal, W_O,j^T W_O,j summed over the query heads of a value head), the projector of rank n that loses least of
tr(G (1 - P) M (1 - P)^T) follows from the eigenvectors of G^(1/2) M G^(1/2).

Each query head attends in its own way and has its own W_O,j, so the error is a sum over query heads of such traces,
which has no closed form. Here M is the mean over query heads and G their sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_MIN_EIGENVALUE = 1e-12
"""Part of the largest one: below it a weight counts as zero, and has no inverse root."""


@dataclass(frozen=True, kw_only=True)
class ValueFactors:
    """Latent numbers, and the combination of the composite heads' features from them.

    Args:
        selection: (n, h d), maps the composite heads' features to the latent numbers.
        combination: (n, h d): feature i is the sum over n of combination[n, i] times number n.
        lost: the sum of the eigenvalues left out, in the units of moment x weight.
    """

    selection: torch.Tensor
    combination: torch.Tensor
    lost: float


def output_weight(o_proj: torch.Tensor, *, num_heads: int, head_dim: int) -> torch.Tensor:
    """G, (h d, h d): what an error of the composite value heads costs behind `o_proj` (hidden, H d)."""
    # shape: (hidden, H d) -> (h, hidden x query heads of a group, d)
    heads = o_proj.double().view(len(o_proj), num_heads, -1, head_dim).permute(1, 0, 2, 3).flatten(1, 2)
    return torch.block_diag(*(heads.mT @ heads))


def factorise_values(moment: torch.Tensor, *, weight: torch.Tensor, num_latent: int) -> ValueFactors:
    """The latent numbers that lose least, in closed form.

    Args:
        moment: M, (h d, h d).
        weight: G, (h d, h d), positive.
        num_latent: at most h d.
    """
    weight = weight.double() if weight.any() else torch.eye(len(weight), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(weight)
    roots = values.clamp(min=_MIN_EIGENVALUE * values.max().item()).sqrt()
    root, inverse = ((vectors * scale) @ vectors.mT for scale in (roots, 1 / roots))
    energies, directions = torch.linalg.eigh(root @ moment.double() @ root)

    kept = _fix_signs(directions.flip(1)[:, :num_latent])
    lost = energies[: len(energies) - num_latent].clamp(min=0).sum().item()
    return ValueFactors(selection=kept.mT @ root, combination=(inverse @ kept).mT.contiguous(), lost=lost)


def _fix_signs(vectors: torch.Tensor) -> torch.Tensor:
    """Each column's largest entry is positive, so that no linear algebra library decides the sign."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)
