"""Hugging Face folders of random weights: transformers' own classes, and exports of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from megatron_mea.checkpoint.tensors import read_tensors, weight_shapes
from megatron_mea.config.load import parse_model
from megatron_mea.exported.modeling_mea import MEAForCausalLM
from megatron_mea.huggingface.hf_config import to_hf_config
from support.models import small_model

SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}
KINDS = {
    "llama": {},
    "llama-2": {"num_key_value_heads": 4, "head_dim": None, "rope_parameters": None},
    "llama-3.2": {
        "rope_parameters": LLAMA3 | {"rope_theta": 1e4, "original_max_position_embeddings": 32},
        "tie_word_embeddings": True,
    },
    "mistral": {"sliding_window": None},
    "mistral-window": {"sliding_window": 128},
    "qwen2": {"head_dim": 4, "rms_norm_eps": 1e-5},
    "qwen2-tied": {"head_dim": 4, "tie_word_embeddings": True, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "qwen3_moe-mixed": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 12,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "qwen3-yarn": {"rope_parameters": YARN | {"rope_theta": 1e4}, "rms_norm_eps": 1e-5},
}
"""Models of transformers' own classes, by the part of the name before the dash."""


def save_stock_model(
    kind: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    vocab_size: int = SIZES["vocab_size"],
    **sharding: Any,
) -> Path:
    """Saves a model of transformers' own class with random weights, biases and gains included."""
    config = CONFIG_MAPPING[kind.partition("-")[0]](**SIZES | KINDS[kind] | {"vocab_size": vocab_size})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        # Biases and gains too.
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)

    model.to(dtype).save_pretrained(folder, **sharding)
    return folder


def save_export(folder: Path, **settings: Any) -> Path:
    """Saves our model with random weights, with the files that `export` writes."""
    torch.manual_seed(0)
    model = MEAForCausalLM(to_hf_config(parse_model(small_model(**settings).model_dump(mode="json"))))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.5, 0.3)

    model.save_pretrained(folder)
    return folder


def edit_config_json(folder: Path, *without: str, **changes: Any) -> None:
    """Changes config.json: removes the keys `without`, and sets others."""
    file = folder / "config.json"
    config_json = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config_json.items() if key not in without}))


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name."""
    return read_tensors(checkpoint, weight_shapes(checkpoint))
