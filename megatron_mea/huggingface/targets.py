"""Export targets: the configuration, the tensors and the modeling files that `export` writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatron_mea.attention.hlc import fold_weight
from megatron_mea.config.schema import EXPERT_KEYS, Model
from megatron_mea.config.variants import STOCK, TRANSFORMERS, VLLM
from megatron_mea.errors import UserError
from megatron_mea.exported import (
    attention_mea,
    combination_mea,
    configuration_mea,
    experts_mea,
    latent_mea,
    modeling_mea,
    modeling_mea_vllm,
    rotary_mea,
)
from megatron_mea.exported.configuration_mea import MEAConfig
from megatron_mea.exported.modeling_mea import MEAForCausalLM
from megatron_mea.exported.modeling_mea_vllm import MEAServedConfig, MEAServedForCausalLM, cache_shape
from megatron_mea.huggingface.expert_tensors import ExpertMatrix, expert_matrices
from megatron_mea.huggingface.hf_config import constant_tensors, to_hf_config
from megatron_mea.model.decoder import parameter_shapes

_MODULES = (
    *(configuration_mea, rotary_mea, combination_mea),
    *(attention_mea, latent_mea, experts_mea, modeling_mea),
)
"""Files of every export with our own classes; each imports those before it alone."""
_CPU_WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head widths of vLLM's attention on CPUs."""


@dataclass(frozen=True, kw_only=True)
class TensorRecipe:
    """How to compute a tensor of an export.

    Args:
        shape: of the result.
        sources: names of the parameters, whose float32 masters `make` gets in this order.
        expert: the matrix of the source that `make` gets instead of all of it.
        make: computes the result in float32.
    """

    shape: tuple[int, ...]
    sources: tuple[str, ...] = ()
    expert: ExpertMatrix | None = None
    make: Callable[..., torch.Tensor] = lambda source: source


@dataclass(frozen=True, kw_only=True)
class ExportTarget:
    """The content of an exported folder, except for tokenizer and model card.

    Args:
        tensors: by exported name.
        modules: source files to copy to the folder; none where transformers has the architecture.
        classes: the `auto_map` to their classes.
        notes: remarks for the user and for the model card.
    """

    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    tensors: Mapping[str, TensorRecipe]
    modules: tuple[ModuleType, ...] = ()
    classes: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def make_export_target(name: str, model: Model, **fields: Any) -> ExportTarget:
    """The target `transformers`, `stock` or `vllm` for a model.

    Args:
        fields: further fields of the configuration, such as dtype and token ids.

    Raises:
        UserError: the model cannot be exported so; the message says why, and which target can be.
    """
    variant = model.variant
    if reason := variant.not_exported.get(name):
        raise UserError(
            where="--target",
            got=f"{name}, for the variant {variant.name}",
            expected=f"{', or '.join(variant.export_targets)}: {reason}",
        )

    if model.hlc_form == "latent" and name == STOCK:
        raise UserError(where="--target", got="stock, with hlc_form: latent", expected=f"{TRANSFORMERS}, or {VLLM}")

    target = {"transformers": _transformers_target, "stock": _stock_target, "vllm": _vllm_target}[name](model, fields)
    target.config.architectures = [target.model_class.__name__]
    if target.classes:
        target.config.auto_map = dict(target.classes)

    return target


def _trained_tensors(model: Model) -> dict[str, TensorRecipe]:
    """The parameters as trained, by name; those of experts one by one, as transformers stores and vLLM reads them."""
    recipes = {}
    for name, shape in parameter_shapes(model).items():
        experts = list(expert_matrices(name, shape))
        for expert in experts:
            recipes[expert.name] = TensorRecipe(shape=expert.shape[1:], sources=(name,), expert=expert, make=_unstack)
        if not experts:
            recipes[name] = TensorRecipe(shape=shape, sources=(name,))

    return recipes


def _constant_recipes(model: Model) -> dict[str, TensorRecipe]:
    """The buffers of the modeling files, which are no parameters."""
    return {
        name: TensorRecipe(shape=tuple(values.shape), make=lambda values=values: values)
        for name, values in constant_tensors(model).items()
    }


def _unstack(matrix: torch.Tensor) -> torch.Tensor:
    # shape: (1, rows, columns) -> (rows, columns)
    return matrix.squeeze(0)


def _transformers_target(model: Model, fields: dict[str, Any]) -> ExportTarget:
    """The weights as trained, with our own modeling files."""
    classes = {
        "AutoConfig": "configuration_mea.MEAConfig",
        "AutoModel": "modeling_mea.MEAModel",
        "AutoModelForCausalLM": "modeling_mea.MEAForCausalLM",
        "AutoModelForSequenceClassification": "modeling_mea.MEAForSequenceClassification",
    }
    return ExportTarget(
        config=to_hf_config(model, **fields),
        model_class=MEAForCausalLM,
        tensors=_trained_tensors(model) | _constant_recipes(model),
        modules=_MODULES,
        classes=classes,
    )


def _stock_target(model: Model, fields: dict[str, Any]) -> ExportTarget:
    """A plain model of a stock architecture, with HLC folded into the weights (eq. 18), which a head norm rules out."""
    composites = model.num_key_value_heads
    config_class, model_class, own_fields = _stock_classes(model)
    shared_keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shared_keys += ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters", "max_position_embeddings")
    shared_keys += ("tie_word_embeddings", "initializer_range")
    shared_keys += ("num_experts", *EXPERT_KEYS) if model.num_experts else ()
    shared_fields = {name: getattr(model, name) for name in shared_keys}
    if config_class is Qwen2Config:
        del shared_fields["head_dim"]

    config = config_class(**shared_fields | own_fields | fields)
    rows = composites * model.head_dim
    tensors = _trained_tensors(model)
    for layer in range(model.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn."
        for side in [side for side, mixed in (("k", model.mixes_keys), ("v", model.mixes_values)) if mixed]:
            combination = f"{prefix}hlc_{side}.weight"
            del tensors[combination]
            for kind in ("weight", "bias") if model.attention_bias else ("weight",):
                name = f"{prefix}{side}_proj.{kind}"
                shape = (rows, *tensors[name].shape[1:])
                tensors[name] = TensorRecipe(shape=shape, sources=(name, combination), make=_fold_in_float64)

        if own_fields.get("attention_bias"):
            # In these architectures o_proj has a bias where q_proj, k_proj and v_proj have.
            hidden = model.hidden_size
            tensors[f"{prefix}o_proj.bias"] = TensorRecipe(
                shape=(hidden,), sources=(), make=lambda hidden=hidden: torch.zeros(hidden)
            )

    kind = config_class.__name__.removesuffix("Config")
    notes = [f"A plain {kind}, which computes the same and needs no code: the head combination is folded into weights."]
    if not model.has_hlc:
        notes = [f"A plain {kind}, which needs no code."]

    if min(model.component_heads) < composites:
        counts = ", ".join(map(str, sorted(set(model.component_heads))))
        notes.append(
            f"The saving of the cache is given up: it holds {composites} heads a layer, with MEA's own files {counts}."
        )

    return ExportTarget(config=config, model_class=model_class, tensors=tensors, notes=tuple(notes))


def _fold_in_float64(projection: torch.Tensor, combination: torch.Tensor) -> torch.Tensor:
    return fold_weight(projection.double(), combination.double()).to(projection.dtype)


def _stock_classes(model: Model) -> tuple[type[PreTrainedConfig], type[PreTrainedModel], dict[str, Any]]:
    """(configuration class, model class, own fields) of the stock architecture that equals this model without MEA."""
    if model.num_experts:
        if model.qk_norm and not model.attention_bias:
            return Qwen3MoeConfig, Qwen3MoeForCausalLM, {"attention_bias": False}

        problem = "attention_bias" if model.attention_bias else "no qk_norm"
        expected = "transformers: Qwen3-MoE normalises queries and keys, and has no biases"
        raise UserError(where="--target", got=f"stock, of a model with experts and {problem}", expected=expected)

    if model.qk_norm:
        return Qwen3Config, Qwen3ForCausalLM, {"attention_bias": model.attention_bias}
    if model.attention_bias and model.num_attention_heads * model.head_dim == model.hidden_size:
        return Qwen2Config, Qwen2ForCausalLM, {}
    if model.hidden_size % model.num_attention_heads == 0:
        return LlamaConfig, LlamaForCausalLM, {"attention_bias": model.attention_bias}

    if model.attention_bias:
        raise UserError(
            where="--target",
            got=f"stock, with biases and a hidden size of {model.hidden_size} for {model.num_attention_heads} heads",
            expected="transformers, or vllm: Llama wants a hidden size that its heads divide, Qwen2 heads that make it "
            "up",
        )

    return MistralConfig, MistralForCausalLM, {"sliding_window": None}


def _vllm_target(model: Model, fields: dict[str, Any]) -> ExportTarget:
    """The weights as trained, with a configuration whose key/value heads are those of the cache."""
    composites, dim = model.num_key_value_heads, model.head_dim
    trained_config, is_latent = to_hf_config(model, **fields), model.hlc_form == "latent"
    shapes = [cache_shape(trained_config, layer) for layer in range(model.num_hidden_layers)]
    if set(shapes) == {(composites, dim)}:
        alternative = "transformers" if model.has_head_norm or is_latent else "stock"
        cached = "as many latent numbers as composite features" if is_latent else "as many component as composite heads"
        reason = (
            f"{cached} ({composites * dim if is_latent else composites}) leave nothing to save, and vLLM loads that"
        )
        got = f"vllm, for the variant {model.attention_variant}"
        raise UserError(where="--target", got=got, expected=f"{alternative}: {reason}")

    if model.qk_norm:
        raise UserError(
            where="--target",
            got="vllm, with qk_norm",
            expected="transformers, which vLLM loads too and caches composite heads of: the norm scales every "
            "composite key by a number of its own, for which vLLM's attention on one shared head has no place",
        )

    if refused := sorted({width for _, width in shapes if not _vllm_kernels(width)}):
        raise UserError(
            where="--target",
            got=f"vllm, with a cache of heads {', '.join(map(str, refused))} wide",
            expected="transformers: vLLM's kernels take multiples of 8 up to 256 (FlashAttention) and 32 or more "
            "(Triton)",
        )

    config = _vllm_config(trained_config, shapes)
    classes = {
        "AutoConfig": "modeling_mea_vllm.MEAServedConfig",
        "AutoModel": "modeling_mea_vllm.MEAServedModel",
        "AutoModelForCausalLM": "modeling_mea_vllm.MEAServedForCausalLM",
    }
    cached, composed = 2 * sum(heads * width for heads, width in shapes), 2 * composites * dim * len(shapes)
    widths = sorted({width for _, width in shapes})
    kernels = "; ".join(f"width {width}: {', '.join(_vllm_kernels(width))}" for width in widths)
    notes = [
        "For vLLM (`vllm serve this/folder --trust-remote-code --model-impl transformers`).",
        f"Its cache holds {composed / cached:.3g} times the tokens that it would hold of composite heads. "
        f"Kernels: {kernels}.",
    ]
    if is_latent:
        latent = sum(model.key_latent_dims + model.value_latent_dims)
        notes.append(
            f"A token takes {cached:,} numbers of it, for {latent:,} latent ones and {composed:,} of composite heads: "
            "vLLM's keys and values are of one width, to which the narrower are padded."
        )

    return ExportTarget(
        config=config,
        model_class=MEAServedForCausalLM,
        tensors=_trained_tensors(model) | _constant_recipes(model),
        modules=(*_MODULES, modeling_mea_vllm),
        classes=classes,
        notes=tuple(notes),
    )


def _vllm_config(trained_config: MEAConfig, shapes: list[tuple[int, int]]) -> MEAServedConfig:
    """The configuration for vLLM, with the (heads, width) of each layer's cache."""
    trained = trained_config.to_dict()
    del trained["model_type"]

    # The shape of most layers goes to the top level, the others to `per_layer_config`.
    common_shape = max(sorted(set(shapes)), key=shapes.count)
    cache_fields = dict(zip(("num_key_value_heads", "head_dim"), common_shape, strict=True))
    composite_fields = {
        "num_composite_heads": trained_config.num_key_value_heads,
        "component_head_dim": trained_config.head_dim,
    }
    per_layer = {
        str(layer): dict(zip(cache_fields, shape, strict=True))
        for layer, shape in enumerate(shapes)
        if shape != common_shape
    }
    served = trained | cache_fields | composite_fields
    if per_layer:
        served["per_layer_config"] = per_layer

    return MEAServedConfig.from_dict(served)


def _vllm_kernels(width: int) -> list[str]:
    """Kernels of vLLM 0.32 for heads of this width; FlexAttention, which takes any and is slow, is left out."""
    supports = {
        "FlashAttention": width % 8 == 0 and width <= 256,
        "Triton": width >= 32,
        "CPU": width in _CPU_WIDTHS,
    }
    return [name for name, supported in supports.items() if supported]
