"""Translates the config.json of a Hugging Face folder to our `model` section and back; the only place that does.

The folder is untrusted: transformers' own configuration classes fill in what the file leaves out, no code of the folder
is run, and what our model would not compute is refused by the name of its key.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mea.checkpoint.folder import GENERATION
from megatron_mea.config.load import parse_model
from megatron_mea.config.schema import EXPERT_KEYS, MAX_COUNT, Model
from megatron_mea.errors import Problem, UserError, shorten
from megatron_mea.huggingface.config_keys import (
    MAX_CONFIG_BYTES,
    STOCK_MODEL_TYPES,
    ConfigJson,
    error_reason,
    problems_of_file,
)
from megatron_mea.inputs import read_json_object

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedConfig

    from megatron_mea.exported.configuration_mea import MEAConfig

_SHARED_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"),
)
_GENERATION_BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), (1, 64)),
    **dict.fromkeys(("max_length", "max_new_tokens"), (1, MAX_COUNT)),
    **dict.fromkeys(("min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size"), (0, MAX_COUNT)),
    **dict.fromkeys(("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"), (0, 1)),
    **dict.fromkeys(("temperature", "repetition_penalty"), (0, 1000)),
    "length_penalty": (-1000, 1000),
}
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_GENERATION_KEYS = frozenset((*_GENERATION_BOUNDS, *_SPECIAL_IDS, "do_sample", "early_stopping")) - {"num_beam_groups"}
"""Generation settings that are used; beams in groups need code of the hub."""
_WITHOUT_EFFECT = ("transformers_version", "use_cache", "return_dict_in_generate", "cache_implementation")
"""Generation settings that change no text."""


def read_generation_config(path: Path, where: str) -> tuple[GenerationConfig | None, list[str]]:
    """Reads the generation settings of a Hugging Face folder or a checkpoint, which need not have any.

    Returns:
        Those that are understood, and warnings about others: they may need code of the hub, or a tokenizer.

    Raises:
        UserError: transformers does not take them, or a value is out of bounds.
    """
    from transformers import GenerationConfig

    file = path / GENERATION
    if not file.is_file():
        return None, []

    try:
        contents = read_json_object(file, max_bytes=MAX_CONFIG_BYTES)
        problems = []
        for key, (low, high) in _GENERATION_BOUNDS.items():
            value = contents.get(key)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and low <= value <= high):
                problems.append(f"{key} = {shorten(value)}, which is no number from {low} to {high}")
        for key in _SPECIAL_IDS:
            value = contents.get(key)
            if value is not None and any(type(item) is not int for item in (value if type(value) is list else [value])):
                problems.append(f"{key} = {shorten(value)}, which is no id")
        if problems:
            raise ValueError("; ".join(problems))

        GenerationConfig.from_dict(contents)
        understood = {key: value for key, value in contents.items() if key in _GENERATION_KEYS}
        config = GenerationConfig.from_dict(understood)
    except Exception as error:
        # transformers checks types and values, each with an exception of its own.
        expected = "generation settings, or no such file"
        raise UserError(where=where, got=f"{file}, unreadable ({error_reason(error)})", expected=expected) from None

    ignored = [
        shorten(key)
        for key, value in contents.items()
        if not (key in _GENERATION_KEYS or key in _WITHOUT_EFFECT or key.startswith(("_", "output_")))
        # Off, or a factor that changes nothing.
        and value
        and value != 1
    ]
    return config, [f"{file}: keys that are not used here are ignored: {', '.join(ignored[:16])}"] if ignored else []


def transformers_config(config_json: ConfigJson) -> PreTrainedConfig:
    """The configuration of transformers, or our own, with what the file leaves out filled in.

    Raises:
        UserError: the values do not fit each other.
    """
    from transformers import CONFIG_MAPPING
    from transformers.utils import logging

    from megatron_mea.exported.configuration_mea import MEAConfig
    from megatron_mea.exported.modeling_mea_vllm import MEAServedConfig

    own_classes = {"mea": MEAConfig, "mea_vllm": MEAServedConfig}
    config_class = own_classes.get(config_json.model_type) or CONFIG_MAPPING[config_json.model_type]
    # It warns of rotary parameters that do not fit each other, which an import refuses.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # A copy, since it writes into what it gets.
        config = config_class.from_dict(copy.deepcopy(config_json.settings))
        if isinstance(config, MEAServedConfig):
            config.trained()
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()) and not config.sliding_window:
            raise ValueError("layer_types has sliding_attention, and there is no sliding_window")
    except Exception as error:
        # transformers checks types and values, each with an exception of its own.
        got = f"{config_json.file}, unreadable ({error_reason(error)})"
        raise UserError(where=config_json.where, got=got, expected="a Hugging Face folder") from None
    finally:
        logging.set_verbosity(verbosity)

    return config


def model_section(config_json: ConfigJson) -> tuple[Model, tuple[str, ...]]:
    """Our section `model`, of a stock model with the variant `plain`, and warnings: what was left out and may matter.

    Raises:
        UserError: config.json describes what our model does not compute.
    """
    file, where, model_type = config_json.file, config_json.where, config_json.model_type
    config = transformers_config(config_json)
    is_stock = model_type in STOCK_MODEL_TYPES
    if is_stock and (problems := list(_settings_problems(config, model_type))):
        raise problems_of_file(file=file, where=where, problems=problems)

    # In the config.json for vLLM, key/value heads and head_dim are those of the cache.
    own_config = config.trained() if model_type == "mea_vllm" else config
    try:
        model = parse_model(_stock_settings(config, model_type) if is_stock else from_hf_config(own_config))
    except UserError as error:
        with_keys = ((problem.where.removeprefix("model."), problem) for problem in error.problems)
        raise UserError.from_problems(
            Problem(where=where, got=f"{file}: {key} = {problem.got}", expected=problem.expected, hint=problem.hint)
            for key, problem in with_keys
        ) from None

    warnings = list(config_json.warnings)
    if dropout := getattr(config, "attention_dropout", None):
        warnings.append(f"{file}: attention_dropout = {dropout} is ignored: training has no dropout")

    return model, tuple(warnings)


def _settings_problems(config: Any, model_type: str) -> Iterator[Problem]:
    """Settings of a stock model with which it computes something else than our variant `plain`."""
    if config.hidden_act not in ("silu", "swish"):
        yield Problem(where="hidden_act", got=config.hidden_act, expected="silu")

    # Llama's and Qwen3's `attention_bias` puts a bias on o_proj too; Qwen2 has biases on q, k and v, and no such key.
    if model_type != "qwen2" and getattr(config, "attention_bias", False):
        yield Problem(where="attention_bias", got=True, expected="false: a bias on o_proj is not supported")
    if getattr(config, "mlp_bias", False):
        yield Problem(where="mlp_bias", got=True, expected="false: biases of the feed-forward are not supported")

    rope = config.rope_parameters or {}
    if rope.get("partial_rotary_factor") not in (None, 1):
        yield Problem(
            where="partial_rotary_factor", got=rope["partial_rotary_factor"], expected="1: RoPE turns all of a head"
        )

    context = config.max_position_embeddings
    sliding_window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    sees_all = sliding_window is not None and sliding_window >= context
    layer_types = getattr(config, "layer_types", None) or []
    supported = {"full_attention", "sliding_attention"} if sees_all else {"full_attention"}
    unsupported = sorted({str(layer_type) for layer_type in layer_types} - supported)
    if sliding_window is not None and not sees_all and (unsupported or not layer_types):
        expected = (
            f"null, or at least max_position_embeddings = {context}; with a context of {sliding_window} nothing changes"
        )
        yield Problem(where="sliding_window", got=sliding_window, expected=expected)
    elif unsupported:
        yield Problem(where="layer_types", got=", ".join(unsupported), expected="full_attention")


def _stock_settings(config: Any, model_type: str) -> dict[str, Any]:
    """Our `model` section of a stock model, not validated."""
    keys = _SHARED_KEYS + (("num_experts", *EXPERT_KEYS) if model_type == "qwen3_moe" else ())
    fields = {key: getattr(config, key) for key in keys}
    return fields | {
        "attention_variant": "plain",
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "qk_norm": model_type in ("qwen3", "qwen3_moe"),
        "attention_bias": model_type == "qwen2",
        # It does not matter where there are weights; transformers allows zero, we do not.
        "initializer_range": config.initializer_range or 0.02,
        **rope_settings(config.rope_parameters),
    }


def to_hf_config(model: Model, **kwargs: object) -> MEAConfig:
    """The exported configuration of a `model` section; `kwargs` are further fields, such as token ids."""
    from megatron_mea.exported.configuration_mea import MEAConfig

    fields = model.model_dump(exclude={"rope_theta", "rope_scaling"})
    return MEAConfig(**fields, rope_parameters=model.rope_parameters, **kwargs)


def constant_tensors(model: Model) -> dict[str, torch.Tensor]:
    """The stored buffers of an exported model: the frequency of every cached pair, which follows from the settings."""
    if model.hlc_form == "head":
        return {}

    from megatron_mea.exported.combination_mea import pair_frequencies

    return {
        f"model.layers.{layer}.self_attn.hlc_k.frequency": pair_frequencies(counts).float()
        for layer, counts in enumerate(model.pair_counts)
    }


def from_hf_config(config: MEAConfig) -> dict[str, Any]:
    """The `model` section of an exported configuration, not validated."""
    names = Model.model_fields.keys() - {"rope_theta", "rope_scaling"}
    return {name: getattr(config, name) for name in names} | rope_settings(config.rope_parameters)


def rope_settings(rope: dict[str, Any]) -> dict[str, Any]:
    """Our `rope_theta` and `rope_scaling` from the `rope_parameters` of transformers 5, not validated."""
    # transformers 4 wrote `type`, which stays beside the new name.
    scaling = {key: value for key, value in rope.items() if key not in ("type", "rope_theta") and value is not None}
    # A factor of 1 rotates the full head.
    if scaling.get("partial_rotary_factor") == 1:
        del scaling["partial_rotary_factor"]

    is_default = scaling == {"rope_type": "default"}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None if is_default else scaling}
