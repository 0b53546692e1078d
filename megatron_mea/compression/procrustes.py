"""Virtual heads out of heads that are first rotated towards one another (generalised Procrustes analysis).

The d features of a head are in a basis of its own, which nothing outside the head sees: a rotation of its values is
undone in the columns of `o_proj`, and one of its keys in the rows of `q_proj`. So heads need not be alike to have
common components; it is enough that they are alike after rotation: y_j = T_j sum_c m_cj b_c. Keys pass through
RoPE on their way, so their T_j must commute with it: they rotate and scale each pair of features, as a complex number
does. The T_j of values may be any matrices, and are orthogonal where a norm follows.

Alternating least squares lowers the squared error: T, m and b each have a closed form given the other two.
"""

from __future__ import annotations

from typing import Literal

import torch

from megatron_mea.compression.factorise import VirtualHeads, factorise

Rotation = Literal["any", "orthogonal", "rotary"]
_MAX_ROUNDS, _MIN_GAIN = 200, 1e-4
_RIDGE = 1e-12


def align_heads(moment: torch.Tensor, *, num_heads: int, rank: int, rotation: Rotation) -> VirtualHeads:
    """The components that lose least of the heads, each rotated as fits best, by iteration from `factorise`'s result.

    Args:
        moment: S = E[y y^T], (h d, h d).
        rank: h'
        rotation: the T_j that are allowed: `any` matrix, `orthogonal` ones, or `rotary` ones, which commute with RoPE.
    """
    # shape: (h d, h d) -> (h, groups, features, h d); T_j mixes the features of a group: a pair as a complex number
    heads = _square_root(moment.double()).unflatten(0, (num_heads, -1))
    heads = torch.complex(*heads.chunk(2, 1)).unsqueeze(2) if rotation == "rotary" else heads.unsqueeze(1)
    dtype = heads.dtype
    stacked = heads.transpose(0, 1).flatten(1, 2)
    combination = factorise(moment, num_heads=num_heads, rank=rank).combination
    basis = torch.einsum("ch,hgan->cgan", combination.to(dtype), heads)
    total, error = _sum_of_squares(heads), float("inf")
    for _ in range(_MAX_ROUNDS):
        rotations = _fit_rotations(
            heads, torch.einsum("ch,cgan->hgan", combination.to(dtype), basis), rotation=rotation
        )
        combination = _fit_combination(heads, rotations, basis)
        # shape: (groups, h features, h' features), and the least squares solution for all components at once
        expansion = torch.einsum("hgab,ch->ghacb", rotations, combination.to(dtype)).flatten(3, 4).flatten(1, 2)
        selection = _solve(expansion.mH @ expansion, expansion.mH)
        basis = (selection @ stacked).unflatten(1, (rank, -1)).transpose(0, 1)
        previous_error, error = error, _sum_of_squares(stacked - expansion @ (selection @ stacked))
        if previous_error - error <= _MIN_GAIN * error:
            break

    selection = selection.unflatten(2, (num_heads, -1)).unflatten(1, (rank, -1))
    selection, combination, rotations = _normalized(selection, combination, rotations)
    return _to_virtual_heads(selection, combination, rotations, lost=error / total if total else 0.0)


def _square_root(moment: torch.Tensor) -> torch.Tensor:
    """R with R R^T = moment."""
    values, vectors = torch.linalg.eigh(moment)
    return vectors * values.clamp(min=0).sqrt()


def _sum_of_squares(x: torch.Tensor) -> float:
    return x.abs().square().sum().item()


def _fit_rotations(heads: torch.Tensor, templates: torch.Tensor, *, rotation: Rotation) -> torch.Tensor:
    """The T_j, (h, groups, features, features), with T_j templates_j nearest to heads_j."""
    product = heads @ templates.mH
    if rotation == "orthogonal":
        left, _, right = torch.linalg.svd(product)
        return left @ right

    return _solve(templates @ templates.mH, product.mH).mH


def _fit_combination(heads: torch.Tensor, rotations: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The m, (h', h) and real, with sum_c m_cj T_j b_c nearest to heads_j."""
    rotated = torch.einsum("hgab,cgbn->hcgan", rotations, basis).flatten(2)
    target = heads.flatten(1)
    if rotated.is_complex():
        rotated, target = torch.view_as_real(rotated).flatten(2), torch.view_as_real(target).flatten(1)
    return _solve(rotated @ rotated.mT, rotated @ target.unsqueeze(-1)).squeeze(-1).T


def _solve(gram: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """gram^-1 right, with a small ridge; directions that no input reaches get zero."""
    ridge = _RIDGE * gram.diagonal(dim1=-2, dim2=-1).real.mean(-1)[..., None, None] + torch.finfo(torch.float64).tiny
    return torch.linalg.solve(gram + ridge * torch.eye(gram.shape[-1], dtype=gram.dtype), right)


def _normalized(
    selection: torch.Tensor, combination: torch.Tensor, rotations: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rescales the factors without changing their product, to T^H T = 1 on average and orthonormal rows of m.

    So `q_proj` and `o_proj` keep their sizes, and the rest of the scale goes into the components.

    Args:
        selection: (groups, h', features, h, features)
    """
    values, vectors = torch.linalg.eigh((rotations.mH @ rotations).mean(0))
    # A direction that no head uses stays as it is.
    values = torch.where(values > _RIDGE * values.amax(-1, keepdim=True), values, 1.0).sqrt()
    scale, inverse = ((vectors * scaling.unsqueeze(-2)) @ vectors.mH for scaling in (values, 1 / values))
    orthonormal, upper = torch.linalg.qr(combination.T)
    selection = torch.einsum("ce,gab,gebhf->gcahf", upper.to(selection.dtype), scale, selection)
    return selection, orthonormal.T.contiguous(), rotations @ inverse


def _to_virtual_heads(
    selection: torch.Tensor, combination: torch.Tensor, rotations: torch.Tensor, *, lost: float
) -> VirtualHeads:
    """The factors with real features, in the shapes of VirtualHeads."""
    groups, rank = selection.shape[:2]
    if selection.is_complex():
        # shape: (pairs, h', 1, h, 1) -> (h', h, pairs), and (h, pairs, 1, 1) -> (h, pairs)
        selection = _complex_to_real(selection[:, :, 0, :, 0].permute(1, 2, 0)).transpose(1, 2)
        return VirtualHeads(
            selection=selection.reshape(rank * 2 * groups, -1),
            combination=combination,
            rotations=_complex_to_real(rotations[:, :, 0, 0]),
            lost=lost,
        )

    return VirtualHeads(
        selection=selection[0].flatten(2, 3).flatten(0, 1),
        combination=combination,
        rotations=rotations[:, 0],
        lost=lost,
    )


def _complex_to_real(x: torch.Tensor) -> torch.Tensor:
    """Complex (..., d / 2) -> real matrices (..., d, d) that multiply feature pairs (i, i + d / 2)."""
    real, imaginary = torch.diag_embed(x.real), torch.diag_embed(x.imag)
    return torch.cat([torch.cat([real, -imaginary], -1), torch.cat([imaginary, real], -1)], -2)
