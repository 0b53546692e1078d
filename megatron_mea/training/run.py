"""A training run from a checked configuration to FINISHED: what `megatron-mea train` does."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mea.checkpoint.folder import SPARE, Meta, checkpoints_of, description_is_whole
from megatron_mea.checkpoint.resume import check_resume, step_to_go_back_to
from megatron_mea.config import Config
from megatron_mea.config.checks import handicaps
from megatron_mea.config.layout import Layout, check_layout
from megatron_mea.config.schema import Model
from megatron_mea.data.corpora import Corpora
from megatron_mea.data.tokenizer import check_tokenizer_folder, load_tokenizer
from megatron_mea.errors import UserError
from megatron_mea.huggingface.weights import open_weights
from megatron_mea.model.decoder import parameter_shapes
from megatron_mea.training.ranks import Ranks
from megatron_mea.training.signals import StopSignal
from megatron_mea.training.teacher import foreign_tokenizer, open_teacher

if TYPE_CHECKING:
    from megatron_mea.training.loop import Inputs


def train(config: Config, stop: StopSignal) -> None:
    """Trains, alone or as one rank of many; goes on from the newest whole checkpoint of the run folder.

    Raises:
        UserError: anything that can be checked before processes meet and memory is taken.
    """
    ranks = Ranks.from_environment()
    layout = check_layout(config, ranks.world_size)
    before = look_at(config)
    if before.finished is not None:
        if ranks.rank == 0:
            print(f"{config.run.dir} is finished at step {before.finished}; raise training.steps to go on", flush=True)
        return
    if find_spec("deepspeed") is None:
        raise UserError(
            "environment", "no deepspeed", "deepspeed 0.19.8: training needs it", "pip install deepspeed==0.19.8"
        )
    inputs = check_inputs(config, ranks, layout, before)

    from megatron_mea.training.loop import run

    run(config, inputs, stop)


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


def check_inputs(config: Config, ranks: Ranks, layout: Layout, before: Before) -> Inputs:
    """Opens data, tokenizer and weights, and compares with the checkpoint that the run goes on from; writes nothing."""
    data, evaluation = config.data, config.evaluation
    check_tokenizer_folder(data.tokenizer, "data.tokenizer")
    vocab = config.model.vocab_size
    mask = data.document_mask
    train = Corpora(data.train, data.seq_length, vocab, config.training.seed, "data.train", mask)
    batch = config.training.global_batch_size
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
    weights = None
    if before.source is not None:
        changes = check_resume(Meta.read(before.source[1]), config, train.fingerprint())
    elif config.run.init_from is not None:
        weights = open_weights(Path(config.run.init_from), config.model, ranks.rank, ranks.world_size)
        warnings += weights.warnings
    teacher = open_teacher(config, ranks.rank, ranks.world_size)
    size = len(load_tokenizer(data.tokenizer))
    if size > vocab:
        raise UserError("model.vocab_size", vocab, f"at least the {size} ids of data.tokenizer = {data.tokenizer}")
    if teacher is not None:
        warnings += foreign_tokenizer(config, teacher)
    warnings += check_space(config, len(before.existing))

    from megatron_mea.training.loop import Inputs

    return Inputs(ranks, layout, train, validation, weights, teacher, before.back_to, warnings, changes)


def check_space(config: Config, existing: int) -> list[str]:
    """A warning where the disk will not hold `checkpoint.keep` checkpoints and the one that is being written.

    Raises:
        UserError: it does not hold a single one.
    """
    place = Path(config.run.dir).absolute()
    while not place.exists():
        place = place.parent
    free, size = shutil.disk_usage(place).free, checkpoint_bytes(config.model)
    allowed = f"{size / 1e9:,.3f} GB for a checkpoint (12 bytes a parameter)"
    if free < size:
        raise UserError("run.dir", f"{config.run.dir}, where {free / 1e9:,.3f} GB are free", f"at least {allowed}")
    missing = max(1, config.checkpoint.keep + 1 - existing)
    if free < missing * size:
        return [f"run.dir has {free / 1e9:,.3f} GB free, and checkpoint.keep needs {missing} times {allowed}"]
    return []


def checkpoint_bytes(model: Model) -> int:
    """Of one checkpoint: float32 weights and both moments, and what comes with them."""
    return 3 * 4 * sum(map(math.prod, parameter_shapes(model).values())) + SPARE


def whole_descriptions(run_dir: Path) -> list[tuple[int, Path]]:
    """The checkpoints whose meta.json is whole; damaged ones are set aside later, when rank 0 verifies everything."""
    return [(step, folder) for step, folder in checkpoints_of(run_dir) if description_is_whole(folder)]


def finished_step(run_dir: Path) -> int | None:
    try:
        return int(json.loads((run_dir / "FINISHED").read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
