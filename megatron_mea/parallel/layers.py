"""The building blocks that hold parameters: linear map, embedding, RMSNorm, and losses over a cut vocabulary."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megatron_mea.data.corpora import IGNORE
from megatron_mea.parallel.collectives import all_reduce, leave, reduce_sum, shared
from megatron_mea.parallel.grid import ALONE, TensorGroup
from megatron_mea.parallel.parameter import constant, declare, normal


class Linear(nn.Module):
    """y = x W^T (+ b), with W (out_features, in_features) as Hugging Face stores it.

    Args:
        shard_dim: 0 cuts the outputs over the tensor group (the bias too), 1 the inputs, so that outputs are
            partial sums. The caller enters and leaves the tensor-parallel region.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        std: float,
        bias: bool = False,
        tp: TensorGroup = ALONE,
        shard_dim: int | None = None,
    ) -> None:
        super().__init__()
        assert not (bias and shard_dim == 1), "a bias behind partial sums would be added once a rank"
        self.weight = declare(f"{name}.weight", (out_features, in_features), "matrix", normal(std), tp, shard_dim)
        self.bias = None
        if bias:
            self.bias = declare(f"{name}.bias", (out_features,), "vector", constant(0.0), tp, shard_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """Token embedding (vocab_size, hidden_size), its rows cut over the tensor group."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, std: float, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        self.tp, self.rows = tp, tp.span(vocab_size)
        self.weight = declare(f"{name}.weight", (vocab_size, hidden_size), "matrix", normal(std), tp, 0)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(batch, seq) -> (batch, seq, hidden), cut along the sequence with sequence parallelism"""
        if self.tp.size == 1:
            return F.embedding(input_ids, self.weight)
        mine = (input_ids >= self.rows.start) & (input_ids < self.rows.stop)
        found = F.embedding((input_ids - self.rows.start) * mine, self.weight)
        return leave(found * mine.unsqueeze(-1), self.tp)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension; torch sums 16-bit inputs in float32.

    Args:
        partial: whether each rank of the tensor group applies it to other features or tokens, so that the
            gain's gradient must be summed over them.
    """

    def __init__(
        self,
        name: str,
        size: int,
        eps: float,
        gain: float = 1.0,
        affine: bool = True,
        tp: TensorGroup = ALONE,
        partial: bool = False,
    ) -> None:
        super().__init__()
        self.size, self.eps, self.tp, self.partial = size, eps, tp, partial
        self.weight = declare(f"{name}.weight", (size,), "vector", constant(gain), tp) if affine else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (self.size,), self.gain(), self.eps)

    def gain(self) -> torch.Tensor | None:
        """(size,), whose gradient is complete on every rank."""
        return shared(self.weight, self.tp) if self.weight is not None and self.partial else self.weight


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, tp: TensorGroup) -> torch.Tensor:
    """Sum of the cross-entropies (nats) of all targets that are not `IGNORE`.

    Gathered logits never exist: ranks exchange the largest logit, the sum of exponentials and the target's logit
    of each token.

    Args:
        logits: (tokens, this rank's part of the vocabulary), float32 or more.
        targets: (tokens,)
    """
    if tp.size == 1:
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    rows = tp.span(vocab_size)
    largest = all_reduce(logits.amax(-1), tp, dist.ReduceOp.MAX)
    shifted = logits - largest.unsqueeze(-1)
    total = reduce_sum(shifted.exp().sum(-1), tp)
    mine = (targets >= rows.start) & (targets < rows.stop)
    column = ((targets - rows.start) * mine).unsqueeze(-1)
    target = reduce_sum(shifted.gather(-1, column).squeeze(-1) * mine, tp)
    return ((total.log() - target) * (targets != IGNORE)).sum()


def divergence_sum(
    logits: torch.Tensor, theirs: torch.Tensor, targets: torch.Tensor, temperature: float, tp: TensorGroup
) -> torch.Tensor:
    """Sum of KL(softmax(theirs / T) || softmax(logits / T)) (nats) over all tokens whose target is not `IGNORE`.

    The soft targets of distillation (Hinton et al. 2015, arXiv 1503.02531, section 2), without the factor T^2. Gathered
    logits never exist: ranks exchange the largest logits, the sums of exponentials and the divergence of each token.

    Args:
        logits: (tokens, this rank's part of the vocabulary), float32 or more.
        theirs: the same of the teacher, of any precision; it gets no gradient.
        targets: (tokens,)
        temperature: T.
    """
    return (_Divergence.apply(logits, theirs, temperature, tp) * (targets != IGNORE)).sum()


class _Divergence(torch.autograd.Function):
    """(tokens, part), (tokens, part) -> (tokens,), equal on all ranks.

    Of all that it computes it keeps the gradient alone, (softmax(logits / T) - softmax(theirs / T)) / T.
    """

    @staticmethod
    def forward(ctx, logits, theirs, temperature, tp):
        log_q, log_p = (_log_softmax(each.to(logits.dtype) / temperature, tp) for each in (logits, theirs))
        p = log_p.exp()
        divergence = all_reduce(log_p.sub_(log_q).mul_(p).sum(-1), tp)
        ctx.save_for_backward(log_q.exp_().sub_(p))
        ctx.temperature = temperature
        return divergence

    @staticmethod
    def backward(ctx, gradient):
        (difference,) = ctx.saved_tensors
        return difference * (gradient / ctx.temperature).unsqueeze(-1), None, None, None


def _log_softmax(logits: torch.Tensor, tp: TensorGroup) -> torch.Tensor:
    """In place, over the parts of all ranks; without a gradient."""
    logits.sub_(all_reduce(logits.amax(-1), tp, dist.ReduceOp.MAX).unsqueeze(-1))
    return logits.sub_(all_reduce(logits.exp().sum(-1), tp).log_().unsqueeze(-1))
