"""Whether what commands name is there, told without torch, whose import takes seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_mea.checkpoint.folder import META, checkpoint_folder
from megatron_mea.data.indexed import open_readers
from megatron_mea.errors import UserError
from megatron_mea.outputs import check_free_folder

INIT_FROM = "run.init_from"


def is_hugging_face(path: str | Path) -> bool:
    return Path(path, "config.json").is_file()


def check_places(model: str | Path, out: str | None = None, data: Mapping[str, str | None] | None = None) -> None:
    """What commands on a MODEL are given.

    Args:
        out: a folder that is to be written.
        data: PREFIX of prepared data, by the option that may name it.

    Raises:
        UserError: `out` is not free, or a model or data is not there.
    """
    if out is not None:
        check_free_folder(Path(out))
    check_model(model)
    for option, prefix in (data or {}).items():
        if prefix is not None:
            open_readers([prefix], option)


def check_model(path: str | Path) -> None:
    """Raises UserError where MODEL is no checkpoint folder, no run folder and no Hugging Face folder."""
    if not is_hugging_face(path):
        checkpoint_folder(path)


def check_hugging_face(path: Path) -> None:
    """Raises UserError where no Hugging Face folder stands."""
    if is_hugging_face(path):
        return
    found = "no config.json" if path.is_dir() else "a file" if path.exists() else "no such folder"
    found = "a checkpoint already" if (path / META).is_file() else found
    mend = "" if path.exists() else "`hf download NAME --local-dir HF_DIR` fetches a model of the hub"
    raise UserError(str(path), found, "a Hugging Face folder: config.json, safetensors, tokenizer", mend)


def named_checkpoint(path: Path, key: str) -> Path:
    """As `checkpoint_folder`, for a key of the configuration that may name a Hugging Face folder as well.

    Raises:
        UserError: no checkpoint stands there.
    """
    try:
        return checkpoint_folder(path)
    except UserError as error:
        allowed = f"{error.problems[0].allowed}, or a Hugging Face folder"
        raise UserError(key, f"{path}: {error.problems[0].found}", allowed) from None


def check_named(path: Path, key: str) -> None:
    """As `check_model`, for a key of the configuration."""
    if not is_hugging_face(path):
        named_checkpoint(path, key)
