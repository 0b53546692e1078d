"""Translates the config.json of a Hugging Face folder to our `model` section and back; the only place that does.

The folder is untrusted: transformers' own configuration classes fill in what the file leaves out, no code of the folder
is run, and what our model would not compute is refused by the name of its key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mea.config.load import parse_model
from megatron_mea.config.schema import MAX_COUNT, MAX_LAYERS, MAX_SIZE, Model
from megatron_mea.errors import Problem, UserError
from megatron_mea.inputs import read_json_object

if TYPE_CHECKING:
    from megatron_mea.exported.configuration_mea import MEAConfig

STOCK_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""model_type of the Hugging Face models that compute what our variant `plain` does."""
_MODEL_TYPES = ("mea", "mea_vllm", *STOCK_MODEL_TYPES)
_SIZE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_labels",
)
_MAX_SIZES = {"num_hidden_layers": MAX_LAYERS} | dict.fromkeys(_SIZE_KEYS, MAX_SIZE)
"""Larger sizes, and 0, are traps or typing errors: transformers divides, and makes lists as long as the file says."""
_MAX_CONFIG_BYTES = 1 << 20
_SHARED_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"),
)
_ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa")
_GENERATION_BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), (1, 64)),
    **dict.fromkeys(("max_length", "max_new_tokens"), (1, MAX_COUNT)),
    **dict.fromkeys(("min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size"), (0, MAX_COUNT)),
    **dict.fromkeys(("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"), (0, 1)),
    **dict.fromkeys(("temperature", "repetition_penalty"), (0, 1000)),
    "length_penalty": (-1000, 1000),
}
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok")


@dataclass(frozen=True, kw_only=True)
class HFConfig:
    """The model that a config.json describes.

    Args:
        model_type: one of ours or of `STOCK_MODEL_TYPES`.
        model: our section `model`; of a stock model with the variant `plain`.
        has_remote_code: whether the folder wants code of its own to be run, which it is not.
    """

    model_type: str
    model: Model
    has_remote_code: bool


def read_config_json(path: Path, where: str) -> dict[str, Any]:
    """The config.json of a Hugging Face folder, checked before any code of transformers sees it.

    Args:
        where: the key or argument that named the folder, for messages.

    Raises:
        UserError: it is missing, no JSON object or too large, of an unknown architecture, quantised, or has sizes that
            would take a machine's memory.
    """
    file = path / "config.json"
    try:
        config_json = read_json_object(file, max_bytes=_MAX_CONFIG_BYTES)
        problems = list(_json_problems(config_json))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            where=where, got=f"{file}, unreadable ({_reason(error)})", expected="a Hugging Face folder"
        ) from None

    if problems:
        raise _with_file(file=file, where=where, problems=problems)

    return config_json


def check_generation_config(path: Path, where: str) -> None:
    """Raises UserError where a folder has generation settings that transformers does not take."""
    from transformers import GenerationConfig

    file = path / "generation_config.json"
    if not file.is_file():
        return

    try:
        contents = read_json_object(file, max_bytes=_MAX_CONFIG_BYTES)
        for key, (low, high) in _GENERATION_BOUNDS.items():
            value = contents.get(key)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and low <= value <= high):
                raise ValueError(f"{key} = {value!r}, which is no number from {low} to {high}")

        GenerationConfig.from_dict(contents)
    except Exception as error:
        # transformers checks types and values, each with an exception of its own.
        expected = "generation settings, or no such file"
        raise UserError(where=where, got=f"{file}, unreadable ({_reason(error)})", expected=expected) from None


def read_hf_config(path: Path, where: str) -> HFConfig:
    """Reads the config.json of a Hugging Face folder.

    Args:
        where: the key or argument that named the folder, for messages.

    Raises:
        UserError: there is no config.json, it cannot be read, or it describes what our model does not compute.
    """
    from transformers import CONFIG_MAPPING
    from transformers.utils import logging

    from megatron_mea.exported.configuration_mea import MEAConfig
    from megatron_mea.exported.modeling_mea_vllm import MEAServedConfig

    file, config_json = path / "config.json", read_config_json(path, where)
    model_type = config_json["model_type"]
    # It warns of rotary parameters that it does not know, which are refused below.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        own_classes = {"mea": MEAConfig, "mea_vllm": MEAServedConfig}
        config = (own_classes.get(model_type) or CONFIG_MAPPING[model_type]).from_dict(config_json)
        # In the config.json for vLLM, key/value heads and head_dim are those of the cache.
        config = config.trained() if model_type == "mea_vllm" else config
        problems = list(_settings_problems(config, model_type)) if model_type in STOCK_MODEL_TYPES else []
    except Exception as error:
        # transformers checks types and values, each with an exception of its own.
        raise UserError(
            where=where, got=f"{file}, unreadable ({_reason(error)})", expected="a Hugging Face folder"
        ) from None
    finally:
        logging.set_verbosity(verbosity)

    if problems:
        raise _with_file(file=file, where=where, problems=problems)

    try:
        model = parse_model(
            _stock_settings(config, model_type) if model_type in STOCK_MODEL_TYPES else from_hf_config(config)
        )
    except UserError as error:
        with_keys = ((problem.where.removeprefix("model."), problem) for problem in error.problems)
        raise UserError.from_problems(
            Problem(where=where, got=f"{file}: {key} = {problem.got}", expected=problem.expected, hint=problem.hint)
            for key, problem in with_keys
        ) from None

    return HFConfig(
        model_type=model_type,
        model=model,
        has_remote_code=model_type in STOCK_MODEL_TYPES and "auto_map" in config_json,
    )


def _reason(error: Exception) -> str:
    """What an exception says, in a line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"no key {text}" if isinstance(error, KeyError) else text


def _with_file(*, file: Path, where: str, problems: Iterable[Problem]) -> UserError:
    """The error of problems whose `where` is a key of a file."""
    return UserError.from_problems(
        Problem(where=where, got=f"{file}: {problem.where} = {str(problem.got)[:200]}", expected=problem.expected)
        for problem in problems
    )


def _json_problems(config_json: dict[str, Any]) -> Iterator[Problem]:
    """Problems that must be found before transformers reads the file: architecture, quantization, experts, sizes."""
    model_type = config_json["model_type"]
    if model_type not in _MODEL_TYPES:
        yield Problem(where="model_type", got=model_type, expected=", ".join(_MODEL_TYPES))

    for key in ("quantization_config", "compression_config"):
        if config_json.get(key):
            method = config_json[key].get("quant_method", "") if isinstance(config_json[key], dict) else ""
            yield Problem(
                where=key, got=method or "something", expected="nothing: weights in float32, bfloat16 or float16"
            )

    for key in _EXPERT_KEYS:
        if config_json.get(key):
            yield Problem(where=key, got=config_json[key], expected="nothing: mixtures of experts are not supported")

    for key in ("attn_implementation", "_attn_implementation"):
        if config_json.get(key) not in (None, *_ATTENTION_IMPLEMENTATIONS):
            # Another one may name a kernel, which transformers would fetch from the hub.
            yield Problem(
                where=key, got=config_json[key], expected=f"nothing, or {', '.join(_ATTENTION_IMPLEMENTATIONS)}"
            )

    for key, largest in _MAX_SIZES.items():
        if isinstance(size := config_json.get(key), int) and not 1 <= size <= largest:
            yield Problem(where=key, got=size, expected=f"1 to {largest:,}")


def _settings_problems(config: Any, model_type: str) -> Iterator[Problem]:
    """Settings of a stock model with which it computes something else than our variant `plain`."""
    if config.hidden_act not in ("silu", "swish"):
        yield Problem(where="hidden_act", got=config.hidden_act, expected="silu")

    # Llama's and Qwen3's `attention_bias` puts a bias on o_proj too; Qwen2 has biases on q, k and v, and no such key.
    if model_type != "qwen2" and getattr(config, "attention_bias", False):
        yield Problem(where="attention_bias", got=True, expected="false: a bias on o_proj is not supported")
    if getattr(config, "mlp_bias", False):
        yield Problem(where="mlp_bias", got=True, expected="false: biases of the feed-forward are not supported")
    if getattr(config, "is_causal", True) is False:
        yield Problem(where="is_causal", got=False, expected="true")

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
    fields = {key: getattr(config, key) for key in _SHARED_KEYS}
    return fields | {
        "attention_variant": "plain",
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "qk_norm": model_type == "qwen3",
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
