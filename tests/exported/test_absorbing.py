"""When a decoding step absorbs the combination, by the sizes of a layer."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from megatron_mea.exported.attention_mea import MEAAttention
from megatron_mea.exported.combination_mea import absorbing_is_cheaper
from megatron_mea.exported.configuration_mea import MEAConfig
from megatron_mea.exported.latent_mea import MEALatentAttention


def shape(*, heads: int, composites: int, dim: int = 64, context: int = 4096, **sizes: Any) -> dict[str, Any]:
    """Arguments of `absorbing_is_cheaper`, from the sizes of an attention layer."""
    config = MEAConfig(
        num_attention_heads=heads, num_key_value_heads=composites, head_dim=dim, num_hidden_layers=1, **sizes
    )
    layer_class = MEALatentAttention if config.hlc_form == "latent" else MEAAttention
    with torch.device("meta"):
        layer = layer_class(config, 0)

    costs = {"cached_widths": layer.cached_widths, "composing_products": layer.composing_products}
    return {"context": context, "heads": heads, "composites": composites, "dim": dim, **costs}


def test_absorbing_is_chosen_by_shapes():
    """One token absorbs at every usual shape, a prompt never, and a GPU, where products are cheap, more tokens."""
    for heads, composites, components in product((8, 16, 32), (4, 8), (1, 2, 4)):
        sizes = shape(heads=heads, composites=composites, num_component_heads=components)
        assert absorbing_is_cheaper(tokens=1, **sizes, on_cpu=True)

        for tokens in range(2, 100):
            if absorbing_is_cheaper(tokens=tokens, **sizes, on_cpu=True):
                assert absorbing_is_cheaper(tokens=tokens - 1, **sizes, on_cpu=True)
                assert absorbing_is_cheaper(tokens=tokens, **sizes, on_cpu=False)

    sizes = shape(heads=32, composites=8, num_component_heads=4)
    assert not absorbing_is_cheaper(tokens=4, **sizes, on_cpu=True)
    assert absorbing_is_cheaper(tokens=4, **sizes, on_cpu=False)
    assert not absorbing_is_cheaper(tokens=512, **sizes, on_cpu=False)
    assert not absorbing_is_cheaper(tokens=1, **sizes | {"context": 16}, on_cpu=True)
    assert absorbing_is_cheaper(tokens=1, **sizes | {"context": 16}, on_cpu=False)

    latent = {"hlc_form": "latent", "key_latent_dim": 306, "value_latent_dim": 204}
    sizes = shape(heads=32, composites=8, context=2048, **latent)
    assert absorbing_is_cheaper(tokens=8, **sizes, on_cpu=True), "composing latent numbers is a dense product"
    assert not absorbing_is_cheaper(tokens=24, **sizes, on_cpu=True)
