"""Maps sample numbers to corpora and windows: a pure function of (seed, corpora, sample number).

Nothing is stored and nothing is built: the position inside an epoch goes through a keyed permutation that is
computed on the fly, so the only state of a run is the number of samples it has consumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from megatron_mea.errors import UserError

PERIOD = 10_000
"""Weights are rounded to multiples of 1 / PERIOD, and the mixture repeats after PERIOD samples."""


class Mixture:
    """Assigns samples to corpora so that every prefix of them has the right share of each corpus.

    Args:
        weights: relative weight of each corpus, rounded to a multiple of 1 / PERIOD and to no less than that.

    Attributes:
        quota: (corpora,) samples of each corpus in a period.

    Raises:
        UserError: there are more than PERIOD corpora.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if len(weights) > PERIOD:
            raise UserError(
                where="data.train",
                got=f"{len(weights):,} corpora",
                expected=f"at most {PERIOD:,}",
                hint="join some of them",
            )

        share = np.asarray(weights, dtype=np.float64) / np.sum(weights)
        self.quota = np.maximum(np.floor(share * PERIOD + 1e-9).astype(np.int64), 1)
        while self.quota.sum() != PERIOD:
            sign = 1 if self.quota.sum() < PERIOD else -1
            room = np.where(self.quota + sign >= 1, sign * (share * PERIOD - self.quota), -np.inf)
            self.quota[np.argmax(room)] += sign

        self._corpus, self._number_in_corpus = _interleave_corpora(self.quota)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The corpus of each sample and the sample's number within that corpus (from 0), both (n,)."""
        period, position = np.divmod(samples, PERIOD)
        corpus = self._corpus[position]
        return corpus, period * self.quota[corpus] + self._number_in_corpus[position]


def _interleave_corpora(quota: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The corpus of each sample of a period and the sample's number within that corpus, both (PERIOD,).

    Entry k of a corpus with quota q is due by position ceil((k + 1) PERIOD / q); serving the earliest deadline
    among those released keeps every corpus within one sample of its share (Steiner and Yeomans, 1993).
    """
    corpus, rank = np.empty(PERIOD, np.int64), np.empty(PERIOD, np.int64)
    served = np.zeros(len(quota), np.int64)
    for position in range(PERIOD):
        released = served * PERIOD // quota <= position
        deadline = -((served + 1) * -PERIOD // quota)
        chosen = int(np.argmin(np.where(released & (served < quota), deadline, PERIOD + 1)))
        corpus[position], rank[position] = chosen, served[chosen]
        served[chosen] += 1

    return corpus, rank


class SampleOrder:
    """Maps sample numbers to windows of corpora.

    Args:
        windows: number of windows of `seq_length` tokens of each corpus.
        weights: relative weight of each corpus.
        seed: keys the permutation of every epoch; None reads each corpus front to back.
    """

    def __init__(self, *, windows: Sequence[int], weights: Sequence[float], seed: int | None) -> None:
        self.windows, self.seed = list(windows), seed
        self.mixture = Mixture(weights)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(corpus, window) of each sample number, both (n,); each window comes once in every epoch of its corpus."""
        corpus, number = self.mixture.locate(np.asarray(samples, dtype=np.int64))
        window = np.empty_like(number)

        for index in np.unique(corpus):
            in_corpus = corpus == index
            size = self.windows[index]
            epochs, positions = np.divmod(number[in_corpus], size)

            windows = positions.copy()
            if self.seed is not None:
                for epoch in np.unique(epochs):
                    key = f"{self.seed}/{index}/{epoch}"
                    windows[epochs == epoch] = permute(positions[epochs == epoch], size=size, key=key)
            window[in_corpus] = windows

        return corpus, window


def permute(positions: np.ndarray, *, size: int, key: str) -> np.ndarray:
    """A bijection of 0..size-1 chosen by `key`, applied to `positions` (n,).

    A balanced Feistel network of six rounds on the next even number of bits. Values beyond `size` are encrypted
    repeatedly until they fall below it (cycle walking), fewer than four times on average.
    """
    half = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    material = hashlib.sha512(key.encode()).digest()
    round_keys = np.frombuffer(material[:48], dtype="<u8")

    def encrypt(values: np.ndarray) -> np.ndarray:
        left, right = values >> half, values & mask
        for round_key in round_keys:
            left, right = right, left ^ (_splitmix64_finaliser(right + round_key) & mask)
        return (left << half) | right

    values = encrypt(np.asarray(positions).astype(np.uint64))
    while (outside := values >= np.uint64(size)).any():
        values[outside] = encrypt(values[outside])

    return values.astype(np.int64)


def _splitmix64_finaliser(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014), modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
