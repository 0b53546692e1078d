"""Folded key and value projections that serve more than one pass, made outside of what is recomputed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_mea.attention.attention import Attention
from megatron_mea.attention.hlc import Folded, HeadProjection

Folds = tuple[Folded | None, Folded | None]
"""Of keys and of values; None where a projection is not folded, or folds by itself."""


def fold(layer: Attention, tokens: int) -> Folds:
    """What `layer` folds for this many tokens."""
    key, value = (each.fold() if each.form(tokens) == "folded" else None for each in (layer.key, layer.value))
    return key, value


class StepFolds:
    """One fold for all micro-batches of an optimizer step, over a tensor group.

    What is gathered and reduced is then independent of the number of micro-batches. All of these but the last use the
    folded weights as leaves, whose gradients are summed in float32; in the last one they are what their factors made
    them, and the sum goes through the fold's backward pass. So factors have gradients in the last backward pass alone,
    as if the others had not used them, which needs nothing of what averages gradients but that it waits for the last.

    Args:
        layers: of this rank, in order.
        micro_batches: of a step.
    """

    def __init__(self, layers: Sequence[Attention], micro_batches: int) -> None:
        self.micro_batches = micro_batches
        pairs = ((layer.key, layer.value) for layer in layers)
        self._layers = [tuple(None if each.hlc is None else _Shared(each) for each in pair) for pair in pairs]

    def of(self, micro_batch: int) -> list[Folds]:
        """Of every layer, for this micro-batch, counted from 0."""
        last = micro_batch == self.micro_batches - 1
        return [tuple(each and (each.last if last else each.leaves) for each in pair) for pair in self._layers]


class _Shared:
    """A folded projection twice over: as leaves that collect their gradient, and joined to its factors."""

    def __init__(self, projection: HeadProjection) -> None:
        folded = projection.fold()
        self.leaves = Folded(*(None if each is None else each.detach().requires_grad_() for each in folded))
        pairs = zip(folded, self.leaves, strict=True)
        self.last = Folded(*(None if leaf is None else _collect(each, leaf) for each, leaf in pairs))


def _collect(folded: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32))

    def add(leaf: torch.Tensor) -> None:
        total.add_(leaf.grad)
        leaf.grad = None

    leaf.register_post_accumulate_grad_hook(add)
    return _AddCollected.apply(folded, total)


class _AddCollected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, folded: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        ctx.total = total
        return folded.view_as(folded)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.total.add_(gradients[0]).to(gradients[0].dtype), None
