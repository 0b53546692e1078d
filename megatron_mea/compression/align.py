"""Virtual heads out of heads that are first turned towards one another.

The d features of a head are in a basis of its own, which nothing outside the head sees: what turns its values is taken
back in the columns of `o_proj`, and what turns its keys, in the rows of `q_proj`. So heads need not be alike to have
common components; it is enough that they are alike after such turns: y_j = T_j sum_c m_cj b_c. Keys pass through
RoPE on their way, so their T_j must commute with it: they turn and scale each pair of features, as a complex number
does. The T_j of values are free, and orthogonal where a norm follows.

The squared error falls in alternating least squares: T, m and b each have a closed form given the other two.
"""

from __future__ import annotations

from typing import Literal

import torch

from megatron_mea.compression.factorise import VirtualHeads, factorise

Turn = Literal["any", "orthogonal", "rotary"]
_ROUNDS, _ENOUGH = 200, 1e-4
_RIDGE = 1e-12


def align(moment: torch.Tensor, num_heads: int, rank: int, turn: Turn) -> VirtualHeads:
    """The components that lose least of the heads, each turned as is best; from `factorise`'s result on.

    Args:
        moment: S = E[y y^T], (h d, h d).
        rank: h'
        turn: which T_j are allowed; `rotary`: those that commute with RoPE.
    """
    # shape: (h d, h d) -> (h, groups, features, h d); T_j mixes the features of a group: a pair as a complex number
    heads = _root(moment.double()).unflatten(0, (num_heads, -1))
    heads = torch.complex(*heads.chunk(2, 1)).unsqueeze(2) if turn == "rotary" else heads.unsqueeze(1)
    field = heads.dtype
    stacked = heads.transpose(0, 1).flatten(1, 2)
    mix = factorise(moment, num_heads, rank).combination
    basis = torch.einsum("ch,hgan->cgan", mix.to(field), heads)
    total, error = _size(heads), float("inf")
    for _ in range(_ROUNDS):
        turns = _turns(heads, torch.einsum("ch,cgan->hgan", mix.to(field), basis), turn)
        mix = _mix(heads, turns, basis)
        # shape: (groups, h features, h' features), and the least squares solution for all components at once
        model = torch.einsum("hgab,ch->ghacb", turns, mix.to(field)).flatten(3, 4).flatten(1, 2)
        selection = _solve(model.mH @ model, model.mH)
        basis = (selection @ stacked).unflatten(1, (rank, -1)).transpose(0, 1)
        before, error = error, _size(stacked - model @ (selection @ stacked))
        if before - error <= _ENOUGH * error:
            break
    selection = selection.unflatten(2, (num_heads, -1)).unflatten(1, (rank, -1))
    return _in_real_features(*_with_usual_sizes(selection, mix, turns), error / total if total else 0.0)


def _root(moment: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(moment)
    return vectors * values.clamp(min=0).sqrt()


def _size(x: torch.Tensor) -> float:
    return x.abs().square().sum().item()


def _turns(heads: torch.Tensor, aimed: torch.Tensor, turn: Turn) -> torch.Tensor:
    """The T_j, (h, groups, features, features), with T_j aimed_j nearest to heads_j."""
    product = heads @ aimed.mH
    if turn == "orthogonal":
        left, _, right = torch.linalg.svd(product)
        return left @ right
    return _solve(aimed @ aimed.mH, product.mH).mH


def _mix(heads: torch.Tensor, turns: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The m, (h', h) and real, with sum_c m_cj T_j b_c nearest to heads_j."""
    turned = torch.einsum("hgab,cgbn->hcgan", turns, basis).flatten(2)
    wanted = heads.flatten(1)
    if turned.is_complex():
        turned, wanted = torch.view_as_real(turned).flatten(2), torch.view_as_real(wanted).flatten(1)
    return _solve(turned @ turned.mT, turned @ wanted.unsqueeze(-1)).squeeze(-1).T


def _solve(gram: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """gram^-1 right; what no input reaches gets zero."""
    ridge = _RIDGE * gram.diagonal(dim1=-2, dim2=-1).real.mean(-1)[..., None, None] + torch.finfo(torch.float64).tiny
    return torch.linalg.solve(gram + ridge * torch.eye(gram.shape[-1], dtype=gram.dtype), right)


def _with_usual_sizes(
    selection: torch.Tensor, mix: torch.Tensor, turns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of all factors with the same product those with T^H T = 1 on average and orthonormal rows of m.

    So `q_proj` and `o_proj` keep their sizes, and what is left is the components'.

    Args:
        selection: (groups, h', features, h, features)
    """
    values, vectors = torch.linalg.eigh((turns.mH @ turns).mean(0))
    # A direction that no head uses stays as it is.
    values = torch.where(values > _RIDGE * values.amax(-1, keepdim=True), values, 1.0).sqrt()
    scale, inverse = ((vectors * each.unsqueeze(-2)) @ vectors.mH for each in (values, 1 / values))
    rotation, upper = torch.linalg.qr(mix.T)
    selection = torch.einsum("ce,gab,gebhf->gcahf", upper.to(selection.dtype), scale, selection)
    return selection, rotation.T.contiguous(), turns @ inverse


def _in_real_features(selection: torch.Tensor, mix: torch.Tensor, turns: torch.Tensor, lost: float) -> VirtualHeads:
    groups, rank = selection.shape[:2]
    if selection.is_complex():
        # shape: (pairs, h', 1, h, 1) -> (h', h, pairs), and (h, pairs, 1, 1) -> (h, pairs)
        selection = _as_matrices(selection[:, :, 0, :, 0].permute(1, 2, 0)).transpose(1, 2)
        return VirtualHeads(selection.reshape(rank * 2 * groups, -1), mix, _as_matrices(turns[:, :, 0, 0]), lost)
    return VirtualHeads(selection[0].flatten(2, 3).flatten(0, 1), mix, turns[:, 0], lost)


def _as_matrices(numbers: torch.Tensor) -> torch.Tensor:
    """Complex (..., d / 2) -> real (..., d, d), which multiply the pairs of features (i, i + d / 2) by them."""
    real, imaginary = torch.diag_embed(numbers.real), torch.diag_embed(numbers.imag)
    return torch.cat([torch.cat([real, -imaginary], -1), torch.cat([imaginary, real], -1)], -2)
