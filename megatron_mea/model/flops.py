"""The work of a layer: FLOPs of a token's forward pass, 2 for a multiplication and an addition; matrix products only.

Pipeline stages are balanced by it (model/stages.py), and `plan` counts with it.
"""

from __future__ import annotations

from megatron_mea.attention.core import core_attention_class
from megatron_mea.attention.mea import combination_products
from megatron_mea.config.schema import Model, Side


def layer_flops(config: Model, *, seq_length: int) -> list[int]:
    """FLOPs a token of every layer in the order of the forward pass: embedding, which has none, every block, head."""
    blocks = [
        block_flops_without_kv(config, layer, seq_length=seq_length)
        + kv_flops(config, layer, side="k", mixes=config.mixes_keys)
        + kv_flops(config, layer, side="v", mixes=config.mixes_values)
        for layer in range(config.num_hidden_layers)
    ]
    return [0, *blocks, head_flops(config)]


def block_flops_without_kv(config: Model, layer: int, *, seq_length: int) -> int:
    """FLOPs a token of a block but for its keys and values, whose form depends on the layout (attention/hlc.py)."""
    core_attention = core_attention_class(config)
    queries_and_output = 4 * config.hidden_size * config.num_attention_heads * config.head_dim
    attention = core_attention.flops_per_token(config, seq_length) + core_attention.projection_flops_per_token(config)
    return queries_and_output + attention + feed_forward_flops(config, layer)


def kv_flops(config: Model, layer: int, *, side: Side, mixes: bool) -> int:
    """FLOPs a token of a block's keys or values as a projection, and if it `mixes` them the combination of its heads.

    Combined token by token (paper eq. 10): a projection to h' heads and h h' d multiplications.
    """
    if not mixes:
        return 2 * config.hidden_size * config.num_key_value_heads * config.head_dim

    projection = config.component_width(layer, side) * config.hidden_size
    return 2 * (projection + combination_products(config, layer, side=side))


def feed_forward_flops(config: Model, layer: int) -> int:
    """FLOPs a token of a block's feed-forward: of a routed one its router and the experts that a token chooses."""
    if not config.is_routed(layer):
        return 6 * config.hidden_size * config.intermediate_size

    inner = config.num_experts_per_tok * config.moe_intermediate_size
    return 2 * config.hidden_size * config.num_experts + 6 * config.hidden_size * inner


def head_flops(config: Model) -> int:
    """FLOPs a token of the language-model head."""
    return 2 * config.hidden_size * config.vocab_size
