"""A list of corpora of the configuration, opened: windows of tokens by sample number."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_mea.config.schema import TrainCorpus
from megatron_mea.data.indexed import IndexedReader, check_ids, open_readers, spread_blocks
from megatron_mea.data.order import PERIOD, SampleOrder
from megatron_mea.errors import UserError

IGNORE = -100
"""A target with this id is left out of the loss, as in torch and Hugging Face."""


@dataclass(frozen=True)
class Batch:
    """Token ids, their positions, and what should follow each of them; all (samples, seq_length) int64.

    Positions restart at documents where those are masked, and the target across a border is `IGNORE`.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    targets: np.ndarray


def stack(windows: Sequence[Batch]) -> Batch:
    """Windows (seq_length,) as one batch."""
    arrays = ([w.input_ids for w in windows], [w.position_ids for w in windows], [w.targets for w in windows])
    return Batch(*map(np.stack, arrays))


def read_window(reader: IndexedReader, start: int, length: int, document_mask: bool) -> Batch:
    """The `length` tokens from `start` on, one dimension less than a batch; the corpus has one token more at least."""
    tokens = reader.tokens[start : start + length + 1].astype(np.int64)
    positions, targets = np.arange(length), tokens[1:].copy()
    if document_mask:
        begins, origin = borders(reader, start, length), np.zeros(length + 1, dtype=np.int64)
        targets[begins - 1] = IGNORE
        origin[begins] = begins
        positions -= np.maximum.accumulate(origin[:-1])
    return Batch(tokens[:-1], positions, targets)


def borders(reader: IndexedReader, start: int, length: int) -> np.ndarray:
    """Where in a window, from 1 to `length`, a document begins."""
    return reader.document_starts(start + 1, start + length + 1) - start


class Corpora:
    """Windows of `seq_length` tokens, numbered as samples of an endless mixture.

    Args:
        corpora: paths and relative weights.
        seq_length: tokens of a window; the token after its last is the last target.
        vocab_size: every id must be below it.
        seed: keys the order of the samples; None reads each corpus front to back (validation).
        key: the configuration key of the list, for messages.
        document_mask: positions restart with every document, and no token has to foretell the next document.

    Raises:
        UserError: a corpus is missing, damaged, too short for one window, or has ids beyond the vocabulary.
    """

    def __init__(
        self,
        corpora: Sequence[TrainCorpus],
        seq_length: int,
        vocab_size: int,
        seed: int | None,
        key: str,
        document_mask: bool = False,
    ) -> None:
        self.seq_length, self.vocab_size, self.key, self.document_mask = seq_length, vocab_size, key, document_mask
        self.paths = [corpus.path for corpus in corpora]
        self.readers = open_readers(self.paths, key)
        for path, reader in zip(self.paths, self.readers, strict=True):
            if reader.tokens.size <= seq_length:
                allowed = f"more than data.seq_length = {seq_length} tokens"
                raise UserError(f"{path}.bin", f"{reader.tokens.size} tokens", allowed)
            reader.check_ids(vocab_size, *self._allowed_ids)
        windows = [(reader.tokens.size - 1) // seq_length for reader in self.readers]
        self.weights = [corpus.weight for corpus in corpora]
        self.order = SampleOrder(windows, self.weights, seed)

    def batch(self, samples: np.ndarray) -> Batch:
        """The windows of the given sample numbers (n,)."""
        starts = self._starts(samples)
        windows = [
            read_window(self.readers[index], start, self.seq_length, self.document_mask) for index, start in starts
        ]
        for (index, _), window in zip(starts, windows, strict=True):
            for ids in (window.input_ids, window.targets[window.targets != IGNORE]):
                check_ids(ids, self.vocab_size, f"{self.paths[index]}.bin", *self._allowed_ids)
        return stack(windows)

    def targets(self, samples: np.ndarray) -> int:
        """How many targets these samples (n,) have that are not `IGNORE`."""
        total = len(samples) * self.seq_length
        if self.document_mask:
            total -= sum(borders(self.readers[i], start, self.seq_length).size for i, start in self._starts(samples))
        return total

    def _starts(self, samples: np.ndarray) -> list[tuple[int, int]]:
        """The corpus of each sample, and the token with which its window begins."""
        corpus, window = self.order.locate(samples)
        return list(zip(corpus.tolist(), (window * self.seq_length).tolist(), strict=True))

    def describe(self, samples: np.ndarray) -> str:
        """Where samples come from, for a message: corpus and window of each."""
        corpus, window = self.order.locate(samples)
        return ", ".join(f"{self.paths[c]} window {w}" for c, w in zip(corpus, window, strict=True))

    def require(self, samples: int, batches: int, batch_size: int) -> None:
        """Raises UserError where the first `samples` samples have no target, or repeat windows of a corpus."""
        self.require_target(samples)
        corpus, number = self.order.mixture.locate(np.arange(samples))
        for index, path in enumerate(self.paths):
            needed = int(number[corpus == index].max(initial=-1)) + 1
            if needed > self.order.windows[index]:
                available = self.order.windows[index] * batches // needed
                raise UserError(
                    self.key,
                    f"{path} has {self.order.windows[index]} windows of {self.seq_length} tokens, "
                    f"enough for {available} global batches of {batch_size}",
                    f"at least evaluation.batches = {batches} global batches",
                    "lower evaluation.batches or give more text",
                )

    def require_target(self, samples: int) -> None:
        """Raises UserError where the first `samples` samples have no target at all."""
        # Mostly the first one has, and the others are not looked at.
        if not any(self.targets(np.asarray([sample])) for sample in range(samples)):
            found, mend = f"documents of one token in the first {samples} samples", "set data.document_mask to false"
            raise UserError(self.key, found, "a token to predict", mend)

    @property
    def tokens(self) -> int:
        return sum(reader.tokens.size for reader in self.readers)

    def fingerprint(self) -> list[dict[str, Any]]:
        """What decides on the samples, by corpus: rounded weight, size and a digest; not the path."""
        quotas = self.order.mixture.quota
        # Without the mask, samples are the same wherever documents begin.
        return [
            {
                "weight": int(quota),
                "tokens": int(reader.tokens.size),
                "digest": corpus_digest(reader, self.document_mask),
            }
            for quota, reader in zip(quotas, self.readers, strict=True)
        ]

    def shares(self) -> list[str]:
        """One line a corpus: path, tokens, weight as given, share of the samples, for the start of the log."""
        rows = zip(self.paths, self.readers, self.weights, self.order.mixture.quota, strict=True)
        return [
            f"{path}: {reader.tokens.size:,} tokens, weight {weight}, {quota / PERIOD:.2%} of the samples"
            for path, reader, weight, quota in rows
        ]

    @property
    def _allowed_ids(self) -> tuple[str, str]:
        mend = "prepare the text with the tokenizer of this run, or raise model.vocab_size"
        return f"ids from 0 up to but not including model.vocab_size = {self.vocab_size}", mend


def corpus_digest(reader: IndexedReader, borders: bool) -> str:
    """A digest of 64 blocks spread over the tokens, and over the index for `borders`: cheap at any size."""
    digest = hashlib.sha256()
    parts = [(reader.tokens, 1)]
    if borders:
        # In tokens and not in bytes, which depend on the type of the file.
        parts += [(reader.offsets, reader.dtype.itemsize), (reader.documents, 1)]
    for array, unit in parts:
        digest.update(f"{array.size} ".encode())
        for start, stop in spread_blocks(array.size, 1 << 17):
            digest.update((array[start:stop].astype(np.int64) // unit).tobytes())
    return digest.hexdigest()[:16]
