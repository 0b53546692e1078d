"""Attention with the general head combination (`hlc_form: latent`, combination_mea.py). Travels with every export."""

import torch
from torch import nn

from .attention_mea import MEAAttention, MEAKeyNorm
from .combination_mea import MEALatentKeys, MEALatentValues, mean_square_without_gain
from .rotary_mea import apply_rotary


class MEALatentKeyNorm(MEAKeyNorm):
    """The RMSNorm of composite keys that already have its weight in them, as latent pairs must.

    A weight that differs within a pair does not commute with the complex combination. So the combination gives keys
    times the weight, and the mean square is taken of what it is divided out of.
    """

    def forward(self, components: torch.Tensor, composites: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, 1, seq, n), (batch, h, seq, d) -> components as they are, scalars (batch, h, seq)"""
        mean_square = mean_square_without_gain(composites, self.weight)
        return components, torch.rsqrt(mean_square + self.eps)


class MEALatentAttention(MEAAttention):
    """Attention whose cache holds pairs of one RoPE frequency each, and latent numbers of values (`hlc_form: latent`).

    Both are "one head" (batch, 1, seq, n), of any two widths, from which the composite heads follow.
    """

    key_norm_class = MEALatentKeyNorm

    def _add_key_value_projections(self):
        config, layer_idx = self.config, self.layer_idx
        key_width, value_width = config.key_latent_dim[layer_idx], config.value_latent_dim[layer_idx]
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, value_width, bias=config.attention_bias)
        self.hlc_k = MEALatentKeys(config.pair_counts(layer_idx), self.num_kv_heads)
        self.hlc_v = MEALatentValues(value_width, self.num_kv_heads, self.head_dim)
        self.cached_widths = (key_width, value_width)
        # Dense products, which take half as long as those of attention (docs/decoding.md).
        self.composing_products = (key_width + value_width) * self.num_kv_heads * self.head_dim // 2

    def _split_components(self, keys, values):
        return keys.unsqueeze(1), values.unsqueeze(1)

    def _rotate_components(self, key, cos, sin):
        frequency = self.hlc_k.frequency.long().to(cos.device).repeat(2)
        return apply_rotary(key, cos[..., frequency], sin[..., frequency])

    def _absorb(self, query, key, value):
        """Queries (batch, H, q, n), keys and values as cached, and nothing: `hlc_v` combines outputs itself."""
        return self.hlc_k(query, absorbed=True), key, value, None

    def _combine_output(self, output, _):
        """Output on latent numbers (batch, q, H, n) -> on composite values (batch, q, H, d)."""
        return self.hlc_v(output, absorbed=True)
