"""The attention layer: Multi-head Explicit Attention (paper section 4.2) and the variants it is compared with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mea.attention.hlc import HeadCombination
from megatron_mea.config.schema import Model
from megatron_mea.huggingface.modeling_mea import apply_rotary
from megatron_mea.parallel.layers import Linear, RMSNorm


class Attention(nn.Module):
    """MEA, eq. 11 and 12; without head combination `plain`, without head norm `mea_no_norm`.

    1. K_comp, V_comp from the projections, h' heads each; queries are not mixed.
    2. K = HLC(W_lc^K, K_comp), V = HLC(W_lc^V, V_comp): h heads each.
    3. Ordinary grouped-query attention with Q, K, V.
    4. An RMSNorm over the d features of every query head's output by itself ("GroupNorm"), then W_O.

    `qk_norm` (Qwen3) acts on the queries and on the composite keys, before RoPE.
    """

    def __init__(self, config: Model, layer: int) -> None:
        super().__init__()
        name = f"model.layers.{layer}.self_attn"
        hidden, dim, heads = config.hidden_size, config.head_dim, config.num_attention_heads
        components, composites = config.component_heads[layer], config.num_key_value_heads
        std, bias = config.initializer_range, config.attention_bias
        self.num_heads, self.head_dim = heads, dim
        self.q_proj = Linear(f"{name}.q_proj", hidden, heads * dim, std, bias)
        self.k_proj = Linear(f"{name}.k_proj", hidden, components * dim, std, bias)
        self.v_proj = Linear(f"{name}.v_proj", hidden, components * dim, std, bias)
        output_std = std / math.sqrt(2 * config.num_hidden_layers)
        self.o_proj = Linear(f"{name}.o_proj", heads * dim, hidden, output_std)

        def combination(which: str) -> HeadCombination:
            return HeadCombination(f"{name}.{which}", components, composites, config.hlc_init)

        self.hlc_k = combination("hlc_k") if config.mixes_keys else None
        self.hlc_v = combination("hlc_v") if config.mixes_values else None
        self.q_norm = self.k_norm = self.head_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(f"{name}.q_norm", dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(f"{name}.k_norm", dim, config.rms_norm_eps)
        if config.has_head_norm:
            self.head_norm = RMSNorm(
                f"{name}.head_norm",
                dim,
                config.head_norm_eps,
                gain=config.head_norm_init,
                affine=config.head_norm_affine,
            )

    def forward(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """(batch, seq, hidden), with cos and sin (batch, 1, seq, d), -> (batch, seq, hidden)"""
        query = self._heads(hidden_states, self.q_proj, None)
        key = self._heads(hidden_states, self.k_proj, self.hlc_k)
        value = self._heads(hidden_states, self.v_proj, self.hlc_v)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        grouped = key.shape[1] != self.num_heads
        # shape: (batch, H, seq, d)
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        if self.head_norm is not None:
            output = self.head_norm(output)
        # shape: (batch, H, seq, d) -> (batch, seq, H d)
        return self.o_proj(output.transpose(1, 2).flatten(2))

    def _heads(self, hidden_states: torch.Tensor, projection: Linear, hlc: HeadCombination | None) -> torch.Tensor:
        """(batch, seq, hidden) -> (batch, heads, seq, d)"""
        if hlc is not None:
            return hlc.project(hidden_states, projection)
        batch, seq, _ = hidden_states.shape
        return projection(hidden_states).view(batch, seq, -1, self.head_dim).transpose(1, 2)
