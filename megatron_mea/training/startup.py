"""Start-up checks of run folder, checkpoints, data, weights and disk space, before processes meet or memory is taken.

What needs no torch comes first (`read_run_state`, `open_corpora`), so that most mistakes are refused within half a
second; `open_run_inputs` imports torch and transformers.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mea.checkpoint.folder import OVERHEAD_BYTES, CheckpointMetadata, intact_checkpoints
from megatron_mea.checkpoint.resume import check_resume, requested_resume_step
from megatron_mea.config import Config
from megatron_mea.config.checks import config_warnings
from megatron_mea.config.layout import TEACHER_KEY
from megatron_mea.config.parallel_dims import ParallelDims
from megatron_mea.config.schema import Model
from megatron_mea.data.begin_token import fits_documents
from megatron_mea.data.corpora import Corpora
from megatron_mea.data.tokenizer import check_tokenizer_folder, load_tokenizer
from megatron_mea.errors import UserError
from megatron_mea.huggingface.model_folder import INIT_FROM, ModelFolder, StoredTensors
from megatron_mea.run_folder import RunFolder
from megatron_mea.training.rank_env import RankEnv

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from megatron_mea.checkpoint.resume import ResumePoint
    from megatron_mea.huggingface.weights import WeightSource

_MAX_CHANGES_SHOWN = 20
"""Changed keys that are printed at most: every path of thousands of corpora may have changed."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """State of a run folder before training starts.

    Args:
        checkpoints: (step, folder) of the checkpoints whose meta.json is intact, oldest first.
        resume_step: the step that `run.resume_from` asks for; None for the newest.
        finished_step: the last step of the run, where nothing is left to do.
    """

    checkpoints: list[tuple[int, Path]]
    resume_step: int | None
    finished_step: int | None

    @property
    def resume_checkpoint(self) -> tuple[int, Path] | None:
        """(step, folder) of the checkpoint to resume from, unless it turns out to be damaged."""
        candidates = (entry for entry in reversed(self.checkpoints) if self.resume_step in (None, entry[0]))
        return next(candidates, None)


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The corpora of a run, and lines to print; `changes` are those of a configuration that resumes."""

    train: Corpora
    validation: Corpora | None
    warnings: list[str]
    changes: list[str]


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """Everything that was opened and checked before processes meet.

    Args:
        weights: initial weights of a run without a checkpoint; None: initialised from the seed.
        teacher: the model of `training.distillation`.
        resume_step: the step that `run.resume_from` asks for; None for the newest checkpoint.
        begins: whether the tokenizer of checkpoints is made to put a begin token before a text, or nothing, as the
            documents have it; None: it does so by itself.
        warnings, changes: lines to print; changes are those of a configuration that resumes.
    """

    rank_env: RankEnv
    dims: ParallelDims
    train: Corpora
    validation: Corpora | None
    begins: bool | None
    weights: WeightSource | None
    teacher: StoredTensors | None
    resume_step: int | None
    warnings: list[str]
    changes: list[str]


def read_run_state(config: Config) -> RunState:
    """Reads the run folder; writes nothing, imports no torch.

    Raises:
        UserError: run.dir is a file, has no checkpoint of the step asked for, or is finished with other settings.
    """
    run = RunFolder(config.run.dir)
    for folder in (run.path, run.checkpoints):
        if folder.exists() and not folder.is_dir():
            raise UserError(
                where="run.dir", got=f"{folder}, which is a file", expected="a folder, or a name that is free"
            )

    checkpoints = intact_checkpoints(run.path)
    resume_step = requested_resume_step(config.run.resume_from, checkpoints)
    finished_step = run.finished_step()
    if finished_step is None or finished_step < config.steps or resume_step is not None:
        return RunState(checkpoints=checkpoints, resume_step=resume_step, finished_step=None)

    for _, folder in checkpoints[-1:]:
        check_resume(metadata=CheckpointMetadata.read(folder), config=config, fingerprint=None)

    return RunState(checkpoints=checkpoints, resume_step=resume_step, finished_step=finished_step)


def open_corpora(*, config: Config, dims: ParallelDims, state: RunState) -> RunData:
    """Opens the corpora and compares with the checkpoint to resume from; writes nothing, imports no torch.

    Raises:
        UserError: the data cannot be used, the configuration may not resume, or a tokenizer or model is not there.
    """
    data, evaluation = config.data, config.evaluation
    check_tokenizer_folder(data.tokenizer, "data.tokenizer")
    settings = {
        "seq_length": data.seq_length,
        "vocab_size": config.model.vocab_size,
        "document_mask": data.document_mask,
    }
    batch_size = config.training.global_batch_size

    train = Corpora(corpora=data.train, seed=config.training.seed, key="data.train", **settings)
    train.require_target(batch_size)
    validation = None
    if data.validation:
        validation = Corpora(corpora=data.validation, seed=None, key="data.validation", **settings)
        validation.require_batches(
            samples=evaluation.batches * batch_size, batches=evaluation.batches, batch_size=batch_size
        )

    warnings = config_warnings(config, dims)
    if config.run.resume_from != "newest" and state.resume_step is None:
        step = config.run.resume_from
        warnings.append(f"this run has gone back to step {step} before (run.resume_from), and goes on from its newest")

    changes: list[str] = []
    if state.resume_checkpoint is not None:
        metadata = CheckpointMetadata.read(state.resume_checkpoint[1])
        changes = check_resume(metadata=metadata, config=config, fingerprint=train.fingerprint())
    elif config.run.init_from is not None:
        ModelFolder.locate(config.run.init_from, INIT_FROM)

    if config.training.distillation is not None:
        ModelFolder.locate(config.training.distillation.teacher, TEACHER_KEY)

    return RunData(train=train, validation=validation, warnings=warnings, changes=changes)


def open_run_inputs(
    *, config: Config, rank_env: RankEnv, dims: ParallelDims, state: RunState, data: RunData
) -> RunInputs:
    """Opens weights, teacher and tokenizer beside the corpora of `open_corpora`; writes nothing, imports torch.

    Raises:
        UserError: one of them cannot be used, the disk holds no checkpoint, or there is no compiler for
            `training.compile`.
    """
    from megatron_mea.huggingface.weights import open_weights
    from megatron_mea.training.teacher import open_teacher, tokenizer_warnings

    if config.training.compile:
        check_compilers()

    warnings, weights = [*data.warnings], None
    ranks = {"rank": rank_env.rank, "world_size": rank_env.world_size}
    if state.resume_checkpoint is None and config.run.init_from is not None:
        weights = open_weights(path=Path(config.run.init_from), model=config.model, **ranks)
        warnings += weights.warnings

    teacher = open_teacher(config=config, **ranks)

    tokenizer = load_tokenizer(config.data.tokenizer)
    num_ids, vocab_size = len(tokenizer), config.model.vocab_size
    if num_ids > vocab_size:
        expected = f"at least the {num_ids} ids of data.tokenizer = {config.data.tokenizer}"
        raise UserError(where="model.vocab_size", got=vocab_size, expected=expected)

    begins, notes = _begin_token(config=config, train=data.train, tokenizer=tokenizer)
    warnings += notes
    if teacher is not None:
        warnings += [*teacher.source.warnings, *tokenizer_warnings(config, teacher.source)]

    warnings += check_disk_space(config, num_checkpoints=len(state.checkpoints))
    return RunInputs(
        rank_env=rank_env,
        dims=dims,
        train=data.train,
        validation=data.validation,
        begins=begins,
        weights=weights,
        teacher=teacher,
        resume_step=state.resume_step,
        warnings=warnings,
        changes=data.changes,
    )


def describe_start(
    *, config: Config, inputs: RunInputs, device: torch.device, resume_point: ResumePoint, notes: list[str]
) -> list[str]:
    """Lines with the kind of run, its data, warnings, and the checkpoint to resume from.

    Args:
        notes: more warnings.
    """
    lines = [
        f"{inputs.rank_env.world_size} process(es) on {device.type}, {config.training.precision}, "
        f"variant {config.model.attention_variant}, {config.steps} steps of {config.tokens_per_step:,} tokens"
    ]
    lines += [f"train {line}" for line in inputs.train.shares()]
    lines += [f"warning: {line}" for line in [*inputs.warnings, *notes, *resume_point.notes]]

    if resume_point.source is not None:
        lines.append(f"resuming from {resume_point.source}")
        num_hidden = len(inputs.changes) - _MAX_CHANGES_SHOWN
        more = [f"{num_hidden} more keys"] if num_hidden > 0 else []
        lines += [f"changed since then: {line}" for line in [*inputs.changes[:_MAX_CHANGES_SHOWN], *more]]

    return lines


def _begin_token(
    *, config: Config, train: Corpora, tokenizer: PreTrainedTokenizerBase
) -> tuple[bool | None, list[str]]:
    """`RunInputs.begins`, and a line where it changes the tokenizer of the run."""
    bos, name = tokenizer.bos_token_id, config.data.tokenizer
    begins = bos is not None and train.documents_begin_with(bos)
    if begins is None:
        return None, [f"some documents of data.train begin with {tokenizer.bos_token}, and others do not"]
    if fits_documents(tokenizer, begins=begins):
        return None, []

    before = tokenizer.bos_token if begins else "nothing"
    note = f"documents of data.train begin with {before}: so do texts with the tokenizer of checkpoints, unlike {name}"
    return begins, [note]


def check_compilers() -> None:
    """Raises UserError where torch.compile would fail for want of a compiler, in the middle of the first step."""
    import torch

    on_gpu = torch.cuda.is_available()
    if on_gpu and find_spec("triton") is None:
        raise UserError(
            where="training.compile",
            got="no triton",
            expected="triton, which torch for CUDA brings",
            hint="pip install triton",
        )

    # Triton builds its launchers with a C compiler.
    variable, name = ("CC", "gcc") if on_gpu else ("CXX", "g++")
    compilers = [os.environ[variable]] if variable in os.environ else ["gcc", "clang"] if on_gpu else ["g++"]
    if not any(map(shutil.which, compilers)):
        raise UserError(
            where="training.compile",
            got=f"no {' or '.join(compilers)}",
            expected="false, or a compiler",
            hint=f"install {name}, or let {variable} name one",
        )


def check_disk_space(config: Config, *, num_checkpoints: int) -> list[str]:
    """A warning where the disk cannot hold `checkpoint.keep` checkpoints and the one that is being written.

    Args:
        num_checkpoints: of the run, on the disk already.

    Raises:
        UserError: the disk cannot hold a single one.
    """
    folder = Path(config.run.dir).absolute()
    while not folder.exists():
        folder = folder.parent

    from megatron_mea.model.decoder import parameter_shapes

    free, size = shutil.disk_usage(folder).free, checkpoint_bytes(config.model)
    num_elements = sum(map(math.prod, parameter_shapes(config.model).values()))
    needed = f"{size / 1e9:,.3f} GB for a checkpoint ({(size - OVERHEAD_BYTES) // num_elements} bytes a parameter)"
    if free < size:
        got = f"{config.run.dir}, where {free / 1e9:,.3f} GB are free"
        raise UserError(where="run.dir", got=got, expected=f"at least {needed}")

    missing = max(1, config.checkpoint.keep + 1 - num_checkpoints)
    if free < missing * size:
        return [f"run.dir has {free / 1e9:,.3f} GB free, and checkpoint.keep needs {missing} times {needed}"]

    return []


def checkpoint_bytes(model: Model) -> int:
    """Bytes of one checkpoint: master weights, the optimizer's state, and everything beside them."""
    from megatron_mea.model.decoder import parameter_specs
    from megatron_mea.optimizers import state_bytes

    return OVERHEAD_BYTES + sum(
        state_bytes(spec) * math.prod(spec.global_shape) for spec in parameter_specs(model).values()
    )
