"""Attention of a context rank's queries to the keys of all tokens, rank by rank in one process."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import SMALL

from megatron_mea.attention.causal import causal_attention
from megatron_mea.attention.document_mask import _flex_attention, attention_function, visible_tokens_mask
from megatron_mea.config.layout import check_layout
from megatron_mea.config.load import parse_config
from megatron_mea.model.decoder import Decoder
from megatron_mea.parallel.grid import ContextGroup
from megatron_mea.plan.workload import Workload


def random_heads(queries: int, keys: int, *, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Query (2, 6, queries, 8), key and value (2, 3, keys, 8)."""
    generator = torch.Generator().manual_seed(keys)
    shapes = ((2, 6, queries, 8), (2, 3, keys, 8), (2, 3, keys, 8))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, visible: torch.Tensor
) -> torch.Tensor:
    """A softmax over explicit scores, in float64."""
    query, key, value = (x.double() for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value


def outputs_and_gradients(attend, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    output = attend(*inputs)
    return [output, *torch.autograd.grad(output.double().pow(3).sum(), inputs)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=str
)
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 7), (40, 41), (33, 200)])
def test_the_last_queries_see_all_tokens_before_them(queries, keys, dtype, tolerance):
    """`is_causal` alone would align the first query with the first key."""
    inputs = random_heads(queries, keys, dtype=dtype)
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    actual = outputs_and_gradients(causal_attention, inputs)
    expected = outputs_and_gradients(lambda q, k, v: dense_attention(q, k, v, visible=visible), inputs)
    for result, reference in zip(actual, expected, strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), reference.double(), rtol=tolerance, atol=tolerance)


def test_very_different_scores_merge():
    """Keys of one part that hold all weight, or none."""
    query, key, value = random_heads(3, 9)
    for scale in (-300.0, 300.0):
        with torch.no_grad():
            key[:, :, :4] = scale * query[:, ::2].mean(2, keepdim=True)
        inputs = [query, key, value]
        visible = torch.ones(3, 9, dtype=torch.bool).tril(6)
        actual = outputs_and_gradients(causal_attention, inputs)
        expected = outputs_and_gradients(lambda q, k, v, seen=visible: dense_attention(q, k, v, visible=seen), inputs)
        for result, reference in zip(actual, expected, strict=True):
            torch.testing.assert_close(result, reference, rtol=1e-10, atol=1e-10)


@st.composite
def windows(draw) -> tuple[torch.Tensor, int]:
    """Position ids of two rows of random documents, the first of which may have begun earlier, and a context size."""
    size, chunk = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    seq = 2 * size * chunk
    rows = []
    for _ in range(2):
        starts = draw(st.sets(st.integers(1, seq - 1))) if seq > 1 else set()
        row = torch.arange(seq) + draw(st.integers(0, 3))
        for start in sorted(starts):
            row[start:] = torch.arange(seq - start)
        rows.append(row)

    return torch.stack(rows), size


@settings(max_examples=60, deadline=None)
@given(windows(), st.booleans())
def test_every_rank_sees_what_its_tokens_may_see(window, document_mask):
    position_ids, size = window
    seq = position_ids.shape[1]
    document = (position_ids == 0).cumsum(1)
    same = document[:, None, :, None] == document[:, None, None, :]
    visible = torch.ones(seq, seq, dtype=torch.bool).tril() & (same | (not document_mask))
    _, key, value = random_heads(seq, seq)
    query = random_heads(seq, seq)[0]
    full = outputs_and_gradients(lambda q, k, v: dense_attention(q, k, v, visible=visible), [query, key, value])

    key_gradient = torch.zeros_like(key)
    for rank in range(size):
        cp = ContextGroup(size=size, rank=rank)
        own = cp.shard(query, dim=2).detach().requires_grad_()
        attend = attention_function(position_ids, document_mask=document_mask, cp=cp)
        output, d_query, d_key, _ = outputs_and_gradients(attend, [own, key, value])
        torch.testing.assert_close(output, cp.shard(full[0], dim=2), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(d_query, cp.shard(full[1], dim=2), rtol=1e-10, atol=1e-10)
        key_gradient += d_key
        mask = visible_tokens_mask(position_ids, document_mask=document_mask, cp=cp)
        assert torch.equal(mask.expand(2, 1, seq // size, seq), cp.shard(visible.expand(2, 1, seq, seq), dim=2))

    torch.testing.assert_close(key_gradient, full[2], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("document_mask", [True, False], ids=["documents", "causal"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_flex_attention_of_a_rank_equals_what_a_cpu_calls(size, document_mask):
    """FlexAttention's forward pass runs on a CPU too, uncompiled; no chunk is a multiple of its blocks."""
    seq = 12 * 26
    position_ids = torch.arange(seq).expand(2, seq).clone()
    for start in (7, 60, 61, 200):
        position_ids[1, start:] = torch.arange(seq - start)

    query, key, value = (x.detach().repeat(1, 1, 1, 2) for x in random_heads(seq, seq, dtype=torch.float32))
    for rank in range(size):
        cp = ContextGroup(size=size, rank=rank)
        inputs = (cp.shard(query, dim=2), key, value)
        with torch.no_grad():
            actual = _flex_attention(position_ids, document_mask=document_mask, cp=cp, compiled=False)(*inputs)
            expected = attention_function(position_ids, document_mask=document_mask, cp=cp)(*inputs)

        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 6), st.integers(1, 5))
def test_the_chunks_of_all_ranks_are_the_sequence(size, chunk):
    seq = 2 * size * chunk
    groups = [ContextGroup(size=size, rank=rank) for rank in range(size)]
    tokens = [torch.cat([torch.arange(seq)[part] for part in cp.chunks(seq)]) for cp in groups]
    assert sorted(torch.cat(tokens).tolist()) == list(range(seq))
    # Every rank sees as many pairs of a query and an earlier key.
    assert len({int((own + 1).sum()) for own in tokens}) == 1
    for cp, own in zip(groups, tokens, strict=True):
        assert torch.equal(cp.shard(torch.arange(seq).unsqueeze(0), dim=1), own.unsqueeze(0))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_latent_numbers_are_gathered_where_no_parameter_is_partitioned(stage):
    """An `hlc_v` of 410 x 1,024 is larger than what ZeRO 3 leaves full; `hlc_k` and combinations of heads are not."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_key_value_heads": 8, "head_dim": 128}
    latent = {"hlc_form": "latent", "key_latent_dim": 410, "value_latent_dim": 410}
    for changes, large in ((latent, True), ({"num_component_heads": 4}, False)):
        config = parse_config(
            {
                "model": SMALL | sizes | {"attention_variant": "mea"} | changes,
                "parallel": {"context_parallel_size": 2, "zero_stage": stage},
                "data": {"tokenizer": "none", "train": [], "seq_length": 32},
                "run": {"dir": "none"},
            },
            needs_data=False,
        )
        dims = check_layout(config, 2)
        with torch.device("meta"):
            decoder = Decoder(config.model, cp=ContextGroup(size=2), fold_outside=dims.folds_outside)

        attention = decoder.blocks[0].self_attn
        gathers = [attention.key_projection.gathers_components, attention.value_projection.gathers_components]
        assert gathers == [True, not (large and stage == 3)]
        # plan counts what is gathered, also of a teacher, which is not partitioned.
        for trains in (True, False):
            workload = Workload(config=config, dims=dims, trains=trains)
            expected = [True, True] if not trains else gathers
            assert [workload.kv_projection(0, side).form == "components" for side in ("k", "v")] == expected
