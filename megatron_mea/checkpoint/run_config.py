"""The configuration of a run that may have checkpoints already: keys that must not change, and where they come from."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mea.checkpoint.folder import CheckpointMetadata, complete_checkpoints, intact_checkpoints
from megatron_mea.config.checks import start_checks
from megatron_mea.config.load import parse_config, read_tree
from megatron_mea.config.schema import Config
from megatron_mea.errors import UserError
from megatron_mea.run_folder import RunFolder

FIXED_KEYS = (
    "model",
    "data.seq_length",
    "data.document_mask",
    "training.global_batch_size",
    "training.seed",
    "training.precision",
    "training.balance",
    "training.router_z_loss_coef",
)
"""Keys, or sections with all their keys, that must not change on resume: they decide on the losses of a run."""


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, list[str]]:
    """Reads a configuration as `load_config`; `FIXED_KEYS` that it does not name come from the run's checkpoint.

    A program whose defaults have changed, or that has more keys, then resumes a run with the values that it began with.

    Returns:
        The configuration, and lines to print: the keys that the checkpoint decided otherwise than the program would.

    Raises:
        UserError: as `load_config`; or the run must not start so, is another one than the file's own folder holds, or a
            newer program wrote its checkpoint.
    """
    tree = read_tree(path, overrides)
    if not any(override.startswith("run.dir=") for override in overrides):
        _check_own_folder(Path(path), tree["run"])

    config, lines = _parse_with_stored_values(tree)
    if problems := list(start_checks(config)):
        raise UserError.from_problems(problems)

    return config, lines


def _check_own_folder(path: Path, run: Any) -> None:
    """Raises UserError where a run folder's own configuration names another folder, as after a move or a copy.

    The run there would begin anew, or go on in the place of this one.
    """
    if not isinstance(run, dict) or not isinstance(run["dir"], str):
        return

    file = path.resolve().parent / path.name
    for folder in file.parents[:2]:
        if file not in (RunFolder(folder).config, RunFolder(folder).job_config):
            continue
        # Containers may mount one folder under two names.
        is_same = os.path.isdir(run["dir"]) and os.path.samefile(run["dir"], folder)
        if complete_checkpoints(folder) and not is_same:
            raise UserError(
                where="run.dir",
                got=f"{run['dir']}, in the {path.name} of the run folder {folder}",
                expected="that folder, or run.dir=FOLDER on the command line",
                hint=f"run.dir={folder} goes on with the run that lies there",
            )


def _parse_with_stored_values(tree: dict[str, Any]) -> tuple[Config, list[str]]:
    """Parses `tree` with the values of the run's checkpoint for the `FIXED_KEYS` that it does not name; with lines."""
    inherited = {key: value for key, value in _stored_values(tree).items() if not _names(tree, key)}
    if not inherited:
        return parse_config(tree), []

    merged = copy.deepcopy(tree)
    for key, value in inherited.items():
        section, _, name = key.partition(".")
        merged.setdefault(section, {})[name] = value

    try:
        config = parse_config(merged)
    except UserError:
        # The tree contradicts the checkpoint. Where it is sound by itself, `check_resume` says in which keys.
        if (alone := _parse_or_none(tree)) is None:
            raise
        return alone, []

    placeholders = {"data": {"tokenizer": "none", "train": []}, "run": {"dir": "none"}}
    decided = _parse_or_none(tree) or parse_config(placeholders, needs_data=False)
    defaults = _fixed_values(decided.model_dump(mode="json"))
    return config, [
        f"{key} = {value}, as in its checkpoint: the configuration does not name it"
        for key, value in inherited.items()
        if value != defaults.get(key)
    ]


def _stored_values(tree: dict[str, Any]) -> dict[str, Any]:
    """`_fixed_values` of the newest checkpoint of the run that `tree` names; empty where there is none of a run."""
    run_dir = tree["run"].get("dir") if isinstance(tree["run"], dict) else None
    try:
        checkpoints = intact_checkpoints(run_dir) if isinstance(run_dir, str) else []
    except OSError:
        # A folder that cannot be read has no checkpoint for a plan; training refuses it by itself.
        return {}

    metadata = CheckpointMetadata.read(checkpoints[-1][1]) if checkpoints else None
    return {} if metadata is None or metadata.origin else _fixed_values(metadata.config)


def _fixed_values(config: dict[str, Any]) -> dict[str, Any]:
    """The values of a configuration for `FIXED_KEYS`; those of a section by each of its keys."""
    values = {}
    for key in FIXED_KEYS:
        section, _, name = key.partition(".")
        fields = config.get(section, {})
        for field in [name] if name else Config.model_fields[section].annotation.model_fields:
            if field in fields:
                values[f"{section}.{field}"] = fields[field]

    return values


def _names(tree: dict[str, Any], key: str) -> bool:
    """Whether `tree` has this key, `null` included, or a value in the place of its section, which will be refused."""
    section, _, name = key.partition(".")
    fields = tree.get(section, {})
    return not isinstance(fields, dict) or name in fields


def _parse_or_none(tree: dict[str, Any]) -> Config | None:
    try:
        return parse_config(tree)
    except UserError:
        return None
