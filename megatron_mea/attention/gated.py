"""Gated attention (arXiv 2505.06708): a sigmoid gate from the layer's input on the output of every head."""

from __future__ import annotations

import torch

from megatron_mea.attention.core import AttentionSizes, CoreAttention
from megatron_mea.config.schema import Model
from megatron_mea.parallel.grid import NO_TP, TensorGroup
from megatron_mea.parallel.layers import Linear


class GatedAttention(CoreAttention):
    """Softmax attention whose heads' outputs are multiplied by sigmoid(X W_gate^T), X the layer's normalised input.

    The gate behind the attention, one for each head, which the paper found best (its G1): a number for every feature
    of a head's output, or with `gate_width: head` one for all of them.
    """

    def __init__(self, *, name: str, config: Model, layer: int, tp: TensorGroup = NO_TP) -> None:
        super().__init__(name=name, config=config, layer=layer, tp=tp)
        self.gates_per_head = _gates_per_head(config)
        self.gate_proj = Linear(
            name=f"{name}.gate_proj",
            component="attention",
            in_features=config.hidden_size,
            out_features=config.num_attention_heads * self.gates_per_head,
            std=config.initializer_range,
            tp=tp,
            shard_dim=0,
        )

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, seq, hidden) -> this rank's gates before the sigmoid, (batch, seq, H gates of a head)"""
        return self.gate_proj(hidden_states)

    def transform_output(self, output: torch.Tensor, projected: torch.Tensor | None) -> torch.Tensor:
        """Multiplies the heads' outputs (batch, seq, H d) by their gates."""
        assert projected is not None
        # shape: (batch, seq, H gates) -> (batch, seq, H, d or 1)
        gates = projected.sigmoid().unflatten(2, (-1, self.gates_per_head))
        return (output.unflatten(2, (gates.shape[2], -1)) * gates).flatten(2)

    @staticmethod
    def projection_flops_per_token(config: Model) -> int:
        """Those of `gate_proj`."""
        return 2 * config.hidden_size * config.num_attention_heads * _gates_per_head(config)

    @staticmethod
    def transform_saved_bytes(sizes: AttentionSizes) -> int:
        """The gates, and the product, which is the input of o_proj; the other factor is saved by the attention."""
        return GatedAttention.projected_bytes(sizes) + sizes.query_bytes

    @staticmethod
    def projected_bytes(sizes: AttentionSizes) -> int:
        """The gates before the sigmoid."""
        return sizes.tokens * sizes.num_heads * _gates_per_head(sizes.config) * sizes.element_bytes


def _gates_per_head(config: Model) -> int:
    return config.head_dim if config.gate_width == "feature" else 1
