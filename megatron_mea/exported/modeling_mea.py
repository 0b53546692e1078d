"""Multi-head Explicit Attention (MEA) decoder for transformers. Travels with every export, as does what it imports."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_mea import CACHE, LAMBDAS, MEAAttention, MEARMSNorm, accept_either_cache_name
from .combination_mea import (
    MEAHeadCombination,
    MEALatentKeys,
    MEALatentValues,
    block_features,
    block_pairs,
    pair_frequencies,
)
from .configuration_mea import MEAConfig
from .experts_mea import MEAExperts, MEARouter, MEASparseMLP
from .latent_mea import MEALatentAttention
from .rotary_mea import rotary_cos_sin

# The experts of experts_mea.py are decorated with @use_experts_implementation: transformers looks for that text in the
# module of a model's class, before it lets them be computed by its grouped products.


class MEAMLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: MEAConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class MEADecoderLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block."""

    attention_classes = {"head": MEAAttention, "latent": MEALatentAttention}  # noqa: RUF012

    def __init__(self, config: MEAConfig, layer_idx: int):
        super().__init__()
        self.self_attn = self.attention_classes[config.hlc_form](config, layer_idx)
        self.mlp = MEASparseMLP(config) if config.is_routed(layer_idx) else MEAMLP(config)
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
    """Base class of MEA models: initialisation, and the features that transformers asks about."""

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
    _can_record_outputs = {"hidden_states": MEADecoderLayer, "attentions": [MEAAttention, MEALatentAttention]}  # noqa: RUF012

    def get_correct_experts_implementation(self, requested_experts):
        """As transformers chooses; experts of widths that grouped products do not take are computed one by one."""
        implementation = super().get_correct_experts_implementation(requested_experts)
        widths = (self.config.hidden_size, self.config.moe_intermediate_size or 0)
        is_aligned = all(width % 8 == 0 for width in widths)
        return implementation if requested_experts is not None or is_aligned else "eager"

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MEAHeadCombination):
            components, composites = module.weight.shape
            block = torch.arange(composites) * components // composites
            init.copy_(module.weight, (torch.arange(components)[:, None] == block).float())

        if isinstance(module, MEALatentKeys):
            init.copy_(module.weight, block_pairs(module.pair_counts, module.num_kv_heads))
            init.copy_(module.frequency, pair_frequencies(module.pair_counts).float())
        if isinstance(module, MEALatentValues):
            init.copy_(module.weight, block_features(len(module.weight), module.num_kv_heads, module.head_dim))

        if isinstance(module, (MEAExperts, MEARouter)):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=self.config.initializer_range)

        if isinstance(module, MEAAttention) and module.differential:
            for name in LAMBDAS:
                init.normal_(getattr(module, name), std=0.1)


class MEAModel(MEAPreTrainedModel):
    """The decoder without its language-model head."""

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
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None] + past

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

    def rotary(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of the rotary angles, each (batch, seq, head_dim)."""
        return rotary_cos_sin(config=self.config, position_ids=position_ids, dtype=dtype)


class MEAForCausalLM(MEAPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    model_class = MEAModel

    def __init__(self, config: MEAConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _get_static_cache_init_shape(self):
        """Returns no shape: transformers would allocate `num_key_value_heads` of `head_dim`, which no layer caches."""
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

        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, positions, :])

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
    """The decoder with a classifier on its last token."""

    def __init__(self, config: MEAConfig):
        # Not GenericForSequenceClassification's, whose AutoModel would ask once more whether this code is trusted.
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
