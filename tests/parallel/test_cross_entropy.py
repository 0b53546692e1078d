"""The chunked loss: against a plain formula in float64, and by the size of the largest tensor that it allocates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_mea.data.corpora import IGNORE_INDEX
from megatron_mea.model import decoder
from megatron_mea.parallel import cross_entropy
from megatron_mea.parallel.cross_entropy import SINGLE_CHUNK_BYTES, chunk_size, linear_cross_entropy_sum
from megatron_mea.parallel.grid import NO_TP, TensorGroup


def random_inputs(*, tokens: int, hidden: int, vocabulary: int, seed: int, ignored: float = 0.3):
    """Hidden states (tokens, hidden), weight (vocabulary, hidden) and targets with a share of `IGNORE_INDEX`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = IGNORE_INDEX
    return x, weight, targets


def reference_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The sum of the cross-entropies from all logits."""
    logits = x @ weight.t()
    chosen = logits[torch.arange(len(x)), targets.clamp(min=0)]
    return ((logits.exp().sum(-1).log() - chosen) * (targets != IGNORE_INDEX)).sum()


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
    """For any chunk size, also where no token of a chunk has a target. A second backward pass is refused, not wrong."""
    x, weight, targets = random_inputs(tokens=tokens, hidden=hidden, vocabulary=vocabulary, seed=seed, ignored=ignored)
    x.requires_grad_(), weight.requires_grad_()
    expected_gradients = torch.autograd.grad(reference_loss(x, weight, targets) * scale, (x, weight))
    loss = linear_cross_entropy_sum(x, weight, targets, offset=0, tp=NO_TP, chunk=chunk)

    assert loss.item() == pytest.approx(reference_loss(x, weight, targets).item(), rel=1e-12, abs=1e-12)

    gradients = torch.autograd.grad(loss * scale, (x, weight), retain_graph=True)
    for actual, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)

    with pytest.raises(RuntimeError, match="inplace"):
        torch.autograd.grad(loss * scale, (x, weight))


def test_a_frozen_weight_gets_no_gradient():
    x, weight, targets = random_inputs(tokens=20, hidden=4, vocabulary=9, seed=0)
    loss = linear_cross_entropy_sum(x.requires_grad_(), weight, targets, offset=0, tp=NO_TP, chunk=7)
    loss.backward()
    assert weight.grad is None


def test_a_validation_makes_no_gradients(monkeypatch):
    x, weight, targets = random_inputs(tokens=20, hidden=4, vocabulary=9, seed=0)
    x.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy_sum(x, weight, targets, offset=0, tp=NO_TP, chunk=7)
    monkeypatch.setattr(cross_entropy, "_add_product", None)
    with torch.no_grad():
        assert linear_cross_entropy_sum(x, weight, targets, offset=0, tp=NO_TP, chunk=7) == loss


@pytest.mark.parametrize("vocabulary", [65537, 64])
def test_ranks_agree_on_the_chunks(monkeypatch, vocabulary):
    """Also where the last rank has fewer rows than the others: ranks with other chunks would hang in collectives."""
    calls = []

    def record(tokens: int, columns: int) -> int:
        calls.append((tokens, columns))
        return tokens

    monkeypatch.setattr(decoder, "chunk_size", record)
    monkeypatch.setattr(decoder, "cross_entropy_sum", lambda *_, **__: None)

    for rank in range(8):
        tp = TensorGroup(size=8, rank=rank, group=None)
        weight = torch.nn.Parameter(torch.zeros(-(-vocabulary // 8), 2))
        head = decoder.LMHead(config=decoder.Model(vocab_size=vocabulary, hidden_size=2), weight=weight, tp=tp)
        head(torch.zeros(1, 5, 2), torch.zeros(1, 5, dtype=torch.long))

    assert calls == [(5, -(-vocabulary // 8))] * 8


def test_large_logits_stay_finite():
    x, weight, targets = random_inputs(tokens=20, hidden=4, vocabulary=9, seed=0)
    loss = linear_cross_entropy_sum(1e4 * x, weight, targets, offset=0, tp=NO_TP, chunk=7)
    expected = torch.nn.functional.cross_entropy(
        1e4 * x @ weight.t(), targets, ignore_index=IGNORE_INDEX, reduction="sum"
    )
    torch.testing.assert_close(loss, expected)


def test_half_precision_is_no_worse_than_in_one_chunk():
    x, weight, targets = random_inputs(tokens=256, hidden=32, vocabulary=500, seed=1)
    errors = []
    exact = torch.autograd.grad(reference_loss(x.requires_grad_(), weight.requires_grad_(), targets), (x, weight))

    for chunk in (256, 32):
        half = [tensor.detach().bfloat16().requires_grad_() for tensor in (x, weight)]
        if chunk == 256:
            logits = torch.nn.functional.linear(*half).float()
            loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
        else:
            loss = linear_cross_entropy_sum(half[0], half[1], targets, offset=0, tp=NO_TP, chunk=chunk)
            assert loss.dtype == torch.float32

        gradients = torch.autograd.grad(loss, half)
        assert [gradient.dtype for gradient in gradients] == [torch.bfloat16] * 2

        errors.append([(a.double() - b).norm() / b.norm() for a, b in zip(gradients, exact, strict=True)])

    for unchunked, chunked in zip(*errors, strict=True):
        assert chunked < 1.1 * unchunked


class LargestTensor(TorchDispatchMode):
    """Records the number of float32 elements in the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *(tensor.untyped_storage().nbytes() // 4 for tensor in tensors)])
        return result


def test_a_model_with_many_logits_never_has_them_all(monkeypatch):
    """Through the decoder's loss, which chooses to chunk: the largest tensor is then one chunk of logits."""
    head = decoder.LMHead(decoder.Model(vocab_size=8192, hidden_size=8), torch.nn.Parameter(torch.randn(8192, 8)))
    x = torch.randn(4, 1024, 8, requires_grad=True)
    targets = torch.randint(0, 8192, (4, 1024))
    assert SINGLE_CHUNK_BYTES < 4 * 4096 * 8192

    with LargestTensor() as largest:
        loss = head(x, targets)
        loss.backward()

    assert largest.elements == chunk_size(4096, 8192) * 8192 == 512 * 8192

    gradients = x.grad, head.weight.grad
    x.grad = head.weight.grad = None
    monkeypatch.setattr(decoder, "chunk_size", lambda tokens, columns: tokens)
    with LargestTensor() as largest:
        expected_loss = head(x, targets)
        expected_loss.backward()

    assert largest.elements == 4096 * 8192
    torch.testing.assert_close(loss, expected_loss)

    for actual, expected in zip(gradients, (x.grad, head.weight.grad), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


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
