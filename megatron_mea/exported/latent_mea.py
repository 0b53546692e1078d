"""Attention with the general head combination (`hlc_form: latent`). Travels with every export.

RoPE turns the feature pair (f, f + d/2) of all heads by one angle, as complex numbers. So keys can be combined from
cached pairs, rotated already, by complex numbers within each frequency, and values from any cached numbers.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .attention_mea import MEAAttention, MEAKeyNorm
from .rotary_mea import apply_rotary, at_least_float32


class MEALatentKeyNorm(MEAKeyNorm):
    """The RMSNorm of composite keys that already have its weight in them, as latent pairs must.

    A weight that differs within a pair does not commute with the complex combination. So the combination gives keys
    times the weight, and the mean square is taken of what it is divided out of.
    """

    def forward(self, components: torch.Tensor, composites: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, 1, seq, n), (batch, h, seq, d) -> components as they are, scalars (batch, h, seq)"""
        sum_dtype = at_least_float32(composites.dtype)
        mean_square = (composites.to(sum_dtype) / self.weight.to(sum_dtype)).pow(2).mean(-1)
        return components, torch.rsqrt(mean_square + self.eps)


class MEALatentValues(nn.Module):
    """Values from latent numbers by `weight` (n, h d)."""

    def __init__(self, num_latent: int, num_kv_heads: int, head_dim: int):
        super().__init__()
        self.num_kv_heads = num_kv_heads
        self.weight = nn.Parameter(torch.empty(num_latent, num_kv_heads * head_dim))

    def matrix(self) -> torch.Tensor:
        """The combination as a real matrix (n, h d)."""
        return self.weight

    def forward(self, latent: torch.Tensor | None) -> torch.Tensor:
        """(batch, 1, seq, n) -> composite heads (batch, h, seq, d); without an argument, matrices (h, n, d)."""
        matrix = self.matrix()
        if latent is None:
            return matrix.unflatten(1, (self.num_kv_heads, -1)).transpose(0, 1).clone()

        return (latent @ matrix).squeeze(1).unflatten(2, (self.num_kv_heads, -1)).transpose(1, 2)


class MEALatentKeys(MEALatentValues):
    """Keys from pairs of one RoPE frequency each, by `weight` (pairs, h, 2), the parts of a complex number.

    Feature pair f of composite head j, as a complex number, is the sum over the pairs n of its frequency of
    weight[n, j] c_n. That commutes with RoPE, which turns all of them by one angle.
    """

    def __init__(self, pair_counts: list[int], num_kv_heads: int):
        nn.Module.__init__(self)
        self.num_kv_heads, self.num_frequencies = num_kv_heads, len(pair_counts)
        self.weight = nn.Parameter(torch.empty(sum(pair_counts), num_kv_heads, 2))
        self.pair_counts = list(pair_counts)
        # Small whole numbers, exact in every dtype that a model may be cast to.
        self.register_buffer("frequency", self.frequencies())

    def frequencies(self) -> torch.Tensor:
        """The index of the frequency of each pair, ascending."""
        return torch.tensor([float(index) for index, count in enumerate(self.pair_counts) for _ in range(count)])

    def matrix(self) -> torch.Tensor:
        """The combination as a real matrix (2 pairs, h d), for features (n, n + pairs) and (f, f + d/2)."""
        real, imaginary = self.weight.unbind(-1)
        # shape: (2, 2, pairs, h), by part of the pair and part of the feature
        parts = torch.stack([torch.stack([real, imaginary]), torch.stack([-imaginary, real])])
        is_own = F.one_hot(self.frequency.long(), self.num_frequencies).to(parts.dtype)
        return torch.einsum("abnh,nf->anhbf", parts, is_own).reshape(2 * len(real), -1)


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
        # In heads, as the costs of absorbing count.
        self.num_component_heads = (key_width + value_width) / (2 * self.head_dim)

    def _split_components(self, keys, values):
        return keys.unsqueeze(1), values.unsqueeze(1)

    def _rotate_components(self, key, cos, sin):
        frequency = self.hlc_k.frequency.long().to(cos.device).repeat(2)
        return apply_rotary(key, cos[..., frequency], sin[..., frequency])

    def _absorb(self, query, key, value):
        """Queries (batch, H, q, n), keys and values as cached, and matrices of `hlc_v` for `_combine_output`."""
        # shape: (batch, h, H / h, q, d) x (h, n, d) -> (batch, H, q, n)
        grouped = query.unflatten(1, (self.num_kv_heads, -1))
        query = torch.einsum("bjgqd,jnd->bjgqn", grouped, self.hlc_k(None).to(query.dtype)).flatten(1, 2)
        return query, key, value, self.hlc_v(None).to(query.dtype)

    def _combine_output(self, output, value_columns):
        """Output on latent numbers (batch, q, H, n) -> on composite values (batch, q, H, d)."""
        grouped = output.unflatten(2, (self.num_kv_heads, -1))
        return torch.einsum("bqjgn,jnd->bqjgd", grouped, value_columns).flatten(2, 3)
