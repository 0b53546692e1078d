"""The start of a run on all ranks: claims its folder, builds the engine, and loads it from the newest checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_mea.checkpoint import folder
from megatron_mea.checkpoint.folder import CheckpointMetadata
from megatron_mea.checkpoint.lease import Lease
from megatron_mea.checkpoint.resume import ResumePoint, find_resume_point
from megatron_mea.checkpoint.saver import Saver
from megatron_mea.checkpoint.tensors import read_fragments
from megatron_mea.config import Config
from megatron_mea.errors import RunError, UserError
from megatron_mea.huggingface.weights import open_weights
from megatron_mea.outputs import disk_errors, make_folder
from megatron_mea.run_folder import RunFolder
from megatron_mea.training.build import build_engine
from megatron_mea.training.distributed import leave_timeouts_to_watchdog, writers_group
from megatron_mea.training.engine import Engine
from megatron_mea.training.initial_weights import read_weights
from megatron_mea.training.metrics import Metrics
from megatron_mea.training.progress import Progress
from megatron_mea.training.rate_jump import keep_checkpoint_before_jump
from megatron_mea.training.startup import RunInputs, describe_start
from megatron_mea.training.watchdog import Watchdog
from megatron_mea.versions import versions

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StartedRun:
    """A run that owns its folder, with an engine that holds the state of `step`.

    Args:
        lease: of the folder, on rank 0; None elsewhere.
        metadata: of the checkpoint that the run resumes from; None: it begins anew.
        versions: of packages and of the code, when it started.
        metrics: the run's files, on rank 0; None elsewhere.
    """

    folder: RunFolder
    lease: Lease | None
    metadata: CheckpointMetadata | None
    engine: Engine
    saver: Saver
    progress: Progress
    versions: dict[str, str]
    metrics: Metrics | None

    @property
    def step(self) -> int:
        """The step after which the run goes on."""
        return self.metadata.step if self.metadata else 0


def start_run(*, config: Config, inputs: RunInputs, device: torch.device, watchdog: Watchdog) -> StartedRun:
    """Claims the run folder, builds the engine and loads it; collective. Rank 0 prints how the run starts.

    Raises:
        UserError: the run folder, a checkpoint or initial weights cannot be used.
        RunError: another job has taken the run folder meanwhile.
    """
    run, rank = RunFolder(config.run.dir), inputs.rank_env.rank
    lease = Lease(run.path) if rank == 0 else None
    resume_point, notes = _claim(run=run, inputs=inputs, lease=lease)
    watchdog.mark()

    source = resume_point.source
    metadata = CheckpointMetadata.read(source) if source else None
    step = metadata.step if metadata else 0
    progress = Progress(config=config, rank=rank, step=step, clock=watchdog.clock)
    if rank == 0 and metadata is not None:
        notes += keep_checkpoint_before_jump(run_dir=run.path, metadata=metadata, config=config)
    for line in describe_start(config=config, inputs=inputs, device=device, resume_point=resume_point, notes=notes):
        progress.log(line)

    check_lease(lease, run=run, step=step)
    if rank == 0:
        _clear(run, resume_point)

    weights = inputs.weights
    if source is None and weights is None and config.run.init_from is not None:
        # There were checkpoints, and all of them are damaged.
        weights = open_weights(Path(config.run.init_from), config.model)

    initialized = source is None and weights is None
    engine = build_engine(config=config, device=device, initialized=initialized, teacher=inputs.teacher)
    watchdog.mark()
    if source is not None:
        read_fragments(source, engine.state.fragments())
    elif weights is not None:
        read_weights(weights.stored, engine.state.fragments(optimizer_state=False))
    if not initialized:
        engine.state.sync_after_load(step)
    if metadata is not None:
        engine.routers.load_state(metadata.expert_counts)

    saver = Saver(
        run_dir=run.path,
        settings=config.checkpoint,
        tokenizer=Path(config.data.tokenizer),
        begins=inputs.begins,
        group=writers_group(),
        lease=lease,
        log=progress.log,
    )
    leave_timeouts_to_watchdog()

    # Building and loading the model took a while, and another job may own the metrics that are truncated next.
    check_lease(lease, run=run, step=step)
    metrics, run_versions = None, versions()
    if rank == 0:
        with disk_errors(run.path):
            metrics = Metrics(config=config, versions=run_versions, step=step if metadata else None, log=progress.log)

    return StartedRun(
        folder=run,
        lease=lease,
        metadata=metadata,
        engine=engine,
        saver=saver,
        progress=progress,
        versions=run_versions,
        metrics=metrics,
    )


def check_lease(lease: Lease | None, *, run: RunFolder, step: int) -> None:
    """Raises RunError on all ranks where another job has taken the run folder; collective.

    Args:
        lease: as `StartedRun.lease`.
        step: that the run has reached, for the message.
    """
    new_holder = [lease.new_holder() if lease is not None else ""]
    dist.broadcast_object_list(new_holder)
    if new_holder[0]:
        raise RunError(f"{run.path} was taken over by {new_holder[0]}: this one stops at step {step} and saves nothing")


def _claim(*, run: RunFolder, inputs: RunInputs, lease: Lease | None) -> tuple[ResumePoint, list[str]]:
    """Finds the checkpoint to resume from, then takes the lease; returns lines to print as well. Collective.

    In this order, since a start that is refused must not stop a running job.
    """

    def take_lease() -> list[str]:
        make_folder(run.path)
        other_job = lease.take() if lease is not None else None
        return [f"{other_job} may still be writing {run.path}: it is made to stop"] if other_job else []

    resume_step, checkpoints = _on_rank_0(run, lambda: (inputs.resume_step, folder.all_checkpoints(run.path)))
    resume_point = find_resume_point(checkpoints=checkpoints, resume_step=resume_step, find_corruption=_find_corruption)
    notes, current_checkpoints = _on_rank_0(run, lambda: (take_lease(), folder.all_checkpoints(run.path)))
    if current_checkpoints != checkpoints:
        # The job that had the folder has saved meanwhile.
        resume_point = find_resume_point(
            checkpoints=current_checkpoints, resume_step=resume_step, find_corruption=_find_corruption
        )

    return resume_point, notes


def _clear(run: RunFolder, resume_point: ResumePoint) -> None:
    """Removes what an earlier start left and marks of its end, and renames checkpoints that the run cannot use."""
    folder.remove_leftovers(run.path)
    with disk_errors(run.path):
        for mark in run.marks:
            mark.unlink(missing_ok=True)
        for checkpoint, reason in resume_point.quarantined:
            # A job that was started at the same time may have renamed it.
            with suppress(FileNotFoundError):
                folder.quarantine(checkpoint, reason)


def _find_corruption(checkpoint: Path) -> str | None:
    """The first problem of a checkpoint that a rank finds in its share of the files; collective."""
    problems: list[str | None] = [None] * dist.get_world_size()
    problem = folder.find_corruption(folder=checkpoint, rank=dist.get_rank(), world_size=len(problems))
    dist.all_gather_object(problems, problem)
    return next((problem for problem in problems if problem), None)


def _on_rank_0(run: RunFolder, function: Callable[[], T]) -> T:
    """Calls `function` on rank 0, and returns its result on all ranks; collective.

    Raises:
        UserError: on all ranks, where `function` raised OSError.
    """
    result: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            result = [function()]
        except OSError as error:
            got = f"{run.path}: {error.strerror}"
            result = [UserError(where="run.dir", got=got, expected="a folder that can be written")]

    dist.broadcast_object_list(result)
    if isinstance(result[0], UserError):
        raise result[0]

    return result[0]
