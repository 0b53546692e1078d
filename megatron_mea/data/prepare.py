"""Tokenises documents into Megatron's indexed format with parallel workers, in constant memory."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from megatron_mea.data.begin_token import tokens_around
from megatron_mea.data.indexed import IndexedWriter, remove_leftovers, token_dtype
from megatron_mea.data.metadata import Recipe, find_prepared
from megatron_mea.data.sources import check_sources, record_batches
from megatron_mea.data.text_encoder import TextEncoder
from megatron_mea.data.text_records import (
    BATCH_BYTES,
    MAX_BROKEN,
    BrokenRecords,
    ReadOptions,
    RecordBatch,
)
from megatron_mea.data.tokenizer import check_tokenizer_folder, load_tokenizer, num_rows
from megatron_mea.errors import Problem, RunError, UserError, shorten
from megatron_mea.outputs import reserve_output
from megatron_mea.printing import note
from megatron_mea.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TINY_DOCUMENT = 16
"""Tokens of an average document below which `prepare` warns."""

_MAX_PREFIX_BYTES = 200
"""A file system takes names of 255, and those of files that are being written are longer than PREFIX.meta.json."""
_DEAD_WORKER_SECONDS = 2.0
"""After so long without a result `prepare` looks whether a worker has died; the pool itself mostly sees it at once."""


def prepare(
    *,
    sources: Sequence[str],
    tokenizer_folder: str | Path,
    prefix: str | Path,
    options: ReadOptions | None = None,
    workers: int = 1,
    max_broken: float = MAX_BROKEN,
    bos: bool = False,
    force: bool = False,
) -> Prepared:
    """Writes PREFIX.bin and PREFIX.idx: the tokens of every document, with an end-of-document token after each.

    The result does not depend on the number of workers. PREFIX.meta.json says what it was made of; data that the same
    input, tokenizer and options have made is left as it is.

    Args:
        options: how sources are read; None: by the defaults.
        workers: processes that parse and tokenise, each with one thread; 1 works in this process.
        max_broken: share of lines and rows that may be broken; these are left out and reported on stderr.
        bos: put the begin token before each document.
        force: replaces what is at PREFIX, whatever has made it.

    Raises:
        UserError: PREFIX is no name or holds other data, sources or tokenizer are not usable, there is no text, a
            document is too long, or too many lines are broken.
        RunError: a worker died, a dataset broke off, or the disk is full.
    """
    name = os.path.basename(prefix)
    if name in ("", ".", "..") or len(os.fsencode(name)) > _MAX_PREFIX_BYTES:
        expected = f"PREFIX, a name of {_MAX_PREFIX_BYTES} bytes at most that .bin and .idx are added to"
        raise UserError(where="--out", got=shorten(str(prefix)), expected=expected)

    check_sources(sources)
    check_tokenizer_folder(tokenizer_folder, "--tokenizer")
    # Workers are none of these, the files being the same for every number, nor is a limit that ends the command.
    options = options or ReadOptions()
    decisive = {"text_key": options.text_key, "split": options.split, "split_at": options.split_at}
    decisive |= {"max_broken": max_broken, "bos": bos}
    recipe = Recipe.read(sources=sources, tokenizer_folder=tokenizer_folder, options=decisive)
    if not force and (found := find_prepared(prefix, recipe)) is not None:
        # Its writer may have been killed when all was done but that.
        remove_leftovers(Path(prefix))
        return Prepared(documents=found.documents, tokens=found.tokens, is_new=False)

    encoder = _open_encoder(tokenizer_folder, bos=bos)
    broken = BrokenRecords(max_broken)

    with (
        reserve_output(f"{prefix}.bin", folder=False),
        reserve_output(f"{prefix}.idx", folder=False),
        IndexedWriter(prefix, encoder.dtype) as writer,
        progress_bar(desc="prepare", unit="tok", unit_scale=True) as progress,
    ):
        for encoded in _encode_batches(
            batches=record_batches(sources, options),
            encoder=encoder,
            text_key=options.text_key,
            workers=workers,
        ):
            broken.add(encoded.records, encoded.broken)
            writer.add(encoded.tokens, encoded.lengths)
            progress.update(encoded.tokens.size)

        broken.close()
        if not writer.documents:
            raise UserError(
                where="--input", got=f"{', '.join(sources)}: no text", expected="at least one document with text"
            )

        # Another process may have been faster.
        if not force and (found := find_prepared(prefix, recipe)) is not None:
            return Prepared(documents=found.documents, tokens=found.tokens, is_new=False)

        documents, tokens = writer.commit(recipe)

    _warn_of_tiny_documents(documents, tokens)
    return Prepared(documents=documents, tokens=tokens, is_new=True)


class Prepared(NamedTuple):
    """Number of documents and tokens at a PREFIX, and whether they were written or had been there before."""

    documents: int
    tokens: int
    is_new: bool


def _warn_of_tiny_documents(documents: int, tokens: int) -> None:
    """Says on stderr that documents of a few tokens each have probably been cut at the wrong places."""
    average = tokens / documents - 1
    if documents > 1 and average < _TINY_DOCUMENT:
        note(
            f"warning: a document has {average:.1f} tokens on average. Is every line or row a whole document? "
            "Of a .txt, --split-at file makes one."
        )


def _open_encoder(tokenizer_folder: str | Path, *, bos: bool) -> Encoder:
    """The encoder of a folder; prints on stderr where documents begin unlike the tokenizer's texts.

    Raises:
        UserError: there is no usable tokenizer, or it has no begin token for `bos`.
    """
    tokenizer = load_tokenizer(tokenizer_folder, "--tokenizer")
    if bos and tokenizer.bos_token_id is None:
        got = f"{tokenizer_folder}, without a begin token (bos_token)"
        raise UserError(where="--bos", got=got, expected="a tokenizer with one, or no --bos")

    if not bos and tokens_around(tokenizer)[0]:
        note(
            f"warning: {tokenizer_folder} puts {tokenizer.decode(tokens_around(tokenizer)[0])} before a text, and the "
            "documents will not have it, nor what a run writes with them: --bos puts it before every document"
        )

    return Encoder.from_tokenizer(tokenizer, tokenizer_folder, bos=bos)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Turns texts into ids; pickled for workers as JSON, so that these need not import transformers.

    Attributes:
        folder: the tokenizer folder.
        backend: the tokenizer as JSON of the library `tokenizers`, or empty where it has Python code of its own.
        bos: the begin token's id, where documents get one.
        eos: the end-of-document id.
        dtype: dtype of the ids.
    """

    folder: str
    backend: str
    bos: int | None
    eos: int
    dtype: np.dtype

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, folder: str | Path, *, bos: bool = False) -> Encoder:
        """The encoder of a tokenizer that was loaded from `folder`."""
        dtype = token_dtype(num_rows(tokenizer))
        return cls(
            folder=str(folder),
            backend=_backend_json(tokenizer),
            bos=tokenizer.bos_token_id if bos else None,
            eos=tokenizer.eos_token_id,
            dtype=dtype,
        )

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (n,) of all texts with begin and end tokens around each, and the length (texts,) of each.

        Special tokens spelt out in a text are encoded as ordinary text, so a document cannot contain its own end.
        """
        documents = self._tokenize(texts)
        around = 1 if self.bos is None else 2
        lengths = np.fromiter((len(ids) + around for ids in documents), np.int32, len(documents))
        tokens = np.full(lengths.sum(dtype=np.int64), self.eos, self.dtype)

        for ids, end in zip(documents, np.cumsum(lengths, dtype=np.int64).tolist(), strict=True):
            tokens[end - 1 - len(ids) : end - 1] = ids

        if self.bos is not None:
            tokens[np.cumsum(lengths, dtype=np.int64) - lengths] = self.bos

        return tokens, lengths

    @cached_property
    def _tokenize(self) -> Callable[[list[str]], Sequence[Sequence[int]]]:
        """The function from texts to the ids of each, without an end-of-document token."""
        if not self.backend:
            tokenizer = load_tokenizer(self.folder, "--tokenizer")
            settings = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            return lambda texts: tokenizer(texts, **settings)["input_ids"] if texts else []

        return TextEncoder(self.backend)


def _backend_json(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer as JSON of the library `tokenizers`, or empty where Python code of its own encodes."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    tokenizer_class = type(tokenizer)
    if (
        not isinstance(tokenizer, PreTrainedTokenizerFast)
        or tokenizer_class.__call__ is not PreTrainedTokenizerBase.__call__
        or tokenizer_class._encode_plus is not PreTrainedTokenizerFast._encode_plus
    ):
        return ""

    try:
        return tokenizer.backend_tokenizer.to_str()
    except Exception:
        # Components that are written in Python cannot be serialised.
        return ""


@dataclass(frozen=True, kw_only=True)
class _EncodedBatch:
    """Tokens of a batch of `records` records, the length of each document, and the problems of broken records."""

    records: int
    tokens: np.ndarray
    lengths: np.ndarray
    broken: list[Problem]


def _encode_batch(*, encoder: Encoder, batch: RecordBatch, text_key: str) -> _EncodedBatch:
    texts, broken = batch.texts(text_key)
    tokens, lengths = encoder(texts)
    return _EncodedBatch(records=len(batch.records), tokens=tokens, lengths=lengths, broken=broken)


def _encode_batches(
    *, batches: Iterable[RecordBatch], encoder: Encoder, text_key: str, workers: int
) -> Iterator[_EncodedBatch]:
    """Tokenises batches in `workers` processes; yields them in their order."""
    if workers == 1:
        yield from (_encode_batch(encoder=encoder, batch=batch, text_key=text_key) for batch in batches)
        return

    # Not forked: forking a process that has started threads can deadlock.
    context = get_context("spawn")
    with ProcessPoolExecutor(
        max_workers=workers, mp_context=context, initializer=_init_worker, initargs=(encoder,)
    ) as pool:
        pending: deque[tuple[Future, int]] = deque()
        try:
            for batch in batches:
                # A worker that is started here inherits the mask, so that this process alone handles Ctrl-C.
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                pending.append((pool.submit(_encode_in_worker, batch, text_key), batch.size))
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

                # Bounded, so that fast reading does not fill the memory; long documents wait one a worker.
                while len(pending) >= 4 * workers or (
                    len(pending) >= workers and sum(size for _, size in pending) > 8 * workers * BATCH_BYTES
                ):
                    yield _result(pending.popleft()[0], pool)

            while pending:
                yield _result(pending.popleft()[0], pool)
        except BrokenProcessPool:
            raise RunError("prepare: a worker died; if memory ran out, take fewer --workers") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _result(future: Future, pool: ProcessPoolExecutor) -> Any:
    """The result of a future, also where a worker dies in the middle of a message.

    The pool sees a death at once, unless a part of a message has come: then it waits for the rest, for ever. Without
    any writer of the pipe that wait ends, and the pool breaks as usual.

    Raises:
        BrokenProcessPool: a worker died.
    """
    is_closed = False
    while not wait([future], timeout=_DEAD_WORKER_SECONDS).done:
        workers = list((pool._processes or {}).values())
        if not is_closed and any(worker.exitcode is not None for worker in workers):
            for worker in workers:
                worker.kill()

            pool._result_queue._writer.close()
            is_closed = True

    return future.result()


_worker_encoder: Encoder


def _init_worker(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Waits for the parent's death and exits: a killed parent cannot end its workers, which would wait for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(batch: RecordBatch, text_key: str) -> _EncodedBatch:
    return _encode_batch(encoder=_worker_encoder, batch=batch, text_key=text_key)
