"""The order of the samples: each window once an epoch, right shares at every step, and nothing else that matters."""

from __future__ import annotations

import hashlib
import tempfile
import tracemalloc
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_mea.config.schema import TrainCorpus
from megatron_mea.data.corpora import Corpora
from megatron_mea.data.indexed import IndexedWriter
from megatron_mea.data.order import PERIOD, Mixture, SampleOrder, permute
from megatron_mea.errors import UserError

WEIGHTS = st.lists(st.floats(1e-6, 1e6) | st.integers(1, 20), min_size=1, max_size=12)
KEYS = st.text(max_size=8)


@cache
def mixture(weights: tuple[float, ...]) -> Mixture:
    return Mixture(weights)


@given(st.integers(1, 3000), KEYS)
@settings(max_examples=150, deadline=None)
def test_permute_is_a_bijection(size: int, key: str) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size=size, key=key)), np.arange(size))


def test_permute_is_a_bijection_of_every_small_size() -> None:
    for size in range(1, 130):
        assert sorted(permute(np.arange(size), size=size, key="key").tolist()) == list(range(size))


@given(st.integers(1, 2**40), KEYS, st.data())
@settings(max_examples=100, deadline=None)
def test_permute_of_huge_sizes(size: int, key: str, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), unique=True, max_size=50))
    permuted = permute(np.asarray(positions, np.int64), size=size, key=key)
    assert len(set(permuted.tolist())) == len(positions)
    assert ((permuted >= 0) & (permuted < size)).all()
    # The target of a position does not depend on the other positions of the call.
    for position, target in zip(positions, permuted.tolist(), strict=True):
        assert permute(np.asarray([position]), size=size, key=key).tolist() == [target]


def reference_permute(*, position: int, size: int, key: str) -> int:
    """`permute` of one position in Python integers: Feistel rounds of splitmix64, and cycle walking."""
    bits = 64
    half = max(1, -(-(size - 1).bit_length() // 2))
    digest = hashlib.sha512(key.encode()).digest()

    while True:
        left, right = divmod(position, 1 << half)
        for turn in range(6):
            mixed = (right + int.from_bytes(digest[8 * turn : 8 * turn + 8], "little")) % 2**bits
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                mixed = (mixed ^ mixed >> shift) * factor % 2**bits
            mixed ^= mixed >> 31
            left, right = right, left ^ mixed % (1 << half)

        position = left << half | right
        if position < size:
            return position


@given(st.integers(1, 2**62), KEYS, st.data())
@settings(max_examples=100, deadline=None)
def test_permute_equals_its_reference(size: int, key: str, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), max_size=10))
    expected = [reference_permute(position=position, size=size, key=key) for position in positions]
    assert permute(np.asarray(positions, np.int64), size=size, key=key).tolist() == expected


def test_permute_looks_random() -> None:
    size = 100_003
    permuted = permute(np.arange(size), size=size, key="1234/0/0")
    assert abs(np.corrcoef(np.arange(size), permuted)[0, 1]) < 0.02

    counts = np.histogram2d(np.arange(size), permuted, bins=20)[0]
    expected = size / 400
    assert 0.7 < ((counts - expected) ** 2 / expected).sum() / 361 < 1.4
    assert (np.diff(permuted) == 1).sum() < 10


@pytest.mark.slow
@given(WEIGHTS)
@settings(max_examples=25, deadline=None)
def test_quotas_are_the_rounded_weights(weights: list[float]) -> None:
    quota = mixture(tuple(weights)).quota
    exact = np.asarray(weights, np.float64) / np.sum(weights) * PERIOD
    assert quota.sum() == PERIOD
    assert (quota >= 1).all()

    # A weight too small for one part gets one all the same, and the others pay for it.
    raised = np.maximum(1 - exact, 0).sum()
    assert (np.abs(quota - exact) <= 1 + raised + 1e-6).all()

    larger = np.asarray(weights)[:, None] > np.asarray(weights)
    assert (quota[:, None] >= quota)[larger].all()


@pytest.mark.parametrize(
    ("weights", "quota"),
    [
        ([1], [10_000]),
        ([1, 1, 1], [3334, 3333, 3333]),
        ([2, 1], [6667, 3333]),
        ([0.7, 0.2, 0.1], [7000, 2000, 1000]),
        ([0.29, 0.71], [2900, 7100]),
        ([1e9, 1], [9999, 1]),
    ],
)
def test_quotas_of_known_weights(weights: list[float], quota: list[int]) -> None:
    assert mixture(tuple(weights)).quota.tolist() == quota


def check_shares(weights: Sequence[float]) -> None:
    """In every prefix of two periods each corpus has its share to within one sample, numbered without a gap."""
    mix = mixture(tuple(weights))
    corpus, number = mix.locate(np.arange(2 * PERIOD))
    served = corpus[:, None] == np.arange(len(weights))
    count = np.cumsum(served, axis=0)
    due = np.arange(1, 2 * PERIOD + 1)[:, None] * mix.quota / PERIOD

    assert np.abs(count - due).max() < 1
    assert np.array_equal(number, count[np.arange(2 * PERIOD), corpus] - 1)


@pytest.mark.slow
@given(WEIGHTS)
@settings(max_examples=25, deadline=None)
def test_shares_are_right_at_every_step(weights: list[float]) -> None:
    check_shares(weights)


MANY = {"equal": [1] * 300, "rising": range(1, 61), "one large": [1000] + [1] * 50, "two large": [5, 5, 1, 1, 1, 1]}


@pytest.mark.parametrize("weights", MANY.values(), ids=MANY)
def test_shares_of_many_corpora(weights: Sequence[float]) -> None:
    check_shares(weights)


WINDOWS = st.lists(st.integers(1, 60), min_size=1, max_size=4)


@pytest.mark.slow
@given(WINDOWS, st.none() | st.integers(0, 2**32), st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_each_window_once_an_epoch_of_each_corpus(windows: list[int], seed: int | None, shape: int) -> None:
    weights = [[1, 1, 1, 1], [1, 2, 3, 4], [9, 1, 1, 5], [0.5, 0.25, 0.1, 3]][shape][: len(windows)]
    order = SampleOrder(windows=windows, weights=weights, seed=seed)
    corpus, window = order.locate(np.arange(3000))

    for index, size in enumerate(windows):
        windows_read = window[corpus == index]
        epochs = windows_read[: windows_read.size // size * size].reshape(-1, size)
        assert epochs.shape[0] > 0
        assert np.array_equal(np.sort(epochs, axis=1), np.broadcast_to(np.arange(size), epochs.shape))
        # The unfinished epoch at the end repeats nothing either.
        assert np.unique(windows_read[epochs.size :]).size == windows_read.size - epochs.size

        if seed is None:
            assert (epochs == np.arange(size)).all()
        elif size > 20:
            assert len({tuple(epoch) for epoch in epochs.tolist()}) == len(epochs)


def test_an_enumeration_of_the_first_epochs_agrees() -> None:
    """Sample by sample, with a counter for each corpus and a list of windows for each epoch."""
    windows, weights, seed = [5, 11, 2], [3.0, 2.0, 1.0], 7
    order = SampleOrder(windows=windows, weights=weights, seed=seed)
    counts, deal, expected = [0, 0, 0], order.mixture.locate(np.arange(200))[0].tolist(), []

    for corpus in deal:
        epoch, position = divmod(counts[corpus], windows[corpus])
        shuffled = [
            reference_permute(position=i, size=windows[corpus], key=f"{seed}/{corpus}/{epoch}")
            for i in range(windows[corpus])
        ]
        expected.append((corpus, shuffled[position]))
        counts[corpus] += 1

    corpus, window = order.locate(np.arange(200))
    assert list(zip(corpus.tolist(), window.tolist(), strict=True)) == expected

    # Any subset, in any order, gives the same.
    subset = np.random.default_rng(0).permutation(200)[:50]
    assert np.array_equal(order.locate(subset), (corpus[subset], window[subset]))


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[SampleOrder, list[int], int]:
    """(order, windows of each corpus, number of samples) of a few small corpora with any weights."""
    windows = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    weights = draw(st.lists(st.integers(1, 20) | st.floats(0.01, 50), min_size=len(windows), max_size=len(windows)))
    return (
        SampleOrder(windows=windows, weights=weights, seed=draw(st.integers(0, 2**32))),
        windows,
        draw(st.integers(1, 1500)),
    )


@pytest.mark.slow
@given(mixtures())
@settings(max_examples=25, deadline=None)
def test_epochs_of_small_corpora_agree_with_their_enumeration(drawn: tuple[SampleOrder, list[int], int]) -> None:
    """Each sample takes its window out of its corpus's set, which is refilled when it is empty."""
    order, windows, count = drawn
    bags: list[set[int]] = [set() for _ in windows]
    served = np.zeros(len(windows), np.int64)

    for number, (corpus, window) in enumerate(zip(*order.locate(np.arange(count)), strict=True), start=1):
        if not bags[corpus]:
            bags[corpus] = set(range(windows[corpus]))
        bags[corpus].remove(window)
        served[corpus] += 1
        assert (np.abs(served * PERIOD - number * order.mixture.quota) < PERIOD).all()


@pytest.mark.slow
@given(mixtures(), st.data())
@settings(max_examples=12, deadline=None)
def test_a_global_batch_does_not_depend_on_what_was_asked_before(
    drawn: tuple[SampleOrder, list[int], int], data: st.DataObject
) -> None:
    """Located in parts, as by any process from any step on in any micro-batches, samples are the same."""
    order, windows, count = drawn
    corpus, window = order.locate(np.arange(count))
    fresh = SampleOrder(windows=windows, weights=order.mixture.quota / PERIOD, seed=order.seed)
    samples = np.asarray(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=40)))

    for part in np.array_split(samples, data.draw(st.integers(1, 5))):
        assert np.array_equal(fresh.locate(part), (corpus[part], window[part]))


@pytest.mark.slow
@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=8), min_size=1, max_size=3), st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_an_epoch_packs_every_token_once(documents: list[list[int]], length: int) -> None:
    """Corpora of documents of drawn lengths, in which no token id comes twice."""
    sizes = [sum(lengths) for lengths in documents]
    assume(min(sizes) > length)

    with tempfile.TemporaryDirectory() as folder:
        for index, lengths in enumerate(documents):
            with IndexedWriter(Path(folder) / str(index), np.dtype("u2")) as writer:
                writer.add(1000 * index + np.arange(sum(lengths)), np.asarray(lengths))
                writer.commit()

        configured = [TrainCorpus(path=f"{folder}/{index}", weight=size) for index, size in enumerate(sizes)]
        corpora = Corpora(corpora=configured, seq_length=length, vocab_size=10_000, seed=7, key="data.train")

        for index, size in enumerate(sizes):
            windows = (size - 1) // length
            corpus, number = corpora.order.mixture.locate(np.arange(2 * PERIOD))

            for epoch in range(2):
                in_epoch = (corpus == index) & (number // windows == epoch)
                batch = corpora.batch(np.flatnonzero(in_epoch))
                used = 1000 * index + np.arange(windows * length)
                assert np.array_equal(np.sort(batch.input_ids, axis=None), used)
                assert np.array_equal(np.sort(batch.targets, axis=None), used + 1)

            # The tokens that no window takes are fewer than a window.
            assert 0 <= size - 1 - windows * length < length


def test_more_corpora_than_parts_are_refused() -> None:
    Mixture([1.0] * PERIOD)
    with pytest.raises(UserError, match=r"10,001 corpora"):
        Mixture([1.0] * (PERIOD + 1))


def test_the_order_is_what_it_was() -> None:
    # Runs that began with an earlier release resume exactly: a change here breaks them.
    corpus, window = SampleOrder(windows=[7, 13], weights=[1, 2], seed=1234).locate(np.arange(15))
    assert corpus.tolist() == [1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0]
    assert window.tolist() == [9, 10, 0, 6, 8, 1, 3, 12, 2, 1, 2, 3, 5, 11, 4]


def locate_samples(*, windows: Sequence[int], weights: Sequence[float], seed: int) -> list[list[int]]:
    return [part.tolist() for part in SampleOrder(windows=windows, weights=weights, seed=seed).locate(np.arange(400))]


def test_seed_position_and_weights_matter() -> None:
    base = locate_samples(windows=[50, 50], weights=[1, 1], seed=1)
    assert locate_samples(windows=[50, 50], weights=[1, 1], seed=1) == base
    assert locate_samples(windows=[50, 50], weights=[4, 4], seed=1) == base
    assert locate_samples(windows=[50, 50], weights=[1, 1], seed=2)[1] != base[1]
    assert locate_samples(windows=[50, 50], weights=[1, 2], seed=1) != base
    assert locate_samples(windows=[50, 51], weights=[1, 1], seed=1) != base

    # Two corpora of one size are not read in the same order.
    corpus, window = np.asarray(base)
    assert window[corpus == 0].tolist() != window[corpus == 1].tolist()


def test_a_billion_windows_cost_nothing() -> None:
    windows = 10**9
    samples = np.arange(windows - 512, windows + 512)
    tracemalloc.start()
    order = SampleOrder(windows=[windows, windows // 3], weights=[1, 1], seed=1)
    first = order.locate(np.arange(1024))
    late = order.locate(samples)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 5_000_000
    for corpus, window in (first, late):
        assert len(set(zip(corpus.tolist(), window.tolist(), strict=True))) == 1024
        assert window[corpus == 0].max() > windows // 2

    # A sample number far beyond 32 bits, and what comes an epoch later in the same corpus.
    far = np.asarray([10**15, 10**15 + 2 * windows])
    corpus, window = order.locate(far)
    assert corpus[0] == corpus[1]
    assert window[0] != window[1]
    assert ((window >= 0) & (window < windows)).all()
