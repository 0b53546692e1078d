"""The loss in chunks of tokens: against logits written out in float64, and by counting what it allocates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_mea.data.corpora import IGNORE
from megatron_mea.model import decoder
from megatron_mea.parallel import cross_entropy
from megatron_mea.parallel.cross_entropy import LARGE, chunk_size, linear_cross_entropy_sum
from megatron_mea.parallel.grid import ALONE, TensorGroup


def problem(tokens: int, hidden: int, vocabulary: int, seed: int, ignored: float = 0.3):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=random, dtype=torch.float64)
    weight = torch.randn(vocabulary, hidden, generator=random, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (tokens,), generator=random)
    targets[torch.rand(tokens, generator=random) < ignored] = IGNORE
    return x, weight, targets


def written_out(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = x @ weight.t()
    chosen = logits[torch.arange(len(x)), targets.clamp(min=0)]
    return ((logits.exp().sum(-1).log() - chosen) * (targets != IGNORE)).sum()


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 40),
    hidden=st.integers(1, 8),
    vocabulary=st.integers(1, 30),
    chunk=st.integers(1, 45),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    scale=st.floats(-3, 3),
    seed=st.integers(0, 2**31),
)
def test_loss_and_gradients_are_those_of_the_logits(tokens, hidden, vocabulary, chunk, ignored, scale, seed):
    """Whatever the chunk, also where whole chunks have no target. A second backward pass is refused, not wrong."""
    x, weight, targets = problem(tokens, hidden, vocabulary, seed, ignored)
    x.requires_grad_(), weight.requires_grad_()
    expected = torch.autograd.grad(written_out(x, weight, targets) * scale, (x, weight))
    loss = linear_cross_entropy_sum(x, weight, targets, 0, ALONE, chunk)
    assert loss.item() == pytest.approx(written_out(x, weight, targets).item(), rel=1e-12, abs=1e-12)
    found = torch.autograd.grad(loss * scale, (x, weight), retain_graph=True)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="inplace"):
        torch.autograd.grad(loss * scale, (x, weight))


def test_what_is_frozen_gets_no_gradient():
    x, weight, targets = problem(20, 4, 9, 0)
    loss = linear_cross_entropy_sum(x.requires_grad_(), weight, targets, 0, ALONE, 7)
    loss.backward()
    assert weight.grad is None


def test_a_validation_makes_no_gradients(monkeypatch):
    x, weight, targets = problem(20, 4, 9, 0)
    x.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy_sum(x, weight, targets, 0, ALONE, 7)
    monkeypatch.setattr(cross_entropy, "_add_product", None)
    with torch.no_grad():
        assert linear_cross_entropy_sum(x, weight, targets, 0, ALONE, 7) == loss


@pytest.mark.parametrize("vocabulary", [65537, 64])
def test_ranks_agree_on_the_chunks(monkeypatch, vocabulary):
    """Also where the last one has fewer rows than the others, which their collectives would not survive."""
    asked = []

    def record(tokens: int, columns: int) -> int:
        asked.append((tokens, columns))
        return tokens

    monkeypatch.setattr(decoder, "chunk_size", record)
    monkeypatch.setattr(decoder, "cross_entropy_sum", lambda *_: None)
    for rank in range(8):
        tp = TensorGroup(8, rank, None)
        weight = torch.nn.Parameter(torch.zeros(-(-vocabulary // 8), 2))
        head = decoder.Projection(decoder.Model(vocab_size=vocabulary, hidden_size=2), weight, tp)
        head(torch.zeros(1, 5, 2), torch.zeros(1, 5, dtype=torch.long))
    assert asked == [(5, -(-vocabulary // 8))] * 8


def test_large_logits_stay_finite():
    x, weight, targets = problem(20, 4, 9, 0)
    loss = linear_cross_entropy_sum(1e4 * x, weight, targets, 0, ALONE, 7)
    expected = torch.nn.functional.cross_entropy(1e4 * x @ weight.t(), targets, ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(loss, expected)


def test_half_precision_is_no_worse_than_in_one_piece():
    x, weight, targets = problem(256, 32, 500, 1)
    errors = []
    exact = torch.autograd.grad(written_out(x.requires_grad_(), weight.requires_grad_(), targets), (x, weight))
    for chunk in (256, 32):
        half = [each.detach().bfloat16().requires_grad_() for each in (x, weight)]
        if chunk == 256:
            logits = torch.nn.functional.linear(*half).float()
            loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        else:
            loss = linear_cross_entropy_sum(*half, targets, 0, ALONE, chunk)
            assert loss.dtype == torch.float32
        found = torch.autograd.grad(loss, half)
        assert [each.dtype for each in found] == [torch.bfloat16] * 2
        errors.append([(a.double() - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)])
    for whole, chunked in zip(*errors, strict=True):
        assert chunked < 1.1 * whole


class Largest(TorchDispatchMode):
    """The most numbers of a tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [each.untyped_storage().nbytes() for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        self.numbers = max([self.numbers, *(size // 4 for size in sizes)])
        return result


def test_a_model_with_many_logits_never_has_them_all(monkeypatch):
    """Through the decoder's own loss, whose rule chooses: in chunks the largest tensor is the matrix."""
    head = decoder.Projection(decoder.Model(vocab_size=8192, hidden_size=8), torch.nn.Parameter(torch.randn(8192, 8)))
    x = torch.randn(4, 1024, 8, requires_grad=True)
    targets = torch.randint(0, 8192, (4, 1024))
    assert LARGE < 4 * 4096 * 8192
    with Largest() as seen:
        loss = head(x, targets)
        loss.backward()
    assert seen.numbers == chunk_size(4096, 8192) * 8192 == 512 * 8192
    found = x.grad, head.weight.grad
    x.grad = head.weight.grad = None
    monkeypatch.setattr(decoder, "chunk_size", lambda tokens, columns: tokens)
    with Largest() as seen:
        whole = head(x, targets)
        whole.backward()
    assert seen.numbers == 4096 * 8192
    torch.testing.assert_close(loss, whole)
    for ours, theirs in zip(found, (x.grad, head.weight.grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "columns", "chunk"),
    [
        (2048, 2048, 2048),
        (8192, 2048, 8192),
        (8193, 2048, 1024),
        (8192, 128256, 1024),
        (256, 128256, 32),
        (100, 10**6, 32),
    ],
)
def test_the_size_of_a_chunk(tokens, columns, chunk):
    assert chunk_size(tokens, columns) == chunk
