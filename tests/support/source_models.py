"""Hugging Face folders to compress, of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from megatron_mea.config.load import parse_model
from megatron_mea.exported.modeling_mea import MEAForCausalLM
from megatron_mea.huggingface.hf_config import to_hf_config

SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
KINDS = {
    "llama": {"head_dim": 8},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8} | EXPERTS,
}
HEADS, DIM, LAYERS = 4, {"mistral": 4, "qwen2": 4}, 3


def save_source_model(kind: str, folder: Path, *, tokenizer: Path | None = None, **changes: Any) -> Path:
    """Saves a Hugging Face folder with random weights: a stock model, or one of our variants.

    Args:
        changes: of the configuration of a stock model.
    """
    torch.manual_seed(0)
    if kind in KINDS:
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES | KINDS[kind] | changes))
    else:
        variant = {"attention_variant": kind, "num_component_heads": 4 if kind.startswith("plain") else [4, 3, 4]}
        model = MEAForCausalLM(to_hf_config(parse_model(SIZES | {"head_dim": 8} | variant)))

    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
        elif "hlc" in name:
            torch.nn.init.normal_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.15)

    model.save_pretrained(folder)
    if tokenizer is not None:
        for file in tokenizer.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())

    return folder
