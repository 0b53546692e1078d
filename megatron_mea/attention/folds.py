"""Folded key and value projections that serve several passes, computed outside of activation checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_mea.attention.hlc import FoldedProjection, HeadProjection
from megatron_mea.attention.mea import MultiheadExplicitAttention

FoldedKV = tuple[FoldedProjection | None, FoldedProjection | None]
"""Folded projections of keys and of values; None where a projection is not folded, or folds in its own forward."""


def fold_kv(layer: MultiheadExplicitAttention, tokens: int) -> FoldedKV:
    """Folds the key and value projections of `layer` where that is their cheapest form for this many tokens."""
    key, value = (
        projection.fold() if projection.form(tokens) == "folded" else None
        for projection in (layer.key_projection, layer.value_projection)
    )
    return key, value


class StepFolds:
    """One fold for all micro-batches of an optimizer step, over a tensor group.

    The amount of communication is then independent of the number of micro-batches. All micro-batches but the last use
    the folded weights as leaves, whose gradients are summed in float32. The last one uses them joined to their factors
    (the projection and hlc), so that its backward takes the sum through the fold. k_proj, v_proj and hlc therefore
    receive gradients only in the last micro-batch's backward, and the data-parallel reduction must run once, after it.

    Args:
        layers: attention layers of this rank, in order.
        micro_batches: number of micro-batches of a step.
    """

    def __init__(self, layers: Sequence[MultiheadExplicitAttention], micro_batches: int) -> None:
        self.micro_batches = micro_batches
        pairs = ((layer.key_projection, layer.value_projection) for layer in layers)
        self._layers = [
            tuple(
                None if projection.hlc is None or projection.gathers_components else _StepFold(projection)
                for projection in pair
            )
            for pair in pairs
        ]

    def for_micro_batch(self, micro_batch: int) -> list[FoldedKV]:
        """Folded projections of every layer for this micro-batch, counted from 0."""
        is_last = micro_batch == self.micro_batches - 1
        return [
            tuple(fold and (fold.with_factors if is_last else fold.leaves) for fold in pair) for pair in self._layers
        ]


class _StepFold:
    """A folded projection in two forms: leaves that accumulate gradients, and tensors joined to the fold's graph."""

    def __init__(self, projection: HeadProjection) -> None:
        folded = projection.fold()
        weight, with_weight = _leaf_and_sum(folded.weight)
        bias, with_bias = (None, None) if folded.bias is None else _leaf_and_sum(folded.bias)

        self.leaves = FoldedProjection(weight, bias)
        self.with_factors = FoldedProjection(with_weight, with_bias)


def _leaf_and_sum(folded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a leaf of the same values, and `folded` with the leaf's accumulated gradient added in its backward."""
    leaf = folded.detach().requires_grad_()
    total = torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32))

    def move_grad(leaf: torch.Tensor) -> None:
        total.add_(leaf.grad)
        leaf.grad = None

    leaf.register_post_accumulate_grad_hook(move_grad)
    return leaf, _AddAccumulated.apply(folded, total)


class _AddAccumulated(torch.autograd.Function):
    """The identity, whose backward adds `total` to the gradient."""

    @staticmethod
    def forward(ctx: Any, folded: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        ctx.total = total
        return folded.view_as(folded)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.total.add_(gradients[0]).to(gradients[0].dtype), None
