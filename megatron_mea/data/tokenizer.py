"""Tokenizers: training a sentencepiece BPE, and loading any Hugging Face tokenizer folder."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_mea.config.schema import MAX_SIZE
from megatron_mea.data.sources import check_sources, read_documents
from megatron_mea.data.text_records import MAX_DOCUMENT, ReadOptions
from megatron_mea.errors import RunError, UserError, shorten
from megatron_mea.inputs import read_json_object
from megatron_mea.outputs import (
    flush,
    flush_tree,
    publish,
    remove_leftovers,
    reserve_output,
    restored_on_failure,
    scratch_folder,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_VOCABULARY_PATTERNS = ("*.model", "*.spm", "*vocab*.json", "tokenizer.*.json", "bpe.codes")
"""Names of vocabularies of less usual classes, such as `spm.model`."""
_TOKENIZER_FILES = (
    *_VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
)


MAX_IDS = 1 << 24
"""More than any vocabulary has."""


def load_tokenizer(folder: str | Path, where: str = "data.tokenizer") -> PreTrainedTokenizerBase:
    """Loads a tokenizer folder with `AutoTokenizer`; runs no code from the folder.

    Args:
        where: the key or option that named the folder, for the message.

    Raises:
        UserError: the folder does not exist or load, or the tokenizer has no vocabulary or no end-of-document (eos)
            token.
    """
    check_tokenizer_folder(folder, where)
    _check_ids(Path(folder), where)
    from transformers import AutoTokenizer
    from transformers.utils import logging

    # transformers warns of every model type that it does not know, though only the tokenizer is loaded.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), config=_model_config(Path(folder)), trust_remote_code=False, local_files_only=True
        )
        if not isinstance(tokenizer.model_max_length, int | float):
            raise TypeError(f"model_max_length = {shorten(tokenizer.model_max_length)} is no number")
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        got = f"{folder}, which does not load ({type(error).__name__}: {reason})"
        raise UserError(where=where, got=got, expected="a Hugging Face tokenizer folder") from None

    # The library makes a tokenizer for which every text is empty where a class does not find its vocabulary.
    if len(tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens}) < 2:
        raise UserError(
            where=where,
            got=f"{folder}, without a vocabulary",
            expected=f"a file of it, such as {' or '.join(_VOCABULARY_FILES[:2])}",
            hint="a download may be incomplete",
        )

    if tokenizer.eos_token_id is None:
        raise UserError(
            where=where,
            got=f"{folder}, without an eos token",
            expected="a tokenizer with an end-of-document token",
            hint="set `eos_token` in its tokenizer_config.json",
        )

    return tokenizer


def num_rows(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that a matrix of embeddings needs for all ids, which may have gaps."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def _model_config(folder: Path) -> PreTrainedConfig:
    """Stands for config.json, by which transformers may choose the class of a tokenizer.

    It would make a configuration of all that the file says, of which the kind of model and the class are needed.
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    file = folder / "config.json"
    contents = read_json_object(file) if file.is_file() else {}
    model_type, tokenizer_class = contents.get("model_type"), contents.get("tokenizer_class")
    is_known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    config = (CONFIG_MAPPING[model_type] if is_known else PreTrainedConfig)(name_or_path=str(folder))
    if isinstance(tokenizer_class, str):
        config.tokenizer_class = tokenizer_class

    return config


def _check_ids(folder: Path, where: str) -> None:
    """Refuses ids for which the library would take gigabytes, or panic, which Python cannot catch.

    Raises:
        UserError: tokenizer.json has an id that is too large, or there twice.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return

    try:
        contents = read_json_object(file, max_bytes=1 << 30)
        vocabulary = (contents.get("model") or {}).get("vocab") or {}
        # BPE maps tokens to ids; Unigram has a list of them.
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
        added_ids = [token["id"] for token in contents.get("added_tokens") or () if token["content"] not in vocabulary]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # The library says what is wrong.
        return

    got = f"{file}, in which two tokens have the same id" if len(set(map(str, ids))) < len(ids) else ""
    for token_id in [*ids, *added_ids]:
        if type(token_id) is not int or not 0 <= token_id < MAX_IDS:
            got = f"{file}, with the id {token_id!r}"

    if got:
        raise UserError(where=where, got=got, expected=f"tokens with an id each, from 0 to {MAX_IDS - 1:,}")


def tokenizer_fingerprint(folder: str | Path) -> str:
    """SHA-256 over the files of a tokenizer that decide on its ids."""
    digest = hashlib.sha256()
    # Without the library, which knows the names of each class, and takes seconds to import.
    others = {path.name for pattern in _VOCABULARY_PATTERNS for path in Path(folder).glob(pattern)}
    for name in (*_TOKENIZER_FILES, *sorted(others - {*_TOKENIZER_FILES})):
        path = Path(folder, name)
        if path.is_file() and name != "chat_template.jinja":
            with path.open("rb") as stream:
                digest.update(f"{name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())

    return digest.hexdigest()


def copy_tokenizer(folder: str | Path, target: Path) -> None:
    """Copies the files of a tokenizer alone from `folder`, which may hold a model too.

    The copy loads as the same class, without the config.json of a model.
    """
    for file in _tokenizer_files(Path(folder)):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(folder, file), target / file)

    if Path(folder, "config.json").is_file():
        tokenizer_class = type(load_tokenizer(folder, str(folder)))
        if type(load_tokenizer(target, str(target))) is not tokenizer_class:
            update_tokenizer_config(target, tokenizer_class=tokenizer_class.__name__)
            load_tokenizer(target, str(target))


def _tokenizer_files(folder: Path) -> list[Path]:
    """The files that the library reads and writes for a tokenizer in this folder, chat templates among them."""
    from transformers import tokenization_utils_base as library
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    model_config = folder / "config.json"
    model_type = read_json_object(model_config).get("model_type") if model_config.is_file() else None
    class_name = _read_config(folder).get("tokenizer_class") or TOKENIZER_MAPPING_NAMES.get(str(model_type))
    tokenizer_class = tokenizer_class_from_name(str(class_name))
    names = {
        *_TOKENIZER_FILES,
        *(library.FULL_TOKENIZER_FILE, library.TOKENIZER_CONFIG_FILE, library.SPECIAL_TOKENS_MAP_FILE),
        *(library.ADDED_TOKENS_FILE, library.CHAT_TEMPLATE_FILE),
        *getattr(tokenizer_class, "vocab_files_names", {}).values(),
    }
    # A file for each version of the library is an old custom of it.
    files = [file for file in folder.glob("*") if file.name in names or file.match("tokenizer.*.json")]
    files += (folder / library.CHAT_TEMPLATE_DIR).glob("*.jinja")
    return sorted(file.relative_to(folder) for file in files if file.is_file())


def limit_length(folder: Path, max_tokens: int) -> None:
    """Makes a tokenizer say that a text has at most `max_tokens`, unless it says fewer."""
    length = _read_config(folder).get("model_max_length")
    if not isinstance(length, int | float) or not 0 < length <= max_tokens:
        update_tokenizer_config(folder, model_max_length=max_tokens)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return read_json_object(file) if file.is_file() else {}


def update_tokenizer_config(folder: Path, **changes: Any) -> None:
    """Changes keys of a tokenizer_config.json, which need not be there."""
    text = json.dumps(_read_config(folder) | changes, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def has_tokenizer_files(folder: Path) -> bool:
    """Whether a file of a tokenizer is there, which need not load."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def check_tokenizer_folder(folder: str | Path, where: str) -> None:
    """Raises UserError unless the folder exists and holds tokenizer files; imports no library."""
    path = Path(folder)
    if not path.is_dir():
        raise UserError(
            where=where,
            got=f"{folder}, which is no folder",
            expected="a Hugging Face tokenizer folder",
            hint="make one with `megatron-mea tokenizer`",
        )

    if not has_tokenizer_files(path):
        raise UserError(
            where=where, got=f"{folder}, without tokenizer files", expected="a Hugging Face tokenizer folder"
        )


def train_tokenizer(
    *,
    sources: Sequence[str],
    vocab_size: int,
    out: str | Path,
    text_key: str = "text",
    split_at: Literal["file", "blank-lines"] = "file",
    max_document: int = MAX_DOCUMENT,
) -> None:
    """Trains a sentencepiece BPE with byte fallback and writes it as a Hugging Face tokenizer folder.

    Args:
        text_key, split_at, max_document: as in `ReadOptions`.
        vocab_size: number of all ids (`len(tokenizer)`), 4 special ones and 256 bytes included.
        out: folder for `tokenizer.model`, `tokenizer.json` and `tokenizer_config.json`.

    Raises:
        UserError: there is no text or too long a document, it cannot fill the vocabulary, or the vocabulary cannot
            hold its characters.
        RunError: the disk is full; `out` is as it was.
    """
    if not 261 <= vocab_size <= MAX_SIZE:
        expected = f"261 (4 special ids, 256 bytes and one piece) to {MAX_SIZE:,}, the most of model.vocab_size"
        raise UserError(where="--vocab-size", got=vocab_size, expected=expected)

    check_sources(sources)
    options = ReadOptions(text_key=text_key, split_at=split_at, max_document=max_document)
    import sentencepiece

    with (
        reserve_output(out, folder=True) as out,
        _disk_errors(out),
        # An existing folder may be another file system, and only its files are replaced.
        scratch_folder(out / "tokenizer" if out.exists() else out) as scratch,
    ):
        remove_leftovers(out)
        sentences, model_bytes = _SentenceIterator(sources, options), io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=sentences,
                # Not to a file: its path would be recorded in the model.
                model_writer=model_bytes,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                split_digits=True,
                character_coverage=0.9999,
                # Decoding must give the text unchanged, so nothing is normalised or stripped.
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
            # sentencepiece prefixes its C++ source line: keep the sentence behind it.
            reason = str(error).strip().splitlines()[-1].rpartition("] ")[2]
            raise UserError(
                where="--vocab-size", got=vocab_size, expected="a size that fits the text", hint=reason
            ) from None

        staging = scratch / "tokenizer"
        staging.mkdir()
        model = staging / "tokenizer.model"
        model.write_bytes(model_bytes.getvalue())
        _write_hugging_face_files(model, staging)

        flush_tree(staging)
        if not out.exists():
            publish(staging, out)
            return

        names = sorted(file.name for file in staging.iterdir())
        with restored_on_failure([out / name for name in names]):
            for name in names:
                (staging / name).replace(out / name)
            flush(out)


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Turns the disk's errors in the block into a RunError that says why `out` cannot be written."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error.strerror}") from error
    except Exception as error:
        # The library `tokenizers` raises a bare Exception: `File too large (os error 27)`.
        if type(error) is Exception and (os_error := re.fullmatch(r"(.*) \(os error \d+\)", str(error))):
            raise RunError(f"{out} cannot be written: {os_error[1]}") from error
        raise


class _SentenceIterator:
    """Iterates over the lines of the documents, since sentencepiece takes no newline inside a sentence.

    sentencepiece replaces every exception of this iterator by one of its own; `error` keeps the original.
    """

    def __init__(self, sources: Sequence[str], options: ReadOptions) -> None:
        self.error: UserError | RunError | None = None
        self._lines = self._read(sources, options)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return next(self._lines)
        except (UserError, RunError) as error:
            self.error = error
            raise

    def _read(self, sources: Sequence[str], options: ReadOptions) -> Iterator[str]:
        is_empty = True
        for text in read_documents(sources, options=options):
            for line in text.splitlines():
                if line.strip():
                    is_empty = False
                    # sentencepiece drops longer sentences; no piece spans so many characters.
                    yield from (line[start : start + 8192] for start in range(0, len(line), 8192))

        if is_empty:
            raise UserError(where="--input", got=", ".join(sources) + ": no text", expected="sources with text")


def _write_hugging_face_files(model: Path, out: Path) -> None:
    """Converts a sentencepiece model into tokenizer.json and tokenizer_config.json with the same ids.

    transformers' own conversion treats lines that begin with a space differently, so the merges are rebuilt
    here: every split of a piece into two pieces, best-scored piece first, as sentencepiece applies them.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ids = range(processor.get_piece_size())
    vocab = {processor.id_to_piece(i): i for i in ids}
    scores = {
        processor.id_to_piece(i): processor.get_score(i)
        for i in ids
        if not (processor.is_byte(i) or processor.is_control(i) or processor.is_unknown(i))
    }

    merges = []
    for piece, score in scores.items():
        splits = [(piece[:end], piece[end:]) for end in range(1, len(piece))]
        known = [(left, right) for left, right in splits if left in scores and right in scores]
        merges += [(-score, vocab[left], vocab[right], (left, right)) for left, right in known]

    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            [pair for *_, pair in sorted(merges)],
            unk_token=SPECIAL_TOKENS["unk_token"],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS.values()]
    )

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS)
    fast.save_pretrained(out)

    # Only transformers 5 knows the class name `TokenizersBackend`.
    config = out / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))
