"""The core attention: what an attention layer does with queries, keys and values, and the interface of its variants.

A variant that is more than component heads and a head norm names its module in config/variants.py. The module replaces
the steps of `CoreAttention` that differ, and states what they cost: `plan` asks it and knows no variant.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import ClassVar

import torch
from torch import nn

from megatron_mea.attention.document_mask import AttentionFn, attention_function
from megatron_mea.config.schema import Model
from megatron_mea.parallel.grid import NO_CP, NO_TP, ContextGroup, TensorGroup

FLOAT32 = 4
"""Bytes of a float32 element."""


@dataclass(frozen=True, kw_only=True)
class AttentionSizes:
    """Sizes of a micro-batch in an attention layer on one rank.

    Args:
        config: the `model` section.
        tokens: whose queries the rank has.
        kv_tokens: whose keys and values it attends to; over a context group those of all its ranks.
        seq_length: tokens of a sample.
        num_heads, num_kv_heads: query heads and composite heads of the rank.
        element_bytes: of the parameter dtype.
    """

    config: Model
    tokens: int
    kv_tokens: int
    seq_length: int
    num_heads: int
    num_kv_heads: int
    element_bytes: int

    @property
    def query_bytes(self) -> int:
        """Bytes of the rank's queries, and of its heads' outputs."""
        return self.tokens * self.num_heads * self.config.head_dim * self.element_bytes

    @property
    def key_bytes(self) -> int:
        """Bytes of the keys that the rank attends to, and of the values."""
        return self.kv_tokens * self.num_kv_heads * self.config.head_dim * self.element_bytes


class CoreAttention(nn.Module):
    """Softmax attention, and the base class of what replaces it in a variant.

    A layer calls `project` outside of what activation checkpointing recomputes; then `transform_kv`, the norms of
    queries and keys, RoPE, `forward`, the head norm, and `transform_output` inside. The static methods are costs, which
    need no module.

    Args:
        name: exported name of the attention layer, the beginning of the names of its parameters.
        config: the `model` section.
        layer: counted from 0 over the whole model.
        tp: the tensor group of this rank, which holds an equal part of the query heads.
    """

    kernel_calls: ClassVar[int] = 1
    """Calls of the attention function by `forward`, where that is a fused kernel."""

    def __init__(self, *, name: str, config: Model, layer: int, tp: TensorGroup = NO_TP) -> None:
        super().__init__()

    @staticmethod
    def attention_fn(position_ids: torch.Tensor, *, document_mask: bool, cp: ContextGroup = NO_CP) -> AttentionFn:
        """The attention function that all layers get for sequences whose tokens are at these positions (batch, seq).

        Over a context group its queries are those of this rank's tokens.
        """
        return attention_function(position_ids, document_mask=document_mask, cp=cp)

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Projections of the module's own from the layer's normalised input (batch, seq, hidden); None: it has none."""
        return None

    def transform_kv(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Composite keys and values as projected, each (batch, h, seq, d), before norm and RoPE -> the same shapes

        Over a context group they are those of this rank's tokens; a class that changes them has composite heads sent.
        """
        return key, value

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, attend: AttentionFn
    ) -> torch.Tensor:
        """(batch, H, seq, d), (batch, h, seq, d), (batch, h, seq, d) -> (batch, outputs, seq, features of an output)

        Over a context group queries and outputs are those of this rank's tokens.

        Args:
            attend: what `attention_fn` returned.
        """
        return attend(query, key, value)

    def transform_output(self, output: torch.Tensor, projected: torch.Tensor | None) -> torch.Tensor:
        """Concatenated outputs of this rank's heads (batch, seq, H d), after the head norm -> the input of o_proj

        Args:
            projected: what `project` returned.
        """
        return output

    @staticmethod
    def flops_per_token(config: Model, seq_length: int) -> int:
        """FLOPs a token of one layer's scores and weighted values, forward, on all ranks of a tensor group.

        Both count all pairs of tokens: 4 x seq_length x H d. The causal half that a kernel may leave out is not taken
        off, which is the usual convention.
        """
        return 4 * seq_length * config.num_attention_heads * config.head_dim

    @staticmethod
    def projection_flops_per_token(config: Model) -> int:
        """FLOPs a token of `project`, forward, on all ranks of a tensor group."""
        return 0

    @staticmethod
    def saved_bytes(sizes: AttentionSizes) -> int:
        """Bytes saved for backward from queries, keys and values to the output of `forward`, all of them included.

        A fused kernel saves no attention weights but one float32 a query.
        """
        return 2 * sizes.query_bytes + 2 * sizes.key_bytes + sizes.tokens * sizes.num_heads * FLOAT32

    @staticmethod
    def saves_output(sizes: AttentionSizes) -> bool:
        """Whether `saved_bytes` covers the output of `forward` as the head norm of a CPU saves it, in float32."""
        return sizes.element_bytes == FLOAT32

    @staticmethod
    def transform_saved_bytes(sizes: AttentionSizes) -> int:
        """Bytes that `transform_output` saves beyond the output of the step before it."""
        return 0

    @staticmethod
    def projected_bytes(sizes: AttentionSizes) -> int:
        """Bytes of what `project` returns, which is saved where activation checkpointing recomputes what follows."""
        return 0

    @staticmethod
    def replicated_parameters(config: Model) -> tuple[int, ...]:
        """Elements of each parameter of a layer that every tensor rank holds, whose gradients they sum."""
        return ()

    @staticmethod
    def mask_bytes(sizes: AttentionSizes, *, document_mask: bool) -> int:
        """Bytes of a mask that all layers share and save."""
        return 0


def core_attention_class(config: Model) -> type[CoreAttention]:
    """The class of the core attention of a model's layers, imported when first needed."""
    if not config.variant.core_attention:
        return CoreAttention

    return _import_class(config.variant.core_attention)


@cache
def _import_class(path: str) -> type[CoreAttention]:
    """The class that `module:class` names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
