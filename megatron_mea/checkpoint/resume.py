"""From which checkpoint a run goes on, and with which changes of its configuration it may."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_mea.checkpoint.folder import Meta, all_checkpoints, damage, set_aside
from megatron_mea.config import Config
from megatron_mea.errors import Problem, UserError

_FIXED = (
    "model",
    "data.seq_length",
    "data.document_mask",
    "training.global_batch_size",
    "training.seed",
    "training.precision",
)
"""Keys (sections with all their keys) that decide on the numbers of a run: equal on resume."""


def newest_whole(run_dir: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose checksums hold, and a line for each damaged one that was set aside."""
    notes = []
    for _, folder in reversed(all_checkpoints(run_dir)):
        problem = damage(folder)
        if problem is None:
            return folder, notes
        notes.append(f"{folder} is damaged ({problem}); renamed to {set_aside(folder).name}")
    if notes:
        notes.append("no whole checkpoint is left: the run begins anew")
    return None, notes


def check_resume(meta: Meta, config: Config, fingerprint: list[dict[str, Any]] | None) -> list[str]:
    """Whether `config` may go on from a checkpoint; returns the allowed changes as lines to print.

    Args:
        fingerprint: of the training data; None leaves the data out of the comparison.

    Raises:
        UserError: a key that must not change has changed, or the data has; names old and new values.
    """
    old, new = _flat(meta.config), _flat(config.model_dump(mode="json"))
    fixed, changed = [], []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        if any(key == name or key.startswith(f"{name}.") for name in _FIXED):
            mend = "restore the old value, or start a new run with another run.dir"
            fixed.append(Problem(key, after, f"{before}, as in the checkpoint of step {meta.step}", mend))
        else:
            changed.append(f"{key}: {before} -> {after}")
    if fingerprint is not None:
        fixed += _data_changes(meta, fingerprint)
    if fixed:
        raise UserError.of(fixed)
    if fingerprint is not None and config.steps < meta.step:
        raise UserError("training.steps", config.steps, f"at least {meta.step}, which the run has reached already")
    return changed


def _data_changes(meta: Meta, fingerprint: list[dict[str, Any]]) -> Iterator[Problem]:
    allowed = f"the corpora of the checkpoint of step {meta.step}, in the same order"
    if len(meta.data) != len(fingerprint):
        yield Problem("data.train", f"{len(fingerprint)} corpora", f"{allowed}: {len(meta.data)} corpora")
        return
    for index, (before, after) in enumerate(zip(meta.data, fingerprint, strict=True)):
        for field in ("weight", "tokens", "digest"):
            if before[field] != after[field]:
                where = f"data.train.{index}"
                yield Problem(where, f"{field} {after[field]}", f"{allowed}: {field} {before[field]}")
                break


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
