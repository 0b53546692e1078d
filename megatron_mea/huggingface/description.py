"""What the config.json of a Hugging Face folder means as our `model` section: the one place that knows.

The folder is untrusted: transformers' own configuration classes fill in what the file leaves out, no code of the folder
is run, and what our model would not compute is refused by the name of its key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mea.config.load import parse_model
from megatron_mea.config.schema import Model
from megatron_mea.errors import Problem, UserError
from megatron_mea.huggingface.convert import from_hf_config, from_rope_parameters

STOCK = ("llama", "mistral", "qwen2", "qwen3")
"""Hugging Face models that compute what our variant `plain` does."""
_KINDS = ("mea", "mea_vllm", *STOCK)
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
_MOST = {"num_hidden_layers": 10_000} | dict.fromkeys(_SIZES, 1 << 20)
"""Larger numbers, and 0, are traps or typing errors: transformers divides, and makes lists as long as the file says."""
_SAME_NAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"),
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok")


@dataclass(frozen=True)
class Description:
    """What a config.json describes.

    Args:
        kind: its model_type, one of ours or of STOCK.
        model: our section `model`; of STOCK the variant `plain`.
        own_code: whether the folder wants code of its own to be run, which it is not.
    """

    kind: str
    model: Model
    own_code: bool


def read_description(path: Path, where: str) -> Description:
    """The description of a Hugging Face folder.

    Args:
        where: the key or argument that named the folder, for messages.

    Raises:
        UserError: there is no config.json, it cannot be read, or it describes what our model does not compute.
    """
    from transformers import CONFIG_MAPPING
    from transformers.utils import logging

    from megatron_mea.huggingface.configuration_mea import MEAConfig
    from megatron_mea.huggingface.modeling_mea_vllm import MEAServedConfig

    file = path / "config.json"
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        kind = description["model_type"]
        problems = list(_foreign(description))
        if not problems:
            # It warns of rotary parameters that it does not know, which are refused below.
            verbosity = logging.get_verbosity()
            logging.set_verbosity_error()
            try:
                ours = {"mea": MEAConfig, "mea_vllm": MEAServedConfig}
                config = (ours.get(kind) or CONFIG_MAPPING[kind]).from_dict(description)
                # The config.json for vLLM tells of the cache what others tell of the model.
                config = config.trained() if kind == "mea_vllm" else config
            finally:
                logging.set_verbosity(verbosity)
            problems = list(_different(config, kind)) if kind in STOCK else []
    except Exception as error:
        # transformers checks types and values, each with an exception of its own.
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = f"no key {reason}" if isinstance(error, KeyError) else reason
        raise UserError(where, f"{file}, unreadable ({reason})", "a Hugging Face folder") from None
    if problems:
        raise UserError.of(Problem(where, f"{file}: {each.where} = {each.found}", each.allowed) for each in problems)
    try:
        model = parse_model(_plain(config, kind) if kind in STOCK else from_hf_config(config))
    except UserError as error:
        found = ((each.where.removeprefix("model."), each) for each in error.problems)
        raise UserError.of(
            Problem(where, f"{file}: {key} = {each.found}", each.allowed, each.mend) for key, each in found
        ) from None
    return Description(kind, model, kind in STOCK and "auto_map" in description)


def _foreign(description: dict[str, Any]) -> Iterator[Problem]:
    """What can be told, and must be, before transformers reads the file."""
    kind = description["model_type"]
    if kind not in _KINDS:
        yield Problem("model_type", kind, ", ".join(_KINDS))
    for key in ("quantization_config", "compression_config"):
        if description.get(key):
            method = description[key].get("quant_method", "") if isinstance(description[key], dict) else ""
            yield Problem(key, method or "something", "nothing: weights in float32, bfloat16 or float16")
    for key in _EXPERTS:
        if description.get(key):
            yield Problem(key, description[key], "nothing: mixtures of experts are not supported")
    for key, most in _MOST.items():
        if isinstance(size := description.get(key), int) and not 1 <= size <= most:
            yield Problem(key, size, f"1 to {most:,}")


def _different(config: Any, kind: str) -> Iterator[Problem]:
    """Settings of a stock model with which it computes something else than our variant `plain`."""
    if config.hidden_act not in ("silu", "swish"):
        yield Problem("hidden_act", config.hidden_act, "silu")
    # Llama's and Qwen3's puts a bias on o_proj too; Qwen2 has biases on q, k and v, and no such key.
    if kind != "qwen2" and getattr(config, "attention_bias", False):
        yield Problem("attention_bias", True, "false: a bias on o_proj is not supported")
    if getattr(config, "mlp_bias", False):
        yield Problem("mlp_bias", True, "false: biases of the feed-forward are not supported")
    if getattr(config, "is_causal", True) is False:
        yield Problem("is_causal", False, "true")
    rope = config.rope_parameters or {}
    if rope.get("partial_rotary_factor") not in (None, 1):
        yield Problem("partial_rotary_factor", rope["partial_rotary_factor"], "1: RoPE turns all of a head")
    context = config.max_position_embeddings
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    sees_all = window is not None and window >= context
    types = getattr(config, "layer_types", None) or []
    other = sorted({str(each) for each in types} - {"full_attention"} - ({"sliding_attention"} if sees_all else set()))
    if window is not None and not sees_all and (other or not types):
        allowed = f"null, or at least max_position_embeddings = {context}; with a context of {window} nothing changes"
        yield Problem("sliding_window", window, allowed)
    elif other:
        yield Problem("layer_types", ", ".join(other), "full_attention")


def _plain(config: Any, kind: str) -> dict[str, Any]:
    """Our `model` section of a stock model, not validated."""
    fields = {key: getattr(config, key) for key in _SAME_NAME}
    return fields | {
        "attention_variant": "plain",
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "qk_norm": kind == "qwen3",
        "attention_bias": kind == "qwen2",
        # Says nothing of weights that are there; a range of zero is one for transformers, not for us.
        "initializer_range": config.initializer_range or 0.02,
        **from_rope_parameters(config.rope_parameters),
    }
