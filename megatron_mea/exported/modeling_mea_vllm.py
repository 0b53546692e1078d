"""The MEA decoder for engines that size their cache by the configuration. Travels with `export --target vllm`.

vLLM's Transformers backend takes the number of key/value heads and their width from `num_key_value_heads` and
`head_dim`. Here these describe the cache of a layer: one head of all rotated component heads concatenated, h' d wide,
or of latent numbers, keys and values padded to one width. Attention absorbs the combination into queries and outputs
(arXiv 2601.19611, eq. 13), for every token and not only in decoding. Layers that save nothing that way cache their h
composite heads.
"""

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_mea import MEAAttention, accept_either_cache_name, eager_attention_forward, pad_features
from .configuration_mea import MEAConfig
from .experts_mea import register_expert_conversion
from .latent_mea import MEALatentAttention
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

    def _check_latent(self, component_heads: list[int]):
        """Nothing: they are checked where they fit the heads, in `trained`."""


register_expert_conversion(MEAServedConfig.model_type)

_SERVING_FIELDS = (
    "model_type",
    "num_composite_heads",
    "component_head_dim",
    "per_layer_config",
    "auto_map",
    "architectures",
)


# Kernels take heads whose width is a multiple of that.
WIDTH_MULTIPLE = 8


def cache_shape(config: MEAConfig, layer_idx: int) -> tuple[int, int]:
    """(heads, width) of a layer's cache, of a configuration as trained: one shared head where that is smaller."""
    composites, dim = config.num_key_value_heads, config.head_dim
    if config.hlc_form == "latent":
        width = max(config.key_latent_dim[layer_idx], config.value_latent_dim[layer_idx])
        width += -width % WIDTH_MULTIPLE
    else:
        width = config.num_component_heads[layer_idx] * dim

    return (1, width) if width < composites * dim else (composites, dim)


class MEAServedAttention(MEAAttention):
    """Attention on one wide cached head, or on composite heads in a layer where that saves nothing."""

    def __init__(self, config: MEAServedConfig, layer_idx: int):
        trained_config = config.trained()
        super().__init__(trained_config, layer_idx)
        # The engine sets its attention function in this configuration.
        self.config = config
        shape = cache_shape(trained_config, layer_idx)
        self.cache_width = shape[1]
        self.absorbed = shape != (self.num_kv_heads, self.head_dim)
        if self.absorbed:
            self.num_key_value_groups = self.num_heads

    @accept_either_cache_name
    def forward(self, hidden_states, position_embeddings, attention_mask=None, cache=None, **kwargs):
        batch, seq, _ = hidden_states.shape
        cos, sin = (angle[:, None] for angle in position_embeddings)
        # shape: (batch, seq, heads d) -> (batch, heads, seq, d)
        query = self.q_proj(hidden_states).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        key, value = self._split_components(self.k_proj(hidden_states), self.v_proj(hidden_states))
        query, key = apply_rotary(query, cos, sin), self._rotate_components(key, cos, sin)

        if self.absorbed:
            # shape: (batch, H, seq, width), (batch, 1, seq, width) twice
            query, key, value, value_columns = self._absorb(query, key, value)
            query, key, value = pad_features(query, key, value, width=self.cache_width)
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
            output = self._combine_output(output[..., : self.cached_widths[1]], value_columns)
        if self.head_norm is not None:
            output = self.head_norm(output)

        return self.o_proj(output.reshape(batch, seq, -1)), weights


class MEAServedLatentAttention(MEAServedAttention, MEALatentAttention):
    """Attention on one head of latent numbers (`hlc_form: latent`)."""


class MEAServedDecoderLayer(MEADecoderLayer):
    """Transformer block with attention on the cache of a serving engine."""

    attention_classes = {"head": MEAServedAttention, "latent": MEAServedLatentAttention}  # noqa: RUF012


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
