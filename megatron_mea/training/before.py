"""What stands before a run, and whether it may start: all that can be checked without torch, which takes seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_mea.checkpoint.folder import Meta, checkpoints_of, description_is_whole
from megatron_mea.checkpoint.resume import check_resume, step_to_go_back_to
from megatron_mea.config import Config
from megatron_mea.config.checks import handicaps
from megatron_mea.config.layout import TEACHER, Layout
from megatron_mea.data.corpora import Corpora
from megatron_mea.data.tokenizer import check_tokenizer_folder
from megatron_mea.errors import UserError
from megatron_mea.huggingface.place import INIT_FROM, check_named


@dataclass(frozen=True)
class Before:
    """What stands in a run folder before a start.

    Args:
        existing: (step, folder) of the checkpoints, oldest first.
        back_to: the step of the one that `run.resume_from` asks for; None for the newest.
        finished: the last step, where nothing is left to do.
    """

    existing: list[tuple[int, Path]]
    back_to: int | None
    finished: int | None

    @property
    def source(self) -> tuple[int, Path] | None:
        """The checkpoint that the run goes on from, unless it turns out to be damaged."""
        wanted = (each for each in reversed(self.existing) if self.back_to in (None, each[0]))
        return next(wanted, None)


@dataclass(frozen=True)
class Data:
    """The corpora of a run, and lines to print; `changes` are those of a configuration that resumes."""

    train: Corpora
    validation: Corpora | None
    warnings: list[str]
    changes: list[str]


def look_at(config: Config) -> Before:
    """Raises UserError where the run folder is none, has no step to go back to, or is finished with other settings."""
    run_dir = Path(config.run.dir)
    for place in (run_dir, run_dir / "checkpoints"):
        if place.exists() and not place.is_dir():
            raise UserError("run.dir", f"{place}, which is a file", "a folder, or a name that is free")
    existing = whole_descriptions(run_dir)
    back_to = step_to_go_back_to(config.run.resume_from, existing)
    finished = finished_step(run_dir)
    if finished is None or finished < config.steps or back_to is not None:
        return Before(existing, back_to, None)
    for _, folder in existing[-1:]:
        check_resume(Meta.read(folder), config, None)
    return Before(existing, back_to, finished)


def open_data(config: Config, layout: Layout, before: Before) -> Data:
    """Opens the corpora, and compares with the checkpoint that the run goes on from; writes nothing.

    Raises:
        UserError: the data cannot be used, the configuration may not resume, or a tokenizer or model is not there.
    """
    data, evaluation = config.data, config.evaluation
    check_tokenizer_folder(data.tokenizer, "data.tokenizer")
    vocab, mask, batch = config.model.vocab_size, data.document_mask, config.training.global_batch_size
    train = Corpora(data.train, data.seq_length, vocab, config.training.seed, "data.train", mask)
    train.require_target(batch)
    validation = None
    if data.validation:
        validation = Corpora(data.validation, data.seq_length, vocab, None, "data.validation", mask)
        validation.require(evaluation.batches * batch, evaluation.batches, batch)
    warnings = handicaps(config, layout)
    if config.run.resume_from != "newest" and before.back_to is None:
        step = config.run.resume_from
        warnings.append(f"this run has gone back to step {step} before (run.resume_from), and goes on from its newest")
    changes: list[str] = []
    if before.source is not None:
        changes = check_resume(Meta.read(before.source[1]), config, train.fingerprint())
    elif config.run.init_from is not None:
        check_named(Path(config.run.init_from), INIT_FROM)
    if config.training.distillation is not None:
        check_named(Path(config.training.distillation.teacher), TEACHER)
    return Data(train, validation, warnings, changes)


def whole_descriptions(run_dir: Path) -> list[tuple[int, Path]]:
    """The checkpoints whose meta.json is whole; damaged ones are set aside later, when rank 0 verifies everything."""
    return [(step, folder) for step, folder in checkpoints_of(run_dir) if description_is_whole(folder)]


def finished_step(run_dir: Path) -> int | None:
    try:
        return int(json.loads((run_dir / "FINISHED").read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
