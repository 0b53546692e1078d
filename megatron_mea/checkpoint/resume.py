"""From which checkpoint a run goes on, and with which changes of its configuration it may."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_mea.checkpoint.folder import Meta
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


@dataclass(frozen=True)
class Choice:
    """From which checkpoint a run goes on, if any.

    Args:
        source: the checkpoint folder; None: the run begins anew.
        notes: lines to print.
        aside: (checkpoint, why) that must be renamed before the run goes on.
    """

    source: Path | None
    notes: list[str]
    aside: list[tuple[Path, Literal["damaged", "later"]]]


def choose(
    existing: Sequence[tuple[int, Path]], back_to: int | None, damage_of: Callable[[Path], str | None]
) -> Choice:
    """The newest checkpoint that is whole, or the one of a step; renames nothing.

    Args:
        existing: (step, folder) of the run's checkpoints, oldest first.
        back_to: the step to go back to; None for the newest.
        damage_of: what is wrong with a folder, as `damage` says it.

    Raises:
        UserError: the checkpoint to go back to is damaged or gone.
    """
    later = [folder for step, folder in existing if back_to is not None and step > back_to]
    choice = Choice(None, [], [(folder, "later") for folder in later])
    if later:
        choice.notes.append(f"going back to step {back_to}: later-step_... are the {len(later)} checkpoints after it")
    for step, folder in reversed(existing[: len(existing) - len(later)]):
        problem = damage_of(folder)
        if problem is None and back_to in (None, step):
            return replace(choice, source=folder)
        if back_to is not None:
            break
        choice.aside.append((folder, "damaged"))
        choice.notes.append(f"{folder} is damaged ({problem}); set aside as damaged-{folder.name}")
    if back_to is not None:
        found = f"{back_to}, whose checkpoint is damaged ({problem})" if existing else back_to
        raise UserError("run.resume_from", found, "newest, or the step of a checkpoint that is whole")
    if choice.aside:
        choice.notes.append("no whole checkpoint is left: the run begins anew")
    return choice


def step_to_go_back_to(resume_from: str | int, existing: Sequence[tuple[int, Path]]) -> int | None:
    """The step that `run.resume_from` asks for; None where the newest checkpoint is to be taken.

    A run that went back and was interrupted goes on with the same command: its newest checkpoint was saved with
    the same `run.resume_from`, so going back has been done.

    Args:
        existing: (step, folder) of the run's checkpoints with a whole meta.json, oldest first.

    Raises:
        UserError: there is no checkpoint of that step.
    """
    if not isinstance(resume_from, int):
        return None
    newest, folder = existing[-1] if existing else (0, None)
    if folder and newest > resume_from and Meta.read(folder).config["run"]["resume_from"] == resume_from:
        return None
    steps = [step for step, _ in existing]
    if resume_from not in steps:
        allowed = f"newest, or a step with a checkpoint: {', '.join(map(str, steps)) or 'none'}"
        raise UserError("run.resume_from", resume_from, allowed)
    return resume_from


def check_resume(meta: Meta, config: Config, fingerprint: list[dict[str, Any]] | None) -> list[str]:
    """Whether `config` may go on from a checkpoint; returns the allowed changes as lines to print.

    Args:
        fingerprint: of the training data; None leaves the data out of the comparison.

    Raises:
        UserError: a key that must not change has changed, or the data has; names old and new values.
    """
    if meta.origin:
        found = f"{config.run.dir}, with a checkpoint that holds weights alone: {meta.origin}"
        mend = "begin a new run with run.init_from = that checkpoint"
        raise UserError("run.dir", found, "a folder of a run, or a name that is free", mend)
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
        if isinstance(value, list):
            value = dict(enumerate(value))
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
