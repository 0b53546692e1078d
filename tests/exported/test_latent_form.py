"""What exports of `hlc_form: latent` have of their own: checks of sizes, the first combination, the norm of keys."""

from __future__ import annotations

import re

import pytest
import torch
from support.models import SMALL, small_model

from megatron_mea.attention.latent import FoldedGainNorm
from megatron_mea.exported.combination_mea import MEALatentKeys
from megatron_mea.exported.configuration_mea import MEAConfig
from megatron_mea.exported.latent_mea import MEALatentKeyNorm
from megatron_mea.exported.modeling_mea import MEAForCausalLM
from megatron_mea.huggingface.hf_config import to_hf_config

LATENT = {"hlc_form": "latent", "key_latent_dim": 6, "value_latent_dim": 5}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"key_latent_dim": [6, 6]}, "key_latent_dim has 2 entries"),
        ({"key_latent_dim": 26}, "key_latent_dim has 26 (expected: 1 to num_key_value_heads x head_dim = 24)"),
        ({"value_latent_dim": [5, 25, 5]}, "value_latent_dim has 25 (expected: 1 to"),
        ({"value_latent_dim": 0}, "value_latent_dim has 0 (expected: 1 to"),
        ({"key_latent_dim": 5}, "with the sum key_latent_dim / 2 = 2.5"),
        ({"key_frequencies": [[1, 1, 1]] * 2}, "key_frequencies has 2 entries (expected: one list for each of the 3"),
        (
            {"key_frequencies": [[1, 2]] * 3},
            "key_frequencies of layer 0 are [1, 2] (expected: head_dim / 2 = 3 numbers",
        ),
        ({"key_frequencies": [[4, -1, 0]] * 3}, "are [4, -1, 0] (expected: head_dim / 2 = 3 numbers from 0 to"),
        ({"key_frequencies": [[5, 0, 0]] * 3, "key_latent_dim": 10}, "from 0 to num_key_value_heads = 4"),
        ({"num_component_heads": 1}, "num_component_heads has 1 (expected where hlc_form is latent"),
        ({"hlc_mixes": "keys"}, "hlc_form is latent (expected for mea: head)"),
        ({"hlc_form": "head"}, "key_latent_dim is set (expected where hlc_form is head: None)"),
    ],
)
def test_sizes_that_no_layer_has_are_refused(changes, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        MEAConfig(**SMALL | LATENT | changes)


@torch.no_grad()
def test_a_new_model_begins_with_whole_pairs_and_features():
    """As training does: the identity at full size, else keys and values as large as what they are combined from."""
    torch.manual_seed(0)
    for sizes in ({}, {"key_latent_dim": 12, "value_latent_dim": 12}):
        model = MEAForCausalLM(to_hf_config(small_model(attention_variant="mea", hlc_form="latent", **sizes)))
        attention = model.model.layers[0].self_attn
        for combination, latent in ((attention.hlc_k, attention.k_proj), (attention.hlc_v, attention.v_proj)):
            numbers = torch.randn(1, 1, 50, latent.out_features)
            composites = combination(numbers)
            assert set(composites.unique().tolist()) == set(numbers.unique().tolist())


@torch.no_grad()
def test_gains_of_zero_leave_the_norm_of_keys_finite():
    """In training and in an export alike; gains down to 1e-3 are divided out exactly."""
    keys = torch.randn(2, 4, 9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    trained = FoldedGainNorm(name="k_norm", size=6, eps=1e-5).double()
    exported = MEALatentKeyNorm(6, eps=1e-5).double()
    for smallest in (1e-3, -1e-3, 0.0):
        gain = torch.tensor([1.0, smallest, 0.5, -2.0, 1.0, 3.0], dtype=torch.float64)
        trained.weight.copy_(gain)
        exported.weight.copy_(gain)
        normed, scalars = trained(keys * gain), exported(keys, keys * gain)[1]
        torch.testing.assert_close(keys * gain * scalars[..., None], normed, rtol=1e-12, atol=1e-12)

        divided = torch.where(gain == 0, 0, keys)
        expected = gain * divided * (divided.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        torch.testing.assert_close(normed, expected, rtol=1e-12, atol=1e-12)


def test_pairs_know_their_frequency_where_only_parameters_have_no_memory(monkeypatch):
    """As vLLM makes a model: parameters on the device "meta", buffers not."""
    register = torch.nn.Module.register_parameter

    def register_on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
        register(module, name, torch.nn.Parameter(parameter.to("meta")))

    monkeypatch.setattr(torch.nn.Module, "register_parameter", register_on_meta)
    keys = MEALatentKeys([2, 0, 1], num_kv_heads=4)
    assert keys.weight.is_meta
    assert keys.frequency.tolist() == [0, 0, 2]
