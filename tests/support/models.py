"""Small model configurations, and a decoder with random parameters together with the reference's tensors."""

from __future__ import annotations

from typing import Any

import torch

from megatron_mea.config.schema import Model
from megatron_mea.model.decoder import Decoder
from megatron_mea.parallel.parameter import parameters_by_name
from support.reference import random_tensors

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
    """The model section `SMALL` with these changes."""
    return Model(**SMALL | changes)


def variants() -> list[dict[str, Any]]:
    """Changes for every kind of attention: variant, h', combined keys or values, q/k norm, biases, tied embeddings."""
    cases = [{"attention_variant": "plain"}, {"attention_variant": "plain_norm"}]
    for variant in ("mea", "mea_no_norm"):
        for components in (4, 2, [1, 2, 3]):
            cases.append({"attention_variant": variant, "num_component_heads": components})
        cases += [{"attention_variant": variant, "hlc_mixes": side} for side in ("keys", "values")]

    cases.append({"attention_variant": "mea", "head_norm_affine": False})
    cases += [{"attention_variant": "differential"}, {"attention_variant": "talking_heads"}]
    cases += [{"attention_variant": "gated", "gate_width": width} for width in ("feature", "head")]
    cases = [case | {"qk_norm": qk_norm} for case in cases for qk_norm in (False, True)]

    cases += latent_cases()
    cases.append({"attention_variant": "differential", "head_norm_affine": False, "attention_bias": True})
    cases.append({"attention_variant": "talking_heads", "num_key_value_heads": 1, "tie_word_embeddings": True})
    cases.append({"attention_variant": "mea", "num_component_heads": 2, "attention_bias": True})
    cases.append({"attention_variant": "mea", "qk_norm": True, "attention_bias": True, "tie_word_embeddings": True})
    return cases


def latent_cases() -> list[dict[str, Any]]:
    """Changes for `hlc_form: latent`: full and small caches, a size for each layer, uneven and missing frequencies."""
    latent = {"hlc_form": "latent"}
    counts = [[4, 0, 2], [1, 1, 1], [3, 4, 0]]
    return [
        {"attention_variant": "mea", **latent},
        {"attention_variant": "mea", **latent, "key_latent_dim": 12, "value_latent_dim": 9, "qk_norm": True},
        {"attention_variant": "mea_no_norm", **latent, "key_latent_dim": 14, "value_latent_dim": 16},
        {
            "attention_variant": "mea_no_norm",
            **latent,
            "key_latent_dim": [12, 6, 14],
            "value_latent_dim": [4, 24, 11],
            "key_frequencies": counts,
            "attention_bias": True,
        },
    ]


def expert_cases() -> list[dict[str, Any]]:
    """Changes for mixtures of experts: all or some layers, one and all experts a token, weights that sum to 1 or not.

    The width of an expert is aligned for grouped products in one of them.
    """
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "qk_norm": True}
    return [
        experts | {"attention_variant": "plain"},
        experts | {"attention_variant": "mea", "num_component_heads": 2, "mlp_only_layers": [1]},
        experts | {"attention_variant": "plain_norm", "decoder_sparse_step": 2, "norm_topk_prob": False},
        experts | {"attention_variant": "mea_no_norm", "num_experts_per_tok": 1, "norm_topk_prob": False},
        experts | {"attention_variant": "gated", "num_experts_per_tok": 8, "moe_intermediate_size": 16},
    ]


def name_of(case: dict[str, Any]) -> str:
    """The id of a parametrised test case."""
    return "-".join(str(value) if isinstance(value, (str, list)) else f"{key}={value}" for key, value in case.items())


def decoder_and_tensors(model: Model, seed: int = 1) -> tuple[Decoder, dict[str, torch.Tensor]]:
    """A float64 decoder, and tensors of the same values for the reference, which require gradients."""
    tensors = random_tensors(model.model_dump(), torch.Generator().manual_seed(seed))
    decoder = Decoder(model).double()
    parameters = parameters_by_name(decoder)
    assert parameters.keys() == tensors.keys()

    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[name].detach())

    return decoder, tensors


def tokens(vocab: int, *shape: int) -> torch.Tensor:
    """Random token ids, the same at every call."""
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(7))


def positions_of(ids: torch.Tensor) -> torch.Tensor:
    """Position ids (batch, seq) from 0 for token ids (batch, seq)."""
    return torch.arange(ids.shape[1]).expand_as(ids)
