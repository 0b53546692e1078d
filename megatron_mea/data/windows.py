"""Batches of windows that read prepared data once from front to back, or a sample of it, to evaluate models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_mea.data.corpora import Batch, read_window, stack_windows
from megatron_mea.data.indexed import IndexedReader, check_ids, open_readers
from megatron_mea.errors import UserError

MAX_WINDOW = 2048
"""Tokens of a window for a model whose training length is unknown."""


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Windows of corpora in order, as a sequence of batches that are read when they are asked for.

    Args:
        locations: (index of the corpus, first token of each window, tokens of a window) of every batch.
        document_mask: positions restart at documents, and no target lies across a border.
    """

    readers: Sequence[IndexedReader]
    locations: list[tuple[int, list[int], int]]
    document_mask: bool

    @property
    def tokens(self) -> int:
        """Input tokens of all windows."""
        return sum(len(starts) * length for _, starts, length in self.locations)

    def __len__(self) -> int:
        return len(self.locations)

    def __iter__(self) -> Iterator[Batch]:
        for index in range(len(self)):
            yield self[index]

    def __getitem__(self, index: int) -> Batch:
        corpus, starts, length = self.locations[index]
        return stack_windows(
            [
                read_window(reader=self.readers[corpus], start=start, length=length, document_mask=self.document_mask)
                for start in starts
            ]
        )


def open_windows(
    *, paths: Sequence[str], where: str, window: int, batch: int, vocab_size: int, document_mask: bool, tokens: int = 0
) -> Windows:
    """Windows in which each token of the corpora is a target once, except the first of a corpus (or masked document).

    Args:
        paths: prefixes of prepared data.
        where: the key or option that named them, for messages.
        window: tokens of a window; the last window of a corpus may be shorter.
        batch: maximal number of windows of a batch.
        tokens: 0 takes all; else about so many, in evenly spaced windows, as many of each corpus.

    Raises:
        UserError: a corpus cannot be read, is too short, has an id beyond the vocabulary in a window, or a damaged
            index.
    """
    readers = open_readers(list(paths), where)
    expected = f"ids from 0 up to but not including the model's vocab_size = {vocab_size}"
    locations = []

    for corpus, (path, reader) in enumerate(zip(paths, readers, strict=True)):
        if reader.tokens.size < 2:
            raise UserError(where=f"{path}.bin", got=f"{reader.tokens.size} tokens", expected="at least 2")

        targets = reader.tokens.size - 1
        tail_start = targets // window * window
        starts: Sequence[int] = range(0, tail_start, window)
        sample_size = -(-tokens // (window * len(readers)))
        is_sample = bool(tokens) and sample_size < len(starts)

        if is_sample:
            starts = [starts[index * len(starts) // sample_size] for index in range(sample_size)]
            # Tokens outside of the sample are not read: there may be a terabyte of them.
            for start in starts:
                ids = reader.tokens[start : start + window + 1]
                check_ids(ids, vocab_size=vocab_size, where=f"{path}.bin", expected=expected)
        else:
            reader.check_ids(vocab_size=vocab_size, expected=expected, sample=reader.tokens.size)
            if document_mask:
                reader.index.check()

        locations += [(corpus, list(starts[first : first + batch]), window) for first in range(0, len(starts), batch)]
        if targets > tail_start and not is_sample:
            locations.append((corpus, [tail_start], targets - tail_start))

    return Windows(readers=readers, locations=locations, document_mask=document_mask)
