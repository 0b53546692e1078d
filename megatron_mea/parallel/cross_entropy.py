"""The head's projection and its cross-entropy as one operation over chunks of tokens: never all logits at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megatron_mea.data.corpora import IGNORE
from megatron_mea.parallel.collectives import all_reduce
from megatron_mea.parallel.grid import TensorGroup

LARGE = 1 << 26
"""Bytes of float32 logits up to which they are made in one piece."""


def chunk_size(tokens: int, columns: int) -> int:
    """Tokens whose logits are made at a time: an eighth, but no fewer than matrix products want and no more than 1,024.

    Args:
        columns: this rank's part of the vocabulary.
    """
    if 4 * tokens * columns <= LARGE:
        return tokens
    return min(tokens, 1024, max(32, -(-tokens // 8)))


def linear_cross_entropy_sum(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, offset: int, tp: TensorGroup, chunk: int
) -> torch.Tensor:
    """Sum of the cross-entropies (nats) of all targets that are not `IGNORE`, in float32 at least.

    The loss is the last thing of a forward pass, and its gradient is linear in the one number that comes back. So each
    chunk's gradient is made while its logits are there (as in Liger Kernel, arXiv 2410.10989), nothing is computed
    twice, and what is kept is the gradient of `hidden` and of `weight`. The latter is summed over chunks in float32,
    where a 16-bit sum would lose the small ones. Ranks of a tensor group exchange the largest logit, the sum of
    exponentials and the target's logit of each token.

    Args:
        hidden: (tokens, hidden_size), the same on all ranks; its gradient is this rank's part of a sum.
        weight: (this rank's part of the vocabulary, hidden_size)
        targets: (tokens,)
        offset: the id of the first row of `weight`.
        chunk: tokens at a time.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, offset, tp, chunk)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        offset: int,
        tp: TensorGroup,
        chunk: int,
    ) -> torch.Tensor:
        accurate = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=accurate, device=hidden.device)
        learns = any(ctx.needs_input_grad[:2])
        if learns:
            d_hidden = torch.empty_like(hidden)
            d_weight = torch.zeros(weight.shape, dtype=accurate, device=weight.device)
        for x, wanted, place in zip(
            hidden.split(chunk), targets.split(chunk), range(0, len(hidden), chunk), strict=True
        ):
            # shape: (chunk, this rank's part of the vocabulary), in whose place come exponentials and the gradient
            logits = F.linear(x, weight).to(accurate)
            logits.sub_(all_reduce(logits.amax(-1), tp, dist.ReduceOp.MAX).unsqueeze(-1))
            column, counted = wanted - offset, wanted != IGNORE
            mine = (column >= 0) & (column < len(weight)) & counted
            column = (column * mine).unsqueeze(-1)
            target = logits.gather(-1, column).squeeze(-1) * mine
            sums, target = all_reduce(torch.stack([logits.exp_().sum(-1), target]), tp)
            total += ((sums.log() - target) * counted).sum()
            if learns:
                gradient = logits.mul_((counted / sums).unsqueeze(-1))
                gradient.scatter_add_(-1, column, -mine.to(accurate).unsqueeze(-1))
                gradient = gradient.to(weight.dtype)
                torch.mm(gradient, weight, out=d_hidden[place : place + chunk])
                d_weight += gradient.t() @ x
        if learns:
            ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,), (d_hidden, d_weight) = gradients, ctx.saved_tensors
        rounded = torch.empty_like(d_weight, dtype=d_hidden.dtype)
        return (
            d_hidden * gradient.to(d_hidden.dtype),
            torch.mul(d_weight, gradient, out=rounded),
            None,
            None,
            None,
            None,
        )
