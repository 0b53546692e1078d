"""Factors of latent keys: pairs, each of one RoPE frequency, from which the composite key heads follow most nearly.

A key head of d features is d/2 complex numbers z_f, one a frequency, and RoPE multiplies z_f by
exp(i theta_f position). So any complex matrix that mixes the heads within one frequency commutes with it: the pairs
c = A z are cached rotated, and z_j is approximated by a complex combination of the pairs of its frequency. An error of
z_jf changes the logits by its product with the queries that meet it. With weights w_jf, their energy, the sum over j
of w_jf E|z_jf - zhat_jf|^2 is least for the eigenvectors of w^(1/2) E[z_f z_f^H] w^(1/2) with the largest eigenvalues
(Eckart and Young), and how many pairs a frequency gets is decided by comparing eigenvalues over all frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_MIN_WEIGHT = 1e-9
"""Part of the mean weight: a head that no query looks at still has a direction to keep."""


@dataclass(frozen=True, kw_only=True)
class KeyFactors:
    """Pairs in order of their frequency, and the combination of composite heads from them.

    Args:
        frequency: (pairs,), the index of each pair's frequency, from 0 to d/2 - 1, ascending.
        selection: (pairs, h) complex: pair n is the sum over j of selection[n, j] z_j at its frequency.
        combination: (pairs, h) complex: z_j is the sum over the pairs n of its frequency of combination[n, j] c_n.
        lost: the sum of the eigenvalues left out, in the units of moment x weight.
    """

    frequency: torch.Tensor
    selection: torch.Tensor
    combination: torch.Tensor
    lost: float


def frequency_moments(moment: torch.Tensor, *, num_heads: int) -> torch.Tensor:
    """E[z_f z_f^H], (d/2, h, h) complex, from E[y y^T], (h d, h d), of heads whose pairs are features (i, i + d/2)."""
    pairs = moment.shape[0] // (2 * num_heads)
    # shape: (h d, h d) -> (h, 2, d/2, h, 2, d/2) -> (2, 2, h, h, d/2)
    blocks = moment.double().view(num_heads, 2, pairs, num_heads, 2, pairs).permute(1, 4, 0, 3, 2, 5)
    blocks = blocks.diagonal(dim1=-2, dim2=-1)
    real, imaginary = blocks[0, 0] + blocks[1, 1], blocks[1, 0] - blocks[0, 1]
    return torch.complex(real, imaginary).permute(2, 0, 1)


def factorise_keys(moments: torch.Tensor, *, weights: torch.Tensor, num_pairs: int) -> KeyFactors:
    """The pairs that lose least, in closed form.

    Args:
        moments: E[z_f z_f^H], (d/2, h, h) complex.
        weights: w, (d/2, h): what an error of head j at frequency f costs.
        num_pairs: at most h d/2.
    """
    weights = weights.double() if weights.any() else torch.ones_like(weights, dtype=torch.float64)
    roots = weights.clamp(min=_MIN_WEIGHT * weights.mean().item()).sqrt()
    weighted = roots[:, :, None] * moments * roots[:, None, :]
    energies, vectors = torch.linalg.eigh(weighted)

    order = energies.flatten().argsort(descending=True, stable=True)
    kept = torch.zeros_like(energies, dtype=torch.bool).flatten().index_fill(0, order[:num_pairs], True)  # noqa: FBT003
    frequency, component = kept.view_as(energies).nonzero(as_tuple=True)

    # shape: (d/2, h, eigenvectors) -> (pairs, h)
    directions = _fix_phases(vectors[frequency, :, component])
    return KeyFactors(
        frequency=frequency,
        selection=directions.conj() * roots[frequency],
        combination=directions / roots[frequency],
        lost=energies.flatten()[order[num_pairs:]].clamp(min=0).sum().item(),
    )


def _fix_phases(directions: torch.Tensor) -> torch.Tensor:
    """Each row's largest entry is positive, so that no linear algebra library decides the phase."""
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return directions * (largest.conj() / largest.abs())


def select_keys(projection: torch.Tensor, keys: KeyFactors) -> torch.Tensor:
    """Rows (2 pairs, D) that project to the pairs, as features (n, n + pairs), from those of the heads (h d, D)."""
    heads = projection.view(keys.selection.shape[1], 2, -1, *projection.shape[1:])
    # shape: (h, d/2, D) -> (h, pairs, D)
    by_pair = torch.complex(heads[:, 0], heads[:, 1])[:, keys.frequency]
    latent = torch.einsum("nh,hn...->n...", keys.selection, by_pair)
    return torch.cat([latent.real, latent.imag])
