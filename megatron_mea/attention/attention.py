"""The attention layer: Multi-head Explicit Attention (paper section 4.2), and the variants it is compared with."""

from __future__ import annotations

import math

import torch
from torch import nn

from megatron_mea.attention.differential import DifferentialHeads
from megatron_mea.attention.documents import Attend, causal
from megatron_mea.attention.head_norm import HeadNorm
from megatron_mea.attention.hlc import Folded, HeadProjection
from megatron_mea.attention.talking_heads import TalkingHeads
from megatron_mea.config.schema import Model
from megatron_mea.huggingface.rotary_mea import apply_rotary
from megatron_mea.parallel.collectives import enter, leave
from megatron_mea.parallel.grid import ALONE, TensorGroup
from megatron_mea.parallel.layers import Linear, RMSNorm
from megatron_mea.parallel.recompute import recomputed


class Attention(nn.Module):
    """MEA, eq. 11 and 12; without head combination `plain`, without head norm `mea_no_norm`. In `differential` and
    `talking_heads` a part of its own, `heads`, takes the place of step 3.

    1. K_comp, V_comp from the projections, h' heads each; queries are not mixed.
    2. K = HLC(W_lc^K, K_comp), V = HLC(W_lc^V, V_comp): h heads each.
    3. Ordinary grouped-query attention with Q, K, V.
    4. An RMSNorm over the d features of every query head's output by itself ("GroupNorm"), then W_O.

    `qk_norm` (Qwen3) acts on the queries and on the composite keys, before RoPE. Over a tensor group every rank
    has its part of the query heads and makes the composite heads that these attend to.

    Args:
        recompute: keep queries, keys and values as they are projected, and make the rest anew in the backward pass.
    """

    def __init__(self, config: Model, layer: int, tp: TensorGroup = ALONE, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        name = f"model.layers.{layer}.self_attn"
        hidden, dim, heads = config.hidden_size, config.head_dim, config.num_attention_heads
        std, bias = config.initializer_range, config.attention_bias
        self.tp, self.num_heads, self.head_dim = tp, heads // tp.size, dim

        def projection(which: str, mixed: bool) -> HeadProjection:
            sizes = (config.component_heads[layer], config.num_key_value_heads, dim)
            return HeadProjection(name, which, hidden, *sizes, std, bias, config.hlc_init if mixed else None, tp)

        def norm(which: str) -> RMSNorm:
            return RMSNorm(f"{name}.{which}", dim, config.rms_norm_eps, tp=tp, partial=True)

        self.q_proj = Linear(f"{name}.q_proj", hidden, heads * dim, std, bias, tp, shard_dim=0)
        self.key = projection("k", config.mixes_keys)
        self.value = projection("v", config.mixes_values)
        output_std = std / math.sqrt(2 * config.num_hidden_layers)
        self.o_proj = Linear(f"{name}.o_proj", heads * dim, hidden, output_std, tp=tp, shard_dim=1)
        self.q_norm = self.k_norm = self.head_norm = None
        if config.qk_norm:
            self.q_norm, self.k_norm = norm("q_norm"), norm("k_norm")
        if config.has_head_norm:
            sizes = config.output_dim, config.head_norm_eps, config.head_norm_init, config.head_norm_affine
            self.head_norm = HeadNorm(f"{name}.head_norm", *sizes, tp, partial=True)
        self.heads: DifferentialHeads | TalkingHeads | None = None
        if config.attention_variant == "differential":
            self.heads = DifferentialHeads(name, layer, dim, tp)
        elif config.attention_variant == "talking_heads":
            self.heads = TalkingHeads(name, heads)

    def forward(
        self,
        hidden_states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attend: Attend = causal,
        folded: tuple[Folded | None, Folded | None] = (None, None),
    ) -> torch.Tensor:
        """(batch, seq, hidden), with cos and sin (batch, 1, seq, d), -> (batch, seq, hidden)

        Args:
            folded: projections of keys and of values that are folded already (attention/folds.py).
        """
        hidden_states = enter(hidden_states, self.tp)
        batch, seq, _ = hidden_states.shape
        # shape: (batch, seq, H d) -> (batch, H, seq, d)
        query = self.q_proj(hidden_states).view(batch, seq, self.num_heads, self.head_dim).transpose(1, 2)
        key, value = self.key(hidden_states, folded[0]), self.value(hidden_states, folded[1])
        return leave(recomputed(self._attend, query, key, value, cos, sin, attend, when=self.recompute), self.tp)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attend: Attend,
    ) -> torch.Tensor:
        """From projected heads to this rank's part of a sum, (batch, seq, hidden)."""
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        output = attend(query, key, value) if self.heads is None else self.heads(query, key, value, attend)
        # shape: (batch, H, seq, d), of differential heads (batch, H / 2, seq, 2d) -> (batch, seq, H d)
        output = output.transpose(1, 2).flatten(2) if self.head_norm is None else self.head_norm(output)
        if isinstance(self.heads, DifferentialHeads):
            output = output * self.heads.scale
        return self.o_proj(output)
