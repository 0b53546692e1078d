"""Virtual heads: fewer component heads, and a combination that gives the composite heads as nearly as can be.

Of one layer and side (keys or values) let y = (y_1 .. y_h) be the composite heads' outputs, d features each, and
S = E[y y^T] their second moment, (h d, h d). All of this needs S alone: of real tokens, or W W^T of the
projection, which is that of white inputs and gives the paper's SVD (eq. 36 to 38): the Gram matrix G_ij = E[y_i . y_j]
of the heads has the squared singular values and the left singular vectors U of the matrix (h, d D) whose rows are the
heads. U U^T y loses least of all combinations of h' heads (Eckart and Young): the components are U^T y, the
combination is U^T. The paper folds the singular values into the combination; here they stay with the components, so
that both have the size that training gives them; the product is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class VirtualHeads:
    """Component heads and their combination, which replace the composite heads of a layer and side.

    Args:
        selection: (h' d, h d), maps the composite heads' outputs, or the rows of their projection, to the components'.
        combination: (h', h): composite head j is the sum over c of combination[c, j] component_c.
        rotations: (h, d, d), by which each composite head is still to be multiplied; None: by the identity.
        lost: the part of the mean square of the composite heads' outputs that is lost, from 0 to 1.
    """

    selection: torch.Tensor
    combination: torch.Tensor
    rotations: torch.Tensor | None
    lost: float


def factorise(moment: torch.Tensor, *, num_heads: int, rank: int, equal_heads: bool = False) -> VirtualHeads:
    """The components that lose least of the heads without rotations, in closed form.

    Args:
        moment: S, (h d, h d).
        rank: h'
        equal_heads: every head counts by its relative error: for keys, whose size a norm takes away (`qk_norm`).
    """
    blocks = moment.double().unflatten(0, (num_heads, -1)).unflatten(2, (num_heads, -1))
    gram = torch.einsum("iaja->ij", blocks)
    head_norms = gram.diagonal().clamp(min=0).sqrt()
    # A head of size zero has no direction to keep.
    scales = torch.where(head_norms > 0, head_norms, 1.0) if equal_heads else torch.ones_like(head_norms)
    energies, vectors = torch.linalg.eigh(gram / torch.outer(scales, scales))

    components = _fix_signs(vectors.flip(1)[:, :rank])
    features = torch.eye(blocks.shape[1], dtype=torch.float64)
    selection = torch.kron((components / scales[:, None]).T.contiguous(), features)
    lost = energies[: num_heads - rank].clamp(min=0).sum() / energies.clamp(min=0).sum().clamp(min=1e-300)
    return VirtualHeads(
        selection=selection, combination=(components * scales[:, None]).T.contiguous(), rotations=None, lost=float(lost)
    )


def _fix_signs(vectors: torch.Tensor) -> torch.Tensor:
    """Each column's largest entry is positive, so that no linear algebra library decides the sign."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)
