"""The seam of attention variants: a row and a module change what they say, and every list follows the registry."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import toy_attention
from support.models import small_model, tokens

from megatron_mea.config.schema import Model
from megatron_mea.config.variants import VARIANTS, combining_variant, extending_variants
from megatron_mea.exported.rotary_mea import apply_rotary, inverse_frequencies, rotary_cos_sin
from megatron_mea.model.decoder import Decoder
from megatron_mea.parallel.parameter import init_parameters, parameters_by_name


@pytest.fixture
def toy(monkeypatch) -> Model:
    """A model of the toy variant, with norms of queries and keys."""
    monkeypatch.setitem(VARIANTS, "toy", toy_attention.ROW)
    return small_model(num_hidden_layers=1, qk_norm=True).model_copy(update={"attention_variant": "toy"})


def test_a_module_has_projections_of_its_own_and_changes_keys_and_values(toy):
    """The layer written out: keys and values change before norm and RoPE, the projection has the normalised input."""
    decoder = Decoder(toy).double()
    init_parameters(decoder, seed=3)
    named = {name.rpartition("self_attn.")[2]: tensor for name, tensor in parameters_by_name(decoder).items()}

    x = torch.randn(2, 5, toy.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(5).expand(2, 5)
    inv_freq = torch.tensor(inverse_frequencies(toy)[0], dtype=torch.float64)
    cos, sin = rotary_cos_sin(config=toy, position_ids=positions, dtype=x.dtype, inv_freq=inv_freq)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    output = decoder.layers["0"].self_attn(x, cos, sin)

    def heads(name: str) -> torch.Tensor:
        # shape: (batch, seq, heads d) -> (batch, heads, seq, d)
        return (x @ named[f"{name}_proj.weight"].T).unflatten(2, (-1, toy.head_dim)).transpose(1, 2)

    def normed(vectors: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(vectors, (toy.head_dim,), named[f"{name}_norm.weight"], toy.rms_norm_eps)

    query = apply_rotary(normed(heads("q"), "q"), cos, sin)
    key = apply_rotary(normed(heads("k") + named["key_shift"], "k"), cos, sin)
    value = heads("v") * named["value_scale"]
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    expected = (attended.transpose(1, 2).flatten(2) + x @ named["skip_proj.weight"].T) @ named["o_proj.weight"].T
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def test_what_is_recomputed_changes_no_gradient(toy):
    ids = tokens(toy.vocab_size, 2, 9)
    gradients = []
    for kind in ("none", "selective", "full"):
        decoder = Decoder(toy, activation_checkpointing=kind).double()
        init_parameters(decoder, seed=3)
        decoder(ids[:, :-1], torch.arange(8).expand(2, 8), ids[:, 1:]).backward()
        gradients.append({name: parameter.grad for name, parameter in parameters_by_name(decoder).items()})

    assert any("skip_proj" in name for name in gradients[0])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-13, atol=1e-13)


def test_what_a_variant_may_be_imported_or_compressed_as():
    assert extending_variants("plain") == ["plain", "plain_norm", "mea", "mea_no_norm"]
    assert extending_variants("plain_norm") == ["plain_norm", "mea"]
    assert extending_variants("mea_no_norm") == ["mea", "mea_no_norm"]
    assert extending_variants("differential") == ["differential"]
    assert [combining_variant(name) for name in ("plain", "plain_norm", "mea")] == ["mea_no_norm", "mea", "mea"]
    assert combining_variant("talking_heads") is None


@pytest.mark.parametrize("row", VARIANTS.values(), ids=lambda row: row.name)
def test_a_row_names_what_exists(row):
    assert row.export_targets[0] == "transformers"
    assert set(row.baselines) <= VARIANTS.keys() - {row.name}
    assert set(row.own_keys) | set(row.ignored_keys) <= Model.model_fields.keys()
    assert not set(row.own_keys) & set(row.ignored_keys)
