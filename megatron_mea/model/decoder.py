"""The decoder as a flat list of layers: embedding, blocks, head."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_mea.attention.attention import Attention
from megatron_mea.config.schema import Model
from megatron_mea.huggingface.convert import to_hf_config
from megatron_mea.huggingface.modeling_mea import rotary_cos_sin
from megatron_mea.parallel.collectives import enter, leave
from megatron_mea.parallel.grid import ALONE, TensorGroup
from megatron_mea.parallel.layers import Embedding, Linear, RMSNorm, cross_entropy_sum
from megatron_mea.parallel.parameter import declare, normal


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Model, layer: int, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        self.tp = tp
        name = f"model.layers.{layer}.mlp"
        hidden, inner, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.gate_proj = Linear(f"{name}.gate_proj", hidden, inner, std, tp=tp, shard_dim=0)
        self.up_proj = Linear(f"{name}.up_proj", hidden, inner, std, tp=tp, shard_dim=0)
        output_std = std / math.sqrt(2 * config.num_hidden_layers)
        self.down_proj = Linear(f"{name}.down_proj", inner, hidden, output_std, tp=tp, shard_dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = enter(x, self.tp)
        return leave(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), self.tp)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: Model, layer: int, tp: TensorGroup = ALONE) -> None:
        super().__init__()

        def norm(which: str) -> RMSNorm:
            name = f"model.layers.{layer}.{which}"
            return RMSNorm(name, config.hidden_size, config.rms_norm_eps, tp=tp, partial=tp.sequence_parallel)

        self.input_layernorm = norm("input_layernorm")
        self.self_attn = Attention(config, layer, tp)
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.mlp = FeedForward(config, layer, tp)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Head(nn.Module):
    """Final norm and language-model head, its rows cut over the tensor group.

    Args:
        tied: the embedding whose matrix serves as the head's.
    """

    def __init__(self, config: Model, tied: Embedding | None, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        self.tp = tp
        self.norm = RMSNorm("model.norm", config.hidden_size, config.rms_norm_eps, tp=tp, partial=tp.sequence_parallel)
        shape, start = (config.vocab_size, config.hidden_size), normal(config.initializer_range)
        self.weight = tied.weight if tied else declare("lm_head.weight", shape, "matrix", start, tp, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, seq, hidden) -> logits (batch, seq, this rank's part of the vocabulary)"""
        return F.linear(enter(self.norm(x), self.tp), self.weight)


class Decoder(nn.Module):
    """A Llama-like decoder.

    Args:
        config: the `model` section.
        checkpoint_activations: recompute each block in the backward pass instead of keeping its activations.
        tp: the tensor group of this rank.
    """

    def __init__(self, config: Model, checkpoint_activations: bool = False, tp: TensorGroup = ALONE) -> None:
        super().__init__()
        self.tp, self.vocab_size = tp, config.vocab_size
        self.hf_config = to_hf_config(config)
        self.checkpoint_activations = checkpoint_activations
        embedding_std = config.embedding_initializer_range or config.initializer_range
        embed = Embedding("model.embed_tokens", config.vocab_size, config.hidden_size, embedding_std, tp)
        blocks = [Block(config, layer, tp) for layer in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList([embed, *blocks, Head(config, embed if config.tie_word_embeddings else None, tp)])

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The sum of the cross-entropies (nats) of all targets that are not `IGNORE`; a float32 scalar.

        All arguments are (batch, seq); `targets[:, i]` is what should follow `input_ids[:, i]`.
        """
        logits = self.logits(input_ids, position_ids)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return cross_entropy_sum(logits.flatten(0, 1), targets.flatten(), self.vocab_size, self.tp)

    def logits(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """(batch, seq) -> (batch, seq, this rank's part of the vocabulary)"""
        embed, *blocks, head = self.layers
        x = embed(input_ids)
        # shape: (batch, seq, d) -> (batch, 1, seq, d), the same for all heads
        cos, sin = (angle.unsqueeze(1) for angle in rotary_cos_sin(self.hf_config, position_ids, x.dtype))
        for block in blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin)
        return head(x)
