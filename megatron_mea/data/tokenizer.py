"""Tokenizers: training a sentencepiece BPE, and loading any Hugging Face tokenizer folder."""

from __future__ import annotations

import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mea.data.sources import check_sources, documents
from megatron_mea.errors import RunError, UserError
from megatron_mea.outputs import output_place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_FILES = (
    *_VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
)


def load_tokenizer(folder: str | Path, where: str = "data.tokenizer") -> PreTrainedTokenizerBase:
    """A tokenizer folder as `AutoTokenizer` loads it; no code from the folder is run.

    Args:
        where: the key or option that named the folder, for the message.

    Raises:
        UserError: it is not there, cannot be loaded, or has no end-of-document (eos) token.
    """
    check_tokenizer_folder(folder, where)
    from transformers import AutoTokenizer
    from transformers.utils import logging

    # It warns of every model type that it does not know, though only the tokenizer is asked for.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        found = f"{folder}, which does not load ({type(error).__name__}: {reason})"
        raise UserError(where, found, "a Hugging Face tokenizer folder") from None
    if tokenizer.eos_token_id is None:
        mend = "set `eos_token` in its tokenizer_config.json"
        raise UserError(where, f"{folder}, without an eos token", "a tokenizer with an end-of-document token", mend)
    return tokenizer


def copy_tokenizer(folder: str | Path, target: Path) -> None:
    """Copies the tokenizer's files alone: the folder may be that of a whole model."""
    target.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        if Path(folder, name).is_file():
            shutil.copy(Path(folder, name), target)


def check_tokenizer_folder(folder: str | Path, where: str) -> None:
    """The part of `load_tokenizer`'s checks that needs no library: it exists and looks like a tokenizer."""
    path = Path(folder)
    if not path.is_dir():
        mend = "make one with `megatron-mea tokenizer`"
        raise UserError(where, f"{folder}, which is no folder", "a Hugging Face tokenizer folder", mend)
    if not any((path / name).is_file() for name in _FILES):
        raise UserError(where, f"{folder}, without tokenizer files", "a Hugging Face tokenizer folder")


def train_tokenizer(sources: Sequence[str], vocab_size: int, out: str | Path, text_key: str = "text") -> None:
    """Trains a sentencepiece BPE with byte fallback and writes it as a Hugging Face tokenizer folder.

    Args:
        vocab_size: counts every id: 4 special ones and 256 bytes included, so `len(tokenizer) == vocab_size`.
        out: gets `tokenizer.model`, `tokenizer.json` and `tokenizer_config.json`.

    Raises:
        UserError: no text, or a vocabulary that the text cannot fill or that cannot hold its characters.
        RunError: the disk is full; `out` is as it was.
    """
    if not 261 <= vocab_size <= 10_000_000:
        raise UserError("--vocab-size", vocab_size, "261 (4 special ids, 256 bytes and one piece) to 10,000,000")
    check_sources(sources)
    import sentencepiece

    with (
        output_place(out, folder=True) as out,
        _disk(out),
        tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch,
    ):
        sentences, trained = _Sentences(sources, text_key), io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=sentences,
                # Not to a file: its path would be recorded in the model.
                model_writer=trained,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                split_digits=True,
                character_coverage=0.9999,
                # Text comes back as it went in: nothing is normalised or stripped.
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                required_chars="\n<>{}",
                max_sentence_length=1 << 16,
                input_sentence_size=5_000_000,
                shuffle_input_sentence=True,
                num_threads=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=3,
                minloglevel=2,
            )
        except RuntimeError as error:
            if sentences.error is not None:
                raise sentences.error from None
            # sentencepiece prefixes its C++ source line: keep the sentence that speaks to the user.
            reason = str(error).strip().splitlines()[-1].rpartition("] ")[2]
            raise UserError("--vocab-size", vocab_size, "a size that fits the text", reason) from None
        made = Path(scratch) / "tokenizer"
        made.mkdir()
        model = made / "tokenizer.model"
        model.write_bytes(trained.getvalue())
        _to_hugging_face(model, made)
        if out.exists():
            for file in sorted(made.iterdir()):
                shutil.move(file, out / file.name)
        else:
            made.rename(out)


@contextmanager
def _disk(out: Path) -> Iterator[None]:
    """Says so where the disk refuses what is written for `out`."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error.strerror}") from error
    except Exception as error:
        # The library `tokenizers` raises a bare Exception: `File too large (os error 27)`.
        if type(error) is Exception and (found := re.fullmatch(r"(.*) \(os error \d+\)", str(error))):
            raise RunError(f"{out} cannot be written: {found[1]}") from error
        raise


class _Sentences:
    """The lines of the documents (sentencepiece takes no newline inside a sentence).

    sentencepiece turns whatever is raised here into an error of its own, so what was raised is kept in `error`.
    """

    def __init__(self, sources: Sequence[str], text_key: str) -> None:
        self.error: UserError | RunError | None = None
        self._lines = self._read(sources, text_key)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return next(self._lines)
        except (UserError, RunError) as error:
            self.error = error
            raise

    def _read(self, sources: Sequence[str], text_key: str) -> Iterator[str]:
        empty = True
        for text in documents(sources, text_key):
            for line in text.splitlines():
                if line.strip():
                    empty = False
                    # sentencepiece drops what is longer; a piece never spans so many characters.
                    yield from (line[at : at + 8192] for at in range(0, len(line), 8192))
        if empty:
            raise UserError("--input", ", ".join(sources) + ": no text", "sources with text")


def _to_hugging_face(model: Path, out: Path) -> None:
    """The same tokenizer for the `tokenizers` library, id for id.

    transformers' own conversion treats lines that begin with a space differently, so the merges are rebuilt
    here: every split of a piece into two pieces, best-scored piece first, as sentencepiece applies them.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    trained = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ids = range(trained.get_piece_size())
    vocab = {trained.id_to_piece(i): i for i in ids}
    score = {
        trained.id_to_piece(i): trained.get_score(i)
        for i in ids
        if not (trained.is_byte(i) or trained.is_control(i) or trained.is_unknown(i))
    }
    merges = []
    for piece, value in score.items():
        splits = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        known = [(left, right) for left, right in splits if left in score and right in score]
        merges += [(-value, vocab[left], vocab[right], (left, right)) for left, right in known]
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            [pair for *_, pair in sorted(merges)],
            unk_token=SPECIAL["unk_token"],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL.values()])
    # `PreTrainedTokenizerFast` is the class name that readers other than transformers 5 know as well.
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL)
    fast.save_pretrained(out)
    config = out / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))
