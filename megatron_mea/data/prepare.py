"""Tokenises documents into the indexed format with parallel workers, in constant memory."""

from __future__ import annotations

import os
import signal
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_mea.data.indexed import IndexedWriter, token_dtype
from megatron_mea.data.records import MAX_BROKEN, BrokenRecords, Records
from megatron_mea.data.sources import batches, check_sources
from megatron_mea.data.tokenizer import load_tokenizer
from megatron_mea.errors import Problem, RunError, UserError
from megatron_mea.outputs import output_place
from megatron_mea.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare(
    sources: Sequence[str],
    tokenizer_folder: str | Path,
    prefix: str | Path,
    text_key: str = "text",
    split: str = "train",
    workers: int = 1,
    max_broken: float = MAX_BROKEN,
) -> tuple[int, int]:
    """Writes PREFIX.bin and PREFIX.idx: every document's tokens with an end-of-document token after each.

    The result does not depend on the number of workers. Returns (documents, tokens).

    Args:
        workers: processes that read and tokenise, each with one thread; 1 works in this process.
        max_broken: the share of lines and rows that may be broken; these are left out and reported on stderr.

    Raises:
        UserError: PREFIX is no name, sources or tokenizer are not usable, hold no text, or too many lines are broken.
        RunError: a worker died, a dataset broke off, or the disk is full.
    """
    if os.path.basename(prefix) in ("", ".", ".."):
        raise UserError("--out", repr(str(prefix)), "PREFIX, a name that .bin and .idx are added to")
    check_sources(sources)
    encoder = Encoder.of(load_tokenizer(tokenizer_folder, "--tokenizer"), tokenizer_folder)
    broken = BrokenRecords(max_broken)
    with (
        output_place(f"{prefix}.bin", folder=False),
        output_place(f"{prefix}.idx", folder=False),
        IndexedWriter(prefix, encoder.dtype) as writer,
        progress_bar(desc="prepare", unit="tok", unit_scale=True) as progress,
    ):
        for done in _encoded(batches(sources, text_key, split), encoder, text_key, workers):
            broken.add(done.records, done.broken)
            writer.add(done.tokens, done.lengths)
            progress.update(done.tokens.size)
        broken.close()
        if not writer.documents:
            raise UserError("--input", f"{', '.join(sources)}: no text", "at least one document with text")
        return writer.commit()


@dataclass(frozen=True)
class Encoder:
    """Turns texts into ids; travels to workers as text, so that they need not import transformers.

    Attributes:
        folder: the tokenizer's.
        backend: the tokenizer in the format of the library `tokenizers`, or nothing where it has code of its own.
        eos: the end-of-document id.
        dtype: of the ids.
    """

    folder: str
    backend: str
    eos: int
    dtype: np.dtype

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Encoder:
        # Ids may have gaps, so that the largest is more than their number says.
        largest = max(tokenizer.get_vocab().values())
        dtype = token_dtype(max(len(tokenizer), largest + 1))
        return cls(str(folder), _backend(tokenizer), tokenizer.eos_token_id, dtype)

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of all texts, an end-of-document token after each, and the length of each.

        Special tokens spelt out in a text stay text: a document cannot end another one.
        """
        documents = self._ids(texts)
        lengths = np.fromiter((len(ids) + 1 for ids in documents), np.int32, len(documents))
        tokens = np.full(lengths.sum(dtype=np.int64), self.eos, self.dtype)
        for ids, end in zip(documents, np.cumsum(lengths, dtype=np.int64).tolist(), strict=True):
            # By way of an array, which numpy takes over three times as fast as a list.
            tokens[end - 1 - len(ids) : end - 1] = array("I", ids)
        return tokens, lengths

    @cached_property
    def _ids(self) -> Callable[[list[str]], list[list[int]]]:
        if not self.backend:
            tokenizer = load_tokenizer(self.folder, "--tokenizer")
            settings = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            return lambda texts: tokenizer(texts, **settings)["input_ids"] if texts else []
        from tokenizers import Tokenizer

        # One thread a worker: the parallelism is over workers.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        backend = Tokenizer.from_str(self.backend)
        backend.encode_special_tokens = True
        # A tokenizer.json may bring both along; transformers switches them off, too.
        backend.no_truncation()
        backend.no_padding()
        return lambda texts: [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _backend(tokenizer: PreTrainedTokenizerBase) -> str:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    if (
        not isinstance(tokenizer, PreTrainedTokenizerFast)
        or kind.__call__ is not PreTrainedTokenizerBase.__call__
        or kind._encode_plus is not PreTrainedTokenizerFast._encode_plus
    ):
        return ""
    try:
        return tokenizer.backend_tokenizer.to_str()
    except Exception:
        # Parts that are written in Python cannot be spelt as text.
        return ""


@dataclass(frozen=True)
class _Done:
    """A batch of `records` records: tokens, the length of each document, and what was wrong with broken records."""

    records: int
    tokens: np.ndarray
    lengths: np.ndarray
    broken: list[Problem]


def _encode(encoder: Encoder, batch: Records, text_key: str) -> _Done:
    texts, broken = batch.texts(text_key)
    return _Done(len(batch.records), *encoder(texts), broken)


def _encoded(remaining: Iterable[Records], encoder: Encoder, text_key: str, workers: int) -> Iterator[_Done]:
    """Every batch tokenised, in the order given."""
    if workers == 1:
        yield from (_encode(encoder, batch, text_key) for batch in remaining)
        return
    # A fresh interpreter for each worker: forking a process that has started threads can deadlock.
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (encoder,)) as pool:
        pending: deque[Future] = deque()
        try:
            for batch in remaining:
                # A worker that is started here inherits the block: it is this process that answers Ctrl-C.
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                pending.append(pool.submit(_encode_in_worker, batch, text_key))
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
                # Only so many batches wait, so that a fast reader does not fill the memory.
                if len(pending) >= 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise RunError("prepare: a worker died; if memory ran out, take fewer --workers") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_worker_encoder: Encoder


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers, and these would wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(batch: Records, text_key: str) -> _Done:
    return _encode(_worker_encoder, batch, text_key)
