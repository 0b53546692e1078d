"""Head-level linear combination, HLC (paper section 4.1): composite heads out of component heads.

Two forms, equal by associativity (eq. 18): on activations, `combine_heads`, or on the projection weights,
`fold_weight`. `HeadProjection` projects a hidden state to the composite heads of its rank in the cheaper of the two. A
folded weight can serve more than one pass: attention/folds.py.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from megatron_mea.parallel.collectives import gather, shared
from megatron_mea.parallel.grid import ALONE, TensorGroup
from megatron_mea.parallel.parameter import Initializer, constant, declare, normal


def combine_heads(components: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Eq. 10 on activations: composite_j = sum_c weight[c, j] component_c.

    Args:
        components: (batch, seq, h', d)
        weight: (h', h)

    Returns:
        (batch, h, seq, d); heads first, as attention wants them: one copy and one matrix product, which was
        measured as the fastest form and saves no more for the backward pass than the components.
    """
    batch, seq, count, dim = components.shape
    # shape: (batch, seq, h', d) -> (h', batch seq d)
    rows = components.permute(2, 0, 1, 3).reshape(count, batch * seq * dim)
    # shape: (h, h') @ (h', batch seq d) -> (h, batch, seq, d) -> (batch, h, seq, d)
    return (weight.t() @ rows).view(-1, batch, seq, dim).transpose(0, 1)


def fold_weight(projection: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Eq. 18, on a projection's weight or bias: the rows of composite head j are sum_c weight[c, j] rows_c.

    Computed in float32 at least and rounded once: in bfloat16 this has one rounding fewer than combining
    activations. Keeps nothing for the backward pass but its arguments.

    Args:
        projection: (h' d, hidden) or (h' d,)
        weight: (h', h)

    Returns:
        (h d, hidden) or (h d,)
    """
    return _Fold.apply(projection, weight)


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projection: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(projection, weight)
        folded = _accurate(weight).t() @ _accurate(projection).reshape(weight.shape[0], -1)
        return folded.to(projection.dtype).view(-1, *projection.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        projection, weight = ctx.saved_tensors
        # shape: (h d, hidden) -> (h, d hidden)
        gradient = _accurate(gradients[0]).reshape(weight.shape[1], -1)
        d_projection = (_accurate(weight) @ gradient).view(projection.shape).to(projection.dtype)
        d_weight = _accurate(projection).reshape(weight.shape[0], -1) @ gradient.t()
        return d_projection, d_weight.to(weight.dtype)


def _accurate(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def folding_is_cheaper(
    tokens: int, hidden_size: int, num_components: int, num_composites: int, tensor_parallel_size: int
) -> bool:
    """Whether to fold rather than to combine activations.

    On one rank the multiplications decide, the projection included. Per feature of a head folding takes
    h hidden (h' + tokens), combining tokens h' (hidden + h): so it pays with h' = h from `hidden_size` tokens on, and
    practically never where h' < h, since then activations also shrink the projection. On several ranks
    communication decides: folding gathers hidden h' d numbers, combining tokens h' d.
    """
    if tensor_parallel_size > 1:
        return tokens > hidden_size
    fold = num_composites * hidden_size * (num_components + tokens)
    combine = tokens * num_components * (hidden_size + num_composites)
    return fold < combine


def folding_serves_a_step(
    micro_batches: int, tokens: int, hidden_size: int, tensor: int, pipeline: int, zero_stage: int
) -> bool:
    """Whether one fold for all micro-batches of a step pays (attention/folds.py).

    Over a tensor group it gathers hidden h' d numbers a step, where combining activations gathers tokens h' d for each
    micro-batch. Not where gradients are partitioned as they appear (ZeRO 2 and 3), so that they cannot wait for the
    last micro-batch, nor in a pipeline, whose micro-batches overlap.

    Args:
        tokens: of a micro-batch.
    """
    possible = tensor > 1 and pipeline == 1 and zero_stage <= 1 and micro_batches > 1
    return possible and micro_batches * tokens > hidden_size


class Folded(NamedTuple):
    """A projection that makes this rank's composite heads at once: (h d, hidden), and (h d,) or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


Form = Literal["plain", "folded", "combined"]


class HeadProjection(nn.Module):
    """From a hidden state to this rank's key or value heads: a component projection and, with `hlc`, its combination.

    Over a tensor group of t ranks, which hold the query heads in equal parts (t divides h, or h divides t):
    the combination is cut by columns with the composite heads where t divides h; otherwise it is whole on every rank,
    which uses the column of its one composite head. The projection is cut evenly along h' d where t divides
    that, across heads if need be, and whole otherwise; what is needed of it is gathered as weights or as activations.

    Args:
        layer: the name of the attention layer; names follow as `LAYER.k_proj` and `LAYER.hlc_k` for `which` = "k".
        hlc: start of the combination, a key of `STARTS`; None for heads that are used as they are (h' = h).
    """

    def __init__(
        self,
        layer: str,
        which: str,
        hidden_size: int,
        num_components: int,
        num_composites: int,
        head_dim: int,
        std: float,
        bias: bool,
        hlc: str | None,
        tp: TensorGroup = ALONE,
    ) -> None:
        super().__init__()
        self.tp, self.hidden_size, self.head_dim = tp, hidden_size, head_dim
        self.num_components, self.num_composites = num_components, num_composites
        rows = num_components * head_dim
        cut = 0 if rows % tp.size == 0 else None
        name = f"{layer}.{which}_proj"
        self.weight = declare(f"{name}.weight", (rows, hidden_size), "matrix", normal(std), tp, cut)
        self.bias = declare(f"{name}.bias", (rows,), "vector", constant(0.0), tp, cut) if bias else None
        self.own_columns = num_composites % tp.size == 0
        self.hlc = None
        if hlc is not None:
            shape, cut = (num_components, num_composites), 1 if self.own_columns else None
            self.hlc = declare(f"{layer}.hlc_{which}.weight", shape, "hlc", STARTS[hlc], tp, cut)

    def forward(self, hidden_states: torch.Tensor, folded: Folded | None = None) -> torch.Tensor:
        """(batch, seq, hidden), whole on every rank, -> (batch, this rank's heads, seq, d)

        Args:
            folded: what `fold` has returned; None for whichever form is the cheapest.
        """
        batch, seq, _ = hidden_states.shape
        form = "folded" if folded else self.form(batch * seq)
        if form == "folded":
            return self._heads(hidden_states, *(folded or self.fold()))
        return self._plain(hidden_states) if form == "plain" else self._combined(hidden_states)

    def form(self, tokens: int) -> Form:
        """The cheapest for this many tokens."""
        if self.hlc is None:
            return "plain"
        sizes = (tokens, self.hidden_size, self.num_components, self.num_composites, self.tp.size)
        return "folded" if folding_is_cheaper(*sizes) else "combined"

    def fold(self) -> Folded:
        """The combination on weights: component projections are gathered."""
        columns = self._columns()
        weight, bias = self._whole()
        return Folded(fold_weight(weight, columns), None if bias is None else fold_weight(bias, columns))

    def _combined(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The combination on activations: component heads are gathered."""
        batch, seq, _ = hidden_states.shape
        if self._is_cut:
            heads = gather(F.linear(hidden_states, self.weight, self.bias), -1, self.tp)
        else:
            heads = F.linear(hidden_states, *self._whole())
        return combine_heads(heads.view(batch, seq, self.num_components, self.head_dim), self._columns())

    def _plain(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Without a combination: the projection's own heads."""
        if self.own_columns:
            return self._heads(hidden_states, self.weight, self.bias)
        weight, bias = self._whole()
        start = self._composite * self.head_dim
        mine = slice(start, start + self.head_dim)
        return self._heads(hidden_states, weight[mine], None if bias is None else bias[mine])

    def _heads(self, hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        batch, seq, _ = hidden_states.shape
        return F.linear(hidden_states, weight, bias).view(batch, seq, -1, self.head_dim).transpose(1, 2)

    @property
    def _is_cut(self) -> bool:
        return self.tp.size > 1 and self.weight.spec.shard_dim is not None

    @property
    def _composite(self) -> int:
        """The composite head of this rank, where there are more ranks than composite heads."""
        return self.tp.rank * self.num_composites // self.tp.size

    def _columns(self) -> torch.Tensor:
        """(h', this rank's composite heads) of the combination."""
        assert self.hlc is not None
        if self.own_columns:
            return self.hlc
        return shared(self.hlc, self.tp)[:, self._composite : self._composite + 1]

    def _whole(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All rows of weight and bias, for a use that differs by rank."""
        if self._is_cut:
            return gather(self.weight, 0, self.tp), None if self.bias is None else gather(self.bias, 0, self.tp)
        return shared(self.weight, self.tp), None if self.bias is None else shared(self.bias, self.tp)


def block_start(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Composite j starts as component floor(j h' / h): the identity where h' = h, grouped queries where h' < h."""
    components, composites = shape
    weight = torch.zeros(shape)
    weight[torch.arange(composites) * components // composites, torch.arange(composites)] = 1.0
    return weight


def orthogonal_start(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Orthogonal rows, scaled by sqrt(h / h') so that a composite head keeps a component's expected size."""
    components, composites = shape
    rotation, upper = torch.linalg.qr(torch.randn(composites, composites, generator=generator))
    # The signs make the rotation uniform (Haar) and independent of the QR implementation's convention.
    return (rotation * upper.diagonal().sign())[:components] * math.sqrt(composites / components)


def normal_start(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Independent normal entries of variance 1 / h'."""
    return torch.randn(shape, generator=generator) * shape[0] ** -0.5


STARTS: dict[str, Initializer] = {
    "block": block_start,
    "orthogonal": orthogonal_start,
    "normal": normal_start,
}
