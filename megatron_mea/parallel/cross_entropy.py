"""The language-model head and its cross-entropy as one operation over chunks of tokens: never all logits at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megatron_mea.data.corpora import IGNORE_INDEX
from megatron_mea.parallel.collectives import all_reduce
from megatron_mea.parallel.grid import TensorGroup

SINGLE_CHUNK_BYTES = 1 << 26
"""Bytes of float32 logits up to which they are computed in one chunk."""


def chunk_size(tokens: int, columns: int) -> int:
    """Returns the number of tokens whose logits are computed at a time: all, or an eighth of them within 32 to 1,024.

    Args:
        columns: size of this rank's shard of the vocabulary.
    """
    if 4 * tokens * columns <= SINGLE_CHUNK_BYTES:
        return tokens

    # Fewer than 32 tokens make slow matrix products.
    return min(tokens, 1024, max(32, -(-tokens // 8)))


def linear_cross_entropy_sum(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, offset: int, tp: TensorGroup, chunk: int
) -> torch.Tensor:
    """Sum of the cross-entropies (nats) of all targets that are not `IGNORE_INDEX`; a scalar, in float32 at least.

    The loss ends the forward pass, and its gradient is linear in the scalar that backward receives. So each chunk's
    gradient is computed while its logits exist (as in Liger Kernel, arXiv 2410.10989), nothing is recomputed, and only
    the gradients of `hidden` and `weight` are saved for backward. The latter is summed over chunks in float32, since a
    16-bit sum would lose small terms. Ranks of a tensor group exchange the largest logit, the sum of exponentials and
    the target's logit of each token.

    Args:
        hidden: (tokens, hidden_size), the same on all ranks; its gradient is a partial sum, to be reduced over them.
        weight: (this rank's shard of the vocabulary, hidden_size)
        targets: (tokens,) token ids.
        offset: the token id of the first row of `weight`.
        chunk: number of tokens at a time.
    """
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden, weight, targets, offset, tp, chunk, needs_grad)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - torch passes by position
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        offset: int,
        tp: TensorGroup,
        chunk: int,
        needs_grad: bool,  # noqa: FBT001
    ) -> torch.Tensor:
        sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=sum_dtype, device=hidden.device)
        if needs_grad:
            d_hidden = torch.empty_like(hidden)
            d_weight = torch.zeros(weight.shape, dtype=sum_dtype, device=weight.device)

        for x, target_ids, start in zip(
            hidden.split(chunk), targets.split(chunk), range(0, len(hidden), chunk), strict=True
        ):
            # shape: (chunk, this rank's shard of the vocabulary)
            logits = F.linear(x, weight)
            # One pass, which reads 16 bits and writes 32.
            log_p = torch.log_softmax(logits, -1, dtype=sum_dtype)

            column, is_counted = target_ids - offset, target_ids != IGNORE_INDEX
            is_local = (column >= 0) & (column < len(weight)) & is_counted
            column = (column * is_local).unsqueeze(-1)
            target_log_p = log_p.gather(-1, column).squeeze(-1)
            loss = -target_log_p

            if tp.size > 1:
                # So far log_p is normalised over this rank's shard alone.
                local_lse = logits[:, 0].to(sum_dtype) - log_p[:, 0]
                largest = all_reduce(local_lse, over=tp, op=dist.ReduceOp.MAX)
                sums, target_logit = all_reduce(
                    torch.stack([(local_lse - largest).exp(), (target_log_p + local_lse) * is_local]), over=tp
                )
                global_lse = largest + sums.log()
                loss, target_log_p = global_lse - target_logit, target_log_p + local_lse - global_lse
                log_p.add_((local_lse - global_lse).unsqueeze(-1))

            total += (loss * is_counted).sum()
            if needs_grad:
                # Softmax minus one-hot, in the memory of the logits.
                d_logits = torch.exp(log_p, out=logits)
                d_target = target_log_p.exp() - is_local.to(sum_dtype)
                d_logits.scatter_(-1, column, d_target.to(d_logits.dtype).unsqueeze(-1))
                torch.mm(d_logits, weight, out=d_hidden[start : start + chunk]).mul_(is_counted.unsqueeze(-1))
                _add_product(d_weight, d_logits.t(), x * is_counted.unsqueeze(-1))
                del d_logits

            # Freed before the next chunk allocates its own.
            del logits, log_p

        if needs_grad:
            ctx.save_for_backward(d_hidden, d_weight)

        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,), (d_hidden, d_weight) = gradients, ctx.saved_tensors
        # In place, so that autograd refuses a second backward pass through this graph.
        return d_hidden.mul_(gradient), d_weight.mul_(gradient).to(d_hidden.dtype), *[None] * 5


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Adds the matrix product a b to `total`, which may be float32 where the factors have 16 bits."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        # Adds the product before it is rounded to 16 bits.
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total += a @ b
