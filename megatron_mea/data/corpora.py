"""The corpora of a configuration as batches of token windows, addressed by sample number."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_mea.config.schema import TrainCorpus
from megatron_mea.data.index_entries import spread_blocks
from megatron_mea.data.indexed import IndexedReader, check_ids, open_readers
from megatron_mea.data.order import PERIOD, SampleOrder
from megatron_mea.errors import UserError

IGNORE_INDEX = -100
"""A target with this id is left out of the loss, as in torch and Hugging Face."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Token ids, their positions and their targets (the tokens that should follow), all (samples, seq_length) int64.

    With a document mask positions restart at each document, and the last token of a document has `IGNORE_INDEX` as
    its target.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    targets: np.ndarray


def stack_windows(windows: Sequence[Batch]) -> Batch:
    """Stacks windows, whose arrays are (seq_length,), into one batch."""
    return Batch(
        input_ids=np.stack([window.input_ids for window in windows]),
        position_ids=np.stack([window.position_ids for window in windows]),
        targets=np.stack([window.targets for window in windows]),
    )


def read_window(*, reader: IndexedReader, start: int, length: int, document_mask: bool) -> Batch:
    """The window of `length` tokens from token `start` on, as a `Batch` of arrays (length,).

    The corpus must have a token after the window, which is the last target.
    """
    tokens = reader.tokens[start : start + length + 1].astype(np.int64)
    positions, targets = np.arange(length), tokens[1:].copy()

    if document_mask:
        borders = document_borders(reader=reader, start=start, length=length)
        targets[borders - 1] = IGNORE_INDEX
        positions = positions_in_documents(borders, length)

    return Batch(input_ids=tokens[:-1], position_ids=positions, targets=targets)


def positions_in_documents(borders: np.ndarray, length: int) -> np.ndarray:
    """Positions (length,) that restart at each of the borders that `document_borders` returns."""
    document_start = np.zeros(length + 1, dtype=np.int64)
    document_start[borders] = borders
    return np.arange(length) - np.maximum.accumulate(document_start[:-1])


def document_borders(*, reader: IndexedReader, start: int, length: int) -> np.ndarray:
    """Positions in a window, from 1 to `length`, at which a document begins; in order."""
    return reader.index.document_starts(start + 1, start + length + 1) - start


class Corpora:
    """Reads windows of `seq_length` tokens by their number in an endless mixture of corpora.

    Args:
        corpora: paths and relative weights.
        seq_length: tokens of a window; the token after it is its last target.
        vocab_size: every id must be below it.
        seed: keys the order of the samples; None reads each corpus front to back (validation).
        key: the configuration key of the list, for messages.
        document_mask: positions restart with every document, and the last token of a document has no target.

    Raises:
        UserError: a corpus is missing, damaged, too short for one window, or has ids beyond the vocabulary.
    """

    def __init__(
        self,
        *,
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
                expected = f"more than data.seq_length = {seq_length} tokens"
                raise UserError(where=f"{path}.bin", got=f"{reader.tokens.size} tokens", expected=expected)
            reader.check_ids(vocab_size=vocab_size, **self._id_error)

        windows = [(reader.tokens.size - 1) // seq_length for reader in self.readers]
        self.weights = [corpus.weight for corpus in corpora]
        self.order = SampleOrder(windows=windows, weights=self.weights, seed=seed)

    def batch(self, samples: np.ndarray) -> Batch:
        """The windows of these sample numbers (n,), their ids checked against the vocabulary."""
        locations = self._locate_windows(samples)
        windows = [
            read_window(
                reader=self.readers[index], start=start, length=self.seq_length, document_mask=self.document_mask
            )
            for index, start in locations
        ]
        for (index, _), window in zip(locations, windows, strict=True):
            for ids in (window.input_ids, window.targets[window.targets != IGNORE_INDEX]):
                check_ids(ids, vocab_size=self.vocab_size, where=f"{self.paths[index]}.bin", **self._id_error)

        return stack_windows(windows)

    def position_ids(self, samples: np.ndarray) -> np.ndarray:
        """Positions inside documents of the windows of these sample numbers (n,): (n, seq_length); reads no tokens."""
        locations = self._locate_windows(samples)
        borders = [
            document_borders(reader=self.readers[index], start=start, length=self.seq_length)
            for index, start in locations
        ]
        return np.stack([positions_in_documents(window_borders, self.seq_length) for window_borders in borders])

    def count_targets(self, samples: np.ndarray) -> int:
        """Number of targets of these samples (n,) that are not `IGNORE_INDEX`."""
        total = len(samples) * self.seq_length
        if self.document_mask:
            total -= sum(
                document_borders(reader=self.readers[index], start=start, length=self.seq_length).size
                for index, start in self._locate_windows(samples)
            )

        return total

    def _locate_windows(self, samples: np.ndarray) -> list[tuple[int, int]]:
        """Index of the corpus and first token of the window of each sample."""
        corpus, window = self.order.locate(samples)
        return list(zip(corpus.tolist(), (window * self.seq_length).tolist(), strict=True))

    def describe(self, samples: np.ndarray) -> str:
        """Corpus and window of each of these samples (n,), as text for a message."""
        corpora, windows = self.order.locate(samples)
        return ", ".join(
            f"{self.paths[corpus]} window {window}" for corpus, window in zip(corpora, windows, strict=True)
        )

    def require_batches(self, *, samples: int, batches: int, batch_size: int) -> None:
        """Checks that there is data for `batches` global batches, without repetition.

        Raises:
            UserError: the first `samples` samples have no target, or repeat windows of a corpus.
        """
        self.require_target(samples)
        corpus, number = self.order.mixture.locate(np.arange(samples))

        for index, path in enumerate(self.paths):
            needed = int(number[corpus == index].max(initial=-1)) + 1
            if needed > self.order.windows[index]:
                available = self.order.windows[index] * batches // needed
                raise UserError(
                    where=self.key,
                    got=f"{path} has {self.order.windows[index]} windows of {self.seq_length} tokens, "
                    f"enough for {available} global batches of {batch_size}",
                    expected=f"at least evaluation.batches = {batches} global batches",
                    hint="lower evaluation.batches or give more text",
                )

    def require_target(self, samples: int) -> None:
        """Raises UserError where the first `samples` samples have no target at all."""
        # Mostly the first sample has one, and the others are not read.
        if not any(self.count_targets(np.asarray([sample])) for sample in range(samples)):
            got, hint = f"documents of one token in the first {samples} samples", "set data.document_mask to false"
            raise UserError(where=self.key, got=got, expected="a token to predict", hint=hint)

    def documents_begin_with(self, token_id: int) -> bool | None:
        """Whether documents begin with a token; None where some do and some do not.

        64 of each corpus are looked at; a document of one token may be an end alone.
        """
        seen = set()
        for reader in self.readers:
            documents = np.linspace(0, max(reader.document_indices.size - 2, 0), num=64).astype(np.int64)
            for start, length in map(reader.index.first_sequence, np.unique(documents).tolist()):
                if length > 1:
                    seen.add(int(reader.tokens[start : start + 1][0]) == token_id)

        return None if len(seen) > 1 else True in seen

    @property
    def tokens(self) -> int:
        """Tokens of all corpora."""
        return sum(reader.tokens.size for reader in self.readers)

    def fingerprint(self) -> list[dict[str, Any]]:
        """Rounded weight, size and digest of each corpus, which decide on the samples; the path does not."""
        quotas = self.order.mixture.quota
        # Without the mask, borders of documents do not change the samples.
        return [
            {
                "weight": int(quota),
                "tokens": int(reader.tokens.size),
                "digest": corpus_digest(reader, borders=self.document_mask),
            }
            for quota, reader in zip(quotas, self.readers, strict=True)
        ]

    def shares(self) -> list[str]:
        """One line for each corpus: path, tokens, weight of the configuration and share of the samples."""
        rows = zip(self.paths, self.readers, self.weights, self.order.mixture.quota, strict=True)
        return [
            f"{path}: {reader.tokens.size:,} tokens, weight {weight}, {quota / PERIOD:.2%} of the samples"
            for path, reader, weight, quota in rows
        ]

    @property
    def _id_error(self) -> dict[str, str]:
        """`expected` and `hint` of the error about an id beyond the vocabulary."""
        return {
            "expected": f"ids from 0 up to but not including model.vocab_size = {self.vocab_size}",
            "hint": "prepare the text with the tokenizer of this run, or raise model.vocab_size",
        }


def corpus_digest(reader: IndexedReader, *, borders: bool) -> str:
    """SHA-256 (16 hex digits) of 64 blocks spread over the tokens, with `borders` also over the index: always cheap."""
    digest = hashlib.sha256()
    parts = [(reader.tokens, 1)]
    if borders:
        # Offsets in tokens: in bytes they depend on the dtype of the file.
        parts += [(reader.offsets, reader.dtype.itemsize), (reader.document_indices, 1)]

    for array, unit in parts:
        digest.update(f"{array.size} ".encode())
        for start, stop in spread_blocks(array.size, 1 << 17):
            digest.update((array[start:stop].astype(np.int64) // unit).tobytes())

    return digest.hexdigest()[:16]
