"""Matrix products of rows that are sorted by expert, each group with its expert's matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F

_ALIGNMENT = 16
"""Bytes of which grouped_mm wants both dimensions of a matrix to be a multiple."""


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """y = x W_e^T of every row, with the matrix of its expert; x is sorted by expert.

    One grouped product where torch has one, else a loop: in float64, and where a dimension is not aligned. Every
    expert gets a gradient, of zeros where no row is its own.

    Args:
        x: (rows, in_features)
        weight: (experts, out_features, in_features)
        counts: (experts,) rows of each expert; their sum is the number of rows.

    Returns:
        (rows, out_features)
    """
    unit = _ALIGNMENT // x.element_size()
    is_aligned = weight.shape[1] % unit == 0 and weight.shape[2] % unit == 0
    # Of no rows at all the backward pass of grouped_mm fails.
    if is_aligned and x.dtype != torch.float64 and len(x) and _has_grouped_mm(x.device):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0).to(torch.int32))

    groups = x.split(counts.tolist())
    return torch.cat([F.linear(group, matrix) for group, matrix in zip(groups, weight.unbind(), strict=True)])


def _has_grouped_mm(device: torch.device) -> bool:
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0)


class _GatherTokens(torch.autograd.Function):
    """x[order // top_k]: a row for each (token, choice) pair of `order`, which has none twice."""

    @staticmethod
    def forward(ctx, x, order, top_k):  # noqa: PLR0917 - torch passes by position
        ctx.save_for_backward(order)
        ctx.num_tokens, ctx.top_k = len(x), top_k
        return x[order // top_k]

    @staticmethod
    def backward(ctx, gradient):
        (order,) = ctx.saved_tensors
        return _sum_choices(gradient, order, num_tokens=ctx.num_tokens, top_k=ctx.top_k), None, None


class _SumChoices(torch.autograd.Function):
    """The sum over each token's choices, the transpose of `_GatherTokens`."""

    @staticmethod
    def forward(ctx, rows, order, num_tokens, top_k):  # noqa: PLR0917 - torch passes by position
        ctx.save_for_backward(order)
        ctx.top_k = top_k
        return _sum_choices(rows, order, num_tokens=num_tokens, top_k=top_k)

    @staticmethod
    def backward(ctx, gradient):
        (order,) = ctx.saved_tensors
        return gradient[order // ctx.top_k], None, None, None


def _sum_choices(rows: torch.Tensor, order: torch.Tensor, *, num_tokens: int, top_k: int) -> torch.Tensor:
    # A place for every pair and a sum, where adding into tokens would on a GPU depend on the order of its threads.
    # shape: (rows, features) -> (tokens, top_k, features) -> (tokens, features)
    pairs = rows.new_zeros(num_tokens * top_k, rows.shape[1])
    return pairs.index_copy_(0, order, rows).view(num_tokens, top_k, -1).sum(1)


def gather_tokens(x: torch.Tensor, order: torch.Tensor, top_k: int) -> torch.Tensor:
    """(tokens, features) -> (rows, features): the token of each (token, choice) pair in `order` (rows,)."""
    return _GatherTokens.apply(x, order, top_k)


def sum_choices(rows: torch.Tensor, order: torch.Tensor, *, num_tokens: int, top_k: int) -> torch.Tensor:
    """(rows, features) -> (tokens, features): the sum of each token's pairs in `order`, zero where it has none."""
    return _SumChoices.apply(rows, order, num_tokens, top_k)
