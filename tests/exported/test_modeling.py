"""The modeling files that travel with an export: against the reference and transformers' models."""

from __future__ import annotations

import pytest
import torch
from support.hf_models import exported, left_padded
from support.models import SMALL, decoder_and_tensors, expert_cases, name_of, small_model, variants
from support.reference import reference_logits
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, StaticCache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_mea.exported.attention_mea import CACHE
from megatron_mea.exported.configuration_mea import MEAConfig
from megatron_mea.exported.modeling_mea import MEAForCausalLM
from megatron_mea.exported.rotary_mea import rotary_cos_sin
from megatron_mea.huggingface.hf_config import to_hf_config


@torch.no_grad()
@pytest.mark.parametrize("case", [*variants(), *expert_cases()], ids=name_of)
def test_logits_equal_the_reference(case):
    """Up to rounding in float64, in which norms, softmax and rotary angles are computed."""
    model, tensors, hf = exported(case)
    ids = torch.randint(0, model.vocab_size, (2, 50), generator=torch.Generator().manual_seed(5))
    expected = reference_logits(tensors=tensors, config=model.model_dump(), input_ids=ids)
    for attention in ("sdpa", "eager"):
        hf.set_attn_implementation(attention)
        torch.testing.assert_close(hf(ids).logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", variants(), ids=name_of)
def test_cache_changes_nothing(case, attention):
    """Prefill, single steps and a chunk of four, left padding, dynamic and static cache: equal to no cache."""
    model, _, hf = exported(case, attention=attention)
    ids, mask, positions = left_padded(model.vocab_size)
    expected = hf(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    alone = hf(ids[2:, 11:], use_cache=False).logits

    torch.testing.assert_close(expected[2:, 11:], alone, rtol=1e-10, atol=1e-10)

    for cache in (DynamicCache(config=hf.config), StaticCache(config=hf.config, max_cache_len=40)):
        logits, start = [], 0
        for count in (12, 1, 1, 4, 1, 1, 1, 1, 1):
            end = start + count
            chunk_mask = mask[:, :end]
            if isinstance(cache, StaticCache):
                chunk_mask = torch.cat([chunk_mask, chunk_mask.new_zeros(3, 40 - end)], dim=1)

            output = hf(
                ids[:, start:end],
                attention_mask=chunk_mask,
                position_ids=positions[:, start:end],
                cache=cache,
                use_cache=True,
            )
            logits.append(output.logits)
            start = end

        is_real = mask.bool()
        torch.testing.assert_close(torch.cat(logits, 1)[is_real], expected[is_real], rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
def test_cache_holds_component_heads_only(qk_norm):
    _, _, hf = exported({"attention_variant": "mea", "num_component_heads": [1, 2, 3], "qk_norm": qk_norm})
    cache = getattr(hf(torch.ones(2, 9, dtype=torch.long), use_cache=True), CACHE)
    for layer, components in zip(cache.layers, [1, 2, 3], strict=True):
        scalars = SMALL["num_key_value_heads"] if qk_norm else 0
        assert layer.keys.numel() == 2 * 9 * (components * SMALL["head_dim"] + scalars)
        assert layer.values.numel() == 2 * 9 * components * SMALL["head_dim"]


@torch.no_grad()
def test_cached_scalars_keep_float32_precision_in_bfloat16():
    case = {"attention_variant": "mea", "num_component_heads": 2, "qk_norm": True}
    _, _, hf = exported(case, dtype=torch.bfloat16)
    cache = getattr(hf(torch.ones(1, 9, dtype=torch.long), use_cache=True), CACHE)
    packed = cache.layers[0].keys[..., 2 * SMALL["head_dim"] :]

    assert packed.dtype == torch.bfloat16

    scalars = packed.contiguous().view(torch.float32)
    assert scalars.shape == (1, 1, 9, 4)
    assert not torch.equal(scalars, scalars.bfloat16().float())


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("case", [case for case in variants() if case["attention_variant"].startswith("mea")][::2])
def test_generate(case):
    """Greedy with a cache equals greedy without and row by row; sampling from one seed is equal with and without."""
    _, _, hf = exported(case)
    ids, mask, _ = left_padded(37)
    settings = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    batched = hf.generate(ids, attention_mask=mask, do_sample=False, **settings)
    uncached = hf.generate(ids, attention_mask=mask, do_sample=False, use_cache=False, **settings)

    assert torch.equal(batched, uncached)

    for row, start in enumerate((0, 5, 11)):
        alone = hf.generate(ids[row : row + 1, start:], do_sample=False, **settings)
        assert torch.equal(alone[0], batched[row, start:])

    samples = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        sampled = hf.generate(ids, attention_mask=mask, do_sample=True, use_cache=use_cache, **settings)
        samples.append(sampled)

    assert torch.equal(*samples)
    assert not torch.equal(samples[0], batched)


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_identity_combination_without_norm_is_a_stock_model(qk_norm, tied):
    """Equal to Llama, or Qwen3 with q/k norm, to 1e-6, since their norms and angles are float32."""
    case = {"attention_variant": "mea_no_norm", "qk_norm": qk_norm, "tie_word_embeddings": tied}
    model, tensors, hf = exported(case)
    model_class, config_class = (Qwen3ForCausalLM, Qwen3Config) if qk_norm else (LlamaForCausalLM, LlamaConfig)
    sizes = {key: value for key, value in SMALL.items() if key != "initializer_range"}
    stock = model_class(
        config_class(
            **sizes,
            rms_norm_eps=model.rms_norm_eps,
            rope_parameters=model.rope_parameters,
            tie_word_embeddings=tied,
        )
    ).double()

    for name, tensor in tensors.items():
        if "hlc" in name:
            hf.get_parameter(name).copy_(torch.eye(4))
        else:
            stock.get_parameter(name).copy_(tensor)

    ids = torch.randint(0, model.vocab_size, (2, 40), generator=torch.Generator().manual_seed(5))
    expected, actual = stock.eval()(ids).logits, hf(ids).logits
    assert (actual - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 4},
        {"rope_type": "dynamic", "factor": 4},
        {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 16},
        {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "truncate": False, "mscale": 0.7},
        {"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 16, "mscale": 1, "mscale_all_dim": 0.5},
        {"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 16, "attention_factor": 1.5},
        {
            "rope_type": "llama3",
            "factor": 8,
            "low_freq_factor": 1,
            "high_freq_factor": 4,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=str,
)
def test_rotary_scalings_are_those_of_transformers(scaling):
    model = small_model(head_dim=32, rope_theta=1e4, rope_scaling=scaling)
    config = to_hf_config(model)
    rope_type = config.rope_parameters["rope_type"]

    for length in (0, 200):
        cos, sin = rotary_cos_sin(config=config, position_ids=torch.arange(max(length, 2))[None], dtype=torch.float64)
        actual, scale = torch.atan2(sin, cos)[0, 1, :16], cos[0, 0, 0].item()
        if rope_type == "default":
            expected, expected_scale = 1e4 ** (-torch.arange(0, 32, 2).double() / 32), 1.0
        else:
            expected, expected_scale = ROPE_INIT_FUNCTIONS[rope_type](
                config, torch.device("cpu"), seq_len=length or None
            )

        torch.testing.assert_close(actual, expected.double(), rtol=1e-6, atol=0)
        assert scale == pytest.approx(expected_scale, rel=1e-12)


@torch.no_grad()
def test_a_scaled_model_equals_llama_beyond_its_context():
    scaling = {"rope_type": "dynamic", "factor": 2}
    model = small_model(attention_variant="plain", rope_scaling=scaling, max_position_embeddings=16)
    _, tensors = decoder_and_tensors(model)
    hf = MEAForCausalLM(to_hf_config(model)).double().eval()
    sizes = {k: v for k, v in SMALL.items() if k != "initializer_range"} | {"max_position_embeddings": 16}
    stock = LlamaForCausalLM(LlamaConfig(**sizes, rms_norm_eps=1e-5, rope_parameters=model.rope_parameters)).double()
    for name, tensor in tensors.items():
        hf.get_parameter(name).copy_(tensor)
        stock.get_parameter(name).copy_(tensor)

    ids = torch.randint(0, model.vocab_size, (1, 40), generator=torch.Generator().manual_seed(5))
    expected = stock.eval()(ids).logits
    assert (hf(ids).logits - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(
    "settings",
    [
        {"attention_variant": "talking_heads", "num_component_heads": 2},
        {"attention_variant": "mea", "hlc_mixes": "keys", "num_component_heads": 2},
        {"attention_variant": "differential", "num_attention_heads": 3, "num_key_value_heads": 1},
    ],
)
def test_a_configuration_that_no_variant_computes_is_refused(settings):
    with pytest.raises(ValueError, match=r"expected where|multiples of 2"):
        MEAConfig(**settings)


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_experts_are_what_vllm_takes_for_its_own_kernel(norm_topk_prob):
    """By the rules of its matcher: a child `experts` of 3-D parameters, a `gate` with nothing but its weight.

    It traces the router, and wants a linear map, a softmax and the top k in a row.
    """
    model = small_model(**expert_cases()[0] | {"norm_topk_prob": norm_topk_prob})
    with torch.device("meta"):
        mlp = MEAForCausalLM(to_hf_config(model)).model.layers[0].mlp

    assert {name for name, _ in mlp.named_children()} == {"experts", "gate"}
    assert all(parameter.dim() == 3 for parameter in mlp.experts.parameters())
    assert list(mlp.gate.state_dict()) == ["weight"]
    assert not list(mlp.named_buffers())

    nodes = list(torch.fx.symbolic_trace(mlp.gate).graph.nodes)
    calls = [node.target.__name__ for node in nodes if node.op == "call_function"]
    order = [calls.index(name) for name in ("linear", "softmax", "topk")]
    assert order == sorted(order)
    assert ("truediv" in calls) == norm_topk_prob
