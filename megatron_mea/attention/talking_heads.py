"""Talking-Heads attention (arXiv 2003.02436; MEA paper eq. 7-9): heads exchange logits and weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from megatron_mea.attention.core import FLOAT32, AttentionSizes, CoreAttention
from megatron_mea.attention.document_mask import visible_tokens_mask
from megatron_mea.config.schema import Model
from megatron_mea.parallel.grid import NO_CP, NO_TP, ContextGroup, TensorGroup
from megatron_mea.parallel.parameter import sharded_parameter


class TalkingHeadsAttention(CoreAttention):
    """Attention whose heads exchange logits and weights through `logits_mix` and `weights_mix`, both (H, H).

    L_j = sum_i logits_mix[i, j] S_i, A_j = softmax(L_j), B_j = sum_i weights_mix[i, j] A_i. Both are initialised to the
    identity. A head's weights need the logits of all heads, so fused kernels, which never hold the scores, cannot
    compute them, and a tensor group cannot shard the heads.
    """

    kernel_calls = 0

    def __init__(self, *, name: str, config: Model, layer: int, tp: TensorGroup = NO_TP) -> None:
        super().__init__(name=name, config=config, layer=layer, tp=tp)
        num_heads = config.num_attention_heads
        self.mixes = nn.ParameterList(
            sharded_parameter(
                name=f"{name}.{mix_name}.weight",
                global_shape=(num_heads, num_heads),
                component="hlc",
                kind="matrix",
                initialize=lambda shape, _: torch.eye(shape[0]),
            )
            for mix_name in ("logits_mix", "weights_mix")
        )

    @staticmethod
    def attention_fn(
        position_ids: torch.Tensor, *, document_mask: bool, cp: ContextGroup = NO_CP
    ) -> Callable[..., torch.Tensor]:
        """An attention function that takes the two mixes too."""
        return partial(_attend, visible=visible_tokens_mask(position_ids, document_mask=document_mask, cp=cp))

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, attend: Callable) -> torch.Tensor:
        """(batch, H, seq, d), (batch, h, seq, d), (batch, h, seq, d) -> (batch, H, seq, d)"""
        logits_mix, weights_mix = self.mixes
        return attend(query, key, value, logits_mix=logits_mix, weights_mix=weights_mix)

    @staticmethod
    def flops_per_token(config: Model, seq_length: int) -> int:
        """Those of softmax attention, and two mixes of H scores a pair of tokens."""
        return CoreAttention.flops_per_token(config, seq_length) + 4 * seq_length * config.num_attention_heads**2

    @staticmethod
    def saved_bytes(sizes: AttentionSizes) -> int:
        """Logits and mixed weights; weights in float32 and, where that is another one, in the parameter dtype."""
        num_scores = sizes.tokens * sizes.seq_length * sizes.num_heads
        rounded_bytes = sizes.element_bytes if sizes.element_bytes < FLOAT32 else 0
        score_bytes = num_scores * (2 * sizes.element_bytes + FLOAT32 + rounded_bytes)
        return 2 * sizes.query_bytes + 2 * sizes.key_bytes + score_bytes

    @staticmethod
    def mask_bytes(sizes: AttentionSizes, *, document_mask: bool) -> int:
        """A boolean for every pair of a query and a key; without documents one sample's serve all."""
        pairs = sizes.tokens * sizes.seq_length
        return pairs if document_mask else pairs * sizes.seq_length // sizes.kv_tokens


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    visible: torch.Tensor,
    logits_mix: torch.Tensor,
    weights_mix: torch.Tensor,
) -> torch.Tensor:
    """query (batch, H, queries, d), key and value (batch, h, keys, d), mixes (H, H) -> (batch, H, queries, d)

    Args:
        visible: boolean mask (batch or 1, 1, queries, keys).
    """
    batch, heads, queries, dim = query.shape
    groups, keys = key.shape[1:3]

    # shape: (batch, h, H / h queries, d) @ (batch, h, d, keys) -> (batch, H, queries, keys)
    logits = (query.reshape(batch, groups, -1, dim) @ key.transpose(2, 3)).view(batch, heads, queries, keys)
    mixed = _combine_scores(logits / math.sqrt(dim), logits_mix).masked_fill(~visible, -math.inf)

    softmax_dtype = torch.promote_types(mixed.dtype, torch.float32)
    weights = _combine_scores(mixed.softmax(-1, dtype=softmax_dtype).to(value.dtype), weights_mix)
    # shape: (batch, h, H / h queries, keys) @ (batch, h, keys, d) -> (batch, H, queries, d)
    return (weights.view(batch, groups, -1, keys) @ value).view(batch, heads, queries, dim)


def _combine_scores(scores: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """(batch, H, queries, keys), (H, H) -> (batch, H, queries, keys)"""
    # Not by broadcasting, which would save a transposed copy of the scores for backward.
    # shape: (batch, H, H) @ (batch, H, queries keys) -> (batch, H, queries keys)
    return (mix.t().expand(len(scores), -1, -1) @ scores.flatten(2)).view_as(scores)
