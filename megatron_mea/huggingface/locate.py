"""Checks that the models and data that commands name exist, without torch, whose import takes seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_mea.checkpoint.folder import META, checkpoint_folder
from megatron_mea.data.indexed import open_readers
from megatron_mea.errors import UserError
from megatron_mea.huggingface.config_keys import read_config_json
from megatron_mea.outputs import check_free_folder

INIT_FROM = "run.init_from"
SOURCE = "HF_DIR"
"""The argument of `import`, for messages."""


def is_hf_folder(path: str | Path) -> bool:
    """Whether a folder holds a config.json."""
    return Path(path, "config.json").is_file()


def check_paths(model: str | Path, *, out: str | None = None, data: Mapping[str, str | None] | None = None) -> None:
    """Checks the paths of a command on a MODEL.

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
    """Raises UserError where MODEL is no checkpoint folder, no run folder and no Hugging Face folder that is known."""
    if is_hf_folder(path):
        read_config_json(Path(path), str(path))
    else:
        checkpoint_folder(path)


def check_hf_folder(path: Path) -> None:
    """Raises UserError where no Hugging Face folder stands, or one that is not known."""
    if is_hf_folder(path):
        read_config_json(path, SOURCE)
        return

    got = "no config.json" if path.is_dir() else "a file" if path.exists() else "no such folder"
    got = "a checkpoint already" if (path / META).is_file() else got
    hint = "" if path.exists() else "`hf download NAME --local-dir HF_DIR` fetches a model of the hub"
    raise UserError(
        where=str(path), got=got, expected="a Hugging Face folder: config.json, safetensors, tokenizer", hint=hint
    )


def named_checkpoint(path: Path, key: str) -> Path:
    """The folder of a checkpoint, or of the newest one of a run, that a key of the configuration names.

    Args:
        key: may also name a Hugging Face folder, which messages say.

    Raises:
        UserError: no checkpoint stands there.
    """
    try:
        return checkpoint_folder(path)
    except UserError as error:
        expected = f"{error.problems[0].expected}, or a Hugging Face folder"
        raise UserError(where=key, got=f"{path}: {error.problems[0].got}", expected=expected) from None


def check_named_model(path: Path, key: str) -> None:
    """Raises UserError where a configuration key names no checkpoint, no run folder and no Hugging Face folder."""
    if is_hf_folder(path):
        read_config_json(path, key)
    else:
        named_checkpoint(path, key)
