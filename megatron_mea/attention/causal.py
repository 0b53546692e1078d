"""Causal attention of as many queries as keys, or on a CPU of the last tokens' queries to the keys of all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of every token to itself and to all tokens before it.

    Args:
        query: (batch, H, queries, d), of the last of the tokens that `key` has; on a GPU of all of them.
        key, value: (batch, h, keys, d), where h divides H.

    Returns:
        (batch, H, queries, d)
    """
    (heads, num_queries), (kv_heads, num_keys) = query.shape[1:3], key.shape[1:3]
    if num_queries == num_keys:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=heads != kv_heads)

    groups = heads // kv_heads
    return _LastQueries.apply(query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))


class _LastQueries(torch.autograd.Function):
    """Attention of the last queries on a CPU, whose kernel would want a mask of queries x keys in float32.

    Attention to the keys before the first query needs no mask, and that to the others is square. Their outputs are
    merged by their log-sum-exps, as ring attention merges those of its blocks (arXiv 2310.01889); with the merged
    output and log-sum-exp each backward pass computes its part of the gradients.
    """

    @staticmethod
    def forward(ctx, query, key, value):  # noqa: PLR0917 - torch passes by position
        flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        (old_key, new_key), (old_value, new_value) = _split(query, key), _split(query, value)
        old_output, old_lse = flash_attention(query, old_key, old_value, is_causal=False)
        new_output, new_lse = flash_attention(query, new_key, new_value, is_causal=True)

        lse = torch.logaddexp(old_lse, new_lse)
        old_weight, new_weight = ((part - lse).exp().unsqueeze(-1) for part in (old_lse, new_lse))
        output = (old_output * old_weight + new_output * new_weight).to(query.dtype)
        ctx.save_for_backward(query, key, value, output, lse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, key, value, output, lse = ctx.saved_tensors
        flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        (d_query_old, *d_old), (d_query_new, *d_new) = (
            flash_backward(gradient, query, part_key, part_value, output, lse, dropout_p=0.0, is_causal=is_causal)
            for part_key, part_value, is_causal in zip(
                _split(query, key), _split(query, value), (False, True), strict=True
            )
        )
        d_key, d_value = (torch.cat(parts, dim=2) for parts in zip(d_old, d_new, strict=True))
        return d_query_old + d_query_new, d_key, d_value


def _split(query: torch.Tensor, heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys or values of the tokens before the first query, and of the others."""
    num_old = heads.shape[2] - query.shape[2]
    return heads[:, :, :num_old], heads[:, :, num_old:]
