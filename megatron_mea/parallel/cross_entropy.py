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
    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden, weight, targets, offset, tp, chunk, learns)


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
        learns: bool,
    ) -> torch.Tensor:
        accurate = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=accurate, device=hidden.device)
        if learns:
            d_hidden = torch.empty_like(hidden)
            d_weight = torch.zeros(weight.shape, dtype=accurate, device=weight.device)
        for x, wanted, place in zip(
            hidden.split(chunk), targets.split(chunk), range(0, len(hidden), chunk), strict=True
        ):
            # shape: (chunk, this rank's part of the vocabulary)
            logits = F.linear(x, weight)
            # One pass, which reads 16 bits and writes 32.
            log_p = torch.log_softmax(logits, -1, dtype=accurate)
            column, counted = wanted - offset, wanted != IGNORE
            mine = (column >= 0) & (column < len(weight)) & counted
            column = (column * mine).unsqueeze(-1)
            target = log_p.gather(-1, column).squeeze(-1)
            loss = -target
            if tp.size > 1:
                # The logarithm of this rank's sum of exponentials, then that of all.
                own = logits[:, 0].to(accurate) - log_p[:, 0]
                largest = all_reduce(own, tp, dist.ReduceOp.MAX)
                sums, logit = all_reduce(torch.stack([(own - largest).exp(), (target + own) * mine]), tp)
                whole = largest + sums.log()
                loss, target = whole - logit, target + own - whole
                log_p.add_((own - whole).unsqueeze(-1))
            total += (loss * counted).sum()
            if learns:
                gradient = torch.exp(log_p, out=logits)
                gradient.scatter_(-1, column, (target.exp() - mine.to(accurate)).to(gradient.dtype).unsqueeze(-1))
                torch.mm(gradient, weight, out=d_hidden[place : place + chunk]).mul_(counted.unsqueeze(-1))
                _add_product(d_weight, gradient.t(), x * counted.unsqueeze(-1))
                del gradient
            # They go before those of the next chunk come.
            del logits, log_p
        if learns:
            ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,), (d_hidden, d_weight) = gradients, ctx.saved_tensors
        # In place: autograd refuses to use the graph again.
        return d_hidden.mul_(gradient), d_weight.mul_(gradient).to(d_hidden.dtype), *[None] * 5


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b, where `total` may be float32 and the factors of 16 bits."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        # Adds where the product is in float32 still.
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total += a @ b
