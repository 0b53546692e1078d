"""The keys of a config.json that are understood, with their types and bounds; transformers sees no others.

A key that none of these models computes with is dropped, one that asks for another computation is refused. Imports
neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from megatron_mea.config.schema import MAX_COUNT, MAX_EXPERTS, MAX_LAYERS, MAX_SIZE, Model
from megatron_mea.errors import Problem, UserError, shorten
from megatron_mea.inputs import read_json_object

STOCK_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
"""model_type of the Hugging Face models that compute what our variant `plain` does."""
CONFIG_JSON = "config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_NAMED = 16
"""Most keys or tensors that a message names: a folder of something else may have thousands that do not fit."""

_Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
_Layers = Annotated[int, Field(ge=1, le=MAX_LAYERS)]
_Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
_Positive = Annotated[float, Field(gt=0, le=1e18)]
_NotNegative = Annotated[float, Field(ge=0, le=1e18)]
_Share = Annotated[float, Field(gt=0, le=1)]
_Experts = Annotated[int, Field(ge=1, le=MAX_EXPERTS)]
_Index = Annotated[int, Field(ge=0, le=MAX_LAYERS)]
_LayerType = Literal["full_attention", "sliding_attention"]
_RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional"]
_Name = Annotated[str, Field(max_length=64)]
_Factors = Annotated[list[_Positive], Field(max_length=MAX_SIZE, fail_fast=True)]


_EXPERT_COUNTS = ("num_experts", "num_local_experts")


class _Keys(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class _Rope(_Keys):
    """RoPE settings of any kind that transformers has for these models."""

    model_config = ConfigDict(extra="forbid")

    rope_type: _RopeType | None = None
    type: _RopeType | None = None
    rope_theta: _Positive | None = None
    partial_rotary_factor: _Share | None = None
    factor: _Positive | None = None
    original_max_position_embeddings: _Count | None = None
    attention_factor: _Positive | None = None
    beta_fast: _Positive | None = None
    beta_slow: _Positive | None = None
    mscale: _Positive | None = None
    mscale_all_dim: _Positive | None = None
    truncate: bool | None = None
    low_freq_factor: _Positive | None = None
    high_freq_factor: _Positive | None = None
    short_factor: _Factors | None = None
    long_factor: _Factors | None = None
    # A remark of whoever wrote the file.
    finetuned: Annotated[bool | None, Field(exclude=True)] = None


class _Layer(_Keys):
    """Sizes that layers may have of their own: the heads of a cache, as `export --target vllm` writes them."""

    model_config = ConfigDict(extra="forbid")

    num_key_value_heads: _Size = 1
    head_dim: _Size = 1


class _CommonKeys(_Keys):
    # No default of these classes is used: what a file leaves out, transformers' class fills in.
    vocab_size: _Size = 1
    hidden_size: _Size = 1
    intermediate_size: _Size = 1
    num_hidden_layers: _Layers = 1
    num_attention_heads: _Size = 1
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    max_position_embeddings: _Count = 1
    rms_norm_eps: _Positive = 1e-6
    initializer_range: _NotNegative = 0.02
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_dropout: _NotNegative | None = None
    rope_theta: _Positive | None = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    partial_rotary_factor: _Share | None = None
    original_max_position_embeddings: _Count | None = None
    bos_token_id: int | None = None
    eos_token_id: int | Annotated[list[int], Field(max_length=1000, fail_fast=True)] | None = None
    pad_token_id: int | None = None


class _StockKeys(_CommonKeys):
    hidden_act: _Name = "silu"
    mlp_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: _Count | None = None
    max_window_layers: Annotated[int, Field(ge=0, le=MAX_COUNT)] = 0
    layer_types: Annotated[list[_LayerType], Field(max_length=MAX_LAYERS, fail_fast=True)] | None = None


class _Qwen3MoeKeys(_StockKeys):
    # transformers 5 saves the second name.
    num_experts: _Experts | None = None
    num_local_experts: _Experts | None = None
    num_experts_per_tok: _Size = 8
    moe_intermediate_size: _Size = 1
    norm_topk_prob: bool = False
    decoder_sparse_step: _Count = 1
    mlp_only_layers: Annotated[list[_Index], Field(max_length=MAX_LAYERS, fail_fast=True)] | None = None


_MEAKeys = create_model(
    "_MEAKeys",
    __base__=_CommonKeys,
    **{
        name: (field.annotation, field)
        for name, field in Model.model_fields.items()
        if name not in _CommonKeys.model_fields
    },
)
"""An export has the keys of our `model` section, in their types and bounds."""


class _ServedKeys(_MEAKeys):
    num_composite_heads: _Size = 1
    component_head_dim: _Size = 1
    per_layer_config: (
        Annotated[dict[Annotated[str, Field(pattern=r"^\d{1,5}$")], _Layer], Field(max_length=MAX_LAYERS)] | None
    ) = None


_UNDERSTOOD: dict[str, type[_Keys]] = {
    "mea": _MEAKeys,
    "mea_vllm": _ServedKeys,
    **dict.fromkeys(STOCK_MODEL_TYPES, _StockKeys),
    "qwen3_moe": _Qwen3MoeKeys,
}

_WITHOUT_EFFECT = frozenset(
    (
        # Who wrote the file, how the weights are stored, which classes it was saved from.
        *("model_type", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype", "name_or_path"),
        # What a model returns, and how it is run.
        *("use_cache", "output_hidden_states", "output_attentions", "return_dict", "use_return_dict", "torchscript"),
        *("chunk_size_feed_forward", "use_bfloat16", "tf_legacy_loss", "gradient_checkpointing", "pretraining_tp"),
        *("tie_last_hidden_states", "is_decoder", "cross_attention_hidden_size", "tie_encoder_decoder"),
        *("attn_implementation", "experts_implementation", "output_router_logits"),
        # Of a training, which has its own.
        "router_aux_loss_coef",
        # Classification, tokenizers.
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
        *("classifier_dropout", "tokenizer_class", "prefix", "sep_token_id", "decoder_start_token_id"),
        # Settings of generation, which transformers 4 wrote here and 5 takes from generation_config.json alone.
        *("max_length", "min_length", "max_new_tokens", "min_new_tokens", "do_sample", "early_stopping", "num_beams"),
        *("num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "min_p", "typical_p"),
        *("epsilon_cutoff", "eta_cutoff", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
        *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores"),
        *("return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
        *("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
    )
)
_OFF = {
    "is_encoder_decoder": "false: a decoder",
    "add_cross_attention": "false: a decoder",
    "pruned_heads": "nothing: heads that were pruned are not supported",
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"),
        "nothing: of mixtures of experts qwen3_moe is supported, and our own exports",
    ),
    **dict.fromkeys(("quantization_config", "compression_config"), "nothing: weights in float32, bfloat16 or float16"),
    "per_layer_config": "nothing: layers that differ are not supported",
}
"""Keys with which a model computes something else, unless they are null, false, 0 or empty."""
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "is_causal": (None, True),
    # Routers and experts of other families.
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), (None, 0, 1)),
    **dict.fromkeys(("router_jitter_noise", "n_shared_experts", "num_shared_experts"), (None, 0)),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), (None, 0)),
    **dict.fromkeys(("moe_num_shared_experts", "first_k_dense_replace", "moe_router_bias", "router_bias"), (None, 0)),
    **dict.fromkeys(("use_expert_bias", "moe_router_enable_expert_bias", "swiglu_limit"), (None, 0)),
    **dict.fromkeys(("routed_scaling_factor", "router_scaling_factor"), (None, 1)),
    **dict.fromkeys(("scoring_func", "score_function", "moe_router_score_function"), (None, "softmax")),
    "topk_method": (None, "greedy"),
    # Another one may name a kernel, which transformers would fetch from the hub.
    **dict.fromkeys(
        ("attn_implementation", "_attn_implementation"),
        (None, "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"),
    ),
}
"""Keys that are dropped, and the values with which that changes nothing."""
KNOWN_KEYS = tuple(
    dict.fromkeys([*_StockKeys.model_fields, *_ServedKeys.model_fields, *sorted(_WITHOUT_EFFECT), *_OFF, *_ALLOWED])
)
"""Every key that has a meaning here for one of the architectures."""


@dataclass(frozen=True, kw_only=True)
class ConfigJson:
    """A config.json of which every value is understood.

    Args:
        file, where: its path, and the key or argument that named its folder, for messages.
        model_type: one of ours or of `STOCK_MODEL_TYPES`.
        settings: the keys that transformers' configuration class gets; what the file leaves out is not there.
        has_remote_code: whether the folder wants code of its own to be run, which it is not.
        warnings: what was left out and may matter.
    """

    file: Path
    where: str
    model_type: str
    settings: dict[str, Any]
    has_remote_code: bool
    warnings: tuple[str, ...]


def read_config_json(path: Path, where: str) -> ConfigJson:
    """Reads the config.json of a Hugging Face folder, before any code of transformers sees it.

    Args:
        where: the key or argument that named the folder, for messages.

    Raises:
        UserError: it is missing, no JSON object or too large, of an unknown architecture, quantised, or has values of
            other types, out of bounds, or with which a model computes something else; or an adapter is beside it.
    """
    file, adapter = path / CONFIG_JSON, path / "adapter_config.json"
    if adapter.exists():
        # transformers would add it to the weights, and an import leave it out.
        raise UserError(
            where=where,
            got=f"{adapter}: an adapter of peft beside the model",
            expected="weights alone",
            hint="merge it with peft (merge_and_unload) and save the model, or move adapter_config.json away",
        )

    try:
        contents = read_json_object(file, max_bytes=MAX_CONFIG_BYTES)
        model_type = contents["model_type"]
    except (OSError, ValueError, KeyError) as error:
        got = f"{file}, unreadable ({error_reason(error)})"
        raise UserError(where=where, got=got, expected="a Hugging Face folder") from None

    if not isinstance(model_type, str) or model_type not in _UNDERSTOOD:
        problem = Problem(where="model_type", got=model_type, expected=", ".join(_UNDERSTOOD))
        raise problems_of_file(file=file, where=where, problems=[problem])

    keys, is_stock = _UNDERSTOOD[model_type], model_type in STOCK_MODEL_TYPES
    known = {*keys.model_fields, *_WITHOUT_EFFECT, *_OFF, *_ALLOWED}
    unknown = [key for key in contents if key not in known and not key.startswith("_")]
    problems, settings = list(_refusals(contents, keys)), {}
    try:
        settings = keys.model_validate(contents).model_dump(exclude_unset=True)
    except ValidationError as error:
        problems += _type_problems(error)

    settings = {key: value for key, value in settings.items() if value is not None or key not in _EXPERT_COUNTS}
    if not is_stock:
        expected = "a key that this version knows, since others may stand for another computation"
        problems += [Problem(where=_printable(key), got=shorten(contents[key]), expected=expected) for key in unknown]
    if problems:
        raise problems_of_file(file=file, where=where, problems=problems)

    warnings = list(_without_foreign_ids(settings, file))
    if unknown:
        names = ", ".join(_printable(key) for key in unknown[:MAX_NAMED])
        warnings.append(f"{file}: keys that a {model_type} does not have are ignored: {names}")

    return ConfigJson(
        file=file,
        where=where,
        model_type=model_type,
        settings=settings,
        has_remote_code=is_stock and "auto_map" in contents,
        warnings=tuple(warnings),
    )


def error_reason(error: Exception) -> str:
    """The message of an exception, in a line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"no key {text}" if isinstance(error, KeyError) else text


def problems_of_file(*, file: Path, where: str, problems: Iterable[Problem]) -> UserError:
    """The error of problems whose `where` is a key of a file."""
    problems = list(problems)
    return UserError.from_problems(
        Problem(where=where, got=f"{file}: {problem.where} = {_printable(problem.got)}", expected=problem.expected)
        for problem in problems[:MAX_NAMED]
    )


def _printable(value: object) -> str:
    """Text of a value for a message, short and without control characters."""
    text = str(value)
    return text if isinstance(value, str) and text.isprintable() and len(text) <= 200 else shorten(value)


def _refusals(contents: dict[str, Any], keys: type[_Keys]) -> Iterator[Problem]:
    """Values with which a model computes something else, or that no file has."""
    for key, expected in _OFF.items():
        if (value := contents.get(key)) and key not in keys.model_fields:
            is_quantised = key == "quantization_config" and isinstance(value, dict)
            yield Problem(where=key, got=value.get("quant_method", value) if is_quantised else value, expected=expected)

    for key, allowed in _ALLOWED.items():
        if not any(contents.get(key) is value or contents.get(key) == value for value in allowed):
            names = ", ".join(str(value).lower() for value in allowed[1:])
            yield Problem(where=key, got=contents[key], expected=f"nothing, or {names}")

    names = _EXPERT_COUNTS
    if len({contents[name] for name in names if isinstance(contents.get(name), int)}) > 1:
        yield Problem(
            where=names[0], got=f"{contents[names[0]]}, and {names[1]} = {contents[names[1]]}", expected="one number"
        )

    # transformers would make a list as long.
    num_labels = contents.get("num_labels")
    if isinstance(num_labels, int) and not 0 <= num_labels <= MAX_SIZE:
        yield Problem(where="num_labels", got=num_labels, expected=f"at most {MAX_SIZE:,}")


def _type_problems(error: ValidationError) -> Iterator[Problem]:
    """One problem for each key of a pydantic error."""
    seen = set()
    for item in error.errors(include_url=False, include_context=False):
        # Of the path, names alone: a union adds its members.
        where = ".".join(
            part for part in item["loc"] if isinstance(part, str) and part.isidentifier() and part != "int"
        )
        if where in seen:
            continue

        seen.add(where)
        is_unknown = item["type"] == "extra_forbidden"
        expected = "a key that is known here" if is_unknown else item["msg"].removeprefix("Input should be ")
        yield Problem(where=where, got=shorten(item["input"]), expected=expected)


def _without_foreign_ids(settings: dict[str, Any], file: Path) -> Iterator[str]:
    """Removes ids of special tokens that the vocabulary does not have, and says so: -1 stood for none."""
    vocab_size = settings.get("vocab_size", MAX_SIZE)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = settings.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        inside = [token_id for token_id in ids if 0 <= token_id < vocab_size]
        if len(inside) < len(ids):
            settings[key] = inside or None
            yield f"{file}: {key} = {_printable(value)} is ignored: ids are below vocab_size = {vocab_size}"
