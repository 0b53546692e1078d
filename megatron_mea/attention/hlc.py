"""Head-level linear combination, HLC (paper section 4.1): composite heads out of component heads.

Two forms, equal by associativity (eq. 18): on activations, `combine_heads`, or on the projection weights,
`fold_weight`. `HeadProjection` projects a hidden state to the composite heads of its rank in the cheaper form. A
folded weight can serve several passes: attention/folds.py. Another combination is attention/latent.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from megatron_mea.exported.rotary_mea import apply_rotary
from megatron_mea.parallel.collectives import copy_to_tp_region, gather_from_tp_region
from megatron_mea.parallel.grid import NO_TP, TensorGroup
from megatron_mea.parallel.layers import Linear
from megatron_mea.parallel.parameter import Initializer, sharded_parameter


def combine_heads(components: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Eq. 10 on activations: composite_j = sum_c weight[c, j] component_c.

    Args:
        components: (batch, seq, h', d)
        weight: (h', h)

    Returns:
        (batch, h, seq, d); heads first, as attention takes them: one copy and one matrix product, which was
        measured as the fastest way and saves no more for backward than the components.
    """
    batch, seq, count, dim = components.shape
    # shape: (batch, seq, h', d) -> (h', batch seq d)
    rows = components.permute(2, 0, 1, 3).reshape(count, batch * seq * dim)
    # shape: (h, h') @ (h', batch seq d) -> (h, batch, seq, d) -> (batch, h, seq, d)
    return (weight.t() @ rows).view(-1, batch, seq, dim).transpose(0, 1)


def fold_weight(projection: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Eq. 18, on a projection's weight or bias: the rows of composite head j are sum_c weight[c, j] rows_c.

    Computed in float32 at least and rounded once: in bfloat16 this has one rounding fewer than combining
    activations. Only the arguments are saved for backward.

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
        folded = _at_least_float32(weight).t() @ _at_least_float32(projection).reshape(weight.shape[0], -1)
        return folded.to(projection.dtype).view(-1, *projection.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        projection, weight = ctx.saved_tensors
        # shape: (h d, hidden) -> (h, d hidden)
        gradient = _at_least_float32(gradients[0]).reshape(weight.shape[1], -1)
        d_projection = (_at_least_float32(weight) @ gradient).view(projection.shape).to(projection.dtype)
        d_weight = _at_least_float32(projection).reshape(weight.shape[0], -1) @ gradient.t()
        return d_projection, d_weight.to(weight.dtype)


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def folding_is_cheaper(
    *, tokens: int, hidden_size: int, num_components: int, num_composites: int, tensor_parallel_size: int
) -> bool:
    """Whether folding the weights is cheaper than combining activations.

    On one rank the multiplications decide, the projection included. Per feature of a head folding takes
    h hidden (h' + tokens), combining tokens h' (hidden + h): so it pays with h' = h from `hidden_size` tokens on, and
    practically never where h' < h, since then activations also shrink the projection. On several ranks
    communication decides: folding gathers hidden h' d elements, combining tokens h' d.
    """
    if tensor_parallel_size > 1:
        return tokens > hidden_size

    folding_cost = num_composites * hidden_size * (num_components + tokens)
    combining_cost = tokens * num_components * (hidden_size + num_composites)
    return folding_cost < combining_cost


def components_are_fewer(*, num_components: float, num_composites: int, tensor_parallel_size: int) -> bool:
    """Whether a rank needs fewer component heads, or features of as many, than it has composite heads.

    Then a context group gathers component heads, h' / (h / t) of the traffic, and each rank combines those of all
    tokens, which costs 2 h' h d / t multiplications a token: little beside attention to as many tokens.
    """
    return num_components < num_composites // tensor_parallel_size


class FoldedProjection(NamedTuple):
    """A projection straight to this rank's composite heads: weight (h d, hidden), and bias (h d,) or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


Form = Literal["plain", "folded", "combined", "components"]
"""How heads are computed: without a combination, by a folded weight, by combining component heads, or not yet: as
component heads that are combined after a context group has gathered them."""


class KeyValueProjection(Linear, ABC):
    """Projects a hidden state to this rank's key or value heads through components, which a subclass combines.

    Over a tensor group of t ranks with equal numbers of query heads (t divides h, or h divides t), the combination is
    sharded by composite heads where t divides h; otherwise every rank holds it in full and uses the part of its one
    composite head. The projection is sharded evenly along its rows where t divides them, even within a head, and
    replicated otherwise; it is gathered as weights or as activations.

    Args:
        layer: the name of the attention layer; parameters are called `LAYER.k_proj` and `LAYER.hlc_k` for `side` = "k".
        side: "k" for keys or "v" for values.
        rows: features of all components together.

    Attributes:
        hlc: the combination; None where there is none.
        gathers_components: whether `forward` returns components, which `combine` takes once a context group has
            gathered them; the attention layer decides.
    """

    def __init__(
        self,
        *,
        layer: str,
        side: str,
        hidden_size: int,
        rows: int,
        num_composites: int,
        head_dim: int,
        std: float,
        bias: bool,
        tp: TensorGroup = NO_TP,
    ) -> None:
        super().__init__(
            name=f"{layer}.{side}_proj",
            component="attention",
            in_features=hidden_size,
            out_features=rows,
            std=std,
            bias=bias,
            tp=tp,
            shard_dim=0 if rows % tp.size == 0 else None,
        )
        self.tp, self.hidden_size, self.rows = tp, hidden_size, rows
        self.head_dim, self.num_composites = head_dim, num_composites
        self.gathers_components = False
        self.shards_composites = num_composites % tp.size == 0
        self.hlc: nn.Parameter | None = None

    def forward(self, hidden_states: torch.Tensor, folded: FoldedProjection | None = None) -> torch.Tensor:
        """(batch, seq, hidden), in full on every tensor rank -> (batch, this rank's heads, seq, d)

        Args:
            folded: the result of `fold`; None chooses the cheapest form.
        """
        batch, seq, _ = hidden_states.shape
        form = "folded" if folded else self.form(batch * seq)
        if form == "folded":
            folded = folded or self.fold()
            return self._project(hidden_states, weight=folded.weight, bias=folded.bias)
        if form == "plain":
            return self._forward_plain(hidden_states)

        components = self._split(self._forward_components(hidden_states))
        return components.transpose(1, 2) if form == "components" else self._combine(components)

    def form(self, tokens: int) -> Form:
        """The cheapest form for this many tokens."""
        if self.hlc is None:
            return "plain"
        if self.gathers_components:
            return "components"

        return "folded" if self._folding_is_cheaper(tokens) else "combined"

    def combine(self, components: torch.Tensor) -> torch.Tensor:
        """Components as `forward` returns them -> (batch, this rank's composite heads, seq, d)

        Outside of this module's forward, so with ZeRO 3 for combinations that it never partitions alone
        (`PERSISTENCE_THRESHOLD`).
        """
        return self._combine(components.transpose(1, 2))

    def rotate(self, components: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """RoPE on components as `forward` returns them, with cos and sin (batch, 1, seq, d)."""
        return apply_rotary(components, cos, sin)

    def fold(self) -> FoldedProjection:
        """Applies the combination to the projection's weights, which are gathered if sharded."""
        matrix = self._columns()
        weight, bias = self._full_projection()
        folded_bias = None if bias is None else fold_weight(bias, matrix)
        return FoldedProjection(fold_weight(weight, matrix), folded_bias)

    @abstractmethod
    def _folding_is_cheaper(self, tokens: int) -> bool:
        """Whether `folded` is the cheaper form for this many tokens."""

    @abstractmethod
    def _split(self, components: torch.Tensor) -> torch.Tensor:
        """(batch, seq, rows) -> (batch, seq, components, features)"""

    @abstractmethod
    def _combine(self, components: torch.Tensor) -> torch.Tensor:
        """(batch, seq, components, features) -> (batch, this rank's composite heads, seq, d)"""

    @abstractmethod
    def _columns(self) -> torch.Tensor:
        """The combination for this rank's composite heads, a matrix as `fold_weight` takes it."""

    def _forward_components(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Projects to all components (batch, seq, rows), and gathers them over the tensor group if sharded."""
        if self._is_sharded:
            return gather_from_tp_region(F.linear(hidden_states, self.weight, self.bias), dim=-1, tp=self.tp)

        weight, bias = self._full_projection()
        return F.linear(hidden_states, weight, bias)

    def _forward_plain(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Projects to this rank's heads, without a combination."""
        if self.shards_composites:
            return self._project(hidden_states, weight=self.weight, bias=self.bias)

        weight, bias = self._full_projection()
        start = self._composite_index * self.head_dim
        rows = slice(start, start + self.head_dim)
        return self._project(hidden_states, weight=weight[rows], bias=None if bias is None else bias[rows])

    def _project(self, hidden_states: torch.Tensor, *, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """(batch, seq, hidden) -> (batch, heads of `weight`, seq, d)"""
        batch, seq, _ = hidden_states.shape
        return F.linear(hidden_states, weight, bias).view(batch, seq, -1, self.head_dim).transpose(1, 2)

    @property
    def _is_sharded(self) -> bool:
        return self.tp.size > 1 and self.weight.spec.shard_dim is not None

    @property
    def _composite_index(self) -> int:
        """Index of this rank's one composite head, where there are more ranks than composite heads."""
        return self.tp.rank * self.num_composites // self.tp.size

    def _local_part(self, width: int = 1) -> torch.Tensor:
        """The part of `hlc` for this rank's composite heads, of which each has `width` entries of dimension 1."""
        assert self.hlc is not None
        if self.shards_composites:
            return self.hlc

        start = self._composite_index * width
        return copy_to_tp_region(self.hlc, self.tp)[:, start : start + width]

    def _full_projection(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All rows of weight and bias, with gradients summed over ranks, since each uses them differently."""

        def gather_or_copy(parameter: torch.Tensor) -> torch.Tensor:
            if self._is_sharded:
                return gather_from_tp_region(parameter, dim=0, tp=self.tp)
            return copy_to_tp_region(parameter, self.tp)

        return gather_or_copy(self.weight), None if self.bias is None else gather_or_copy(self.bias)


class HeadProjection(KeyValueProjection):
    """Projects to component heads and, with `hlc`, combines them; the combination is sharded by its columns.

    Args:
        hlc: initialisation of the combination, a key of `HLC_INITS`; None without a combination (h' = h).
    """

    def __init__(
        self,
        *,
        layer: str,
        side: str,
        hidden_size: int,
        num_components: int,
        num_composites: int,
        head_dim: int,
        std: float,
        bias: bool,
        hlc: str | None,
        tp: TensorGroup = NO_TP,
    ) -> None:
        super().__init__(
            layer=layer,
            side=side,
            hidden_size=hidden_size,
            rows=num_components * head_dim,
            num_composites=num_composites,
            head_dim=head_dim,
            std=std,
            bias=bias,
            tp=tp,
        )
        self.num_components = num_components
        if hlc is not None:
            self.hlc = sharded_parameter(
                name=f"{layer}.hlc_{side}.weight",
                global_shape=(num_components, num_composites),
                component="hlc",
                kind="matrix",
                initialize=HLC_INITS[hlc],
                tp=tp,
                shard_dim=1 if self.shards_composites else None,
            )

    def _folding_is_cheaper(self, tokens: int) -> bool:
        return folding_is_cheaper(
            tokens=tokens,
            hidden_size=self.hidden_size,
            num_components=self.num_components,
            num_composites=self.num_composites,
            tensor_parallel_size=self.tp.size,
        )

    def _split(self, components: torch.Tensor) -> torch.Tensor:
        return components.unflatten(-1, (self.num_components, self.head_dim))

    def _combine(self, components: torch.Tensor) -> torch.Tensor:
        return combine_heads(components, self._columns())

    def _columns(self) -> torch.Tensor:
        return self._local_part()


def block_init(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Composite j starts as component floor(j h' / h): the identity where h' = h, grouped queries where h' < h."""
    components, composites = shape
    weight = torch.zeros(shape)
    weight[torch.arange(composites) * components // composites, torch.arange(composites)] = 1.0
    return weight


def orthogonal_init(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Orthogonal rows, scaled by sqrt(h / h') so that a composite head keeps a component's expected size."""
    components, composites = shape
    rotation, upper = torch.linalg.qr(torch.randn(composites, composites, generator=generator))
    # The signs make the rotation uniform (Haar) and independent of the QR implementation's convention.
    return (rotation * upper.diagonal().sign())[:components] * math.sqrt(composites / components)


def normal_init(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Independent normal entries of variance 1 / h'."""
    return torch.randn(shape, generator=generator) * shape[0] ** -0.5


HLC_INITS: dict[str, Initializer] = {
    "block": block_init,
    "orthogonal": orthogonal_init,
    "normal": normal_init,
}
