"""One layer's attention of a step of decoding: the new token's numbers join a full cache, and a query attends to it.

As in decode.py projections of hidden states are left out, and caches hold random numbers. Queries and the numbers of
the new token are as each method's attention takes them, rotated already.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from decode import Preallocated

from megatron_mea.config.schema import Model
from megatron_mea.exported.attention_mea import MEAAttention, packed_attention_forward
from megatron_mea.exported.latent_mea import MEALatentAttention
from megatron_mea.exported.rotary_mea import rotary_cos_sin
from megatron_mea.huggingface.hf_config import to_hf_config

from .layers import DecoupledLayer, PeerLayer, RebuiltLayer, converted

Step = Callable[[], torch.Tensor]


def uncompressed_step(model: Model, *, length: int) -> Step:
    """Attention to a cache of all composite heads."""
    heads, dim = model.num_key_value_heads, model.head_dim
    cache = Preallocated(random_numbers(1, heads, length, dim), random_numbers(1, heads, length, dim))
    query = random_numbers(1, model.num_attention_heads, 1, dim)
    key, value = random_numbers(1, heads, 1, dim), random_numbers(1, heads, 1, dim)

    def step() -> torch.Tensor:
        keys, values = cache.update(key, value, layer_idx=0)
        return packed_attention_forward(None, query, keys, values, attention_mask=None, scaling=dim**-0.5)[0]

    return step


def exported_step(model: Model, *, layer: int, length: int) -> Step:
    """Attention of one of our exports to its cache, absorbed or composed, whichever it takes itself."""
    config = to_hf_config(model)
    attention_class = MEALatentAttention if model.hlc_form == "latent" else MEAAttention
    module = attention_class(config, layer).eval()
    for combination in (module.hlc_k, module.hlc_v):
        torch.nn.init.normal_(combination.weight, std=0.1)

    widths = [projection.out_features for projection in (module.k_proj, module.v_proj)]
    cache = Preallocated(*(random_numbers(1, 1, length, width) for width in widths))
    query = random_numbers(1, model.num_attention_heads, 1, model.head_dim)
    new = [random_numbers(1, 1, width) for width in widths]

    def step() -> torch.Tensor:
        key, value = module._split_components(*new)
        keys, values, _ = module._update_cache(key, value, None, cache=cache)
        if not module._should_absorb(query, keys, None, implementation="sdpa"):
            keys, values = module.hlc_k(keys), module.hlc_v(values)
            return packed_attention_forward(module, query, keys, values, attention_mask=None, scaling=module.scaling)[0]

        wide_query, keys, values, columns = module._absorb(query, keys, values)
        output, _ = packed_attention_forward(
            module, wide_query, keys, values, attention_mask=None, scaling=module.scaling
        )
        return module._combine_output(output, columns)

    return step


def peer_step(layer: PeerLayer, model: Model, *, length: int) -> Step:
    """Attention to a peer's cache."""
    layer = converted(layer, lambda matrix: matrix.float())
    if isinstance(layer, RebuiltLayer):
        return _rebuilt_step(layer, model, length=length)
    return _decoupled_step(layer, model, length=length)


def _rebuilt_step(layer: RebuiltLayer, model: Model, *, length: int) -> Step:
    """Keys are rebuilt and rotated, as complex numbers in place; values are expanded behind the sum over tokens."""
    groups, key_rank, _ = layer.key_selection.shape
    heads, dim = model.num_key_value_heads, model.head_dim
    keys, values = (
        random_numbers(groups, length, key_rank),
        random_numbers(groups, length, layer.value_selection.shape[1]),
    )
    new_key, new_value = random_numbers(*keys[:, -1].shape), random_numbers(*values[:, -1].shape)
    # Features of a pair side by side, so that a pair is a complex number.
    pairs = torch.arange(heads * dim).view(heads, 2, dim // 2).transpose(1, 2).flatten()
    key_expansion = layer.key_expansion.flatten(0, 1)[pairs].unflatten(0, (groups, -1)).mT.contiguous()
    value_expansion = layer.value_expansion.unflatten(1, (-1, dim)).flatten(0, 1).mT.contiguous()
    # shape: (1, length, d) -> (length, 1, d / 2)
    cos, sin = rotary_cos_sin(config=model, position_ids=torch.arange(length)[None], dtype=torch.float32)
    angles = torch.complex(cos, sin)[0, :, None, : dim // 2].contiguous()
    query = random_numbers(heads, model.num_attention_heads // heads, dim)

    def step() -> torch.Tensor:
        keys[:, -1], values[:, -1] = new_key, new_value
        # shape: (groups, length, h d / groups) -> (groups, length, h / groups, d / 2) complex
        rebuilt = (keys @ key_expansion).unflatten(2, (-1, dim // 2, 2))
        torch.view_as_complex(rebuilt).mul_(angles)
        # shape: (h, H / h, d) x (h, d, length) -> (h, H / h, length)
        by_head = rebuilt.flatten(3).permute(0, 2, 3, 1).flatten(0, 1)
        weights = (query * dim**-0.5 @ by_head).softmax(-1)
        latent = weights.view(groups, -1, length) @ values
        return latent.view(heads, -1, latent.shape[-1]) @ value_expansion

    return step


def _decoupled_step(layer: DecoupledLayer, model: Model, *, length: int) -> Step:
    """Queries are multiplied into the latent numbers' space, where one key is the value as well."""
    heads, dim = model.num_key_value_heads, model.head_dim
    width, latent = layer.rotary_selection.shape[0], len(layer.selection)
    cache, new = random_numbers(1, 1, length, latent + width), random_numbers(latent + width)
    query = random_numbers(heads, model.num_attention_heads // heads, dim)
    rotary_query = random_numbers(heads, model.num_attention_heads // heads, width)
    value_expansion = layer.value_expansion.mT.contiguous()

    def step() -> torch.Tensor:
        cache[0, 0, -1] = new
        wide = torch.cat([query @ layer.key_expansion, rotary_query], -1).view(1, 1, -1, latent + width)
        output = F.scaled_dot_product_attention(wide, cache, cache, scale=dim**-0.5)
        return output.view(heads, -1, latent + width)[..., :latent] @ value_expansion

    return step


def random_numbers(*shape: int) -> torch.Tensor:
    """What stands in caches and queries."""
    return torch.randn(*shape) * 0.5
