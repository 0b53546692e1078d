"""Multi-head Explicit Attention (MEA) decoder for transformers. Travels with every export, as does what it imports.

The cache of a layer holds one head: all rotated component heads side by side, h' d wide, in transformers' own
cache classes (arXiv 2601.19611, eq. 13: RoPE commutes with the combination, so rotated component heads can be
stored). Composite heads are made from it when many tokens attend (prefill). A few new tokens absorb the
combination into their queries and outputs instead, and attend to that one head; `absorbing_is_cheaper` decides.
"""

import inspect
import math
from functools import partial, wraps

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_mea import MEAConfig
from .rotary_mea import apply_rotary, at_least_float32, rotary_cos_sin

# transformers 5.24 renamed `past_key_values` to `cache` everywhere; older releases know the old name only.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"

# As many new tokens are a step of decoding, not a prompt: the mask is then repeated for each query head.
FEW_TOKENS = 32
LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
WIDEST_KERNEL_HEAD = 256  # of FlashAttention and, on a GPU, FlexAttention


def accept_either_cache_name(function):
    """Lets a forward method that names its argument `cache` be called with `past_key_values` too."""

    @wraps(function)
    def wrapped(*args, **kwargs):
        old = kwargs.pop("past_key_values", None)
        if old is not None:
            kwargs["cache"] = old
        return function(*args, **kwargs)

    return wrapped


def same_bits(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor's memory read as `dtype`. No gradient passes `view(dtype)`, not even to the tensor's own type."""
    return tensor if tensor.dtype == dtype else tensor.view(dtype)


def eager_attention_forward(
    module, query, key, value, attention_mask, scaling, dropout=0.0, key_scale=None, mixes=(None, None), **kwargs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of query heads (batch, H, q, D) on n key/value heads (batch, n, all, D): (batch, q, H, D) and weights.

    The H / n query heads of a key head are rows of one product, so nothing is repeated. `key_scale`
    (batch, h, all) multiplies the scores of each composite head's queries. `mixes` combine the heads' logits and
    weights (talking heads, eq. 7-9).
    """
    logits_mix, weights_mix = mixes
    batch, heads, seq, dim = query.shape
    count, length = key.shape[1:3]
    accurate, dtype = at_least_float32(query.dtype), value.dtype
    if key_scale is not None and query.device.type == "cpu":
        # Explicit 16-bit products are up to 50 times slower than float32 where the CPU has no such instructions.
        query, key, value = query.to(accurate), key.to(accurate), value.to(accurate)
    scores = query.reshape(batch, count, -1, dim) @ key.transpose(2, 3)
    scores = scores.view(batch, heads, seq, length).to(accurate)
    if key_scale is None:
        scores = scores * scaling
    else:
        # shape: (batch, h, H / h, q, all) * (batch, h, 1, 1, all) -> (batch, H, q, all)
        scores = scores.unflatten(1, (key_scale.shape[1], -1)) * (key_scale * scaling)[:, :, None, None]
        scores = scores.flatten(1, 2)
    if logits_mix is not None:
        scores = logits_mix(scores.to(query.dtype)).to(accurate)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1).to(value.dtype)
    weights = weights if weights_mix is None else weights_mix(weights)
    weights = F.dropout(weights, p=dropout, training=module.training)
    output = (weights.view(batch, count, -1, length) @ value).view(batch, heads, seq, -1)
    return output.transpose(1, 2).to(dtype).contiguous(), weights


def packed_attention_forward(module, query, key, value, attention_mask, scaling, key_scale=None, **kwargs):
    """`eager_attention_forward` by torch's fused attention, for few tokens: (batch, q, H, D) and no weights.

    transformers' own `sdpa` repeats keys and values for several tokens, and some kernels read them once for each
    query head. A multiplication of scores is beyond the fused kernels.
    """
    if key_scale is not None:
        output, _ = eager_attention_forward(module, query, key, value, attention_mask, scaling, key_scale=key_scale)
        return output, None
    batch, heads, seq, dim = query.shape
    count = key.shape[1]
    if attention_mask is not None and (attention_mask.shape[1] > 1 or seq > 1):
        # shape: (batch, H or 1, q or 1, all) -> (batch, n or 1, H / n q, all)
        groups = count if attention_mask.shape[1] > 1 else 1
        attention_mask = attention_mask.expand(-1, groups * (heads // count), seq, -1)
        attention_mask = attention_mask.reshape(-1, groups, heads // count * seq, key.shape[2])
    output = F.scaled_dot_product_attention(
        query.reshape(batch, count, -1, dim), key, value, attn_mask=attention_mask, scale=scaling
    )
    return output.view(batch, heads, seq, -1).transpose(1, 2), None


def absorbing_is_cheaper(
    tokens: int, context: int, heads: int, composites: int, components: int, dim: int, on_cpu: bool
) -> bool:
    """Whether `tokens` new tokens a row attend cheaper to component heads than to heads composed anew from the cache.

    Counted for one side (keys or values) of one cached token, in products of a head's width. Absorbed: each row of
    queries meets h' heads where it would meet one. Composed: the combination itself, h h', and moving h' + h
    heads, each of which takes as long as so many products as measured in docs/decoding.md (for a GPU: estimated from
    the ratio of its arithmetic to its bandwidth). `context`, the cached tokens of the batch, multiplies both alike;
    but absorbing costs a CPU some small operations more, which a short context does not pay for.
    """
    products_per_move, fixed = (28, 1.5e6) if on_cpu else (150, 0)
    composing = composites * components + products_per_move * (composites + components)
    saved = composing - tokens * heads * (components - 1)
    return saved > 0 and 2 * saved * dim * context >= fixed


class MEARMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last dimension; sums in float32 for 16-bit inputs, in float64 for float64."""


class MEAKeyNorm(nn.Module):
    """The norm of composite keys, as what components take of it (gain) and what cannot act on them (scalars).

    The norm of composite key j is its gain times k_j times a scalar s_j. Gain and RoPE act on features and
    commute with the combination, so they can act on components; the scalars (batch, h, seq) are multiplied onto
    composite keys, or onto scores, later.
    """

    def __init__(self, head_dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))
        self.eps = eps

    def forward(self, components: torch.Tensor, composites: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean_square = composites.to(at_least_float32(composites.dtype)).pow(2).mean(-1)
        return components * self.weight, torch.rsqrt(mean_square + self.eps)


class MEAHeadCombination(nn.Module):
    """Head-level linear combination (eq. 10): `weight` (h', h), composite j = sum_c weight[c, j] component_c.

    Talking heads combine their logits and weights (batch, H, q, all) in the same way (eq. 7 and 9).
    """

    def __init__(self, num_component_heads: int, num_key_value_heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_component_heads, num_key_value_heads))

    def forward(self, components: torch.Tensor | None) -> torch.Tensor:
        """(batch, h', seq, d) -> (batch, h, seq, d); without components the columns of `weight`: (h, h').

        Nobody reads `weight` from outside: offloading puts it in place during a module's own forward only.
        """
        if components is None:
            return self.weight.t().clone()
        batch, count, seq, dim = components.shape
        # shape: (h, h') @ (batch, h', seq d) -> (batch, h, seq d)
        return (self.weight.t() @ components.reshape(batch, count, seq * dim)).view(batch, -1, seq, dim)


class MEAMLP(nn.Module):
    def __init__(self, config: MEAConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class MEAAttention(nn.Module):
    """Grouped-query attention on composite heads, each query head's output normalised (eq. 11 and 12).

    Two variants are others: talking heads (eq. 7-9), and differential ones (eq. 4-6), of which heads 2i and 2i + 1 make
    one, twice as wide.
    """

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
        self.k_proj = nn.Linear(hidden, self.num_component_heads * dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(hidden, self.num_component_heads * dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(self.num_heads * dim, hidden, bias=False)
        sizes = (self.num_component_heads, self.num_kv_heads)
        self.hlc_k = MEAHeadCombination(*sizes) if config.mixes_keys else None
        self.hlc_v = MEAHeadCombination(*sizes) if config.mixes_values else None
        self.q_norm = MEARMSNorm(dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = MEAKeyNorm(dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.differential = config.attention_variant == "differential"
        self.output_dim = 2 * dim if self.differential else dim
        self.head_norm = self.logits_mix = self.weights_mix = None
        if config.has_head_norm:
            affine = config.head_norm_affine
            self.head_norm = MEARMSNorm(self.output_dim, eps=config.head_norm_eps, elementwise_affine=affine)
        if self.differential:
            self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer_idx)
            for name in LAMBDAS:
                self.register_parameter(name, nn.Parameter(torch.zeros(dim)))
        if config.attention_variant == "talking_heads":
            self.logits_mix, self.weights_mix = (MEAHeadCombination(self.num_heads, self.num_heads) for _ in range(2))

    @accept_either_cache_name
    def forward(self, hidden_states, position_embeddings, attention_mask=None, cache: Cache | None = None, **kwargs):
        batch, seq, _ = hidden_states.shape
        cos, sin = (angle[:, None] for angle in position_embeddings)
        # shape: (batch, seq, heads d) -> (batch, heads, seq, d)
        query = self.q_proj(hidden_states).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        key = self.k_proj(hidden_states).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        value = self.v_proj(hidden_states).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        key_scale = None
        if self.k_norm is not None:
            query = self.q_norm(query)
            key, key_scale = self.k_norm(key, key if self.hlc_k is None else self.hlc_k(key))
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        if cache is not None:
            key, value, key_scale = self._through_cache(cache, key, value, key_scale)

        implementation = self.config._attn_implementation
        # Several tokens without a mask are a prompt; sdpa takes its causal mask for granted.
        decoding = cache is not None and not self.training and (seq == 1 or attention_mask is not None)
        absorbed = decoding and self._absorbs(implementation, query, key, key_scale)
        if absorbed:
            query, key, value, mix = self._absorb(query, key, value)
        else:
            if implementation == "sdpa" and attention_mask is None and seq > 1:
                # A prompt sees nothing of a static cache beyond itself.
                key, value = key[:, :, :seq], value[:, :, :seq]
            key = key if self.hlc_k is None else self.hlc_k(key)
            value = value if self.hlc_v is None else self.hlc_v(value)
            if key_scale is not None:
                key, key_scale = (key * key_scale[:, :, : key.shape[2], None]).to(query.dtype), None

        if key_scale is not None:
            kwargs["key_scale"] = key_scale
        if decoding and implementation == "sdpa" and seq <= FEW_TOKENS:
            attend = packed_attention_forward
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
            kwargs["dropout"] = self.config.attention_dropout if self.training else 0.0
        if self.differential:
            attend = partial(self._attend_differentially, attend)
        elif self.logits_mix is not None:
            attend = self._attend_talking
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        # shape: (batch, seq, heads, d); vLLM's attention hands back (batch, seq, heads d)
        if absorbed:
            output = self._resolve(output, mix)
        if self.head_norm is not None:
            output = self.head_norm(output.reshape(batch, seq, -1, self.output_dim))
        if self.differential:
            output = output * (1 - self.lambda_init)
        return self.o_proj(output.reshape(batch, seq, -1)), weights

    def _attend_differentially(self, attend, module, query, key, value, *args, **kwargs):
        """First minus lambda times second heads of pairs, on both their values: (batch, q, H / 2, 2 d)."""
        if self.config._attn_implementation == "vllm":
            # Its layers cache what a call brings, and there are two.
            raise ValueError("attn_implementation is 'vllm' (allowed for differential: those of transformers)")
        # shape: (batch, h, all, d) -> (batch, h / 2, all, d) twice over -> (batch, h, all, d)
        halves = [half.repeat(1, 2, 1, 1) for half in (value[:, 0::2], value[:, 1::2])]
        query, key = (torch.cat((heads[:, 0::2], heads[:, 1::2]), dim=1) for heads in (query, key))
        outputs = [attend(module, query, key, half, *args, **kwargs) for half in halves]
        output = torch.cat([half for half, _ in outputs], dim=-1)
        accurate = at_least_float32(output.dtype)
        q1, k1, q2, k2 = (getattr(self, name).to(accurate) for name in LAMBDAS)
        weight = ((q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.lambda_init).to(output.dtype)
        weights = outputs[0][1]
        if weights is not None:
            first, second = weights.chunk(2, dim=1)
            weights = first - weight * second
        first, second = output.chunk(2, dim=2)
        return first - weight * second, weights

    def _attend_talking(self, module, query, key, value, attention_mask, **kwargs):
        """As `eager_attention_forward`, which alone has the scores of all heads."""
        implementation, seq = self.config._attn_implementation, query.shape[2]
        if implementation not in ("eager", "sdpa"):
            raise ValueError(f"attn_implementation is {implementation!r} (allowed for talking_heads: eager, sdpa)")
        if attention_mask is None and seq > 1:
            attention_mask = torch.ones(seq, seq, dtype=torch.bool, device=query.device).tril()
        mixes = (self.logits_mix, self.weights_mix)
        return eager_attention_forward(self, query, key, value, attention_mask, mixes=mixes, **kwargs)

    def _through_cache(self, cache, key, value, key_scale):
        """Appends to the cache and returns all of it: keys, values (batch, h', all, d), scalars (batch, h, all)."""
        batch, _, seq, _ = key.shape
        # shape: (batch, h', seq, d) -> (batch, 1, seq, h' d)
        keys, values = (heads.transpose(1, 2).reshape(batch, 1, seq, -1) for heads in (key, value))
        width = keys.shape[-1]
        if key_scale is not None:
            if any(hasattr(layer, "_quantize") for layer in cache.layers):
                raise ValueError("qk_norm has exact scalars in the cache (allowed: caches that do not quantise)")
            # The scalars keep their float32 bits in a 16-bit cache: they take two places each.
            scales = key_scale.transpose(1, 2).unsqueeze(1).contiguous()
            keys = torch.cat((keys, same_bits(scales, keys.dtype)), dim=-1)
        keys, values = cache.update(keys, values, self.layer_idx)
        if keys.shape[2] == seq:
            return key, value, key_scale  # no past: what was given, which has its gradients
        if key_scale is not None:
            if keys.dtype != key_scale.dtype and key_scale.requires_grad:
                raise ValueError("no gradients pass the scalars of qk_norm in a 16-bit cache: use_cache=False")
            key_scale = same_bits(keys[:, 0, :, width:], key_scale.dtype).transpose(1, 2)
        # Views: no step of decoding copies the cache.
        components = (self.num_component_heads, self.head_dim)
        keys, values = (heads[:, 0, :, :width].unflatten(2, components) for heads in (keys, values))
        return keys.transpose(1, 2), values.transpose(1, 2), key_scale

    def _absorbs(self, implementation: str, query, key, key_scale) -> bool:
        """Whether the combination goes into these queries: where the kernel can do it, and where it is cheaper."""
        if self.hlc_k is None and self.hlc_v is None:
            return False
        count, dim, tokens, context = self.num_component_heads, self.head_dim, query.shape[2], key.shape[2]
        if implementation not in ("sdpa", "eager"):
            # Kernels that read grouped keys as they are, but neither wide heads nor scaled scores.
            native = implementation == "flex_attention" or implementation.startswith("flash_attention")
            if not native or count * dim > WIDEST_KERNEL_HEAD or key_scale is not None:
                return False
        sizes = (len(query) * context, self.num_heads, self.num_kv_heads, count, dim)
        return tokens <= FEW_TOKENS and absorbing_is_cheaper(tokens, *sizes, query.device.type == "cpu")

    def _absorb(self, query, key, value):
        """Queries (batch, H, q, h' d) on one key/value head (batch, 1, all, h' d), and what `_resolve` needs.

        q . k_j = sum_c (weight[c, j] q) . k_c, so the query head takes the combination, concatenated over c;
        the values' combination is applied to the output in the same way. Keys and values are views of the cache.
        """
        # shape: (batch, H, q, 1, d) * (H, 1, h', 1) -> (batch, H, q, h' d)
        query = (query.unsqueeze(3) * self._mix(self.hlc_k, query)[:, None]).flatten(3)
        # shape: (batch, h', all, d) -> (batch, 1, all, h' d)
        key, value = (heads.transpose(1, 2).flatten(2).unsqueeze(1) for heads in (key, value))
        return query, key, value, self._mix(self.hlc_v, query)

    def _resolve(self, output, mix):
        """Output on component values (batch, q, H, h' d) -> on composite values (batch, q, H, d)."""
        return (output.unflatten(3, (self.num_component_heads, self.head_dim)) * mix).sum(3)

    def _mix(self, combination, like) -> torch.Tensor:
        """Column of each query head's composite head: (H, h', 1)."""
        if combination is None:
            columns = torch.eye(self.num_kv_heads, dtype=like.dtype, device=like.device)
        else:
            columns = combination(None).to(like.dtype)
        return columns.repeat_interleave(self.num_key_value_groups, dim=0).unsqueeze(2)


class MEADecoderLayer(GradientCheckpointingLayer):
    attention_class = MEAAttention

    def __init__(self, config: MEAConfig, layer_idx: int):
        super().__init__()
        self.self_attn = self.attention_class(config, layer_idx)
        self.mlp = MEAMLP(config)
        self.input_layernorm = MEARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MEARMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @accept_either_cache_name
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, cache=None, **kwargs):
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            cache=cache,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class MEAPreTrainedModel(PreTrainedModel):
    config_class = MEAConfig
    config: MEAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MEADecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": MEADecoderLayer, "attentions": MEAAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MEAHeadCombination):
            components, composites = module.weight.shape
            block = torch.arange(composites) * components // composites
            init.copy_(module.weight, (torch.arange(components)[:, None] == block).float())
        if isinstance(module, MEAAttention) and module.differential:
            for name in LAMBDAS:
                init.normal_(getattr(module, name), std=0.1)


class MEAModel(MEAPreTrainedModel):
    layer_class = MEADecoderLayer

    def __init__(self, config: MEAConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self.layer_class(config, i) for i in range(config.num_hidden_layers))
        self.norm = MEARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @accept_either_cache_name
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None] + seen
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )
        position_embeddings = self.rotary(position_ids, hidden_states.dtype)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings,
                attention_mask=mask,
                cache=cache,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), **{CACHE: cache if use_cache else None}
        )

    def rotary(self, position_ids: torch.Tensor, dtype: torch.dtype):
        return rotary_cos_sin(self.config, position_ids, dtype)


class MEAForCausalLM(MEAPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    model_class = MEAModel

    def __init__(self, config: MEAConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _get_static_cache_init_shape(self):
        """No shape in advance: transformers would take `num_key_value_heads` of `head_dim`, which no layer caches."""
        return None

    @accept_either_cache_name
    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE, None)},
        )


class MEAForSequenceClassification(GenericForSequenceClassification, MEAPreTrainedModel):
    def __init__(self, config: MEAConfig):
        # Not the generic one, whose base model comes from AutoModel: that asks anew whether this code is trusted.
        MEAPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = MEAModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


__all__ = [
    "MEAConfig",
    "MEAForCausalLM",
    "MEAForSequenceClassification",
    "MEAModel",
    "MEAPreTrainedModel",
]
