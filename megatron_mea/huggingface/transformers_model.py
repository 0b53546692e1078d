"""Models of transformers in memory: that of a Hugging Face folder, and our own class with a checkpoint's weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from megatron_mea.config.schema import Model
from megatron_mea.errors import UserError
from megatron_mea.exported.modeling_mea import MEAForCausalLM
from megatron_mea.exported.modeling_mea_vllm import MEAServedForCausalLM
from megatron_mea.huggingface.config_keys import ConfigJson
from megatron_mea.huggingface.hf_config import constant_tensors, to_hf_config, transformers_config
from megatron_mea.huggingface.safetensors_reader import StoredTensor, check_tensors, scan_model

_OWN_CLASSES = {"mea": MEAForCausalLM, "mea_vllm": MEAServedForCausalLM}


def build_causal_lm(*, model: Model, weights: dict[str, torch.Tensor], **ids: int | None) -> MEAForCausalLM:
    """The exported model of a `model` section with these weights, which it keeps; `ids` are special tokens."""
    with torch.device("meta"):
        causal_lm = MEAForCausalLM(to_hf_config(model=model, dtype=torch.float32, **ids))

    if model.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]

    weights |= constant_tensors(model)
    causal_lm.load_state_dict(weights, strict=True, assign=True)
    causal_lm.tie_weights()
    _choose_expert_products(causal_lm)
    return causal_lm


def load_pretrained(
    config_json: ConfigJson, *, constants: Mapping[str, torch.Tensor]
) -> tuple[PreTrainedModel, dict[str, StoredTensor]]:
    """Loads a Hugging Face folder in float32: safetensors alone, no code of it, and nothing from the hub.

    Its tensors are compared with its config.json first, before memory is taken by the sizes that stand there;
    transformers would initialize missing ones at random.

    Args:
        constants: as `scan_safetensors` takes them.

    Returns:
        The model, and what is stored by the names of its parameters.

    Raises:
        UserError: the files cannot be read, or differ from config.json.
    """
    folder, where, config = config_json.file.parent, config_json.where, transformers_config(config_json)
    model_class = _OWN_CLASSES.get(config_json.model_type)
    stored = scan_model(
        path=folder,
        where=where,
        num_layers=config.num_hidden_layers,
        num_experts=getattr(config, "num_experts", 0),
        tied=config.tie_word_embeddings,
        constants=constants,
    )
    tensors = {
        # A model that was saved without its head has names without the prefix.
        name if name.startswith(("model.", "lm_head.")) else f"model.{name}": tensor
        for name, tensor in stored.items()
    }

    try:
        with torch.device("meta"):
            model = model_class(config) if model_class else AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise _not_loadable(where, error) from None

    if problems := check_tensors(
        path=folder,
        where=where,
        shapes={name: tensor.shape for name, tensor in tensors.items()},
        expected={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        expected_by=str(config_json.file),
    ):
        raise UserError.from_problems(problems)

    logging.disable_progress_bar()
    try:
        model = (model_class or AutoModelForCausalLM).from_pretrained(
            str(folder),
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
        model.set_attn_implementation("sdpa")
        _choose_expert_products(model)
    except Exception as error:
        raise _not_loadable(where, error) from None

    return model, tensors


def _choose_expert_products(model: PreTrainedModel) -> None:
    """Has experts computed one by one where torch's grouped products do not take their widths."""
    config = model.config
    if getattr(config, "num_experts", 0) and any(
        size % 4 for size in (config.hidden_size, config.moe_intermediate_size)
    ):
        model.set_experts_implementation("eager")


def _not_loadable(where: str, error: Exception) -> UserError:
    """transformers checks types and values, each with an exception of its own."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(where=where, got=f"not loadable ({reason})", expected="a Hugging Face causal language model")
