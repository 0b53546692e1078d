"""The entries of a `.idx`, checked where they are used: a sample when it is opened, then those of each window."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_mea.errors import UserError

SAMPLE_ENTRIES = 1 << 18
"""Tokens, and entries of an index, that are checked when a corpus is opened.

Some megabytes of each corpus, since every rank reads them and there may be a thousand corpora. `prepare` checks all
tokens, a sample shows a wrong tokenizer or a damaged copy, and ids and entries are checked again as they are read.
"""
_CHUNK = 1 << 18
"""Entries that are in memory at a time: an index has thousands of millions, and a window any number of empty ones."""
_HINT = "copy the .idx again or prepare the text again; `megatron-mea inspect PREFIX` looks at all of it"


@dataclass(kw_only=True)
class IndexEntries:
    """Sequences and documents of a corpus; damage ends in a UserError and never in moved documents.

    Args:
        path: the `.idx`.
        begin: byte of the `.idx` at which the entries begin, `lengths` first.
        itemsize: bytes of a token.
        lengths: (sequences,) int32, tokens of each sequence.
        offsets: (sequences,) int64, where each sequence begins in the `.bin`, in bytes.
        document_indices: (documents + 1,) int64, the sequence at which each document begins, and the number of all.

    Attributes:
        data_size: bytes of the `.bin` by the last sequence; a sum would read the full index.

    Raises:
        UserError: an entry of the sample, or the first or last one, is damaged.
    """

    path: str
    begin: int
    itemsize: int
    lengths: np.ndarray
    offsets: np.ndarray
    document_indices: np.ndarray

    def __post_init__(self) -> None:
        # Megatron's documents may have any number of sequences; those of `prepare` have one.
        self._one_sequence_each = False
        count = self.offsets.size
        boundaries = [int(self.document_indices[end]) for end in (0, -1)] if self.document_indices.size else []
        if boundaries != [0, count]:
            self._refuse(
                f"documents from sequence {boundaries[0]:,} to {boundaries[1]:,}" if boundaries else "no document"
            )

        first, length = (int(self.offsets[0]), int(self.lengths[-1])) if count else (0, 0)
        if first or length < 0:
            self._refuse(f"sequence 0 at byte {first:,}" if first else f"sequence {count - 1:,} of {length:,} tokens")

        self.data_size = int(self.offsets[-1]) + length * self.itemsize if count else 0
        self._one_sequence_each = self.check(SAMPLE_ENTRIES)

    def check(self, sample: int | None = None) -> bool:
        """Checks up to `sample` sequences and documents, in 64 blocks spread evenly; None: all of them.

        Returns whether document n was seen to be sequence n wherever it looked.

        Raises:
            UserError: an entry is damaged.
        """
        count, one_sequence_each = self.offsets.size, self.document_indices.size == self.offsets.size + 1
        with open(self.path, "rb", buffering=0) as stream:
            if hasattr(os, "posix_fadvise") and sample is not None:
                # Without this the kernel reads megabytes behind every block.
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

            # Of the file and not of its memory map, which would be read page by page.
            def read(dtype: np.dtype, begin: int, *entries: int) -> np.ndarray:
                stream.seek(self.begin + begin + entries[0] * dtype.itemsize)
                return np.fromfile(stream, dtype, entries[1] - entries[0])

            for first, stop in _chunks(count - 1, sample):
                lengths = read(self.lengths.dtype, 0, first, stop)
                offsets = read(self.offsets.dtype, 4 * count, first, stop + 1)
                self._check_sequences(lengths=lengths, offsets=offsets, first=first)

            for first, stop in _chunks(self.document_indices.size - 1, sample):
                indices = read(self.document_indices.dtype, 12 * count, first, stop + 1)
                self._check_documents(indices, first)
                one_sequence_each &= bool((indices == np.arange(first, stop + 1)).all())

        return one_sequence_each

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Indices of the tokens in [start, stop) with which a document begins, in order.

        Raises:
            UserError: an entry that decides on them is damaged.
        """
        first = self._lower_bound(self.offsets, start * self.itemsize, maximum=self.data_size)
        last = self._lower_bound(self.offsets, stop * self.itemsize, maximum=self.data_size, low=first)
        for low, high in _chunks(min(last, self.offsets.size - 1), begin=max(first - 1, 0)):
            self._check_sequences(lengths=self.lengths[low:high], offsets=self.offsets[low : high + 1], first=low)

        if not self._one_sequence_each:
            first, last = (
                self._lower_bound(self.document_indices, sequence, maximum=self.offsets.size)
                for sequence in (first, last)
            )

        # Also where there seems to be none: the neighbours show whether a damaged entry hides documents.
        chunks = list(_chunks(last, begin=first)) or [(first, max(first, last))]
        starts = [self._document_offsets(low, high) // self.itemsize for low, high in chunks]
        return np.unique(np.concatenate([np.empty(0, np.int64), *starts]))

    def first_sequence(self, document: int) -> tuple[int, int]:
        """Index of the token with which a document begins, and the tokens of its first sequence.

        Raises:
            UserError: an entry that decides on them is damaged.
        """
        low = max(document - 2, 0)
        self._check_documents(self.document_indices[low : document + 3], low)
        sequence = int(self.document_indices[document])
        if sequence == self.offsets.size:
            return self.data_size // self.itemsize, 0

        low, high = max(sequence - 1, 0), min(sequence + 1, self.offsets.size - 1)
        self._check_sequences(lengths=self.lengths[low:high], offsets=self.offsets[low : high + 1], first=low)
        return int(self.offsets[sequence]) // self.itemsize, int(self.lengths[sequence])

    def document_lengths(self) -> Iterator[np.ndarray]:
        """Tokens of all documents in order, in pieces."""
        for first, stop in _chunks(self.document_indices.size - 1):
            sequences = self.document_indices[first : stop + 1]
            begins = np.full(sequences.size, self.data_size)
            begins[sequences < self.offsets.size] = self.offsets[sequences[sequences < self.offsets.size]]
            yield np.diff(begins) // self.itemsize

    def _document_offsets(self, first: int, stop: int) -> np.ndarray:
        """Bytes at which the documents [first, stop) begin, in order and each once, since documents may be empty."""
        # Neighbours, too: beside them alone a damaged entry at the border shows.
        low = max(first - 2, 0)
        self._check_documents(self.document_indices[low : stop + 2], low)
        return np.unique(self.offsets[self.document_indices[first:stop]])

    def _check_sequences(self, *, lengths: np.ndarray, offsets: np.ndarray, first: int) -> None:
        """Checks (n,) lengths and (n + 1,) offsets of the sequences from number `first` on."""
        wrong = (lengths < 0) | (offsets[:-1] + lengths * np.int64(self.itemsize) != offsets[1:])
        if wrong.any():
            index = int(np.argmax(wrong))
            here, following = f"{lengths[index]:,} tokens at byte {offsets[index]:,}", f"{offsets[index + 1]:,}"
            self._refuse(f"sequence {first + index:,} of {here}, and the next one at byte {following}")

    def _check_documents(self, indices: np.ndarray, first: int) -> None:
        """Checks (n,) entries of `document_indices` from number `first` on."""
        falls = np.append(indices[1:] < indices[:-1], False)
        wrong = (indices < 0) | (indices > self.offsets.size) | falls
        if self._one_sequence_each:
            wrong |= indices != np.arange(first, first + indices.size)

        if wrong.any():
            index = int(np.argmax(wrong))
            following = f", and the next one with sequence {indices[index + 1]:,}" if falls[index] else ""
            self._refuse(f"document {first + index:,} that begins with sequence {indices[index]:,}{following}")

    def _lower_bound(self, values: np.ndarray, target: int, *, maximum: int, low: int = 0) -> int:
        """Number of the first of `values`, from number `low` on, that is not below `target`.

        Not np.searchsorted: the arrays of an index are not aligned, and numpy would copy all of them. The values that
        the search comes by must rise up to `maximum`, else it would end anywhere.
        """
        high, below, above = len(values), 0, maximum
        while low < high:
            middle = (low + high) // 2
            value = int(values[middle])
            if not below <= value <= above:
                kind = "sequence" if values is self.offsets else "document"
                self._refuse(f"{kind} {middle:,} that begins at {value:,}, between {below:,} and {above:,}")

            if value < target:
                low, below = middle + 1, value
            else:
                high, above = middle, value

        return low

    def _refuse(self, got: str) -> None:
        raise UserError(
            where=self.path,
            got=got,
            expected=f"{self.offsets.size:,} sequences that follow one another, each of {self.itemsize} bytes a token, "
            f"and documents that divide them in order{', one each' if self._one_sequence_each else ''}",
            hint=_HINT,
        )


def spread_blocks(total: int, sample: int) -> list[tuple[int, int]]:
    """(start, stop) of 64 evenly spread blocks of `sample` entries together; of one block where `total` is less."""
    if total <= sample:
        return [(0, max(total, 0))]

    block = sample // 64
    return [(int(start), int(start) + block) for start in np.linspace(0, total - block, 64, dtype=np.int64)]


def _chunks(stop: int, sample: int | None = None, *, begin: int = 0) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive pieces of [begin, stop); with `sample` of 64 blocks of it."""
    for first, last in [(begin, stop)] if sample is None else spread_blocks(stop, sample):
        for low in range(first, last, _CHUNK):
            yield low, min(low + _CHUNK, last)
