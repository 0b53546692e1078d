"""The attention layer of a Multi-head Explicit Attention (MEA) decoder. Travels with every export.

The cache of a layer holds one head: all rotated component heads concatenated, h' d wide, in transformers' own
cache classes (arXiv 2601.19611, eq. 13: RoPE commutes with the combination, so rotated component heads can be
cached). Many new tokens (prefill) attend to composite heads, which are composed from the cache. A few new tokens
absorb the combination into their queries and outputs instead, and attend to that one head; `absorbing_is_cheaper`
decides. Another combination is latent_mea.py.
"""

import inspect
import math
from functools import partial, wraps

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .combination_mea import MEAHeadCombination, absorbing_is_cheaper
from .configuration_mea import MEAConfig
from .rotary_mea import apply_rotary, at_least_float32

# transformers 5.24 renamed `past_key_values` to `cache` everywhere; older releases know the old name only.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"

# Up to so many new tokens are a step of decoding, not a prompt: the mask is then repeated for each query head.
MAX_DECODING_TOKENS = 32
LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
# The widest head that FlashAttention and, on a GPU, FlexAttention take.
MAX_KERNEL_HEAD_DIM = 256


def accept_either_cache_name(function):
    """Lets a forward method that names its argument `cache` be called with `past_key_values` too."""

    @wraps(function)
    def wrapped(*args, **kwargs):
        past_key_values = kwargs.pop("past_key_values", None)
        if past_key_values is not None:
            kwargs["cache"] = past_key_values

        return function(*args, **kwargs)

    return wrapped


def reinterpret_bits(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor's memory read as `dtype`; a gradient passes only if that is the tensor's own dtype."""
    return tensor if tensor.dtype == dtype else tensor.view(dtype)


def eager_attention_forward(
    module, query, key, value, attention_mask, scaling, dropout=0.0, key_scale=None, mixes=(None, None), **kwargs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of query heads (batch, H, q, D) on n key/value heads (batch, n, all, D): (batch, q, H, D) and weights.

    The H / n query heads of a key head are rows of one matrix product, so keys and values are not repeated.
    `key_scale` (batch, h, all) multiplies the scores of each composite head's queries. `mixes` combine the heads'
    logits and weights (talking heads, eq. 7-9).
    """
    logits_mix, weights_mix = mixes
    batch, heads, seq, dim = query.shape
    num_kv_heads, length = key.shape[1:3]
    score_dtype, dtype = at_least_float32(query.dtype), value.dtype
    if key_scale is not None and query.device.type == "cpu":
        # Explicit 16-bit products are up to 50 times slower than float32 where the CPU has no such instructions.
        query, key, value = query.to(score_dtype), key.to(score_dtype), value.to(score_dtype)

    scores = query.reshape(batch, num_kv_heads, -1, dim) @ key.transpose(2, 3)
    scores = scores.view(batch, heads, seq, length).to(score_dtype)
    if key_scale is None:
        scores = scores * scaling
    else:
        # shape: (batch, h, H / h, q, all) * (batch, h, 1, 1, all) -> (batch, H, q, all)
        scores = scores.unflatten(1, (key_scale.shape[1], -1)) * (key_scale * scaling)[:, :, None, None]
        scores = scores.flatten(1, 2)

    if logits_mix is not None:
        scores = logits_mix(scores.to(query.dtype)).to(score_dtype)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask

    weights = F.softmax(scores, dim=-1).to(value.dtype)
    weights = weights if weights_mix is None else weights_mix(weights)
    weights = F.dropout(weights, p=dropout, training=module.training)

    output = (weights.view(batch, num_kv_heads, -1, length) @ value).view(batch, heads, seq, -1)
    return output.transpose(1, 2).to(dtype).contiguous(), weights


def packed_attention_forward(module, query, key, value, attention_mask, scaling, key_scale=None, **kwargs):
    """The attention of `eager_attention_forward` by torch's fused one, for few tokens: (batch, q, H, D) and None.

    transformers' own `sdpa` repeats keys and values for several tokens, and some kernels read them once for each
    query head. Fused kernels cannot scale scores by `key_scale`, so this falls back to the eager function.
    """
    if key_scale is not None:
        output, _ = eager_attention_forward(
            module, query, key, value, attention_mask=attention_mask, scaling=scaling, key_scale=key_scale
        )
        return output, None

    batch, heads, seq, dim = query.shape
    num_kv_heads = key.shape[1]
    if attention_mask is not None and (attention_mask.shape[1] > 1 or seq > 1):
        # shape: (batch, H or 1, q or 1, all) -> (batch, n or 1, H / n q, all)
        group_size = heads // num_kv_heads
        mask_heads = num_kv_heads if attention_mask.shape[1] > 1 else 1
        attention_mask = attention_mask.expand(-1, mask_heads * group_size, seq, -1)
        attention_mask = attention_mask.reshape(-1, mask_heads, group_size * seq, key.shape[2])

    output = F.scaled_dot_product_attention(
        query.reshape(batch, num_kv_heads, -1, dim), key, value, attn_mask=attention_mask, scale=scaling
    )
    return output.view(batch, heads, seq, -1).transpose(1, 2), None


def pad_features(*heads: torch.Tensor, width: int) -> list[torch.Tensor]:
    """The heads with zeros behind their features up to one `width`, which some kernels and caches want."""
    return [head if head.shape[-1] == width else F.pad(head, (0, width - head.shape[-1])) for head in heads]


class MEARMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last dimension; sums in float32 for 16-bit inputs, in float64 for float64."""


class MEAKeyNorm(nn.Module):
    """The RMSNorm of composite keys, split into a weight on component keys and scalars on composite keys.

    The norm of composite key j is the weight times k_j times a scalar s_j. Weight and RoPE act on features and
    commute with the combination, so they are applied to components; the scalars (batch, h, seq) are multiplied onto
    composite keys, or onto scores, later.
    """

    def __init__(self, head_dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))
        self.eps = eps

    def forward(self, components: torch.Tensor, composites: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, h', seq, d), (batch, h, seq, d) -> components (batch, h', seq, d), scalars (batch, h, seq)"""
        mean_square = composites.to(at_least_float32(composites.dtype)).pow(2).mean(-1)
        return components * self.weight, torch.rsqrt(mean_square + self.eps)


class MEAAttention(nn.Module):
    """Grouped-query attention on composite heads, each query head's output normalised (eq. 11 and 12).

    Other variants are talking heads (eq. 7-9), and differential attention (eq. 4-6), where heads 2i and 2i + 1 become
    one of twice the width, and gated attention (arXiv 2505.06708).
    """

    key_norm_class = MEAKeyNorm

    def __init__(self, config: MEAConfig, layer_idx: int):
        super().__init__()
        hidden, dim = config.hidden_size, config.head_dim
        self.config, self.layer_idx = config, layer_idx
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, dim
        self.num_component_heads = config.num_component_heads[layer_idx]
        self.num_key_value_groups = self.num_heads // self.num_kv_heads
        self.scaling = dim**-0.5
        self.is_causal = True

        self.q_proj = nn.Linear(hidden, self.num_heads * dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(self.num_heads * dim, hidden, bias=False)

        self._add_key_value_projections()
        self.q_norm = MEARMSNorm(dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = self.key_norm_class(dim, eps=config.rms_norm_eps) if config.qk_norm else None

        self.differential = config.attention_variant == "differential"
        self.output_dim = config.variant.heads_per_output * dim
        self.head_norm = self.logits_mix = self.weights_mix = None
        if config.has_head_norm:
            affine = config.head_norm_affine
            self.head_norm = MEARMSNorm(self.output_dim, eps=config.head_norm_eps, elementwise_affine=affine)

        if self.differential:
            self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer_idx)
            for name in LAMBDAS:
                self.register_parameter(name, nn.Parameter(torch.zeros(dim)))

        self.gate_proj = None
        if config.attention_variant == "gated":
            gates_per_head = dim if config.gate_width == "feature" else 1
            self.gate_proj = nn.Linear(hidden, self.num_heads * gates_per_head, bias=False)

        if config.attention_variant == "talking_heads":
            self.logits_mix, self.weights_mix = (MEAHeadCombination(self.num_heads, self.num_heads) for _ in range(2))

    def _add_key_value_projections(self):
        """Projections to component heads, their combinations, and sizes for `absorbing_is_cheaper`."""
        config, dim = self.config, self.head_dim

        def projection() -> nn.Linear:
            return nn.Linear(config.hidden_size, self.num_component_heads * dim, bias=config.attention_bias)

        def combination() -> MEAHeadCombination:
            return MEAHeadCombination(self.num_component_heads, self.num_kv_heads)

        self.cached_widths = (self.num_component_heads * dim,) * 2
        self.composing_products = 2 * self.num_component_heads * self.num_kv_heads * dim
        self.k_proj, self.v_proj = projection(), projection()
        self.hlc_k = combination() if config.mixes_keys else None
        self.hlc_v = combination() if config.mixes_values else None

    @accept_either_cache_name
    def forward(self, hidden_states, position_embeddings, attention_mask=None, cache: Cache | None = None, **kwargs):
        batch, seq, _ = hidden_states.shape
        cos, sin = (angle[:, None] for angle in position_embeddings)
        # shape: (batch, seq, heads d) -> (batch, heads, seq, d)
        query = self.q_proj(hidden_states).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        key, value = self._split_components(self.k_proj(hidden_states), self.v_proj(hidden_states))

        key_scale = None
        if self.k_norm is not None:
            query = self.q_norm(query)
            key, key_scale = self.k_norm(key, key if self.hlc_k is None else self.hlc_k(key))

        query, key = apply_rotary(query, cos, sin), self._rotate_components(key, cos, sin)
        if cache is not None:
            key, value, key_scale = self._update_cache(key, value, key_scale, cache=cache)

        implementation = self.config._attn_implementation
        # Several tokens without a mask are a prompt, for which sdpa's causal mask is implied.
        is_decoding = cache is not None and not self.training and (seq == 1 or attention_mask is not None)
        is_absorbed = is_decoding and self._should_absorb(query, key, key_scale, implementation=implementation)
        if is_absorbed:
            query, key, value, value_columns = self._absorb(query, key, value)
            if implementation.startswith("flash_attention"):
                query, key, value = pad_features(query, key, value, width=max(self.cached_widths))
        else:
            if implementation == "sdpa" and attention_mask is None and seq > 1:
                # A static cache is longer than the prompt, which is all that it holds.
                key, value = key[:, :, :seq], value[:, :, :seq]

            key = key if self.hlc_k is None else self.hlc_k(key)
            value = value if self.hlc_v is None else self.hlc_v(value)
            if key_scale is not None:
                key, key_scale = (key * key_scale[:, :, : key.shape[2], None]).to(query.dtype), None

        if key_scale is not None:
            kwargs["key_scale"] = key_scale

        if is_decoding and implementation == "sdpa" and seq <= MAX_DECODING_TOKENS:
            attend = packed_attention_forward
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
            kwargs["dropout"] = self.config.attention_dropout if self.training else 0.0

        if self.differential:
            attend = partial(self._differential_attention, attend)
        elif self.logits_mix is not None:
            attend = self._talking_heads_attention

        output, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        # shape: (batch, seq, heads, d), or (batch, seq, heads d) from vLLM's attention
        if is_absorbed:
            output = self._combine_output(output[..., : self.cached_widths[1]], value_columns)
        if self.head_norm is not None:
            output = self.head_norm(output.reshape(batch, seq, -1, self.output_dim))
        if self.differential:
            output = output * (1 - self.lambda_init)
        if self.gate_proj is not None:
            # One gate for each feature of a head's output, or one for all of them (arXiv 2505.06708).
            gates = self.gate_proj(hidden_states).sigmoid().unflatten(2, (self.num_heads, -1))
            output = output.reshape(batch, seq, self.num_heads, -1) * gates

        return self.o_proj(output.reshape(batch, seq, -1)), weights

    def _differential_attention(self, attend, module, query, key, value, *args, **kwargs):
        """Attention of first minus lambda times second heads of pairs: (batch, q, H / 2, 2 d) and weights."""
        if self.config._attn_implementation == "vllm":
            # vLLM's attention caches the values of each call, and here each of two calls has half of them.
            raise ValueError("attn_implementation is 'vllm' (expected for differential: those of transformers)")

        # shape: (batch, h, all, d) -> (batch, h / 2, all, d) twice over -> (batch, h, all, d)
        halves = [half.repeat(1, 2, 1, 1) for half in (value[:, 0::2], value[:, 1::2])]
        query, key = (torch.cat((heads[:, 0::2], heads[:, 1::2]), dim=1) for heads in (query, key))
        outputs = [attend(module, query, key, half, *args, **kwargs) for half in halves]
        output = torch.cat([half for half, _ in outputs], dim=-1)

        sum_dtype = at_least_float32(output.dtype)
        q1, k1, q2, k2 = (getattr(self, name).to(sum_dtype) for name in LAMBDAS)
        weight = ((q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.lambda_init).to(output.dtype)
        weights = outputs[0][1]
        if weights is not None:
            first, second = weights.chunk(2, dim=1)
            weights = first - weight * second

        first, second = output.chunk(2, dim=2)
        return first - weight * second, weights

    def _talking_heads_attention(self, module, query, key, value, attention_mask, **kwargs):
        """Attention with mixed logits and weights, always eager since only that holds the scores of all heads."""
        implementation, seq = self.config._attn_implementation, query.shape[2]
        if implementation not in ("eager", "sdpa"):
            raise ValueError(f"attn_implementation is {implementation!r} (expected for talking_heads: eager, sdpa)")
        if attention_mask is None and seq > 1:
            attention_mask = torch.ones(seq, seq, dtype=torch.bool, device=query.device).tril()

        mixes = (self.logits_mix, self.weights_mix)
        return eager_attention_forward(self, query, key, value, attention_mask=attention_mask, mixes=mixes, **kwargs)

    def _update_cache(self, key, value, key_scale, *, cache):
        """Appends to the cache and returns all of it: keys, values (batch, h', all, d), scalars (batch, h, all)."""
        batch, _, seq, _ = key.shape
        # shape: (batch, h', seq, d) -> (batch, 1, seq, h' d)
        keys, values = (heads.transpose(1, 2).reshape(batch, 1, seq, -1) for heads in (key, value))
        width = keys.shape[-1]
        if key_scale is not None:
            if any(hasattr(layer, "_quantize") for layer in cache.layers):
                raise ValueError("qk_norm has exact scalars in the cache (expected: caches that do not quantise)")
            # In a 16-bit cache each float32 scalar takes two elements, bit by bit.
            scales = key_scale.transpose(1, 2).unsqueeze(1).contiguous()
            keys = torch.cat((keys, reinterpret_bits(scales, keys.dtype)), dim=-1)

        keys, values = cache.update(keys, values, self.layer_idx)
        if keys.shape[2] == seq:
            # No past: the arguments, through which gradients pass.
            return key, value, key_scale

        if key_scale is not None:
            if keys.dtype != key_scale.dtype and key_scale.requires_grad:
                raise ValueError("no gradients pass the scalars of qk_norm in a 16-bit cache: use_cache=False")
            key_scale = reinterpret_bits(keys[:, 0, :, width:], key_scale.dtype).transpose(1, 2)

        # Views, so that a step of decoding does not copy the cache.
        return *self._split_components(keys[:, 0, :, :width], values[:, 0]), key_scale

    def _split_components(self, keys, values):
        """Keys and values (batch, seq, h' d) as component heads (batch, h', seq, d)."""
        return (heads.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for heads in (keys, values))

    def _rotate_components(self, key, cos, sin):
        """RoPE of component keys, by cos and sin (batch, 1, seq, d)."""
        return apply_rotary(key, cos, sin)

    def _should_absorb(self, query, key, key_scale, *, implementation: str) -> bool:
        """Whether these queries absorb the combination: if the attention function supports that and it is cheaper."""
        if self.hlc_k is None and self.hlc_v is None:
            return False

        tokens, context = query.shape[2], len(query) * key.shape[2]
        if implementation not in ("sdpa", "eager"):
            # These kernels read grouped keys without repeating them, but take neither wide heads nor scaled scores.
            reads_grouped_keys = implementation == "flex_attention" or implementation.startswith("flash_attention")
            if not reads_grouped_keys or max(self.cached_widths) > MAX_KERNEL_HEAD_DIM or key_scale is not None:
                return False

        return tokens <= MAX_DECODING_TOKENS and absorbing_is_cheaper(
            tokens=tokens,
            context=context,
            heads=self.num_heads,
            composites=self.num_kv_heads,
            dim=self.head_dim,
            cached_widths=self.cached_widths,
            composing_products=self.composing_products,
            on_cpu=query.device.type == "cpu",
        )

    def _absorb(self, query, key, value):
        """Returns queries (batch, H, q, h' d), one key and value head (batch, 1, all, h' d), and columns of `hlc_v`.

        q . k_j = sum_c (weight[c, j] q) . k_c, so the query head absorbs the combination, concatenated over c;
        `_combine_output` applies that of the values to the output. Keys and values are views of the cache.
        """
        # shape: (batch, H, q, 1, d) * (H, 1, h', 1) -> (batch, H, q, h' d)
        query = (query.unsqueeze(3) * self._query_head_columns(self.hlc_k, query)[:, None]).flatten(3)
        # shape: (batch, h', all, d) -> (batch, 1, all, h' d)
        key, value = (heads.transpose(1, 2).flatten(2).unsqueeze(1) for heads in (key, value))
        return query, key, value, self._query_head_columns(self.hlc_v, query)

    def _combine_output(self, output, value_columns):
        """Output on component values (batch, q, H, h' d) -> on composite values (batch, q, H, d)."""
        return (output.unflatten(3, (self.num_component_heads, self.head_dim)) * value_columns).sum(3)

    def _query_head_columns(self, combination, like) -> torch.Tensor:
        """Columns of the combination, that of its composite head for each query head: (H, h', 1)."""
        if combination is None:
            columns = torch.eye(self.num_kv_heads, dtype=like.dtype, device=like.device)
        else:
            columns = combination(None).to(like.dtype)

        return columns.repeat_interleave(self.num_heads // self.num_kv_heads, dim=0).unsqueeze(2)
