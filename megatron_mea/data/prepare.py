"""Tokenises documents into the indexed format with parallel workers, in constant memory."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_mea.data.indexed import IndexedWriter, token_dtype
from megatron_mea.data.sources import check_sources, documents
from megatron_mea.data.tokenizer import load_tokenizer
from megatron_mea.errors import UserError
from megatron_mea.outputs import output_place
from megatron_mea.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 128
"""Documents a worker gets at a time."""


def prepare(
    sources: Sequence[str],
    tokenizer_folder: str | Path,
    prefix: str | Path,
    text_key: str = "text",
    split: str = "train",
    workers: int = 1,
) -> tuple[int, int]:
    """Writes PREFIX.bin and PREFIX.idx: every document's tokens with an end-of-document token after each.

    The result does not depend on the number of workers. Returns (documents, tokens).

    Raises:
        UserError: sources or tokenizer are not usable, or hold no text.
    """
    check_sources(sources)
    tokenizer = load_tokenizer(tokenizer_folder, "--tokenizer")
    texts = documents(sources, text_key, split)
    with (
        output_place(f"{prefix}.bin", folder=False),
        output_place(f"{prefix}.idx", folder=False),
        IndexedWriter(prefix, token_dtype(len(tokenizer))) as writer,
        progress_bar(desc="prepare", unit="tok", unit_scale=True) as progress,
    ):
        empty = True
        for tokens, lengths in _encoded(texts, str(tokenizer_folder), tokenizer, workers):
            writer.add(tokens, lengths)
            progress.update(tokens.size)
            empty = False
        if empty:
            raise UserError("--input", f"{', '.join(sources)}: no text", "at least one document with text")
        return writer.commit()


def _encoded(
    texts: Iterable[str], folder: str, tokenizer: PreTrainedTokenizerBase, workers: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, lengths) of each batch of documents, in the order of the documents."""
    remaining = iter(texts)
    batches = iter(lambda: list(islice(remaining, _BATCH)), [])
    if workers == 1:
        yield from (encode(tokenizer, batch) for batch in batches)
        return
    # A fresh interpreter for each worker: forking a process that has started threads can deadlock.
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (folder,)) as pool:
        pending: deque[Future] = deque()
        try:
            for batch in batches:
                # A worker that is started here inherits the block: it is this process that answers Ctrl-C.
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                pending.append(pool.submit(_encode_in_worker, batch))
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
                # Only so many batches wait, so that a fast reader does not fill the memory.
                if len(pending) >= 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all texts, an end-of-document token after each, and the length of each.

    Special tokens spelt out in the text stay text: a document cannot end another one.
    """
    batch = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    ids = [np.asarray([*document, tokenizer.eos_token_id], dtype=np.int64) for document in batch]
    return np.concatenate(ids), np.asarray([document.size for document in ids], dtype=np.int32)


_worker_tokenizer: PreTrainedTokenizerBase


def _start_worker(folder: str) -> None:
    global _worker_tokenizer
    # One thread a worker: the parallelism is over workers.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = load_tokenizer(folder, "--tokenizer")


def _encode_in_worker(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    return encode(_worker_tokenizer, texts)
