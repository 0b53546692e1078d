"""The modeling file that travels with an export: against the trainer, the reference and transformers' own models."""

from __future__ import annotations

import pytest
import torch
from models import SMALL, decoder_and_tensors, name_of, small_model, variants
from reference import reference_logits
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, StaticCache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_mea.huggingface.configuration_mea import MEAConfig
from megatron_mea.huggingface.convert import to_hf_config
from megatron_mea.huggingface.modeling_mea import CACHE, MEAForCausalLM
from megatron_mea.huggingface.rotary_mea import rotary_cos_sin


def exported(case: dict, attention: str = "sdpa", dtype=torch.float64):
    """The export of a model with random parameters, beside the reference's tensors."""
    model = small_model(**case)
    _, tensors = decoder_and_tensors(model)
    hf = MEAForCausalLM(to_hf_config(model, attn_implementation=attention, pad_token_id=0)).to(dtype).eval()
    missing, unexpected = hf.load_state_dict({n: t.detach().to(dtype) for n, t in tensors.items()}, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if model.tie_word_embeddings else [])
    hf.tie_weights()
    return model, tensors, hf


def left_padded(vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, attention mask, positions) of three rows of 23 with 0, 5 and 11 places of padding on the left."""
    ids = torch.randint(1, vocab, (3, 23), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :5] = mask[2, :11] = 0
    ids[mask == 0] = 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
@pytest.mark.parametrize("case", variants(), ids=name_of)
def test_logits_equal_the_reference(case):
    """In float64 to rounding: norms, softmax and rotary angles are computed in float64."""
    model, tensors, hf = exported(case)
    ids = torch.randint(0, model.vocab_size, (2, 50), generator=torch.Generator().manual_seed(5))
    expected = reference_logits(tensors, model.model_dump(), ids)
    for attention in ("sdpa", "eager"):
        hf.set_attn_implementation(attention)
        torch.testing.assert_close(hf(ids).logits, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", variants(), ids=name_of)
def test_cache_changes_nothing(case, attention):
    """Prefill, single steps and a chunk of four, left padding, dynamic and static cache: equal to no cache."""
    model, _, hf = exported(case, attention)
    ids, mask, positions = left_padded(model.vocab_size)
    expected = hf(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    alone = hf(ids[2:, 11:], use_cache=False).logits
    torch.testing.assert_close(expected[2:, 11:], alone, rtol=1e-10, atol=1e-10)
    for cache in (DynamicCache(config=hf.config), StaticCache(config=hf.config, max_cache_len=40)):
        logits, seen = [], 0
        for count in (12, 1, 1, 4, 1, 1, 1, 1, 1):
            until = mask[:, : seen + count]
            if isinstance(cache, StaticCache):
                until = torch.cat([until, until.new_zeros(3, 40 - seen - count)], dim=1)
            now = slice(seen, seen + count)
            output = hf(ids[:, now], attention_mask=until, position_ids=positions[:, now], cache=cache, use_cache=True)
            logits.append(output.logits)
            seen += count
        real = mask.bool()
        torch.testing.assert_close(torch.cat(logits, 1)[real], expected[real], rtol=1e-10, atol=1e-10)


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


@torch.no_grad()
@pytest.mark.parametrize("case", [case for case in variants() if case["attention_variant"].startswith("mea")][::2])
def test_generate(case):
    """Greedy with cache, without, and row by row give the same; so do two samplings from one seed."""
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
    """Llama's, with q/k norm Qwen3's; their norms and angles are float32, so equal to 1e-6."""
    case = {"attention_variant": "mea_no_norm", "qk_norm": qk_norm, "tie_word_embeddings": tied}
    model, tensors, hf = exported(case)
    kind, config = (Qwen3ForCausalLM, Qwen3Config) if qk_norm else (LlamaForCausalLM, LlamaConfig)
    sizes = {key: value for key, value in SMALL.items() if key != "initializer_range"}
    stock = kind(
        config(
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
    expected, found = stock.eval()(ids).logits, hf(ids).logits
    assert (found - expected).norm() <= 1e-6 * expected.norm()


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
    kind = config.rope_parameters["rope_type"]
    for length in (0, 200):
        cos, sin = rotary_cos_sin(config, torch.arange(max(length, 2))[None], torch.float64)
        found, scale = torch.atan2(sin, cos)[0, 1, :16], cos[0, 0, 0].item()
        if kind == "default":
            expected, expected_scale = 1e4 ** (-torch.arange(0, 32, 2).double() / 32), 1.0
        else:
            expected, expected_scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length or None)
        torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=0)
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
    "given",
    [
        {"attention_variant": "talking_heads", "num_component_heads": 2},
        {"attention_variant": "mea", "hlc_mixes": "keys", "num_component_heads": 2},
        {"attention_variant": "differential", "num_attention_heads": 3, "num_key_value_heads": 1},
    ],
)
def test_a_configuration_made_by_hand_that_no_variant_computes(given):
    with pytest.raises(ValueError, match=r"allowed where|needs pairs"):
        MEAConfig(**given)
