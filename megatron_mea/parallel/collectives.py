"""Collectives with gradients over a tensor group, after Megatron-LM (arXiv 1909.08053, 2205.05198).

Inside a tensor-parallel region every rank computes with its part of a matrix. A gradient that leaves the region is
the sum over the ranks, so `enter` is the identity with an all-reduce behind it, and `leave` the other way round;
with sequence parallelism they gather and scatter along the sequence. All are the identity in a group of one.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_mea.parallel.grid import TensorGroup

SEQUENCE = 1
"""The dimension of (batch, seq, hidden) that sequence parallelism cuts."""


def all_reduce(x: torch.Tensor, tp: TensorGroup, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
    """A reduced copy of `x`; without a gradient."""
    x = x.detach().contiguous().clone()
    if tp.size > 1:
        dist.all_reduce(x, op=op, group=tp.group)
    return x


def all_gather(x: torch.Tensor, dim: int, tp: TensorGroup) -> torch.Tensor:
    """Equal parts joined at `dim`; without a gradient."""
    rows = x.detach().movedim(dim, 0).contiguous()
    parts = rows.new_empty((tp.size * rows.shape[0], *rows.shape[1:]))
    dist.all_gather_into_tensor(parts, rows, group=tp.group)
    return parts.movedim(0, dim)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tp):
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return all_reduce(gradient, ctx.tp), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tp):
        return all_reduce(x, tp)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class _Gather(torch.autograd.Function):
    """Joins equal parts at `dim`; the gradient of the whole is summed over ranks and cut again."""

    @staticmethod
    def forward(ctx, x, dim, tp):
        ctx.dim, ctx.tp = dim, tp
        return all_gather(x, dim, tp)

    @staticmethod
    def backward(ctx, gradient):
        return _reduce_scatter(gradient, ctx.dim, ctx.tp), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, tp):
        ctx.dim, ctx.tp = dim, tp
        return _reduce_scatter(x, dim, tp)

    @staticmethod
    def backward(ctx, gradient):
        # Two matrix products read it.
        return all_gather(gradient, ctx.dim, ctx.tp).contiguous(), None, None


class _Scatter(torch.autograd.Function):
    """Keeps this rank's part of what all ranks hold alike; the gradient is joined again."""

    @staticmethod
    def forward(ctx, x, dim, tp):
        ctx.dim, ctx.tp = dim, tp
        return x.chunk(tp.size, dim)[tp.rank].contiguous()

    @staticmethod
    def backward(ctx, gradient):
        return all_gather(gradient, ctx.dim, ctx.tp), None, None


def _reduce_scatter(x: torch.Tensor, dim: int, tp: TensorGroup) -> torch.Tensor:
    rows = x.movedim(dim, 0).contiguous()
    part = rows.new_empty((rows.shape[0] // tp.size, *rows.shape[1:]))
    dist.reduce_scatter_tensor(part, rows, group=tp.group)
    return part.movedim(0, dim)


def enter(x: torch.Tensor, tp: TensorGroup) -> torch.Tensor:
    """Into a region: (batch, seq, hidden), whole on every rank; the gradient comes out summed over ranks."""
    if tp.size == 1:
        return x
    # What is gathered lies sequence first: copied once here, where several matrices read it.
    return _Gather.apply(x, SEQUENCE, tp).contiguous() if tp.sequence_parallel else _Copy.apply(x, tp)


def leave(x: torch.Tensor, tp: TensorGroup) -> torch.Tensor:
    """Out of a region: partial sums (batch, seq, hidden) become sums, cut along the sequence where that is asked."""
    if tp.size == 1:
        return x
    return _ReduceScatter.apply(x, SEQUENCE, tp) if tp.sequence_parallel else _Reduce.apply(x, tp)


def reduce_sum(x: torch.Tensor, tp: TensorGroup) -> torch.Tensor:
    """Partial sums become sums on every rank; the gradient passes."""
    return x if tp.size == 1 else _Reduce.apply(x, tp)


def shared(parameter: torch.Tensor, tp: TensorGroup) -> torch.Tensor:
    """A parameter that all ranks hold alike, where each uses it on its own part: its gradient comes out complete."""
    return parameter if tp.size == 1 else _Copy.apply(parameter, tp)


def gather(x: torch.Tensor, dim: int, tp: TensorGroup) -> torch.Tensor:
    """Equal parts joined at `dim`, for a use that differs by rank; the gradient is summed and cut again."""
    return x if tp.size == 1 else _Gather.apply(x, dim, tp)


def scatter_sequence(x: torch.Tensor, tp: TensorGroup) -> torch.Tensor:
    """(batch, seq, hidden) held alike by all ranks becomes this rank's part of the sequence."""
    return _Scatter.apply(x, SEQUENCE, tp) if tp.size > 1 and tp.sequence_parallel else x
