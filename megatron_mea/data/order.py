"""Which window of which corpus a sample is: a pure function of (seed, corpora, sample number).

Nothing is stored and nothing is built: the position inside an epoch goes through a keyed permutation that is
computed on the fly, so the only state of a run is the number of samples it has consumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from megatron_mea.errors import UserError

PERIOD = 10_000
"""Weights are rounded to this many parts; the mixture repeats after as many samples."""


class Mixture:
    """Deals the samples out to corpora so that each one's share is right at every moment.

    Args:
        weights: relative weights, one a corpus; each is rounded to 1/PERIOD, and to no less than that.

    Raises:
        UserError: more corpora than there are parts.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if len(weights) > PERIOD:
            raise UserError("data.train", f"{len(weights):,} corpora", f"at most {PERIOD:,}", "join some of them")
        share = np.asarray(weights, dtype=np.float64) / np.sum(weights)
        self.quota = np.maximum(np.floor(share * PERIOD + 1e-9).astype(np.int64), 1)
        while self.quota.sum() != PERIOD:
            sign = 1 if self.quota.sum() < PERIOD else -1
            room = np.where(self.quota + sign >= 1, sign * (share * PERIOD - self.quota), -np.inf)
            self.quota[np.argmax(room)] += sign
        self._corpus, self._rank = _deal(self.quota)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The corpus of each sample, and which one of that corpus it is, counted from 0."""
        period, position = np.divmod(samples, PERIOD)
        corpus = self._corpus[position]
        return corpus, period * self.quota[corpus] + self._rank[position]


def _deal(quota: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One period: its corpora in order, and the running number of each entry within its corpus.

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
    """Maps sample numbers to windows.

    Args:
        windows: the number of windows of `seq_length` tokens of each corpus.
        weights: relative weight of each corpus.
        seed: keys the permutation of every epoch; None reads each corpus front to back.
    """

    def __init__(self, windows: Sequence[int], weights: Sequence[float], seed: int | None) -> None:
        self.windows, self.seed = list(windows), seed
        self.mixture = Mixture(weights)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(corpus, window) of each sample number, both (n,); each window comes once an epoch."""
        corpus, number = self.mixture.locate(np.asarray(samples, dtype=np.int64))
        window = np.empty_like(number)
        for index in np.unique(corpus):
            here = corpus == index
            size = self.windows[index]
            epochs, positions = np.divmod(number[here], size)
            found = positions.copy()
            if self.seed is not None:
                for epoch in np.unique(epochs):
                    key = f"{self.seed}/{index}/{epoch}"
                    found[epochs == epoch] = permute(positions[epochs == epoch], size, key)
            window[here] = found
        return corpus, window


def permute(positions: np.ndarray, size: int, key: str) -> np.ndarray:
    """A bijection of 0..size-1 chosen by `key`, applied to `positions` (n,).

    A balanced Feistel network of six rounds on the next even number of bits; what falls outside is sent
    through again until it falls inside (cycle walking), fewer than four times on average.
    """
    half = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    material = hashlib.sha512(key.encode()).digest()
    rounds = np.frombuffer(material[:48], dtype="<u8")

    def encrypt(values: np.ndarray) -> np.ndarray:
        left, right = values >> half, values & mask
        for round_key in rounds:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        return (left << half) | right

    values = encrypt(np.asarray(positions).astype(np.uint64))
    while (outside := values >= np.uint64(size)).any():
        values[outside] = encrypt(values[outside])
    return values.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014), modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
