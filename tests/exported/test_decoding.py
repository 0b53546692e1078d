"""Decoding from the cache of component heads: absorbed and composed equal the model without a cache, in every mode."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from support.hf_models import exported, left_padded
from support.models import SMALL, name_of, small_model
from transformers import DynamicCache, QuantizedCache, StaticCache

from megatron_mea.exported import attention_mea, modeling_mea
from megatron_mea.exported.attention_mea import CACHE
from megatron_mea.plan.memory import cache_bytes_per_token

MIXED = {"attention_variant": "mea", "num_component_heads": [1, 2, 3]}
LATENT = {"hlc_form": "latent", "key_latent_dim": [12, 6, 14], "value_latent_dim": [4, 24, 11]}
COUNTS = [[4, 0, 2], [1, 1, 1], [3, 4, 0]]
CASES = [
    case | {"qk_norm": norm}
    for case in (
        MIXED,
        {"attention_variant": "mea_no_norm", "num_component_heads": 4, "attention_bias": True},
        {"attention_variant": "mea", "hlc_mixes": "keys"},
        {"attention_variant": "mea_no_norm", "hlc_mixes": "values"},
        {"attention_variant": "mea", **LATENT},
        {"attention_variant": "mea_no_norm", **LATENT, "key_frequencies": COUNTS, "attention_bias": True},
        {"attention_variant": "plain"},
        {"attention_variant": "differential"},
        {"attention_variant": "talking_heads"},
        {"attention_variant": "gated"},
        {"attention_variant": "gated", "gate_width": "head"},
    )
    for norm in (False, True)
]
PATHS = {"absorbed": True, "composed": False}
CHUNKS = (12, 1, 1, 4, 2, 3)


@pytest.fixture(params=["absorbed", "composed"])
def path(request, monkeypatch) -> str:
    """Forces either way of attending to a cache."""
    monkeypatch.setattr(attention_mea, "absorbing_is_cheaper", lambda **_: PATHS[request.param])
    return request.param


def chunked_logits(*, hf, cache, ids, mask=None, positions=None, chunks=CHUNKS, step=None):
    """Logits of `ids`, passed through a cache in chunks of these lengths.

    Args:
        mask: (batch, seq); padded to the length of a static cache.
        step: the forward function of single tokens; None for that of `hf`.
    """
    logits, start = [], 0
    for count in chunks:
        end, inputs = start + count, {}
        if mask is not None:
            chunk_mask = mask[:, :end]
            if isinstance(cache, StaticCache):
                chunk_mask = torch.nn.functional.pad(chunk_mask, (0, cache.get_max_length() - end))
            inputs = {"attention_mask": chunk_mask, "position_ids": positions[:, start:end]}

        forward = step if step is not None and count == 1 else hf
        logits.append(forward(ids[:, start:end].clone(), cache=cache, use_cache=True, **inputs).logits)
        start = end

    return torch.cat(logits, 1)


def caches(hf) -> list:
    return [DynamicCache(config=hf.config), StaticCache(config=hf.config, max_cache_len=40)]


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_plan_counts_the_bytes_of_a_token_in_the_cache(case):
    _, _, hf = exported(case)
    hf.to(torch.bfloat16)
    cache = DynamicCache(config=hf.config)
    hf(torch.zeros(1, 5, dtype=torch.long), cache=cache, use_cache=True)
    stored = sum(side.nbytes for layer in cache.layers for side in (layer.keys, layer.values))
    assert stored == 5 * cache_bytes_per_token(small_model(**case))


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_both_paths_equal_no_cache(path, case):
    """Prompt, steps and chunks; eager and sdpa; dynamic and static cache; left padding, none, and an additive mask."""
    for attention in ("sdpa", "eager"):
        _, _, hf = exported(case, attention=attention)
        ids, mask, positions = left_padded(37)
        expected_padded = hf(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        expected = hf(ids, use_cache=False).logits
        for cache in caches(hf):
            actual = chunked_logits(hf=hf, cache=cache, ids=ids, mask=mask, positions=positions)
            torch.testing.assert_close(actual[mask.bool()], expected_padded[mask.bool()], rtol=1e-9, atol=1e-9)

        actual = chunked_logits(hf=hf, cache=caches(hf)[attention == "eager"], ids=ids)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("boolean", [False, True])
def test_a_mask_of_four_dimensions_is_used_unchanged(path, qk_norm, heads, boolean):
    """Additive or boolean, for all heads or each head, as packed sequences and tree attention pass them."""
    _, _, hf = exported(MIXED | {"qk_norm": qk_norm})
    ids, length = left_padded(37)[0], 23
    visible = torch.rand(3, heads, length, length, generator=torch.Generator().manual_seed(1)) < 0.6
    visible = (visible | torch.eye(length, dtype=torch.bool)).tril()
    mask = visible if boolean else torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -1e30)
    expected = hf(ids, attention_mask=mask, use_cache=False).logits
    cache, logits, start = DynamicCache(config=hf.config), [], 0
    for count in CHUNKS:
        end = start + count
        chunk_mask = mask[:, :, start:end, :end]
        logits.append(hf(ids[:, start:end], attention_mask=chunk_mask, cache=cache, use_cache=True).logits)
        start = end

    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 8])
def test_one_row_of_a_mask_for_all_queries(path, heads):
    _, _, hf = exported(MIXED)
    ids = left_padded(37)[0]
    mask = (torch.arange(23) < torch.arange(2, 2 + heads)[:, None, None])[None]
    expected = hf(ids, attention_mask=mask, use_cache=False).logits
    cache, chunks = DynamicCache(config=hf.config), ((0, 12), (12, 13), (13, 23))
    logits = [hf(ids[:, start:end], attention_mask=mask[..., :end], cache=cache).logits for start, end in chunks]

    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
def test_attentions_of_absorbed_steps(path, qk_norm):
    _, _, hf = exported(MIXED | {"qk_norm": qk_norm}, attention="eager")
    ids, mask, positions = left_padded(37)
    expected = hf(ids, attention_mask=mask, position_ids=positions, output_attentions=True).attentions
    cache = DynamicCache(config=hf.config)
    hf(ids[:, :20], attention_mask=mask[:, :20], position_ids=positions[:, :20], cache=cache)
    last = hf(ids[:, 20:], attention_mask=mask, position_ids=positions[:, 20:], cache=cache, output_attentions=True)
    for actual, layer in zip(last.attentions, expected, strict=True):
        torch.testing.assert_close(actual, layer[:, :, 20:], rtol=1e-9, atol=1e-9)


MODES = {
    "beam": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 10, "temperature": 1.3},
    "chunked-prefill": {"prefill_chunk_size": 4},
    "static": {"cache_implementation": "static"},
    "static-chunked-prefill": {"cache_implementation": "static", "prefill_chunk_size": 4},
    "prompt-lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {"assistant_model": True},
}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_generate_equals_generate_without_a_cache(path, mode):
    for qk_norm in (False, True):
        _, _, hf = exported(MIXED | {"qk_norm": qk_norm})
        ids, mask, _ = left_padded(37)
        settings = {"max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
        if mode in ("prompt-lookup", "assisted"):
            # transformers supports these for a batch of one only.
            ids = ids[:1, :8].repeat(1, 2)
            mask = torch.ones_like(ids)

        mode_settings = dict(MODES[mode])
        cacheless_keys = ("num_beams", "num_return_sequences", "top_k", "temperature")
        cacheless_settings = {key: value for key, value in mode_settings.items() if key in cacheless_keys}
        cacheless_settings["do_sample"] = mode_settings.get("do_sample", False)
        if mode == "assisted":
            mode_settings["assistant_model"] = exported({"attention_variant": "mea", "num_component_heads": 2})[2]

        torch.manual_seed(0)
        expected = hf.generate(ids, attention_mask=mask, use_cache=False, **settings | cacheless_settings)
        torch.manual_seed(0)
        actual = hf.generate(ids, attention_mask=mask, **settings | mode_settings)
        assert torch.equal(actual, expected)


@torch.no_grad()
def test_generation_continues_from_a_cache(path):
    for qk_norm in (False, True):
        _, _, hf = exported(MIXED | {"qk_norm": qk_norm})
        ids = left_padded(37)[0][:1]
        settings = {"pad_token_id": 0, "eos_token_id": None, "do_sample": False, "return_dict_in_generate": True}
        first = hf.generate(ids, max_new_tokens=5, **settings)
        longer = torch.cat([first.sequences, ids[:, :4]], 1)
        expected = hf.generate(longer, max_new_tokens=6, use_cache=False, **settings).sequences
        actual = hf.generate(longer, max_new_tokens=6, **{CACHE: first[CACHE]}, **settings).sequences
        assert torch.equal(actual, expected)


@torch.no_grad()
@pytest.mark.parametrize(("qk_norm", "dtype"), product([False, True], [torch.float32, torch.bfloat16]))
def test_a_step_does_not_copy_the_cache(monkeypatch, qk_norm, dtype):
    """The keys, values and scalars that attention reads are views of the cache."""
    monkeypatch.setattr(attention_mea, "absorbing_is_cheaper", lambda **_: True)
    _, _, hf = exported(MIXED | {"qk_norm": qk_norm}, dtype=dtype)
    name = "eager_attention_forward" if qk_norm else "packed_attention_forward"
    attend, calls = getattr(attention_mea, name), []

    def spy(module, query, key, value, *args, **kwargs):
        calls.append((key, value, kwargs.get("key_scale")))
        return attend(module, query, key, value, *args, **kwargs)

    monkeypatch.setattr(attention_mea, name, spy)
    cache = DynamicCache(config=hf.config)
    hf(left_padded(37)[0], cache=cache)
    calls.clear()
    hf(torch.ones(3, 1, dtype=torch.long), cache=cache)

    assert len(calls) == 3

    for layer, (key, value, key_scale) in zip(cache.layers, calls, strict=True):
        assert key.data_ptr() == layer.keys.data_ptr()
        assert value.data_ptr() == layer.values.data_ptr()
        assert key.shape[-1] == value.shape[-1] == layer.values.shape[-1]

        if qk_norm:
            assert key_scale.untyped_storage().data_ptr() == layer.keys.untyped_storage().data_ptr()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_compiled_step_is_one_graph_and_compiled_once(path, qk_norm):
    """Dynamic angles too, though they depend on the values of the positions."""
    rope = {"rope_type": "dynamic", "factor": 2} if qk_norm else None
    case = {"attention_variant": "mea", "num_component_heads": [1, 2], "num_hidden_layers": 2, "rope_scaling": rope}
    _, _, hf = exported(case | {"qk_norm": qk_norm})
    ids, mask, positions = left_padded(37)
    expected = hf(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(hf.forward, backend=count)
    cache = StaticCache(config=hf.config, max_cache_len=40)
    actual = chunked_logits(
        hf=hf, cache=cache, ids=ids, mask=mask, positions=positions, chunks=(12,) + (1,) * 11, step=step
    )

    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-9, atol=1e-9)
    assert len(graphs) == 1


@pytest.mark.parametrize("qk_norm", [False, True])
def test_gradients_through_a_cache(path, qk_norm):
    _, _, hf = exported(MIXED | {"qk_norm": qk_norm})
    ids = left_padded(37)[0]
    grads = []
    for is_cached in (False, True):
        hf.zero_grad()
        if is_cached:
            logits = chunked_logits(hf=hf, cache=DynamicCache(config=hf.config), ids=ids)
        else:
            logits = hf(ids, use_cache=False).logits

        logits.pow(2).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in hf.parameters()]))

    assert (grads[0] - grads[1]).abs().max() <= 1e-9 * grads[0].abs().max()


def test_a_16_bit_cache_drops_no_gradient_silently():
    """A model in training has a cache by default, which must change nothing before it holds tokens."""
    _, _, hf = exported(MIXED | {"qk_norm": True}, dtype=torch.bfloat16)
    hf.train()
    ids, grads = left_padded(37)[0], []
    for use_cache in (False, True):
        hf.zero_grad()
        hf(ids, use_cache=use_cache).logits.float().pow(2).sum().backward()
        grads.append([p.grad for p in hf.parameters()])

    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))

    cache = getattr(hf(ids, use_cache=True), CACHE)

    with pytest.raises(ValueError, match="use_cache=False"):
        hf(ids[:, :1], cache=cache)


@torch.no_grad()
def test_quantised_caches():
    """They cache component heads; with qk_norm they are refused, since they would round its exact scalars."""
    ids = left_padded(37)[0]
    _, _, hf = exported(MIXED, dtype=torch.float32)
    try:
        cache = QuantizedCache("fp8", hf.config)
    except (ValueError, TypeError):
        pytest.skip("this transformers has no float8 cache")

    expected = hf(ids, use_cache=False).logits
    assert (chunked_logits(hf=hf, cache=cache, ids=ids) - expected).norm() < 0.2 * expected.norm()

    _, _, hf = exported(MIXED | {"qk_norm": True}, dtype=torch.float32)

    with pytest.raises(ValueError, match="expected: caches that do not quantise"):
        hf(ids, cache=QuantizedCache("fp8", hf.config))


@torch.no_grad()
@pytest.mark.parametrize("form", [MIXED, {"attention_variant": "mea", **LATENT}], ids=["head", "latent"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_flash_attention_gets_one_wide_head(monkeypatch, form, qk_norm):
    """FlashAttention does not run on a CPU; a stand-in records the shapes that it would get, of one width."""
    _, _, hf = exported(form | {"qk_norm": qk_norm})
    ids, shapes = left_padded(37)[0], []
    expected = hf(ids, use_cache=False).logits

    def flash(module, query, key, value, attention_mask, dropout, scaling, **kwargs):
        assert query.shape[-1] == key.shape[-1] == value.shape[-1]
        shapes.append((tuple(query.shape), tuple(key.shape)))
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, visible, scale=scaling)
        return output.transpose(1, 2), None

    cache = DynamicCache(config=hf.config)
    interface = attention_mea.ALL_ATTENTION_FUNCTIONS
    monkeypatch.setattr(type(interface), "get_interface", lambda *_: flash)
    monkeypatch.setattr(hf.config, "_attn_implementation_internal", "flash_attention_2")
    monkeypatch.setattr(modeling_mea, "create_causal_mask", lambda **_: None)
    monkeypatch.setattr(attention_mea, "absorbing_is_cheaper", lambda **_: True)
    actual = chunked_logits(hf=hf, cache=cache, ids=ids, chunks=(12, *[1] * 11))

    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)

    width = SMALL["head_dim"]
    # Of the last layer, whose 14 latent numbers of keys are more than the 11 of values, and than their mean.
    cached = 14 if form.get("hlc_form") else 3 * width
    composed = ((3, 8, 1, width), (3, 4, 23, width))
    assert shapes[-1] == (composed if qk_norm else ((3, 8, 1, cached), (3, 1, 23, cached)))

    monkeypatch.setattr(attention_mea, "MAX_KERNEL_HEAD_DIM", cached - 1)
    chunked_logits(hf=hf, cache=DynamicCache(config=hf.config), ids=ids, chunks=(12, *[1] * 11))
    assert shapes[-1] == composed


@pytest.mark.parametrize("variant", ["differential", "talking_heads"])
def test_variants_that_vllm_attention_cannot_compute_are_refused(variant, monkeypatch):
    """vLLM's attention caches the values of each call, which are half of a differential pair's."""
    _, _, hf = exported({"attention_variant": variant})
    monkeypatch.setattr(type(attention_mea.ALL_ATTENTION_FUNCTIONS), "get_interface", lambda *_: None)
    monkeypatch.setattr(hf.config, "_attn_implementation_internal", "vllm")

    with pytest.raises(ValueError, match="attn_implementation is 'vllm'"):
        hf(torch.ones(1, 4, dtype=torch.long))


@torch.no_grad()
def test_generation_may_switch_from_composed_to_absorbed(monkeypatch):
    """A short context is composed, a long one absorbed, in one generation."""
    _, _, hf = exported(MIXED | {"qk_norm": True})
    ids, decisions = left_padded(37)[0], []

    def absorb_long_contexts(*, tokens, context, **_):
        decisions.append(context >= 3 * 18)
        return decisions[-1]

    monkeypatch.setattr(attention_mea, "absorbing_is_cheaper", absorb_long_contexts)
    actual = chunked_logits(hf=hf, cache=DynamicCache(config=hf.config), ids=ids)
    torch.testing.assert_close(actual, hf(ids, use_cache=False).logits, rtol=1e-9, atol=1e-9)
    assert set(decisions) == {True, False}


def test_weights_offloaded_to_disk(tmp_path, path):
    """Offloaded weights are loaded only during their module's forward, also those of the combination when absorbing."""
    pytest.importorskip("accelerate", reason="accelerate is not installed (the extra `eval`)")
    _, _, hf = exported(MIXED | {"qk_norm": True})
    hf.save_pretrained(tmp_path / "model")
    device_map = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "lm_head"), "cpu")
    offloaded = modeling_mea.MEAForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map=device_map | {"model.layers.1": "disk", "model.layers.2": "disk"},
        offload_folder=tmp_path / "offload",
        dtype=torch.float64,
    )

    assert offloaded.model.layers[1].self_attn.hlc_k.weight.device.type == "meta"

    ids = left_padded(37)[0]
    with torch.no_grad():
        actual = chunked_logits(hf=offloaded, cache=DynamicCache(config=hf.config), ids=ids)
        torch.testing.assert_close(actual, hf(ids, use_cache=False).logits, rtol=1e-9, atol=1e-9)
