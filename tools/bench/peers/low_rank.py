"""The low-rank factorisation of a projection that loses least of its outputs, and the singular values behind it."""

from __future__ import annotations

import torch


def factorise_outputs(
    weight: torch.Tensor, moment: torch.Tensor, *, rank: int, groups: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """The W' = expansion @ selection of this rank with the least E|W x - W' x|^2, for each group of rows by itself.

    With C = E[x x^T] = L L^T the papers take the SVD of W L (SVD-LLM, Palu), or of W C^(1/2) (CARE), drop the smallest
    singular values and multiply by the inverse root. That is U U^T W with the eigenvectors U of W C W^T, and needs no
    inverse.

    Args:
        weight: W, (rows, D).
        moment: C, (D, D).
        rank: of each group, at most its rows.
        groups: of as many rows each.

    Returns:
        selection (groups, rank, D), and expansion (groups, rows / groups, rank).
    """
    rows = weight.unflatten(0, (groups, -1))
    vectors = torch.linalg.eigh(rows @ moment @ rows.mT).eigenvectors
    expansion = vectors.flip(2)[:, :, :rank].contiguous()
    return expansion.mT @ rows, expansion


def output_energies(weight: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Squares of the singular values of W C^(1/2), descending: what each rank adds to E|W' x|^2."""
    return torch.linalg.eigvalsh(weight @ moment @ weight.mT).flip(0).clamp(min=0)
