"""The building blocks that hold parameters: linear map, embedding, RMSNorm, and losses over a sharded vocabulary."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megatron_mea.data.corpora import IGNORE_INDEX
from megatron_mea.parallel.collectives import all_reduce, copy_to_tp_region, exit_tp_region, reduce_from_tp_region
from megatron_mea.parallel.grid import NO_TP, TensorGroup
from megatron_mea.parallel.parameter import Component, constant, normal, sharded_parameter


class Linear(nn.Module):
    """y = x W^T (+ b), with W (out_features, in_features) as Hugging Face stores it.

    Args:
        shard_dim: 0 shards the outputs over the tensor group (the bias too), 1 the inputs, so that outputs are
            partial sums. The caller enters and exits the tensor-parallel region.
    """

    def __init__(
        self,
        *,
        name: str,
        component: Component,
        in_features: int,
        out_features: int,
        std: float,
        bias: bool = False,
        tp: TensorGroup = NO_TP,
        shard_dim: int | None = None,
    ) -> None:
        super().__init__()
        assert not (bias and shard_dim == 1), "a bias behind partial sums would be added once a rank"

        self.weight = sharded_parameter(
            name=f"{name}.weight",
            global_shape=(out_features, in_features),
            component=component,
            kind="matrix",
            initialize=normal(std),
            tp=tp,
            shard_dim=shard_dim,
        )
        self.bias = None
        if bias:
            self.bias = sharded_parameter(
                name=f"{name}.bias",
                global_shape=(out_features,),
                component=component,
                kind="vector",
                initialize=constant(0.0),
                tp=tp,
                shard_dim=shard_dim,
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features), or this rank's shards of both."""
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """Token embedding (vocab_size, hidden_size), its rows sharded over the tensor group."""

    def __init__(self, *, name: str, vocab_size: int, hidden_size: int, std: float, tp: TensorGroup = NO_TP) -> None:
        super().__init__()
        self.tp, self.rows = tp, tp.local_range(vocab_size)
        self.weight = sharded_parameter(
            name=f"{name}.weight",
            global_shape=(vocab_size, hidden_size),
            component="embedding",
            kind="matrix",
            initialize=normal(std),
            tp=tp,
            shard_dim=0,
        )

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(batch, seq) -> (batch, seq, hidden), sharded along the sequence with sequence parallelism"""
        if self.tp.size == 1:
            return F.embedding(input_ids, self.weight)

        # Tokens of other ranks' rows look up row 0, and count as zero in the sum.
        is_local = (input_ids >= self.rows.start) & (input_ids < self.rows.stop)
        rows = F.embedding((input_ids - self.rows.start) * is_local, self.weight)
        return exit_tp_region(rows * is_local.unsqueeze(-1), self.tp)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension; torch sums 16-bit inputs in float32.

    Args:
        gain: initial value of the weight.
        affine: whether there is a weight.
        reduce_weight_grad: whether each rank of the tensor group applies it to other features or tokens, so that the
            weight's gradient must be summed over them.
    """

    def __init__(
        self,
        *,
        name: str,
        size: int,
        eps: float,
        gain: float = 1.0,
        affine: bool = True,
        tp: TensorGroup = NO_TP,
        reduce_weight_grad: bool = False,
    ) -> None:
        super().__init__()
        self.size, self.eps, self.tp, self.reduce_weight_grad = size, eps, tp, reduce_weight_grad
        self.weight = (
            sharded_parameter(
                name=f"{name}.weight",
                global_shape=(size,),
                component="norm",
                kind="vector",
                initialize=constant(gain),
                tp=tp,
            )
            if affine
            else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., size) -> (..., size)"""
        return F.rms_norm(x, (self.size,), self.gain(), self.eps)

    def gain(self) -> torch.Tensor | None:
        """Returns the weight (size,), with a gradient that is complete on every rank; None if not affine."""
        return (
            copy_to_tp_region(self.weight, self.tp)
            if self.weight is not None and self.reduce_weight_grad
            else self.weight
        )


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor, *, vocab_size: int, tp: TensorGroup) -> torch.Tensor:
    """Sum of the cross-entropies (nats) of all targets that are not `IGNORE_INDEX`; a scalar.

    Logits are never gathered: ranks exchange the largest logit, the sum of exponentials and the target's logit
    of each token.

    Args:
        logits: (tokens, this rank's shard of the vocabulary), float32 or more.
        targets: (tokens,) token ids.
    """
    if tp.size == 1:
        return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")

    rows = tp.local_range(vocab_size)
    largest = all_reduce(logits.amax(-1), over=tp, op=dist.ReduceOp.MAX)
    shifted = logits - largest.unsqueeze(-1)
    sum_exp = reduce_from_tp_region(shifted.exp().sum(-1), tp)

    is_local = (targets >= rows.start) & (targets < rows.stop)
    column = ((targets - rows.start) * is_local).unsqueeze(-1)
    target_logit = reduce_from_tp_region(shifted.gather(-1, column).squeeze(-1) * is_local, tp)
    return ((sum_exp.log() - target_logit) * (targets != IGNORE_INDEX)).sum()


def kl_divergence_sum(
    logits: torch.Tensor, teacher_logits: torch.Tensor, targets: torch.Tensor, *, temperature: float, tp: TensorGroup
) -> torch.Tensor:
    """Sum of KL(softmax(teacher_logits / T) || softmax(logits / T)) (nats); a scalar.

    The soft targets of distillation (Hinton et al. 2015, arXiv 1503.02531, section 2), without the factor T^2; tokens
    whose target is `IGNORE_INDEX` do not count. Logits are never gathered: ranks exchange the largest logits, the sums
    of exponentials and the divergence of each token.

    Args:
        logits: (tokens, this rank's shard of the vocabulary), float32 or more.
        teacher_logits: the teacher's, of the same shape and any dtype; no gradient.
        targets: (tokens,) token ids.
        temperature: T.
    """
    return (_KLDivergence.apply(logits, teacher_logits, temperature, tp) * (targets != IGNORE_INDEX)).sum()


class _KLDivergence(torch.autograd.Function):
    """(tokens, shard of the vocabulary), twice -> (tokens,), equal on all ranks.

    Saves only the gradient for backward, (softmax(logits / T) - softmax(teacher_logits / T)) / T.
    """

    @staticmethod
    def forward(ctx, logits, teacher_logits, temperature, tp):  # noqa: PLR0917 - torch passes by position
        log_q = _log_softmax_(logits / temperature, tp)
        log_p = _log_softmax_(teacher_logits.to(logits.dtype) / temperature, tp)
        p = log_p.exp()
        divergence = all_reduce(log_p.sub_(log_q).mul_(p).sum(-1), over=tp)
        ctx.save_for_backward(log_q.exp_().sub_(p))
        ctx.temperature = temperature
        return divergence

    @staticmethod
    def backward(ctx, gradient):
        (difference,) = ctx.saved_tensors
        return difference * (gradient / ctx.temperature).unsqueeze(-1), None, None, None


def _log_softmax_(logits: torch.Tensor, tp: TensorGroup) -> torch.Tensor:
    """Turns logits (tokens, shard of the vocabulary) into log-probabilities in place; no gradient passes."""
    logits.sub_(all_reduce(logits.amax(-1), over=tp, op=dist.ReduceOp.MAX).unsqueeze(-1))
    return logits.sub_(all_reduce(logits.exp().sum(-1), over=tp).log_().unsqueeze(-1))
