"""What `export` can write: which configuration, which tensors out of which parameters, which files beside them."""

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
)

from megatron_mea.attention.hlc import fold_weight
from megatron_mea.config.schema import Model
from megatron_mea.errors import UserError
from megatron_mea.huggingface import configuration_mea, modeling_mea, modeling_mea_vllm, rotary_mea
from megatron_mea.huggingface.convert import to_hf_config
from megatron_mea.huggingface.modeling_mea import MEAForCausalLM
from megatron_mea.huggingface.modeling_mea_vllm import MEAServedConfig, MEAServedForCausalLM
from megatron_mea.model.decoder import parameter_shapes

_CPU_WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head widths of vLLM's attention on CPUs."""


@dataclass(frozen=True)
class Recipe:
    """How a tensor of an export is made.

    Args:
        shape: of the result.
        sources: names of the parameters, whose float32 masters `make` gets in this order.
    """

    shape: tuple[int, ...]
    sources: tuple[str, ...] = ()
    make: Callable[..., torch.Tensor] = lambda source: source


@dataclass(frozen=True)
class Target:
    """Everything that a folder of one kind holds, but for tokenizer and model card.

    Args:
        tensors: by exported name.
        modules: what travels with the folder; none where transformers has the architecture.
        classes: their `auto_map`.
        notes: what the user should know, in the card too.
    """

    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    tensors: Mapping[str, Recipe]
    modules: tuple[ModuleType, ...] = ()
    classes: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def make_target(name: str, model: Model, **fields: Any) -> Target:
    """The target `transformers`, `stock` or `vllm` for a model.

    Args:
        fields: further fields of the configuration: dtype, token ids.

    Raises:
        UserError: the model cannot be that; the message says why and what it can be.
    """
    target = {"transformers": _transformers, "stock": _stock, "vllm": _vllm}[name](model, fields)
    target.config.architectures = [target.model_class.__name__]
    if target.classes:
        target.config.auto_map = dict(target.classes)
    return target


def _as_trained(model: Model) -> dict[str, Recipe]:
    return {name: Recipe(shape, (name,)) for name, shape in parameter_shapes(model).items()}


def _transformers(model: Model, fields: dict[str, Any]) -> Target:
    classes = {
        "AutoConfig": "configuration_mea.MEAConfig",
        "AutoModel": "modeling_mea.MEAModel",
        "AutoModelForCausalLM": "modeling_mea.MEAForCausalLM",
        "AutoModelForSequenceClassification": "modeling_mea.MEAForSequenceClassification",
    }
    modules = (configuration_mea, rotary_mea, modeling_mea)
    return Target(to_hf_config(model, **fields), MEAForCausalLM, _as_trained(model), modules, classes)


def _stock(model: Model, fields: dict[str, Any]) -> Target:
    """Composite heads are linear in the weights (eq. 18), so without a head norm a plain model computes the same."""
    if model.attention_variant == "talking_heads":
        allowed = "transformers: no stock architecture mixes the scores of its heads"
        raise UserError("--target", "stock, for the variant talking_heads", allowed)
    if model.has_head_norm:
        raise UserError(
            "--target",
            f"stock, for the variant {model.attention_variant}",
            f"transformers{', or vllm' if model.has_hlc else ''}: no stock architecture norms the outputs of its "
            "heads, and the norm cannot be folded into weights",
        )
    composites = model.num_key_value_heads
    config_class, model_class, own = _stock_classes(model)
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shared += ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters", "max_position_embeddings")
    shared += ("tie_word_embeddings", "initializer_range")
    values = {name: getattr(model, name) for name in shared}
    if config_class is Qwen2Config:
        del values["head_dim"]
    config = config_class(**values | own | fields)
    rows = composites * model.head_dim
    tensors = {}
    for name, recipe in _as_trained(model).items():
        layer, _, parameter = name.rpartition("self_attn.")
        which = parameter[:1]
        if parameter.startswith("hlc_"):
            continue
        mixed = {"k": model.mixes_keys, "v": model.mixes_values}.get(which, False)
        if mixed and parameter.startswith(f"{which}_proj"):
            combination = f"{layer}self_attn.hlc_{which}.weight"
            recipe = Recipe((rows, *recipe.shape[1:]), (name, combination), _fold)
        tensors[name] = recipe
        if parameter == "o_proj.weight" and own.get("attention_bias"):
            # Of these architectures the output has a bias too, where the inputs have.
            hidden = model.hidden_size
            tensors[f"{layer}self_attn.o_proj.bias"] = Recipe((hidden,), (), lambda hidden=hidden: torch.zeros(hidden))
    kind = config_class.model_type.capitalize()
    notes = [f"A plain {kind}, which computes the same and needs no code: the head combination is folded into weights."]
    if not model.has_hlc:
        notes = [f"A plain {kind}, which needs no code."]
    if min(model.component_heads) < composites:
        counts = ", ".join(map(str, sorted(set(model.component_heads))))
        notes.append(
            f"The saving of the cache is given up: it holds {composites} heads a layer, with MEA's own files {counts}."
        )
    return Target(config, model_class, tensors, notes=tuple(notes))


def _fold(projection: torch.Tensor, combination: torch.Tensor) -> torch.Tensor:
    return fold_weight(projection.double(), combination.double()).to(projection.dtype)


def _stock_classes(model: Model) -> tuple[type[PreTrainedConfig], type[PreTrainedModel], dict[str, Any]]:
    """(configuration, model, fields of its own) of the architecture that is this one without MEA."""
    if model.qk_norm:
        return Qwen3Config, Qwen3ForCausalLM, {"attention_bias": model.attention_bias}
    if model.attention_bias and model.num_attention_heads * model.head_dim == model.hidden_size:
        return Qwen2Config, Qwen2ForCausalLM, {}
    if model.hidden_size % model.num_attention_heads == 0:
        return LlamaConfig, LlamaForCausalLM, {"attention_bias": model.attention_bias}
    if model.attention_bias:
        raise UserError(
            "--target",
            f"stock, with biases and a hidden size of {model.hidden_size} for {model.num_attention_heads} heads",
            "transformers, or vllm: Llama wants a hidden size that its heads divide, Qwen2 heads that make it up",
        )
    return MistralConfig, MistralForCausalLM, {"sliding_window": None}


def _vllm(model: Model, fields: dict[str, Any]) -> Target:
    """The weights as trained; a configuration that says what the cache holds."""
    composites, dim = model.num_key_value_heads, model.head_dim
    found = f"vllm, for the variant {model.attention_variant}"
    if model.attention_variant in ("differential", "talking_heads"):
        raise UserError("--target", found, "transformers: vLLM attends once a layer, and hands out no scores")
    if not model.has_hlc:
        one = "stock" if model.attention_variant == "plain" else "transformers"
        raise UserError("--target", found, f"{one}: this variant caches its heads as they are, and vLLM loads that")
    if min(model.component_heads) == composites:
        one = "transformers" if model.has_head_norm else "stock"
        reason = f"as many component as composite heads ({composites}) leave nothing to save, and vLLM loads that"
        raise UserError("--target", found, f"{one}: {reason}")
    if model.qk_norm:
        raise UserError(
            "--target",
            "vllm, with qk_norm",
            "transformers, which vLLM loads too and caches composite heads of: the norm scales every composite key "
            "by a number of its own, for which vLLM's attention on one shared head has no place",
        )
    # The heads of a layer's cache and their width. With h' = h composite heads take no more room and are narrower.
    shapes = [(1, count * dim) if count < composites else (composites, dim) for count in model.component_heads]
    if refused := sorted({width for _, width in shapes if not _kernels(width)}):
        raise UserError(
            "--target",
            f"vllm, with a cache of heads {', '.join(map(str, refused))} wide",
            "transformers: vLLM's kernels take multiples of 8 up to 256 (FlashAttention) and 32 or more (Triton)",
        )
    config = _served_config(model, shapes, fields)
    classes = {
        "AutoConfig": "modeling_mea_vllm.MEAServedConfig",
        "AutoModel": "modeling_mea_vllm.MEAServedModel",
        "AutoModelForCausalLM": "modeling_mea_vllm.MEAServedForCausalLM",
    }
    gain = composites * model.num_hidden_layers / sum(model.component_heads)
    kernels = "; ".join(f"width {width}: {', '.join(_kernels(width))}" for width in sorted({w for _, w in shapes}))
    notes = (
        "For vLLM (`vllm serve this/folder --trust-remote-code --model-impl transformers`).",
        f"Its cache holds {gain:.3g} times the tokens that it would hold of composite heads. Kernels: {kernels}.",
    )
    modules = (configuration_mea, rotary_mea, modeling_mea, modeling_mea_vllm)
    return Target(config, MEAServedForCausalLM, _as_trained(model), modules, classes, notes)


def _served_config(model: Model, shapes: list[tuple[int, int]], fields: dict[str, Any]) -> MEAServedConfig:
    trained = to_hf_config(model, **fields).to_dict()
    del trained["model_type"]
    # The shape of most layers stands in the configuration itself, that of the others by layer.
    usual = max(sorted(set(shapes)), key=shapes.count)
    served = dict(zip(("num_key_value_heads", "head_dim"), usual, strict=True))
    own = {"num_composite_heads": model.num_key_value_heads, "component_head_dim": model.head_dim}
    others = {str(layer): dict(zip(served, shape, strict=True)) for layer, shape in enumerate(shapes) if shape != usual}
    return MEAServedConfig.from_dict(trained | served | own | ({"per_layer_config": others} if others else {}))


def _kernels(width: int) -> list[str]:
    """Those of vLLM 0.32 that take heads so wide; FlexAttention, which takes all and is slow, is left out."""
    takes = {
        "FlashAttention": width % 8 == 0 and width <= 256,
        "Triton": width >= 32,
        "CPU": width in _CPU_WIDTHS,
    }
    return [name for name, does in takes.items() if does]
