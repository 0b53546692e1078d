"""Combinations of cached keys and values to composite heads. For training and in every export, with which it travels.

RoPE turns the feature pair (f, f + d/2) of all heads by one angle, as complex numbers. So keys can be combined from
cached pairs, rotated already, by complex numbers within each frequency, and values from any cached numbers. Eq. 10 of
arXiv 2601.19611, which combines whole heads, is the case of one real matrix for all of them.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .rotary_mea import at_least_float32

# Gains of a norm smaller than that count as that where keys are divided by them: a gain of 0 leaves no key to find.
MIN_GAIN = 1e-6


class MEAHeadCombination(nn.Module):
    """Head-level linear combination (eq. 10): `weight` (h', h), composite j = sum_c weight[c, j] component_c.

    Talking heads combine their logits and weights (batch, H, q, all) in the same way (eq. 7 and 9).
    """

    def __init__(self, num_component_heads: int, num_key_value_heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_component_heads, num_key_value_heads))

    def forward(self, components: torch.Tensor | None) -> torch.Tensor:
        """(batch, h', seq, d) -> (batch, h, seq, d); without components, the columns of `weight`: (h, h').

        Other modules get the weight through this call, since offloading loads it only during the module's forward.
        """
        if components is None:
            return self.weight.t().clone()

        batch, num_components, seq, dim = components.shape
        # shape: (h, h') @ (batch, h', seq d) -> (batch, h, seq d)
        return (self.weight.t() @ components.reshape(batch, num_components, seq * dim)).view(batch, -1, seq, dim)


class MEALatentKeys(nn.Module):
    """Keys from pairs of one RoPE frequency each, by `weight` (pairs, h, 2), the parts of a complex number.

    Feature pair f of composite head j, as a complex number, is the sum over the pairs n of its frequency of
    weight[n, j] c_n. That commutes with RoPE, which turns all of them by one angle.
    """

    def __init__(self, pair_counts: Sequence[int], num_kv_heads: int):
        super().__init__()
        self.pair_counts, self.num_kv_heads = list(pair_counts), num_kv_heads
        self.weight = nn.Parameter(torch.empty(sum(pair_counts), num_kv_heads, 2))
        # Small whole numbers, exact in every dtype that a model may be cast to. On the default device, and not where
        # the weight is: vLLM has parameters alone on the device "meta".
        self.register_buffer("frequency", torch.empty(sum(pair_counts)).copy_(pair_frequencies(pair_counts)))

    def forward(self, x: torch.Tensor, *, absorbed: bool = False) -> torch.Tensor:
        """Pairs (batch, 1, seq, n) -> composite heads (batch, h, seq, d).

        `absorbed`: queries (batch, H, seq, d) -> (batch, H, seq, n), whose products with pairs are theirs with keys.
        """
        frequency, num_frequencies = self.frequency.long(), len(self.pair_counts)
        if not absorbed:
            matrix = expand_pairs(self.weight, frequency, head_dim=2 * num_frequencies)
            return (x @ matrix).squeeze(1).unflatten(2, (self.num_kv_heads, -1)).transpose(1, 2)

        grouped = x.unflatten(1, (self.num_kv_heads, -1))
        first, second = (grouped.index_select(-1, frequency + start) for start in (0, num_frequencies))
        # shape: (pairs, h) -> (h, 1, 1, pairs)
        real, imaginary = (part.t()[:, None, None].to(x.dtype) for part in self.weight.unbind(-1))
        pairs = (real * first + imaginary * second, real * second - imaginary * first)
        return torch.cat(pairs, dim=-1).flatten(1, 2)


class MEALatentValues(nn.Module):
    """Values from latent numbers by `weight` (n, h d)."""

    def __init__(self, num_latent: int, num_kv_heads: int, head_dim: int):
        super().__init__()
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.weight = nn.Parameter(torch.empty(num_latent, num_kv_heads * head_dim))

    def forward(self, x: torch.Tensor, *, absorbed: bool = False) -> torch.Tensor:
        """Latent numbers (batch, 1, seq, n) -> composite heads (batch, h, seq, d).

        `absorbed`: outputs of attention on latent numbers (batch, seq, H, n) -> on values (batch, seq, H, d).
        """
        if not absorbed:
            return (x @ self.weight).squeeze(1).unflatten(2, (self.num_kv_heads, -1)).transpose(1, 2)

        grouped = x.unflatten(2, (self.num_kv_heads, -1))
        weight = self.weight.unflatten(1, (self.num_kv_heads, -1)).to(x.dtype)
        return torch.einsum("bqjgn,njd->bqjgd", grouped, weight).flatten(2, 3)


def absorbing_is_cheaper(
    *,
    tokens: int,
    context: int,
    heads: int,
    composites: int,
    dim: int,
    cached_widths: tuple[int, int],
    composing_products: int,
    on_cpu: bool,
) -> bool:
    """Whether attention of new tokens is cheaper on what is cached than on heads composed from it.

    Costs are counted for keys and values of one cached token, in products of two numbers. Absorbed: each row of queries
    attends to a head as wide as the cache instead of d. Composed: the combination itself, and moving both what is
    cached and h heads, each number of which takes as long as `products_per_move` products, as measured in
    docs/decoding.md (for a GPU: estimated from the ratio of its arithmetic to its bandwidth). Both are proportional to
    `context`, but on a CPU absorbing costs some more small operations, which only a long context pays for.

    Args:
        tokens: number of new tokens of a sequence.
        context: number of cached tokens of the batch.
        heads, composites, dim: H, h and d.
        cached_widths: numbers of a token's cached keys and values.
        composing_products: of the combinations of one token's keys and values.
    """
    products_per_move, min_saved = (28, 1.5e6) if on_cpu else (150, 0)
    composing = composing_products + products_per_move * (sum(cached_widths) + 2 * composites * dim)
    saved = composing - tokens * heads * (sum(cached_widths) - 2 * dim)
    return saved > 0 and saved * context >= min_saved


def mean_square_without_gain(keys: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """The mean square (...,) of the keys (..., d) that became `keys` by multiplication with `gain` (d,)."""
    sum_dtype = at_least_float32(keys.dtype)
    gain_squares = gain.to(sum_dtype).square().clamp(min=MIN_GAIN**2)
    return (keys.to(sum_dtype).square() / gain_squares).mean(-1)


def pair_frequencies(counts: Sequence[int]) -> torch.Tensor:
    """The index of every pair's frequency (pairs,), ascending, from the number of pairs of each frequency."""
    return torch.repeat_interleave(torch.arange(len(counts), device="cpu"), torch.tensor(counts, device="cpu"))


def expand_pairs(combination: torch.Tensor, frequency: torch.Tensor, *, head_dim: int) -> torch.Tensor:
    """The complex combination as a real matrix, by which rows of pairs (n, n + pairs) are multiplied.

    Args:
        combination: (pairs, h, 2), real and imaginary parts.
        frequency: (pairs,)

    Returns:
        (2 pairs, h d), whose features are pairs (f, f + d/2) of each head.
    """
    real, imaginary = combination.unbind(-1)
    # shape: (2, 2, pairs, h), by part of the pair and part of the feature
    parts = torch.stack([torch.stack([real, imaginary]), torch.stack([-imaginary, real])])
    is_own = F.one_hot(frequency, head_dim // 2).to(parts.dtype)
    # shape: (2, 2, pairs, h), (pairs, d/2) -> (2, pairs, h, 2, d/2)
    matrix = torch.einsum("abnh,nf->anhbf", parts, is_own)
    return matrix.reshape(2 * len(frequency), -1)


def block_pairs(counts: Sequence[int], num_composites: int) -> torch.Tensor:
    """The first combination of pairs (pairs, h, 2): at a frequency of r pairs, composite j is pair floor(j r / h).

    That is the identity where each frequency has h pairs, and grouped queries where each has h'.
    """
    combination = torch.zeros(sum(counts), num_composites, 2)
    composites = torch.arange(num_composites)
    first = 0
    for count in counts:
        if count:
            combination[first + composites * count // num_composites, composites, 0] = 1.0
        first += count

    return combination


def block_features(num_latent: int, num_composites: int, head_dim: int) -> torch.Tensor:
    """The first combination of values (n, h d): number c d + i is feature i of block c, as with component heads.

    A feature of r numbers gives composite j its number floor(j r / h); without one it starts at zero.
    """
    combination = torch.zeros(num_latent, num_composites, head_dim)
    features = torch.arange(head_dim)
    counts = (num_latent - features + head_dim - 1) // head_dim
    for composite in range(num_composites):
        latent = composite * counts // num_composites * head_dim + features
        combination[latent[counts > 0], composite, features[counts > 0]] = 1.0

    return combination.flatten(1)
