"""What the peers cache in a layer, and attention with it over whole windows, to measure losses.

Both classes take the inputs of a layer's projections (batch, seq, D), with a 1 at the end where there are biases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mea.attention.document_mask import AttentionFn
from megatron_mea.attention.mea import MultiheadExplicitAttention
from megatron_mea.exported.rotary_mea import apply_rotary

Convert = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class RebuiltLayer:
    """Latent numbers before RoPE: a step of decoding rebuilds all keys from them, and rotates these.

    Heads may come in groups, each with latent numbers of its own.

    Args:
        key_selection, value_selection: (groups, rank, D), from a layer's inputs to what is cached.
        key_expansion, value_expansion: (groups, h d / groups, rank), from that to the composite heads.
    """

    key_selection: torch.Tensor
    key_expansion: torch.Tensor
    value_selection: torch.Tensor
    value_expansion: torch.Tensor
    rebuilds_keys = True

    @property
    def cached(self) -> int:
        """Cached numbers a token."""
        return self.key_selection.shape[:2].numel() + self.value_selection.shape[:2].numel()

    def attend(
        self, query: torch.Tensor, inputs: torch.Tensor, *, cos: torch.Tensor, sin: torch.Tensor, attend: AttentionFn
    ) -> torch.Tensor:
        """Attention of queries (batch, H, seq, d) before RoPE, by an `AttentionFn`: (batch, H, seq, d)."""
        dim = query.shape[-1]
        key, value = (
            torch.einsum("gor,grD,bsD->bsgo", expansion, selection, inputs)
            .flatten(2)
            .unflatten(2, (-1, dim))
            .transpose(1, 2)
            for selection, expansion in (
                (self.key_selection, self.key_expansion),
                (self.value_selection, self.value_expansion),
            )
        )
        return attend(apply_rotary(query, cos, sin), apply_rotary(key, cos, sin), value)


@dataclass(frozen=True, kw_only=True)
class DecoupledLayer:
    """A rotated key that all heads share, and latent numbers without positions for the rest of keys and for values.

    Nothing is rebuilt: a step of decoding multiplies the queries instead (DeepSeek's MLA, absorbed).

    Args:
        rotary_selection: (2 pairs, D), from a layer's inputs to the shared key, as features (n, n + pairs).
        rotary_queries: (h, 2 pairs, d), from the queries of a composite head to those that meet the shared key.
        frequency: (pairs,), the index of the RoPE frequency by which each pair is rotated.
        selection: (n, D), from a layer's inputs to the latent numbers.
        key_expansion, value_expansion: (h, d, n), from these to the composite heads.
    """

    rotary_selection: torch.Tensor
    rotary_queries: torch.Tensor
    frequency: torch.Tensor
    selection: torch.Tensor
    key_expansion: torch.Tensor
    value_expansion: torch.Tensor
    rebuilds_keys = False

    @property
    def cached(self) -> int:
        """Cached numbers a token."""
        return len(self.rotary_selection) + len(self.selection)

    def attend(
        self, query: torch.Tensor, inputs: torch.Tensor, *, cos: torch.Tensor, sin: torch.Tensor, attend: AttentionFn
    ) -> torch.Tensor:
        """Attention of queries (batch, H, seq, d) before RoPE, by an `AttentionFn`: (batch, H, seq, d)."""
        heads, width, dim = self.rotary_queries.shape
        cos, sin = (angle[..., self.frequency.repeat(2)] for angle in (cos, sin))
        grouped = query.unflatten(1, (heads, -1))
        rotary_query = torch.einsum("hrd,bhgsd->bhgsr", self.rotary_queries, grouped).flatten(1, 2)
        rotary_key = (inputs @ self.rotary_selection.mT).unsqueeze(1)
        rotary_query, rotary_key = (apply_rotary(rows, cos, sin) for rows in (rotary_query, rotary_key))

        latent = inputs @ self.selection.mT
        key, value = (
            torch.einsum("hdn,bsn->bhsd", expansion, latent) for expansion in (self.key_expansion, self.value_expansion)
        )
        # The attention function divides by the root of the width that it sees, and its kernel wants values as wide.
        query = torch.cat([rotary_query, query], -1) * ((width + dim) / dim) ** 0.5
        key = torch.cat([rotary_key.expand(-1, heads, -1, -1), key], -1)
        return attend(query, key, F.pad(value, (0, width)))[..., :dim]


PeerLayer = RebuiltLayer | DecoupledLayer


def converted(layer: PeerLayer, convert: Convert) -> PeerLayer:
    """The layer with each matrix replaced by `convert` of it; whole numbers stay."""
    return type(layer)(
        **{name: convert(tensor) if tensor.is_floating_point() else tensor for name, tensor in vars(layer).items()}
    )


class PeerAttention(nn.Module):
    """An attention layer that takes queries and `o_proj` from the source model's, and keys and values from a peer's."""

    def __init__(self, source: MultiheadExplicitAttention, layer: PeerLayer) -> None:
        super().__init__()
        self.source = source
        weight = source.o_proj.weight
        self.layer = converted(layer, lambda matrix: matrix.to(weight))

    def forward(
        self, hidden_states: torch.Tensor, *, cos: torch.Tensor, sin: torch.Tensor, attend: AttentionFn
    ) -> torch.Tensor:
        """(batch, seq, hidden), with cos and sin (batch, 1, seq, d), -> (batch, seq, hidden)"""
        query = self.source.q_proj(hidden_states).unflatten(2, (self.source.num_heads, -1)).transpose(1, 2)
        inputs = with_bias_column(hidden_states, has_bias=self.source.q_proj.bias is not None)
        output = self.layer.attend(query, inputs, cos=cos, sin=sin, attend=attend)
        return self.source.o_proj(output.transpose(1, 2).flatten(2))


def with_bias_column(hidden_states: torch.Tensor, *, has_bias: bool) -> torch.Tensor:
    """Inputs (..., hidden) as projections with their bias as the last column take them: with a 1 at the end."""
    return F.pad(hidden_states, (0, 1), value=1.0) if has_bias else hidden_states
