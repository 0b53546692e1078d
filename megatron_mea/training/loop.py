"""The training loop: steps, validation, metrics, checkpoints, stop requests."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_mea.checkpoint import folder
from megatron_mea.checkpoint.lease import Lease
from megatron_mea.checkpoint.resume import ResumePoint, find_resume_point
from megatron_mea.checkpoint.saver import Saver
from megatron_mea.checkpoint.tensors import read_fragments
from megatron_mea.config import Config
from megatron_mea.errors import RunError, UserError
from megatron_mea.huggingface.weights import open_weights
from megatron_mea.outputs import disk_errors, make_folder
from megatron_mea.parallel.parameter import parameters_by_name
from megatron_mea.run_folder import RunFolder
from megatron_mea.training import distributed, metrics
from megatron_mea.training.build import build_engine
from megatron_mea.training.head_stats import HeadOutputs, head_tensors
from megatron_mea.training.initial_weights import read_weights
from megatron_mea.training.loader import DataStallTimer, Prefetcher, StepData, training_steps, validation_batches
from megatron_mea.training.nonfinite import NonFiniteError, describe_nonfinite
from megatron_mea.training.profile import Profiler
from megatron_mea.training.progress import Progress
from megatron_mea.training.rate_jump import keep_checkpoint_before_jump
from megatron_mea.training.replicas import check_replicas
from megatron_mea.training.schedule import learning_rate
from megatron_mea.training.signals import StopSignal
from megatron_mea.training.startup import RunInputs, describe_start
from megatron_mea.training.straggler import StragglerDetector
from megatron_mea.training.watchdog import Watchdog
from megatron_mea.versions import versions

T = TypeVar("T")


def run(*, config: Config, inputs: RunInputs, stop: StopSignal) -> None:
    """Trains until the last step, or until a rank is asked to stop."""
    if config.training.deterministic:
        # cuBLAS reads it at its start; without it torch refuses to be deterministic.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(mode=True)

    with closing(Watchdog(inputs.rank_env.rank, distributed.START_MINUTES)) as watchdog:
        device = distributed.start_distributed(inputs.rank_env)
        _Trainer(config=config, inputs=inputs, device=device, watchdog=watchdog).train(stop)
        # Not after an exception: leaving a group may wait for the others, or end them before this rank has printed why.
        distributed.stop_distributed()


class _Trainer:
    """The state of a training run on this rank, from the run folder as it is found to the last step; collective."""

    def __init__(self, *, config: Config, inputs: RunInputs, device: torch.device, watchdog: Watchdog) -> None:
        self.config, self.inputs, self.watchdog = config, inputs, watchdog
        self.run_dir, self.rank = Path(config.run.dir), inputs.rank_env.rank
        self.versions, self.data_fingerprint = versions(), inputs.train.fingerprint()
        self.validation_loss: float | None = None
        self.data_stall = DataStallTimer(watchdog.clock)
        self.lease: Lease | None = None

        resume_point, notes = self._find_resume_point()
        watchdog.mark()
        self.metadata = folder.CheckpointMetadata.read(resume_point.source) if resume_point.source else None
        self.step = self.metadata.step if self.metadata else 0
        self.progress = Progress(config=config, rank=self.rank, step=self.step, clock=watchdog.clock)
        if self.rank == 0 and self.metadata is not None:
            notes += keep_checkpoint_before_jump(run_dir=self.run_dir, metadata=self.metadata, config=config)
        for line in describe_start(config=config, inputs=inputs, device=device, resume_point=resume_point, notes=notes):
            self.progress.log(line)
        self._check_lease()
        if self.rank == 0:
            folder.remove_leftovers(self.run_dir)
            with disk_errors(self.run_dir):
                for mark in RunFolder(self.run_dir).marks:
                    mark.unlink(missing_ok=True)
                for checkpoint, reason in resume_point.quarantined:
                    # A job that was started at the same time may have renamed it.
                    with suppress(FileNotFoundError):
                        folder.quarantine(checkpoint, reason)

        self.weights = inputs.weights
        if resume_point.source is None and self.weights is None and config.run.init_from is not None:
            # There were checkpoints, and all of them are damaged.
            self.weights = open_weights(Path(config.run.init_from), config.model)

        initialized = resume_point.source is None and self.weights is None
        self.engine = build_engine(config=config, device=device, initialized=initialized, teacher=inputs.teacher)
        watchdog.mark()
        self.grid = self.engine.grid
        self._load(resume_point.source)

        self.saver = Saver(
            run_dir=self.run_dir,
            settings=config.checkpoint,
            tokenizer=Path(config.data.tokenizer),
            begins=inputs.begins,
            group=distributed.writers_group(),
            lease=self.lease,
            log=self.progress.log,
        )
        distributed.leave_timeouts_to_watchdog()
        self.metrics, self.heartbeat = None, None
        self.head_outputs = HeadOutputs(self.engine.model)
        self.stragglers = StragglerDetector(
            model=self.engine.model,
            grid=self.grid,
            device=device,
            on_forward=watchdog.mark,
            clock=watchdog.clock,
        )
        self.profiler = Profiler(
            settings=config.logging.profile, run_dir=self.run_dir, rank=None if self.grid.stage_rank else self.rank
        )

        # Building and loading the model took a while, and another job may own the metrics that are truncated next.
        self._check_lease()
        if self.rank == 0:
            resume_step = self.step if resume_point.source is not None else None
            with disk_errors(self.run_dir):
                self.metrics = metrics.Metrics(
                    config=config, versions=self.versions, step=resume_step, log=self.progress.log
                )

            self.heartbeat = metrics.Heartbeat(self.run_dir)

    def train(self, stop: StopSignal) -> None:
        """Trains until the last step or a stop request, and writes all that is pending."""
        config, has_validation = self.config, self.inputs.validation is not None
        if self.step == 0 and has_validation:
            self._record({"step": 0, "tokens": 0, "validation_loss": self._validate()})

        loader = Prefetcher(
            training_steps(corpora=self.inputs.train, config=config, grid=self.grid, first=self.step + 1),
            self.data_stall,
        )
        self.progress.start()
        for data in loader:
            step, lr = data.step, learning_rate(config, data.step)
            self.profiler.start_step(step)
            try:
                result = self.engine.train_step(
                    batches=data.batches,
                    num_targets=data.num_targets,
                    lr=lr,
                    stop_requested=partial(self._stop_requested, stop),
                )
            except NonFiniteError as error:
                message = describe_nonfinite(
                    error, data=data, config=config, corpora=self.inputs.train, model=self.engine.model
                )
                if self.metrics is not None and not self.lease.new_holder():
                    # A full disk must not hide the message.
                    with suppress(OSError):
                        metrics.write_diverged(run_dir=self.run_dir, step=data.step, reason=message.partition("\n")[0])

                raise NonFiniteError(message) from None

            self.watchdog.mark()
            if step == self.progress.first_step + 1:
                self.watchdog.minutes = config.parallel.timeout_minutes

            self.step, is_last = step, step == config.steps
            with self.watchdog.extend_timeout(distributed.SAVE_MINUTES):
                trace = self.profiler.end_step(step, last=is_last or result.should_stop)

            if trace is not None:
                self.progress.log(f"wrote a trace: {trace}")

            row = {"step": step, "tokens": step * config.tokens_per_step} | result.scalars()
            should_validate = has_validation and (is_last or step % config.evaluation.interval == 0)
            should_log = (
                should_validate or is_last or step % config.logging.interval == 0 or config.logging.sample_hashes
            )
            should_save = is_last or result.should_stop or step % config.checkpoint.interval == 0

            if config.training.replica_check_interval and step % config.training.replica_check_interval == 0:
                check_replicas(model=self.engine.model, grid=self.grid, config=config)

            if should_log:
                row["tokens_per_second"] = self.progress.tokens_per_second(step)
                if config.logging.sample_hashes:
                    row["sample_hashes"] = self._gather_sample_hashes(data)
                if should_validate:
                    row["validation_loss"] = self._validate()

                row["data_wait_seconds"] = self.data_stall.max_over_ranks(self.engine.device)
                forward_seconds, warnings = self.stragglers.report()
                self._record(row | forward_seconds)
                for line in warnings:
                    self.progress.log(f"warning: {line}")

            if result.should_stop:
                self._check_lease()

            if should_save:
                with self.watchdog.extend_timeout(distributed.SAVE_MINUTES):
                    self.saver.save(self._checkpoint_metadata(), self.engine.state.fragments(owned=True))

            self._beat(row, force=should_save)
            if should_log or should_save:
                self.progress.mark(step)
            if result.should_stop and not is_last:
                break

        loader.close()
        with self.watchdog.extend_timeout(distributed.SAVE_MINUTES):
            self.saver.wait()

        self._beat(row={}, force=True)
        if self.step < config.steps:
            self.progress.log(f"asked to stop: saved step {self.step}; the same command goes on from here")
        else:
            if self.rank == 0:
                with disk_errors(RunFolder(self.run_dir).finished):
                    metrics.write_finished(self.run_dir, self.step)
            self.progress.log(f"finished at step {self.step}: {self.run_dir}")

        with disk_errors(self.run_dir):
            if self.metrics is not None:
                self.metrics.close()
            if self.lease is not None:
                self.lease.end()

        dist.barrier()

    def _beat(self, row: dict, *, force: bool) -> None:
        """Writes the heartbeat, with loss and rate from a row of the metrics; `force`: however new the last one is."""
        if self.heartbeat is not None:
            facts = {"steps": self.config.steps, "save_seconds": self.saver.seconds}
            facts |= {key: row[key] for key in ("loss", "tokens_per_second") if key in row}
            self.heartbeat.beat(step=self.step, facts=facts, force=force)

    def _find_resume_point(self) -> tuple[ResumePoint, list[str]]:
        """Finds the checkpoint to resume from, then takes the lease; returns lines to print as well. Collective.

        In this order, since a start that is refused must not stop a running job.
        """
        resume_step, checkpoints = self._on_rank_0(
            lambda: (self.inputs.resume_step, folder.all_checkpoints(self.run_dir))
        )
        resume_point = find_resume_point(
            checkpoints=checkpoints, resume_step=resume_step, find_corruption=self._find_corruption
        )
        notes, current_checkpoints = self._on_rank_0(lambda: (self._take_lease(), folder.all_checkpoints(self.run_dir)))
        if current_checkpoints != checkpoints:
            # The job that had the folder has saved meanwhile.
            resume_point = find_resume_point(
                checkpoints=current_checkpoints, resume_step=resume_step, find_corruption=self._find_corruption
            )

        return resume_point, notes

    def _take_lease(self) -> list[str]:
        """Takes the lease of the run folder; returns lines to print."""
        make_folder(self.run_dir)
        self.lease = Lease(self.run_dir)
        other_job = self.lease.take()
        return [f"{other_job} may still be writing {self.run_dir}: it is made to stop"] if other_job else []

    def _on_rank_0(self, function: Callable[[], T]) -> T:
        """Calls `function` on rank 0, and returns its result on all ranks; collective.

        Raises:
            UserError: on all ranks, where `function` raised OSError.
        """
        result: list[Any] = [None]
        if self.rank == 0:
            try:
                result = [function()]
            except OSError as error:
                got = f"{self.run_dir}: {error.strerror}"
                result = [UserError(where="run.dir", got=got, expected="a folder that can be written")]

        dist.broadcast_object_list(result)
        if isinstance(result[0], UserError):
            raise result[0]

        return result[0]

    def _find_corruption(self, checkpoint: Path) -> str | None:
        """The first problem of a checkpoint that a rank finds in its share of the files; collective."""
        problems: list[str | None] = [None] * dist.get_world_size()
        problem = folder.find_corruption(folder=checkpoint, rank=self.rank, world_size=len(problems))
        dist.all_gather_object(problems, problem)
        return next((problem for problem in problems if problem), None)

    def _stop_requested(self, stop: StopSignal) -> bool:
        """Whether this rank got a signal, could not save, or lost the lease."""
        lost_lease = self.lease is not None and bool(self.lease.new_holder(cached=True))
        return stop.received is not None or self.saver.failed or lost_lease

    def _check_lease(self) -> None:
        """Raises RunError on all ranks where another job has taken the run folder; collective."""
        new_holder = [self.lease.new_holder() if self.lease is not None else ""]
        dist.broadcast_object_list(new_holder)
        if new_holder[0]:
            raise RunError(
                f"{self.run_dir} was taken over by {new_holder[0]}: "
                f"this one stops at step {self.step} and saves nothing"
            )

    def _record(self, row: dict) -> None:
        """Prints and writes a row of the metrics; with a validation loss also head statistics. Collective."""
        self.progress.report(row)
        tensors = None
        if "validation_loss" in row:
            # Every rank takes part in gathering them; rank 0 writes.
            named = parameters_by_name(self.engine.model).items()
            names = [name for name, parameter in named if parameter.spec.component == "hlc"]
            combinations = {name: self.engine.state.full_weight(name).cpu() for name in names}
            combinations = self._gather_stages(combinations)
            tensors = head_tensors(combinations, self._gather_stages(self.head_outputs.rms(self.grid.tp)))

        if self.metrics is not None and not self.lease.new_holder():
            self.metrics.write(row, tensors)

    def _gather_sample_hashes(self, data: StepData) -> list[str]:
        """A digest of every sample of the global batch, in its order; collective over the data group."""
        hashes_by_rank: list[list[list[str]]] = [[]] * self.grid.dims.dp
        dist.all_gather_object(hashes_by_rank, data.hashes(), group=self.grid.mpu.get_data_parallel_group())
        # Ranks take the micro-batches of a global batch in turn.
        return [digest for turn in zip(*hashes_by_rank, strict=True) for micro_batch in turn for digest in micro_batch]

    def _gather_stages(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of all pipeline stages, by name; collective over the pipeline group."""
        if self.grid.dims.pp == 1:
            return tensors

        stages: list[dict[str, torch.Tensor]] = [{}] * self.grid.dims.pp
        dist.all_gather_object(stages, tensors, group=self.grid.mpu.get_pipe_parallel_group())
        return {name: value for stage in stages for name, value in stage.items()}

    def _validate(self) -> float:
        """Mean cross-entropy (nats a target) over `evaluation.batches` global batches of validation; collective."""
        corpora = self.inputs.validation
        assert corpora is not None

        count = self.config.evaluation.batches * self.engine.grid.dims.num_micro_batches
        batches = validation_batches(corpora=corpora, config=self.config, grid=self.grid)
        with closing(Prefetcher(batches, self.data_stall)) as prefetcher, self.head_outputs.recording():
            self.validation_loss = self.engine.evaluate(iter(prefetcher), count)

        return self.validation_loss

    def _checkpoint_metadata(self) -> folder.CheckpointMetadata:
        """The contents of meta.json for a checkpoint of the current step."""
        dims = self.inputs.dims

        return folder.CheckpointMetadata(
            step=self.step,
            samples=self.step * self.config.training.global_batch_size,
            tokens=self.step * self.config.tokens_per_step,
            config=self.config.model_dump(mode="json"),
            data=self.data_fingerprint,
            layout={
                "tensor_model_parallel_size": dims.tp,
                "pipeline_model_parallel_size": dims.pp,
                "data_parallel_size": dims.dp,
                "zero_stage": self.config.parallel.zero_stage,
            },
            versions=self.versions,
            validation_loss=self.validation_loss,
        )

    def _load(self, source: Path | None) -> None:
        """Loads a checkpoint into the engine, or else the weights of `run.init_from`, if there are any."""
        if self.metadata is not None and source is not None:
            self.validation_loss = self.metadata.validation_loss
            read_fragments(source, self.engine.state.fragments())
        elif self.weights is not None:
            read_weights(self.weights.stored, self.engine.state.fragments(optimizer_state=False))
        else:
            return

        self.engine.state.sync_after_load(self.step)
