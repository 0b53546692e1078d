"""Small model configurations, and a decoder with random parameters beside the reference's tensors."""

from __future__ import annotations

from typing import Any

import torch
from reference import random_tensors

from megatron_mea.config.schema import Model
from megatron_mea.model.decoder import Decoder
from megatron_mea.parallel.parameter import named_specs

SMALL: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
}


def small_model(**changes: Any) -> Model:
    return Model(**SMALL | changes)


def variants() -> list[dict[str, Any]]:
    """Every attention form that trains: variant, h', which side is mixed, q/k norm, biases, tied embeddings."""
    cases = [{"attention_variant": "plain"}, {"attention_variant": "plain_norm"}]
    for variant in ("mea", "mea_no_norm"):
        for components in (4, 2, [1, 2, 3]):
            cases.append({"attention_variant": variant, "num_component_heads": components})
        cases += [{"attention_variant": variant, "hlc_mixes": side} for side in ("keys", "values")]
    cases.append({"attention_variant": "mea", "head_norm_affine": False})
    cases += [{"attention_variant": "differential"}, {"attention_variant": "talking_heads"}]
    cases = [case | {"qk_norm": norm} for case in cases for norm in (False, True)]
    cases.append({"attention_variant": "differential", "head_norm_affine": False, "attention_bias": True})
    cases.append({"attention_variant": "talking_heads", "num_key_value_heads": 1, "tie_word_embeddings": True})
    cases.append({"attention_variant": "mea", "num_component_heads": 2, "attention_bias": True})
    cases.append({"attention_variant": "mea", "qk_norm": True, "attention_bias": True, "tie_word_embeddings": True})
    return cases


def name_of(case: dict[str, Any]) -> str:
    return "-".join(str(value) if isinstance(value, (str, list)) else f"{key}={value}" for key, value in case.items())


def decoder_and_tensors(model: Model, seed: int = 1) -> tuple[Decoder, dict[str, torch.Tensor]]:
    """A float64 decoder, and tensors of the same values for the reference, which track gradients."""
    tensors = random_tensors(model.model_dump(), torch.Generator().manual_seed(seed))
    decoder = Decoder(model).double()
    parameters = named_specs(decoder)
    assert parameters.keys() == tensors.keys()
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[name].detach())
    return decoder, tensors
