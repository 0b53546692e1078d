"""The training model against support/reference.py, a float64 reference written from the paper, not from this code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import decoder_and_tensors, name_of, positions_of, small_model, tokens, variants
from support.reference import reference_logits, reference_loss

from megatron_mea.attention.hlc import (
    HLC_INITS,
    HeadProjection,
    KeyValueProjection,
    combine_heads,
    fold_weight,
    folding_is_cheaper,
)
from megatron_mea.model.decoder import Decoder
from megatron_mea.parallel.layers import IGNORE_INDEX
from megatron_mea.parallel.parameter import init_parameters, parameters_by_name


@pytest.mark.parametrize("case", variants(), ids=name_of)
def test_loss_and_gradients_equal_the_reference(case):
    model = small_model(**case)
    decoder, tensors = decoder_and_tensors(model)
    ids = tokens(model.vocab_size, 2, 18)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    loss = decoder(inputs, positions_of(inputs), targets)
    loss.backward()
    mean_loss = reference_loss(tensors=tensors, config=model.model_dump(), input_ids=inputs, targets=targets)
    expected = mean_loss * targets.numel()
    expected.backward()

    assert abs(loss.item() - expected.item()) <= 1e-12 * abs(expected.item())

    # Relative to the norm of all gradients: where a norm follows, that of a scale is (almost) zero.
    total_norm = torch.stack([tensor.grad.norm() for tensor in tensors.values()]).norm()
    for name, parameter in parameters_by_name(decoder).items():
        assert (parameter.grad - tensors[name].grad).norm() <= 1e-12 * total_norm, name


LONG = {"max_position_embeddings": 16}
ROPES = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4, "beta_fast": 0.5, "beta_slow": 0.1},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "mscale": 0.7, "mscale_all_dim": 1.3},
    {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 8,
        "attention_factor": 1.4,
        "truncate": False,
    },
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("variant", ["mea", "differential", "talking_heads"])
def test_scaled_rotary_angles_equal_the_reference(rope, variant):
    """On a sequence beyond the trained context, with a base low enough for planes on both sides of every edge."""
    model = small_model(attention_variant=variant, rope_scaling=rope, rope_theta=20.0, head_dim=12, **LONG)
    decoder, tensors = decoder_and_tensors(model)
    ids = tokens(model.vocab_size, 2, 24)
    expected = reference_logits(tensors=tensors, config=model.model_dump(exclude_none=True), input_ids=ids)
    actual = decoder.logits(decoder.forward_hidden(ids, positions_of(ids)))

    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", [case for case in variants() if small_model(**case).has_hlc], ids=name_of)
def test_both_forms_of_the_combination_are_equal(case, monkeypatch):
    model = small_model(**case)
    ids = tokens(model.vocab_size, 2, 17)
    results = []
    for form in ("combined", "folded"):
        monkeypatch.setattr(
            KeyValueProjection, "form", lambda self, tokens, form=form: "plain" if self.hlc is None else form
        )
        decoder, _ = decoder_and_tensors(model)
        loss = decoder(ids, positions_of(ids), ids)
        loss.backward()
        results.append((loss, {n: p.grad for n, p in parameters_by_name(decoder).items()}))

    (combined, combined_gradients), (folded, folded_gradients) = results
    assert abs(combined - folded) <= 1e-12 * abs(combined)

    total_norm = torch.stack([gradient.norm() for gradient in combined_gradients.values()]).norm()
    for name, gradient in combined_gradients.items():
        assert (gradient - folded_gradients[name]).norm() <= 1e-12 * total_norm, name


@settings(deadline=None, max_examples=50)
@given(
    components=st.integers(1, 5),
    composites=st.integers(1, 6),
    dim=st.integers(1, 7),
    batch=st.integers(1, 3),
    seq=st.integers(1, 6),
    hidden=st.integers(1, 9),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_combination_and_fold_equal_the_formula(components, composites, dim, batch, seq, hidden, bias, seed):
    """Eq. 10 as printed, and eq. 18: combining activations equals folding the projection."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, matrix = random(batch, seq, hidden), random(components, composites)
    weight, offset = random(components * dim, hidden), random(components * dim) if bias else None
    heads = torch.nn.functional.linear(x, weight, offset).view(batch, seq, components, dim)
    expected = torch.einsum("b n c d, c h -> b h n d", heads, matrix)

    torch.testing.assert_close(combine_heads(heads, matrix), expected, rtol=1e-12, atol=1e-12)

    projection = HeadProjection(
        layer="m",
        side="k",
        hidden_size=hidden,
        num_components=components,
        num_composites=composites,
        head_dim=dim,
        std=1.0,
        bias=bias,
        hlc="normal",
    ).double()
    projection.weight.data, projection.hlc.data = weight, matrix
    if bias:
        projection.bias.data = offset

    for form in (projection.form(batch * seq), "combined", "folded"):
        projection.form = lambda tokens, form=form: form
        torch.testing.assert_close(projection(x), expected, rtol=1e-11, atol=1e-11)

    torch.testing.assert_close(projection(x, projection.fold()), expected, rtol=1e-11, atol=1e-11)


def test_fold_rounds_once():
    """In bfloat16 the folded weight is the exact one rounded, not a sum of rounded terms."""
    generator = torch.Generator().manual_seed(0)
    weight, matrix = (torch.randn(shape, generator=generator).bfloat16() for shape in ((12 * 4, 16), (12, 6)))
    exact = torch.einsum("c f, c h -> h f", weight.double().view(12, -1), matrix.double()).reshape(24, 16)
    error = (fold_weight(weight, matrix).double() - exact).abs()

    assert fold_weight(weight, matrix).dtype == torch.bfloat16
    assert (error <= exact.abs() * 2**-8).all()


def test_the_cheaper_form_is_chosen():
    def is_cheaper(*, tokens: int, components: int, size: int) -> bool:
        return folding_is_cheaper(
            tokens=tokens, hidden_size=2048, num_components=components, num_composites=8, tensor_parallel_size=size
        )

    assert is_cheaper(tokens=2049, components=8, size=1)
    assert not is_cheaper(tokens=2047, components=8, size=1)
    assert not is_cheaper(tokens=10**6, components=4, size=1)
    assert is_cheaper(tokens=2049, components=4, size=2)
    assert not is_cheaper(tokens=2047, components=4, size=2)


def test_logits_are_causal_and_ignored_targets_do_not_count():
    model = small_model(attention_variant="mea", num_component_heads=2)
    decoder, tensors = decoder_and_tensors(model)
    ids = tokens(model.vocab_size, 2, 12)
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % model.vocab_size
    logits, changed_logits = (
        decoder.logits(decoder.forward_hidden(batch, positions_of(batch))) for batch in (ids, changed)
    )

    assert torch.equal(logits[:, :7], changed_logits[:, :7])
    assert not torch.allclose(logits[:, 7:], changed_logits[:, 7:])

    expected = reference_logits(tensors=tensors, config=model.model_dump(), input_ids=ids)
    torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-11)

    targets = ids.clone()
    targets[0, 3] = targets[1, 5] = IGNORE_INDEX
    is_counted = targets != IGNORE_INDEX
    nll = -logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]

    torch.testing.assert_close(decoder(ids, positions_of(ids), targets), nll[is_counted].sum())


@pytest.mark.slow
@pytest.mark.parametrize("case", variants(), ids=name_of)
def test_activation_checkpointing_changes_nothing(case):
    """Nor does folding inside or outside of the checkpoint."""
    model = small_model(**case)
    # 2 x 17 tokens fold where h' = h, 2 x 12 do not.
    for length in (12, 17):
        ids = tokens(model.vocab_size, 2, length)
        gradients = []
        for activation_checkpointing, fold_outside in (
            ("none", True),
            ("none", False),
            ("full", True),
            ("full", False),
            ("selective", True),
        ):
            decoder = Decoder(
                config=model, activation_checkpointing=activation_checkpointing, fold_outside=fold_outside
            ).double()
            decoder.load_state_dict(decoder_and_tensors(model)[0].state_dict())
            decoder(ids, positions_of(ids), ids).backward()
            gradients.append({name: p.grad for name, p in parameters_by_name(decoder).items()})

        expected = gradients[0]
        for actual in gradients[1:]:
            for name, gradient in expected.items():
                assert torch.equal(actual[name], gradient), name


class TestInitialization:
    def test_depends_on_seed_and_name_alone(self):
        deep, shallow = Decoder(small_model()), Decoder(small_model(num_hidden_layers=1))
        init_parameters(deep, 1)
        init_parameters(shallow, 1)
        name = "model.layers.0.self_attn.q_proj.weight"
        name_in_layer_1 = name.replace("layers.0", "layers.1")

        assert torch.equal(parameters_by_name(deep)[name], parameters_by_name(shallow)[name])
        assert not torch.equal(parameters_by_name(deep)[name], parameters_by_name(deep)[name_in_layer_1])

        init_parameters(shallow, 2)
        assert not torch.equal(parameters_by_name(deep)[name], parameters_by_name(shallow)[name])

    def test_sizes_are_as_configured(self):
        model = small_model(
            hidden_size=256, head_dim=32, intermediate_size=512, initializer_range=0.02, embedding_initializer_range=0.5
        )
        decoder = Decoder(model)
        init_parameters(decoder, 0)
        parameters = parameters_by_name(decoder)
        output = 0.02 / (2 * model.num_hidden_layers) ** 0.5

        for name, std in {
            "model.embed_tokens.weight": 0.5,
            "lm_head.weight": 0.02,
            "model.layers.1.self_attn.q_proj.weight": 0.02,
            "model.layers.1.self_attn.o_proj.weight": output,
            "model.layers.1.mlp.gate_proj.weight": 0.02,
            "model.layers.1.mlp.down_proj.weight": output,
        }.items():
            assert parameters[name].std().item() == pytest.approx(std, rel=0.05), name

        assert (parameters["model.layers.0.input_layernorm.weight"] == 1).all()

    def test_head_norm_gain(self):
        decoder = Decoder(small_model(head_norm_init=0.2))
        init_parameters(decoder, 0)
        assert torch.allclose(
            parameters_by_name(decoder)["model.layers.2.self_attn.head_norm.weight"], torch.tensor(0.2)
        )

    @settings(deadline=None)
    @given(components=st.integers(1, 8), extra=st.integers(0, 8))
    def test_block_init(self, components, extra):
        composites = components + extra
        weight = HLC_INITS["block"]((components, composites), torch.Generator())
        assert torch.equal(weight.sum(0), torch.ones(composites))
        assert [int(column.argmax()) for column in weight.T] == [
            j * components // composites for j in range(composites)
        ]

        if not extra:
            assert torch.equal(weight, torch.eye(components))

    def test_random_inits(self):
        generator = torch.Generator().manual_seed(0)
        weight = HLC_INITS["orthogonal"]((3, 6), generator)
        torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(3), rtol=0, atol=1e-5)

        weight = HLC_INITS["normal"]((64, 128), generator)
        assert weight.std().item() == pytest.approx(1 / 8, rel=0.05)
