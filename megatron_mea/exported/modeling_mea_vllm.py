"""The MEA decoder for engines that size their cache by the configuration. Travels with `export --target vllm`.

vLLM's Transformers backend takes the number of key/value heads and their width from `num_key_value_heads` and
`head_dim`. Here these describe the cache of a layer: one head of width h' d, all rotated component heads concatenated.
Attention absorbs the combination into queries and outputs (arXiv 2601.19611, eq. 13), for every token and not only in
decoding. Layers with h' = h save nothing that way, and cache their h composite heads.
"""

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_mea import MEAAttention, MEAHeadCombination, accept_either_cache_name, eager_attention_forward
from .configuration_mea import MEAConfig
from .experts_mea import register_expert_conversion
from .modeling_mea import MEADecoderLayer, MEAForCausalLM, MEAModel
from .rotary_mea import apply_rotary, rotary_cos_sin


class MEAServedConfig(MEAConfig):
    """A configuration whose `num_key_value_heads` and `head_dim` describe the cache.

    Where layers differ, theirs are in `per_layer_config`. Those of the trained model are `num_composite_heads` (h) and
    `component_head_dim` (d).
    """

    model_type = "mea_vllm"

    num_composite_heads: int = 4
    component_head_dim: int = 64

    def trained(self) -> MEAConfig:
        """The configuration of the model that was trained, which has the same weights."""
        fields = {name: value for name, value in self.to_dict().items() if name not in _SERVING_FIELDS}
        trained_sizes = {"num_key_value_heads": self.num_composite_heads, "head_dim": self.component_head_dim}
        return MEAConfig.from_dict(fields | trained_sizes)


register_expert_conversion(MEAServedConfig.model_type)

_SERVING_FIELDS = (
    "model_type",
    "num_composite_heads",
    "component_head_dim",
    "per_layer_config",
    "auto_map",
    "architectures",
)


class MEAServedAttention(MEAAttention):
    """Attention on one wide cached head, or on composite heads where a layer has h' = h."""

    def __init__(self, config: MEAServedConfig, layer_idx: int):
        super().__init__(config.trained(), layer_idx)
        # The engine sets its attention function in this configuration.
        self.config = config
        self.absorbed = self.num_component_heads < self.num_kv_heads
        if self.absorbed:
            self.num_key_value_groups = self.num_heads

    @accept_either_cache_name
    def forward(self, hidden_states, position_embeddings, attention_mask=None, cache=None, **kwargs):
        batch, seq, _ = hidden_states.shape
        cos, sin = (angle[:, None] for angle in position_embeddings)
        # shape: (batch, seq, heads d) -> (batch, heads, seq, d)
        query = self.q_proj(hidden_states).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        key = self.k_proj(hidden_states).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        value = self.v_proj(hidden_states).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)

        if self.absorbed:
            # shape: (batch, H, seq, 1, d) * (H, 1, h', 1) -> (batch, H, seq, h' d)
            query = (query.unsqueeze(3) * self._columns_per_query_head(self.hlc_k)[:, None, :, None]).flatten(3)
            # shape: (batch, h', seq, d) -> (batch, 1, seq, h' d)
            key, value = (heads.transpose(1, 2).flatten(2).unsqueeze(1) for heads in (key, value))
        else:
            key = key if self.hlc_k is None else self.hlc_k(key)
            value = value if self.hlc_v is None else self.hlc_v(value)

        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)

        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        # vLLM looks for this call in the source: there must be exactly one, whose `scaling` is an attribute.
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )

        # shape: (batch, seq, H, width), or flattened by an engine -> (batch, seq, H width)
        output = output.reshape(batch, seq, -1)
        if output.shape[-1] != self.num_heads * query.shape[-1]:
            raise ValueError("not for tensor parallelism, which cannot cut the shared head: use data parallelism")

        output = output.reshape(batch, seq, self.num_heads, -1)
        if self.absorbed:
            # shape: (batch, seq, H, h', d) * (H, h', 1), summed over h' -> (batch, seq, H, d)
            columns = self._columns_per_query_head(self.hlc_v).unsqueeze(-1)
            output = (output.unflatten(3, (self.num_component_heads, self.head_dim)) * columns).sum(3)

        if self.head_norm is not None:
            output = self.head_norm(output)

        return self.o_proj(output.reshape(batch, seq, -1)), weights

    def _columns_per_query_head(self, combination: MEAHeadCombination) -> torch.Tensor:
        """Columns of the combination, that of its composite head for each query head: (H, h')."""
        return combination.weight.t().repeat_interleave(self.num_heads // self.num_kv_heads, dim=0)


class MEAServedDecoderLayer(MEADecoderLayer):
    """Transformer block with attention on the cache of a serving engine."""

    attention_classes = {"head": MEAServedAttention}  # noqa: RUF012


class MEAServedModel(MEAModel):
    """The decoder without its language-model head."""

    config_class = MEAServedConfig
    layer_class = MEAServedDecoderLayer
    _no_split_modules = ["MEAServedDecoderLayer"]  # noqa: RUF012

    def __init__(self, config: MEAServedConfig):
        super().__init__(config)
        self.trained_config = config.trained()

    def rotary(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of the rotary angles, each (batch, seq, component_head_dim)."""
        return rotary_cos_sin(config=self.trained_config, position_ids=position_ids, dtype=dtype)


# The experts are decorated with @use_experts_implementation (experts_mea.py): transformers looks for that text here.
class MEAServedForCausalLM(MEAForCausalLM):
    """The decoder with a language-model head."""

    config_class = MEAServedConfig
    model_class = MEAServedModel
    _no_split_modules = ["MEAServedDecoderLayer"]  # noqa: RUF012


__all__ = ["MEAServedConfig", "MEAServedForCausalLM", "MEAServedModel"]
