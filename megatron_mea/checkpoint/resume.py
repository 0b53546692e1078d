"""The checkpoint that a run resumes from, and the changes of its configuration that are allowed then."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_mea.checkpoint.folder import CheckpointMetadata
from megatron_mea.checkpoint.run_config import FIXED_KEYS
from megatron_mea.config import Config
from megatron_mea.errors import Problem, UserError


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """The checkpoint that a run resumes from, if any.

    Args:
        source: the checkpoint folder; None: the run starts from step 0.
        notes: lines to print.
        quarantined: (checkpoint, reason) of those that must be renamed before the run resumes.
    """

    source: Path | None
    notes: list[str]
    quarantined: list[tuple[Path, Literal["damaged", "later"]]]


def find_resume_point(
    *, checkpoints: Sequence[tuple[int, Path]], resume_step: int | None, find_corruption: Callable[[Path], str | None]
) -> ResumePoint:
    """The newest intact checkpoint, or that of a step; renames nothing.

    Args:
        checkpoints: (step, folder) of the run's checkpoints, oldest first.
        resume_step: the step to go back to; None for the newest.
        find_corruption: folder -> its problem or None, as `folder.find_corruption`.

    Raises:
        UserError: the checkpoint to go back to is damaged or gone.
    """
    later = [folder for step, folder in checkpoints if resume_step is not None and step > resume_step]
    point = ResumePoint(source=None, notes=[], quarantined=[(folder, "later") for folder in later])
    if later:
        point.notes.append(
            f"going back to step {resume_step}: later-step_... are the {len(later)} checkpoints after it"
        )

    for step, folder in reversed(checkpoints[: len(checkpoints) - len(later)]):
        problem = find_corruption(folder)
        if problem is None and resume_step in (None, step):
            return replace(point, source=folder)
        if resume_step is not None:
            break

        point.quarantined.append((folder, "damaged"))
        point.notes.append(f"{folder} is damaged ({problem}); set aside as damaged-{folder.name}")

    if resume_step is not None:
        got = f"{resume_step}, whose checkpoint is damaged ({problem})" if checkpoints else resume_step
        raise UserError(where="run.resume_from", got=got, expected="newest, or the step of a checkpoint that is whole")

    if point.quarantined:
        point.notes.append("no whole checkpoint is left: the run begins anew")

    return point


def requested_resume_step(resume_from: str | int, checkpoints: Sequence[tuple[int, Path]]) -> int | None:
    """The step that `run.resume_from` asks for; None for the newest checkpoint.

    A run that went back and was interrupted resumes with the same command: if its newest checkpoint was saved with
    the same `run.resume_from`, it has gone back already.

    Args:
        checkpoints: (step, folder) of the run's checkpoints with an intact meta.json, oldest first.

    Raises:
        UserError: there is no checkpoint of that step.
    """
    if not isinstance(resume_from, int):
        return None

    newest, folder = checkpoints[-1] if checkpoints else (0, None)
    if folder and newest > resume_from and CheckpointMetadata.read(folder).config["run"]["resume_from"] == resume_from:
        return None

    steps = [step for step, _ in checkpoints]
    if resume_from not in steps:
        expected = f"newest, or a step with a checkpoint: {', '.join(map(str, steps)) or 'none'}"
        raise UserError(where="run.resume_from", got=resume_from, expected=expected)

    return resume_from


def check_resume(
    *, metadata: CheckpointMetadata, config: Config, fingerprint: list[dict[str, Any]] | None
) -> list[str]:
    """Checks that `config` may resume from a checkpoint; returns the allowed changes as lines to print.

    Args:
        fingerprint: of the training data; None leaves the data out of the comparison.

    Raises:
        UserError: a fixed key or the data has changed; names old and new values.
    """
    if metadata.origin:
        got = f"{config.run.dir}, with a checkpoint that holds weights alone: {metadata.origin}"
        hint = "begin a new run with run.init_from = that checkpoint"
        raise UserError(where="run.dir", got=got, expected="a folder of a run, or a name that is free", hint=hint)

    old_values, new_values = _flatten(metadata.config), _flatten(config.model_dump(mode="json"))
    problems, changes = [], []
    for key in sorted(old_values.keys() | new_values.keys()):
        old, new = old_values.get(key), new_values.get(key)
        if old == new:
            continue

        if any(key == name or key.startswith(f"{name}.") for name in FIXED_KEYS):
            expected = f"{old}, as in the checkpoint of step {metadata.step}"
            hint = "restore the old value, or start a new run with another run.dir"
            problems.append(Problem(where=key, got=new, expected=expected, hint=hint))
        else:
            changes.append(f"{key}: {old} -> {new}")

    if fingerprint is not None:
        problems += _data_problems(metadata, fingerprint)
    if problems:
        raise UserError.from_problems(problems)

    if config.steps < metadata.step:
        raise UserError(
            where="training.steps",
            got=config.steps,
            expected=f"at least {metadata.step}, which the run has reached already",
            hint="run.resume_from = the step of an earlier checkpoint goes back",
        )

    return changes


def _data_problems(metadata: CheckpointMetadata, fingerprint: list[dict[str, Any]]) -> Iterator[Problem]:
    """Differences between the training data and that of a checkpoint, the first of each corpus."""
    expected = f"the corpora of the checkpoint of step {metadata.step}, in the same order"
    if len(metadata.data) != len(fingerprint):
        yield Problem(
            where="data.train", got=f"{len(fingerprint)} corpora", expected=f"{expected}: {len(metadata.data)} corpora"
        )
        return

    for index, (old, new) in enumerate(zip(metadata.data, fingerprint, strict=True)):
        for field in ("weight", "tokens", "digest"):
            if old.get(field) != new[field]:
                yield Problem(
                    where=f"data.train.{index}",
                    got=f"{field} {new[field]}",
                    expected=f"{expected}: {field} {old.get(field)}",
                )
                break


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists -> values by their path, as `data.train.0.path`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list):
            value = dict(enumerate(value))
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
