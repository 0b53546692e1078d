"""Collectives with gradients over tensor groups, after Megatron-LM (arXiv 1909.08053, 2205.05198), and context groups.

Inside a tensor-parallel region every rank computes with its shard of a matrix. A gradient that leaves the region is
the sum over the ranks, so `enter_tp_region` is the identity forward and an all-reduce backward, and `exit_tp_region`
the other way round (Megatron's copy_to and reduce_from). With sequence parallelism they are an all-gather and a
reduce-scatter along the sequence. All are the identity in a group of one. They call torch.distributed directly, since
the compiler turns those calls into its own; behind a wrapper gradients would be lost.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_mea.parallel.grid import ContextGroup, TensorGroup

SEQUENCE_DIM = 1
"""The dimension of (batch, seq, hidden) that sequence parallelism shards."""


def all_reduce(
    x: torch.Tensor, *, over: TensorGroup | ContextGroup, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> torch.Tensor:
    """Returns a copy of `x` reduced over a group; no gradient passes."""
    x = x.detach().contiguous().clone()
    if over.size > 1:
        dist.all_reduce(x, op=op, group=over.group)

    return x


def all_gather(x: torch.Tensor, *, dim: int, tp: TensorGroup) -> torch.Tensor:
    """Concatenates the equally large shards of all ranks along `dim`; no gradient passes."""
    # The collective concatenates along the first dimension.
    shard = x.detach().movedim(dim, 0).contiguous()
    full = shard.new_empty((tp.size * shard.shape[0], *shard.shape[1:]))
    dist.all_gather_into_tensor(full, shard, group=tp.group)
    return full.movedim(0, dim)


class _CopyToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tp):
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return all_reduce(gradient, over=ctx.tp), None


class _ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tp):
        return all_reduce(x, over=tp)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class _GatherFromRegion(torch.autograd.Function):
    """All-gather of equally large shards along `dim`; the gradient is reduce-scattered."""

    @staticmethod
    def forward(ctx, x, dim, tp):  # noqa: PLR0917 - torch passes by position
        ctx.dim, ctx.tp = dim, tp
        return all_gather(x, dim=dim, tp=tp)

    @staticmethod
    def backward(ctx, gradient):
        return _reduce_scatter(gradient, dim=ctx.dim, tp=ctx.tp), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, tp):  # noqa: PLR0917 - torch passes by position
        ctx.dim, ctx.tp = dim, tp
        return _reduce_scatter(x, dim=dim, tp=tp)

    @staticmethod
    def backward(ctx, gradient):
        # Contiguous, since two matrix products read it.
        return all_gather(gradient, dim=ctx.dim, tp=ctx.tp).contiguous(), None, None


def _reduce_scatter(x: torch.Tensor, *, dim: int, tp: TensorGroup) -> torch.Tensor:
    """Sums `x` over the tensor group and returns this rank's shard of the sum along `dim`."""
    full = x.movedim(dim, 0).contiguous()
    shard = full.new_empty((full.shape[0] // tp.size, *full.shape[1:]))
    dist.reduce_scatter_tensor(shard, full, group=tp.group)
    return shard.movedim(0, dim)


def enter_tp_region(x: torch.Tensor, tp: TensorGroup) -> torch.Tensor:
    """Returns (batch, seq, hidden) in full on every rank; its gradient is summed over the tensor group.

    Megatron's copy_to_tensor_model_parallel_region, or gather_from_sequence_parallel_region with sequence parallelism.
    """
    if tp.size == 1:
        return x

    # The gathered tensor lies sequence first: copied once here, where several matrices read it.
    return (
        _GatherFromRegion.apply(x, SEQUENCE_DIM, tp).contiguous()
        if tp.sequence_parallel
        else _CopyToRegion.apply(x, tp)
    )


def exit_tp_region(x: torch.Tensor, tp: TensorGroup) -> torch.Tensor:
    """Sums partial results (batch, seq, hidden) over the tensor group; sequence parallelism shards the sum.

    Megatron's reduce_from_tensor_model_parallel_region, or reduce_scatter_to_sequence_parallel_region.
    """
    if tp.size == 1:
        return x

    return _ReduceScatter.apply(x, SEQUENCE_DIM, tp) if tp.sequence_parallel else _ReduceFromRegion.apply(x, tp)


def reduce_from_tp_region(x: torch.Tensor, tp: TensorGroup) -> torch.Tensor:
    """Sums `x` over the tensor group on every rank; the gradient passes unchanged."""
    return x if tp.size == 1 else _ReduceFromRegion.apply(x, tp)


def copy_to_tp_region(parameter: torch.Tensor, tp: TensorGroup) -> torch.Tensor:
    """Returns a replicated parameter that each rank uses on its own shard; its gradient is summed over the ranks."""
    return parameter if tp.size == 1 else _CopyToRegion.apply(parameter, tp)


def gather_from_tp_region(x: torch.Tensor, *, dim: int, tp: TensorGroup) -> torch.Tensor:
    """Concatenates equal shards along `dim`, for a use that differs by rank; the gradient is reduce-scattered."""
    return x if tp.size == 1 else _GatherFromRegion.apply(x, dim, tp)


def gather_from_cp_region(x: torch.Tensor, cp: ContextGroup) -> torch.Tensor:
    """(batch, heads, this rank's tokens, d) -> (batch, heads, seq, d), all tokens in their order, on every rank.

    The gradient is summed over the context group and reduce-scattered.
    """
    return x if cp.size == 1 else _GatherTokens.apply(x, cp)


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cp):
        ctx.cp = cp
        batch, heads, tokens, dim = x.shape
        # gloo wants as many dimensions as its input has.
        shards = x.new_empty(cp.size * batch, heads, tokens, dim)
        dist.all_gather_into_tensor(shards, x.contiguous(), group=cp.group)

        # shape: (c batch, heads, seq / c, d) -> (c, batch, heads, 2, chunk, d)
        shards = shards.view(cp.size, batch, heads, 2, tokens // 2, dim)
        first_half, second_half = shards[:, :, :, 0].unbind(0), shards[:, :, :, 1].unbind(0)
        return torch.cat([*first_half, *reversed(second_half)], dim=2)

    @staticmethod
    def backward(ctx, gradient):
        cp = ctx.cp
        batch, heads, seq, dim = gradient.shape
        chunks = gradient.chunk(2 * cp.size, dim=2)
        shards = gradient.new_empty(cp.size, batch, heads, 2, seq // (2 * cp.size), dim)
        for rank, rank_shards in enumerate(shards):
            rank_shards[:, :, 0], rank_shards[:, :, 1] = chunks[rank], chunks[-1 - rank]

        shard = gradient.new_empty(batch, heads, seq // cp.size, dim)
        dist.reduce_scatter_tensor(shard, shards.view(cp.size * batch, *shard.shape[1:]), group=cp.group)
        return shard, None
