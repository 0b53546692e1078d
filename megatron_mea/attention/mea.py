"""The attention layer: Multi-head Explicit Attention (paper section 4.2), and the variants it is compared with."""

from __future__ import annotations

import math

import torch
from torch import nn

from megatron_mea.attention.causal import causal_attention
from megatron_mea.attention.core import CoreAttention, core_attention_class
from megatron_mea.attention.document_mask import AttentionFn
from megatron_mea.attention.head_norm import HeadNorm
from megatron_mea.attention.hlc import FoldedProjection, HeadProjection, KeyValueProjection, components_are_fewer
from megatron_mea.attention.latent import FoldedGainNorm, LatentKeys, LatentValues
from megatron_mea.config.schema import Model, Side
from megatron_mea.exported.rotary_mea import apply_rotary
from megatron_mea.parallel import zero
from megatron_mea.parallel.activation_checkpoint import maybe_checkpoint
from megatron_mea.parallel.collectives import enter_tp_region, exit_tp_region, gather_from_cp_region
from megatron_mea.parallel.grid import NO_CP, NO_TP, ContextGroup, TensorGroup
from megatron_mea.parallel.layers import Linear, RMSNorm


def combination_products(config: Model, layer: int, *, side: Side) -> int:
    """Multiplications a token of combining heads: h h' d, or of latent numbers by a dense matrix (n, h d)."""
    features = config.component_width(layer, side) * config.num_key_value_heads
    return features * config.head_dim if config.hlc_form == "latent" else features


def combination_numel(config: Model, layer: int, *, side: Side) -> int:
    """Elements of a combination: h' h; complex numbers from pairs to heads; or a matrix (n, h d) of values."""
    if config.hlc_form == "head":
        return config.component_heads[layer] * config.num_key_value_heads

    numel = config.component_width(layer, side) * config.num_key_value_heads
    return numel if side == "k" else numel * config.head_dim


def components_are_gathered(
    config: Model, layer: int, *, side: Side, tp_size: int, cp_size: int, fold_outside: bool
) -> bool:
    """Whether a context group gathers components of keys or values, which each rank combines afterwards.

    That is outside of their projection's forward, so without `fold_outside` (ZeRO 3) a combination that is large enough
    to be partitioned rules it out.
    """
    is_full = fold_outside or combination_numel(config, layer, side=side) <= zero.PERSISTENCE_THRESHOLD
    return (
        cp_size > 1
        and is_full
        and core_attention_class(config).transform_kv is CoreAttention.transform_kv
        and components_are_fewer(
            num_components=config.component_width(layer, side) / config.head_dim,
            num_composites=config.num_key_value_heads,
            tensor_parallel_size=tp_size,
        )
    )


class MultiheadExplicitAttention(nn.Module):
    """MEA, eq. 11 and 12; without head combination `plain`, without head norm `mea_no_norm`.

    1. K_comp, V_comp from the projections, h' heads each; queries are not combined.
    2. K = HLC(W_lc^K, K_comp), V = HLC(W_lc^V, V_comp): h heads each.
    3. Ordinary grouped-query attention with Q, K, V, or what the variant's `core_attention` replaces it with.
    4. An RMSNorm over the d features of every query head's output by itself ("GroupNorm"), then W_O.

    `qk_norm` (Qwen3) acts on the queries and on the composite keys, before RoPE. Over a tensor group every rank
    holds an equal part of the query heads and computes the composite heads that these attend to. Over a context group
    it gathers the keys and values of all tokens, as component or composite heads, whichever it needs fewer of.

    Args:
        layer: counted from 0 over the full model.
        recompute: save only projected queries, keys and values for backward, and recompute the rest.
        fold_outside: whether combinations can be used outside of their projection's forward, as in `Decoder`.
    """

    def __init__(
        self,
        config: Model,
        layer: int,
        *,
        tp: TensorGroup = NO_TP,
        cp: ContextGroup = NO_CP,
        recompute: bool = False,
        fold_outside: bool = True,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        name = f"model.layers.{layer}.self_attn"
        hidden, dim, heads = config.hidden_size, config.head_dim, config.num_attention_heads
        std, bias = config.initializer_range, config.attention_bias
        self.tp, self.cp, self.num_heads, self.head_dim = tp, cp, heads // tp.size, dim

        def norm(suffix: str, norm_class: type[RMSNorm]) -> RMSNorm:
            return norm_class(
                name=f"{name}.{suffix}", size=dim, eps=config.rms_norm_eps, tp=tp, reduce_weight_grad=True
            )

        self.q_proj = Linear(
            name=f"{name}.q_proj",
            component="attention",
            in_features=hidden,
            out_features=heads * dim,
            std=std,
            bias=bias,
            tp=tp,
            shard_dim=0,
        )
        self.key_projection, self.value_projection = _key_value_projections(
            config=config, layer=layer, name=name, tp=tp
        )
        for side, projection in (("k", self.key_projection), ("v", self.value_projection)):
            projection.gathers_components = projection.hlc is not None and components_are_gathered(
                config, layer, side=side, tp_size=tp.size, cp_size=cp.size, fold_outside=fold_outside
            )

        output_std = std / math.sqrt(2 * config.num_hidden_layers)
        self.o_proj = Linear(
            name=f"{name}.o_proj",
            component="attention",
            in_features=heads * dim,
            out_features=hidden,
            std=output_std,
            tp=tp,
            shard_dim=1,
        )

        self.q_norm = self.k_norm = self.head_norm = None
        if config.qk_norm:
            self.q_norm = norm("q_norm", RMSNorm)
            self.k_norm = norm("k_norm", FoldedGainNorm if config.hlc_form == "latent" else RMSNorm)

        if config.has_head_norm:
            self.head_norm = HeadNorm(
                name=f"{name}.head_norm",
                size=config.output_dim,
                eps=config.head_norm_eps,
                gain=config.head_norm_init,
                affine=config.head_norm_affine,
                tp=tp,
                reduce_weight_grad=True,
            )

        self.core_attention = core_attention_class(config)(name=name, config=config, layer=layer, tp=tp)

    @property
    def rotates_all_keys(self) -> bool:
        """Whether RoPE waits for the keys of all tokens: the norm of composite keys comes before it."""
        return self.key_projection.gathers_components and self.k_norm is not None

    def forward(
        self,
        hidden_states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        full_cos_sin: tuple[torch.Tensor, torch.Tensor] | None = None,
        attend: AttentionFn = causal_attention,
        folded: tuple[FoldedProjection | None, FoldedProjection | None] = (None, None),
    ) -> torch.Tensor:
        """(batch, seq, hidden), with cos and sin (batch, 1, seq, d), -> (batch, seq, hidden)

        Over a context group all of them are those of this rank's tokens.

        Args:
            full_cos_sin: cos and sin of all tokens of the sequences, where `rotates_all_keys`.
            attend: the attention function that step 3 calls.
            folded: folded projections of keys and of values (attention/folds.py); None to choose the cheapest form.
        """
        hidden_states = enter_tp_region(hidden_states, self.tp)
        batch, seq, _ = hidden_states.shape

        # shape: (batch, seq, H d) -> (batch, H, seq, d)
        query = self.q_proj(hidden_states).view(batch, seq, self.num_heads, self.head_dim).transpose(1, 2)
        key, value = self.key_projection(hidden_states, folded[0]), self.value_projection(hidden_states, folded[1])
        output = maybe_checkpoint(
            self._attend_and_project,
            query,
            key,
            value,
            self.core_attention.project(hidden_states),
            cos=cos,
            sin=sin,
            full_cos_sin=full_cos_sin,
            attend=attend,
            enabled=self.recompute,
        )
        return exit_tp_region(output, self.tp)

    def _attend_and_project(  # noqa: PLR0917 - a checkpoint saves what is passed by position
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        projected: torch.Tensor | None,
        *,
        cos: torch.Tensor,
        sin: torch.Tensor,
        full_cos_sin: tuple[torch.Tensor, torch.Tensor] | None,
        attend: AttentionFn,
    ) -> torch.Tensor:
        """q, k, v -> this rank's partial o_proj output (batch, seq, hidden), to be reduced over the tensor group."""
        key, value = self.core_attention.transform_kv(key, value)
        query = apply_rotary(query if self.q_norm is None else self.q_norm(query), cos, sin)
        key = self._keys_of_all_tokens(key, cos=cos, sin=sin, full_cos_sin=full_cos_sin)
        value = gather_from_cp_region(value, self.cp)
        if self.value_projection.gathers_components:
            value = self.value_projection.combine(value)

        output = self.core_attention(query, key, value, attend=attend)
        # shape: (batch, H, seq, d), or of pairs of heads (batch, H / 2, seq, 2d) -> (batch, seq, H d)
        output = output.transpose(1, 2).flatten(2) if self.head_norm is None else self.head_norm(output)
        return self.o_proj(self.core_attention.transform_output(output, projected))

    def _keys_of_all_tokens(
        self,
        key: torch.Tensor,
        *,
        cos: torch.Tensor,
        sin: torch.Tensor,
        full_cos_sin: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Keys as projected (batch, heads, this rank's tokens, d) -> rotated composite keys (batch, heads, seq, d)"""
        if not self.key_projection.gathers_components:
            key = key if self.k_norm is None else self.k_norm(key)
            return gather_from_cp_region(apply_rotary(key, cos, sin), self.cp)

        if self.k_norm is None:
            # A combination of rotated heads is the rotated combination.
            rotated = self.key_projection.rotate(key, cos, sin)
            return self.key_projection.combine(gather_from_cp_region(rotated, self.cp))

        assert full_cos_sin is not None
        key = self.k_norm(self.key_projection.combine(gather_from_cp_region(key, self.cp)))
        return apply_rotary(key, *full_cos_sin)


def _key_value_projections(
    *, config: Model, layer: int, name: str, tp: TensorGroup
) -> tuple[KeyValueProjection, KeyValueProjection]:
    """The projections of a layer's keys and of its values, in the form that `hlc_form` names."""
    shared = {
        "layer": name,
        "hidden_size": config.hidden_size,
        "num_composites": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "std": config.initializer_range,
        "bias": config.attention_bias,
        "tp": tp,
    }
    if config.hlc_form == "latent":
        keys = LatentKeys(counts=config.pair_counts[layer], **shared)
        return keys, LatentValues(num_latent=config.value_latent_dims[layer], **shared)

    keys, values = (
        HeadProjection(
            side=side,
            num_components=config.component_heads[layer],
            hlc=config.hlc_init if combines else None,
            **shared,
        )
        for side, combines in (("k", config.mixes_keys), ("v", config.mixes_values))
    )
    return keys, values
