"""Decoding from the cache of component heads: absorbed, composed and without a cache are one model, in every mode."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from models import SMALL, name_of
from test_huggingface import exported, left_padded
from transformers import DynamicCache, QuantizedCache, StaticCache

from megatron_mea.huggingface import modeling_mea
from megatron_mea.huggingface.modeling_mea import CACHE, absorbing_is_cheaper

MIXED = {"attention_variant": "mea", "num_component_heads": [1, 2, 3]}
CASES = [
    case | {"qk_norm": norm}
    for case in (
        MIXED,
        {"attention_variant": "mea_no_norm", "num_component_heads": 4, "attention_bias": True},
        {"attention_variant": "mea", "hlc_mixes": "keys"},
        {"attention_variant": "mea_no_norm", "hlc_mixes": "values"},
        {"attention_variant": "plain"},
        {"attention_variant": "differential"},
        {"attention_variant": "talking_heads"},
    )
    for norm in (False, True)
]
PATHS = {"absorbed": True, "composed": False}
CHUNKS = (12, 1, 1, 4, 2, 3)


@pytest.fixture(params=["absorbed", "composed"])
def path(request, monkeypatch) -> str:
    """Each way of attending to a cache, whatever the rule would choose."""
    monkeypatch.setattr(modeling_mea, "absorbing_is_cheaper", lambda *_: PATHS[request.param])
    return request.param


def in_chunks(hf, cache, ids, mask=None, positions=None, chunks=CHUNKS, step=None):
    """The logits of `ids`, given to a cache piece by piece; a mask covers the whole of a static cache."""
    logits, seen = [], 0
    for count in chunks:
        now, given = slice(seen, seen + count), {}
        if mask is not None:
            until = mask[:, : seen + count]
            if isinstance(cache, StaticCache):
                until = torch.nn.functional.pad(until, (0, cache.get_max_length() - seen - count))
            given = {"attention_mask": until, "position_ids": positions[:, now]}
        forward = step if step is not None and count == 1 else hf
        logits.append(forward(ids[:, now].clone(), cache=cache, use_cache=True, **given).logits)
        seen += count
    return torch.cat(logits, 1)


def caches(hf) -> list:
    return [DynamicCache(config=hf.config), StaticCache(config=hf.config, max_cache_len=40)]


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_both_paths_equal_no_cache(path, case):
    """Prompt, steps and chunks; eager and sdpa; dynamic and static cache; left padding, none, and an additive mask."""
    for attention in ("sdpa", "eager"):
        _, _, hf = exported(case, attention)
        ids, mask, positions = left_padded(37)
        padded = hf(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        whole = hf(ids, use_cache=False).logits
        for cache in caches(hf):
            found = in_chunks(hf, cache, ids, mask, positions)
            torch.testing.assert_close(found[mask.bool()], padded[mask.bool()], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(in_chunks(hf, caches(hf)[attention == "eager"], ids), whole, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("boolean", [False, True])
def test_a_mask_of_four_dimensions_is_taken_as_it_is(path, qk_norm, heads, boolean):
    """Additive or boolean, one for all heads or one a head, as packed sequences and tree attention give them."""
    _, _, hf = exported(MIXED | {"qk_norm": qk_norm})
    ids, length = left_padded(37)[0], 23
    seen = torch.rand(3, heads, length, length, generator=torch.Generator().manual_seed(1)) < 0.6
    seen = (seen | torch.eye(length, dtype=torch.bool)).tril()
    mask = seen if boolean else torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e30)
    expected = hf(ids, attention_mask=mask, use_cache=False).logits
    cache, found, start = DynamicCache(config=hf.config), [], 0
    for count in CHUNKS:
        end = start + count
        found.append(
            hf(ids[:, start:end], attention_mask=mask[:, :, start:end, :end], cache=cache, use_cache=True).logits
        )
        start = end
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 8])
def test_one_row_of_a_mask_for_all_queries(path, heads):
    _, _, hf = exported(MIXED)
    ids = left_padded(37)[0]
    mask = (torch.arange(23) < torch.arange(2, 2 + heads)[:, None, None])[None]
    expected = hf(ids, attention_mask=mask, use_cache=False).logits
    cache, parts = DynamicCache(config=hf.config), ((0, 12), (12, 13), (13, 23))
    found = [hf(ids[:, start:end], attention_mask=mask[..., :end], cache=cache).logits for start, end in parts]
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
def test_attentions_of_absorbed_steps(path, qk_norm):
    _, _, hf = exported(MIXED | {"qk_norm": qk_norm}, "eager")
    ids, mask, positions = left_padded(37)
    expected = hf(ids, attention_mask=mask, position_ids=positions, output_attentions=True).attentions
    cache = DynamicCache(config=hf.config)
    hf(ids[:, :20], attention_mask=mask[:, :20], position_ids=positions[:, :20], cache=cache)
    last = hf(ids[:, 20:], attention_mask=mask, position_ids=positions[:, 20:], cache=cache, output_attentions=True)
    for found, layer in zip(last.attentions, expected, strict=True):
        torch.testing.assert_close(found, layer[:, :, 20:], rtol=1e-9, atol=1e-9)


MODES = {
    "beam": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 10, "temperature": 1.3},
    "chunked-prefill": {"prefill_chunk_size": 4},
    "static": {"cache_implementation": "static"},
    "static-chunked-prefill": {"cache_implementation": "static", "prefill_chunk_size": 4},
    "prompt-lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {"assistant_model": True},
}


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_generate_gives_what_it_gives_without_a_cache(path, mode):
    for qk_norm in (False, True):
        _, _, hf = exported(MIXED | {"qk_norm": qk_norm})
        ids, mask, _ = left_padded(37)
        settings = {"max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
        if mode in ("prompt-lookup", "assisted"):  # transformers has them for one row only
            ids = ids[:1, :8].repeat(1, 2)
            mask = torch.ones_like(ids)
        given = dict(MODES[mode])
        plain = {k: v for k, v in given.items() if k in ("num_beams", "num_return_sequences", "top_k", "temperature")}
        plain["do_sample"] = given.get("do_sample", False)
        if mode == "assisted":
            given["assistant_model"] = exported({"attention_variant": "mea", "num_component_heads": 2})[2]
        torch.manual_seed(0)
        expected = hf.generate(ids, attention_mask=mask, use_cache=False, **settings | plain)
        torch.manual_seed(0)
        found = hf.generate(ids, attention_mask=mask, **settings | given)
        assert torch.equal(found, expected)


@torch.no_grad()
def test_generation_goes_on_from_a_cache(path):
    for qk_norm in (False, True):
        _, _, hf = exported(MIXED | {"qk_norm": qk_norm})
        ids = left_padded(37)[0][:1]
        settings = {"pad_token_id": 0, "eos_token_id": None, "do_sample": False, "return_dict_in_generate": True}
        first = hf.generate(ids, max_new_tokens=5, **settings)
        longer = torch.cat([first.sequences, ids[:, :4]], 1)
        expected = hf.generate(longer, max_new_tokens=6, use_cache=False, **settings).sequences
        found = hf.generate(longer, max_new_tokens=6, **{CACHE: first[CACHE]}, **settings).sequences
        assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize(("qk_norm", "dtype"), product([False, True], [torch.float32, torch.bfloat16]))
def test_a_step_copies_nothing_of_the_cache(monkeypatch, qk_norm, dtype):
    """What is attended to lies in the cache's own memory: keys, values and scalars."""
    monkeypatch.setattr(modeling_mea, "absorbing_is_cheaper", lambda *_: True)
    _, _, hf = exported(MIXED | {"qk_norm": qk_norm}, dtype=dtype)
    name = "eager_attention_forward" if qk_norm else "packed_attention_forward"
    attend, seen = getattr(modeling_mea, name), []

    def spy(module, query, key, value, *args, **kwargs):
        seen.append((key, value, kwargs.get("key_scale")))
        return attend(module, query, key, value, *args, **kwargs)

    monkeypatch.setattr(modeling_mea, name, spy)
    cache = DynamicCache(config=hf.config)
    hf(left_padded(37)[0], cache=cache)
    seen.clear()
    hf(torch.ones(3, 1, dtype=torch.long), cache=cache)
    assert len(seen) == 3
    for layer, (key, value, key_scale) in zip(cache.layers, seen, strict=True):
        assert key.data_ptr() == layer.keys.data_ptr()
        assert value.data_ptr() == layer.values.data_ptr()
        assert key.shape[-1] == value.shape[-1] == layer.values.shape[-1]
        if qk_norm:
            assert key_scale.untyped_storage().data_ptr() == layer.keys.untyped_storage().data_ptr()


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
    found = in_chunks(hf, cache, ids, mask, positions, chunks=(12,) + (1,) * 11, step=step)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-9, atol=1e-9)
    assert len(graphs) == 1


@pytest.mark.parametrize("qk_norm", [False, True])
def test_gradients_through_a_cache(path, qk_norm):
    _, _, hf = exported(MIXED | {"qk_norm": qk_norm})
    ids = left_padded(37)[0]
    grads = []
    for cached in (False, True):
        hf.zero_grad()
        logits = in_chunks(hf, DynamicCache(config=hf.config), ids) if cached else hf(ids, use_cache=False).logits
        logits.pow(2).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in hf.parameters()]))
    assert (grads[0] - grads[1]).abs().max() <= 1e-9 * grads[0].abs().max()


def test_a_16_bit_cache_drops_no_gradient_silently():
    """A model in training has a cache unless told otherwise; without a past it must not matter."""
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
    """They hold component heads as they hold any; the exact scalars of qk_norm they would destroy."""
    ids = left_padded(37)[0]
    _, _, hf = exported(MIXED, dtype=torch.float32)
    try:
        cache = QuantizedCache("fp8", hf.config)
    except (ValueError, TypeError):
        pytest.skip("this transformers has no float8 cache")
    expected = hf(ids, use_cache=False).logits
    assert (in_chunks(hf, cache, ids) - expected).norm() < 0.2 * expected.norm()
    _, _, hf = exported(MIXED | {"qk_norm": True}, dtype=torch.float32)
    with pytest.raises(ValueError, match="allowed: caches that do not quantise"):
        hf(ids, cache=QuantizedCache("fp8", hf.config))


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
def test_flash_attention_is_given_one_wide_head(monkeypatch, qk_norm):
    """FlashAttention does not run here; a stand-in with its shapes shows what it would be given, and the result."""
    _, _, hf = exported(MIXED | {"qk_norm": qk_norm})
    ids, shapes = left_padded(37)[0], []
    expected = hf(ids, use_cache=False).logits

    def flash(module, query, key, value, attention_mask, dropout, scaling, **kwargs):
        shapes.append((tuple(query.shape), tuple(key.shape)))
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, visible, scale=scaling)
        return output.transpose(1, 2), None

    cache = DynamicCache(config=hf.config)
    interface = modeling_mea.ALL_ATTENTION_FUNCTIONS
    monkeypatch.setattr(type(interface), "get_interface", lambda *_: flash)
    monkeypatch.setattr(hf.config, "_attn_implementation_internal", "flash_attention_2")
    monkeypatch.setattr(modeling_mea, "create_causal_mask", lambda **_: None)
    monkeypatch.setattr(modeling_mea, "absorbing_is_cheaper", lambda *_: True)
    found = in_chunks(hf, cache, ids, chunks=(12, *[1] * 11))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    width = SMALL["head_dim"]
    composed = ((3, 8, 1, width), (3, 4, 23, width))
    assert shapes[-1] == (composed if qk_norm else ((3, 8, 1, 3 * width), (3, 1, 23, 3 * width)))
    monkeypatch.setattr(modeling_mea, "WIDEST_KERNEL_HEAD", 2 * width)
    in_chunks(hf, DynamicCache(config=hf.config), ids, chunks=(12, *[1] * 11))
    assert shapes[-1] == composed


@pytest.mark.parametrize("variant", ["differential", "talking_heads"])
def test_what_a_kernel_cannot_compute_is_refused(variant, monkeypatch):
    """vLLM's layers cache what a call brings, and would keep half of a differential pair's values."""
    _, _, hf = exported({"attention_variant": variant})
    monkeypatch.setattr(type(modeling_mea.ALL_ATTENTION_FUNCTIONS), "get_interface", lambda *_: None)
    monkeypatch.setattr(hf.config, "_attn_implementation_internal", "vllm")
    with pytest.raises(ValueError, match="attn_implementation is 'vllm'"):
        hf(torch.ones(1, 4, dtype=torch.long))


def test_the_rule_by_shapes_alone():
    """One token absorbs at every usual shape and length, a prompt never; a GPU, where products are cheap, more."""
    for heads, composites, components in product((8, 16, 32), (4, 8), (1, 2, 4)):
        sizes = (4096, heads, composites, components, 64)
        assert absorbing_is_cheaper(1, *sizes, on_cpu=True)
        for tokens in range(2, 100):
            if absorbing_is_cheaper(tokens, *sizes, on_cpu=True):
                assert absorbing_is_cheaper(tokens - 1, *sizes, on_cpu=True)
                assert absorbing_is_cheaper(tokens, *sizes, on_cpu=False)
    assert not absorbing_is_cheaper(4, 4096, 32, 8, 4, 64, on_cpu=True)
    assert absorbing_is_cheaper(4, 4096, 32, 8, 4, 64, on_cpu=False)
    assert not absorbing_is_cheaper(512, 4096, 32, 8, 4, 64, on_cpu=False)
    assert not absorbing_is_cheaper(1, 16, 32, 8, 4, 64, on_cpu=True)
    assert absorbing_is_cheaper(1, 16, 32, 8, 4, 64, on_cpu=False)


@torch.no_grad()
def test_nothing_changes_where_the_rule_changes_its_mind(monkeypatch):
    """A short context is composed, a long one absorbed, in one generation."""
    _, _, hf = exported(MIXED | {"qk_norm": True})
    ids, chosen = left_padded(37)[0], []

    def rule(tokens, context, *_):
        chosen.append(context >= 3 * 18)
        return chosen[-1]

    monkeypatch.setattr(modeling_mea, "absorbing_is_cheaper", rule)
    found = in_chunks(hf, DynamicCache(config=hf.config), ids)
    torch.testing.assert_close(found, hf(ids, use_cache=False).logits, rtol=1e-9, atol=1e-9)
    assert set(chosen) == {True, False}


def test_weights_that_are_offloaded_to_a_disk(tmp_path, path):
    """Each module's weights are in place during its own forward only; absorbing needs the combination's."""
    pytest.importorskip("accelerate", reason="accelerate is not installed (the extra `eval`)")
    _, _, hf = exported(MIXED | {"qk_norm": True})
    hf.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "lm_head"), "cpu")
    offloaded = modeling_mea.MEAForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map=places | {"model.layers.1": "disk", "model.layers.2": "disk"},
        offload_folder=tmp_path / "offload",
        dtype=torch.float64,
    )
    assert offloaded.model.layers[1].self_attn.hlc_k.weight.device.type == "meta"
    ids = left_padded(37)[0]
    with torch.no_grad():
        found = in_chunks(offloaded, DynamicCache(config=hf.config), ids)
        torch.testing.assert_close(found, hf(ids, use_cache=False).logits, rtol=1e-9, atol=1e-9)
