"""Prepared data read once from the beginning to the end, or a sample of it: what models are measured on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_mea.data.corpora import Batch, read_window, stack
from megatron_mea.data.indexed import IndexedReader, check_ids, open_readers
from megatron_mea.errors import UserError

MAX_WINDOW = 2048
"""Of a model that names no training length."""


@dataclass(frozen=True)
class Windows:
    """Windows of corpora, one after the other, in batches.

    Args:
        places: (corpus, first token of each window, tokens of each of them) of every batch.
        document_mask: positions restart at documents, and no target lies across a border.
    """

    readers: Sequence[IndexedReader]
    places: list[tuple[int, list[int], int]]
    document_mask: bool

    @property
    def tokens(self) -> int:
        return sum(len(starts) * length for _, starts, length in self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Batch]:
        for place in range(len(self)):
            yield self[place]

    def __getitem__(self, index: int) -> Batch:
        corpus, starts, length = self.places[index]
        return stack([read_window(self.readers[corpus], at, length, self.document_mask) for at in starts])


def open_windows(
    paths: Sequence[str], where: str, window: int, batch: int, vocab_size: int, document_mask: bool, tokens: int = 0
) -> Windows:
    """Every token is a target once, but for a corpus's first one (and, of masked documents, the first of each).

    Args:
        paths: prefixes of prepared data.
        where: the key or option that named them, for messages.
        window: tokens of a window; the tail of a corpus is a shorter one.
        batch: windows of a batch at most.
        tokens: 0: all; else about so many, in whole windows at even distances.

    Raises:
        UserError: a corpus cannot be read, is too short, or has an id beyond the vocabulary in a window.
    """
    readers = open_readers(list(paths), where)
    allowed = f"ids from 0 up to but not including the model's vocab_size = {vocab_size}"
    places = []
    for corpus, (path, reader) in enumerate(zip(paths, readers, strict=True)):
        if reader.tokens.size < 2:
            raise UserError(f"{path}.bin", f"{reader.tokens.size} tokens", "at least 2")
        targets = reader.tokens.size - 1
        whole = targets // window * window
        starts: Sequence[int] = range(0, whole, window)
        wanted = -(-tokens // (window * len(readers)))
        if tokens and wanted < len(starts):
            starts = [starts[index * len(starts) // wanted] for index in range(wanted)]
            whole = targets
            # The others are not read: there may be a terabyte of them.
            for at in starts:
                check_ids(reader.tokens[at : at + window + 1], vocab_size, f"{path}.bin", allowed)
        else:
            reader.check_ids(vocab_size, allowed, sample=reader.tokens.size)
        places += [(corpus, list(starts[first : first + batch]), window) for first in range(0, len(starts), batch)]
        if targets > whole:
            places.append((corpus, [whole], targets - whole))
    return Windows(readers, places, document_mask)
