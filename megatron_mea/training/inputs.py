"""What a run trains on and begins with, opened and checked before processes meet or memory is taken."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from megatron_mea.checkpoint.folder import SPARE
from megatron_mea.config import Config
from megatron_mea.config.layout import Layout
from megatron_mea.config.schema import Model
from megatron_mea.data.corpora import Corpora
from megatron_mea.data.tokenizer import load_tokenizer
from megatron_mea.errors import UserError
from megatron_mea.huggingface.weights import StoredModel, WeightSource, open_weights
from megatron_mea.model.decoder import parameter_shapes
from megatron_mea.training.before import Before, Data
from megatron_mea.training.ranks import Ranks
from megatron_mea.training.teacher import foreign_tokenizer, open_teacher


@dataclass(frozen=True)
class Inputs:
    """What was opened and checked before processes met.

    Args:
        weights: what a run without a checkpoint begins with; None: initialised from the seed.
        teacher: of `training.distillation`.
        back_to: the step that `run.resume_from` asks to go back to; None for the newest checkpoint.
        warnings, changes: lines to print; changes are those of a configuration that resumes.
    """

    ranks: Ranks
    layout: Layout
    train: Corpora
    validation: Corpora | None
    weights: WeightSource | None
    teacher: StoredModel | None
    back_to: int | None
    warnings: list[str]
    changes: list[str]


def open_inputs(config: Config, ranks: Ranks, layout: Layout, before: Before, data: Data) -> Inputs:
    """Opens weights, teacher and tokenizer, and completes what `open_data` has opened; writes nothing.

    Raises:
        UserError: one of them cannot be used, the disk holds no checkpoint, or there is nothing to compile with.
    """
    if config.training.compile:
        check_compilers()
    warnings, weights, vocab = [*data.warnings], None, config.model.vocab_size
    if before.source is None and config.run.init_from is not None:
        weights = open_weights(Path(config.run.init_from), config.model, ranks.rank, ranks.world_size)
        warnings += weights.warnings
    teacher = open_teacher(config, ranks.rank, ranks.world_size)
    size = len(load_tokenizer(config.data.tokenizer))
    if size > vocab:
        allowed = f"at least the {size} ids of data.tokenizer = {config.data.tokenizer}"
        raise UserError("model.vocab_size", vocab, allowed)
    if teacher is not None:
        warnings += foreign_tokenizer(config, teacher)
    warnings += check_space(config, len(before.existing))
    opened = data.train, data.validation, weights, teacher
    return Inputs(ranks, layout, *opened, before.back_to, warnings, data.changes)


def check_compilers() -> None:
    """Raises UserError where torch.compile would fail for want of a compiler, in the middle of the first step."""
    on_gpu = torch.cuda.is_available()
    if on_gpu and find_spec("triton") is None:
        raise UserError("training.compile", "no triton", "triton, which torch for CUDA brings", "pip install triton")
    # Triton builds its launchers with one for C.
    variable, name = ("CC", "gcc") if on_gpu else ("CXX", "g++")
    names = [os.environ[variable]] if variable in os.environ else ["gcc", "clang"] if on_gpu else ["g++"]
    if not any(map(shutil.which, names)):
        mend = f"install {name}, or let {variable} name one"
        raise UserError("training.compile", f"no {' or '.join(names)}", "false, or a compiler", mend)


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
