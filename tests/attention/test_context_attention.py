"""Attention of a context rank's queries to the keys of all tokens, rank by rank in one process."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mea.attention.causal import causal_attention
from megatron_mea.attention.document_mask import _flex_attention, attention_function, visible_tokens_mask
from megatron_mea.parallel.grid import ContextGroup


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
