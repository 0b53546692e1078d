"""The training loop: steps, validation, metrics, checkpoints, stop requests. All else is a callback."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing, suppress

import torch
import torch.distributed as dist

from megatron_mea.checkpoint.folder import CheckpointMetadata
from megatron_mea.config import Config
from megatron_mea.outputs import disk_errors
from megatron_mea.training import distributed, metrics
from megatron_mea.training.callbacks import Record, TrainedStep, what_is_due
from megatron_mea.training.loader import DataStallTimer, Prefetcher, StepData, training_steps, validation_batches
from megatron_mea.training.nonfinite import NonFiniteError, describe_nonfinite
from megatron_mea.training.run_callbacks import build_callbacks
from megatron_mea.training.run_start import StartedRun, check_lease, start_run
from megatron_mea.training.schedule import learning_rate
from megatron_mea.training.signals import StopSignal
from megatron_mea.training.startup import RunInputs
from megatron_mea.training.step_result import StepResult
from megatron_mea.training.watchdog import Watchdog


def run(*, config: Config, inputs: RunInputs, stop: StopSignal) -> None:
    """Trains until the last step, or until a rank is asked to stop."""
    if config.training.deterministic:
        # cuBLAS reads it at its start; without it torch refuses to be deterministic.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(mode=True)

    with closing(Watchdog(inputs.rank_env.rank, distributed.START_MINUTES)) as watchdog:
        device = distributed.start_distributed(inputs.rank_env)
        started = start_run(config=config, inputs=inputs, device=device, watchdog=watchdog)
        Trainer(config=config, inputs=inputs, started=started, watchdog=watchdog, stop=stop).train()
        # Not after an exception: leaving a group may wait for the others, or end them before this rank has printed why.
        distributed.stop_distributed()


class Trainer:
    """Trains a started run on this rank; every rank calls the same methods, and callbacks, in the same order."""

    def __init__(
        self, *, config: Config, inputs: RunInputs, started: StartedRun, watchdog: Watchdog, stop: StopSignal
    ) -> None:
        self.config, self.inputs, self.watchdog, self.stop = config, inputs, watchdog, stop
        self.folder, self.lease, self.step = started.folder, started.lease, started.step
        self.engine, self.saver = started.engine, started.saver
        self.progress, self.metrics = started.progress, started.metrics
        self.validation_loss = started.metadata.validation_loss if started.metadata else None
        self.versions, self.data_fingerprint = started.versions, inputs.train.fingerprint()
        self.data_stall = DataStallTimer(watchdog.clock)
        self.callbacks = build_callbacks(config=config, started=started, watchdog=watchdog, data_stall=self.data_stall)

    def train(self) -> None:
        """Trains until the last step or a stop request, and writes all that is pending."""
        config = self.config
        if self.step == 0 and self.inputs.validation is not None:
            record = Record(row={"step": 0, "tokens": 0})
            self._validate(record)
            self._write(record)

        first = self.step + 1
        steps = training_steps(corpora=self.inputs.train, config=config, grid=self.engine.grid, first=first)
        loader = Prefetcher(steps, self.data_stall)
        self.progress.start()
        for data in loader:
            for callback in self.callbacks:
                callback.on_step_begin(data.step)

            result = self._train_step(data)
            self.watchdog.mark()
            if data.step == first:
                self.watchdog.minutes = config.parallel.timeout_minutes

            self.step = data.step
            due = what_is_due(data.step, config=config, stop_requested=result.should_stop)
            record = Record(row={"step": self.step, "tokens": self.step * config.tokens_per_step} | result.scalars())
            self._follow_up(TrainedStep(data=data, result=result, due=due, record=record))
            if due.last:
                break

        loader.close()
        self._finish()

    def _train_step(self, data: StepData) -> StepResult:
        """One optimizer step; a loss that is not finite is described and noted as the end of the run."""
        try:
            return self.engine.train_step(
                batches=data.batches,
                num_targets=data.num_targets,
                lr=learning_rate(self.config, data.step),
                stop_requested=self._stop_requested,
            )
        except NonFiniteError as error:
            message = describe_nonfinite(
                error, data=data, config=self.config, corpora=self.inputs.train, model=self.engine.model
            )
            if self._owns_folder():
                # A full disk must not hide the message.
                with suppress(OSError):
                    reason = message.partition("\n")[0]
                    metrics.write_diverged(run=self.folder, step=data.step, reason=reason)

            raise NonFiniteError(message) from None

    def _follow_up(self, trained: TrainedStep) -> None:
        """Logs, validates and saves as it is due, with the callbacks of each."""
        due, record = trained.due, trained.record
        for callback in self.callbacks:
            callback.on_update(trained)

        if due.log:
            record.row["tokens_per_second"] = self.progress.tokens_per_second(trained.step)
            if due.validate:
                self._validate(record)

            warnings = [line for callback in self.callbacks for line in callback.on_log(trained)]
            self._write(record)
            for line in warnings:
                self.progress.log(f"warning: {line}")

        if trained.result.should_stop:
            check_lease(self.lease, run=self.folder, step=self.step)
        if due.save:
            with self.watchdog.extend_timeout(distributed.SAVE_MINUTES):
                self.saver.save(self._checkpoint_metadata(), self.engine.state.fragments(owned=True))

        for callback in self.callbacks:
            callback.on_step_end(trained)
        if due.log or due.save:
            self.progress.mark(trained.step)

    def _validate(self, record: Record) -> None:
        """Adds to a record the mean cross-entropy (nats a target) over `evaluation.batches` global batches."""
        assert self.inputs.validation is not None
        count = self.config.evaluation.batches * self.engine.grid.dims.num_micro_batches
        batches = validation_batches(corpora=self.inputs.validation, config=self.config, grid=self.engine.grid)
        with ExitStack() as stack:
            for callback in self.callbacks:
                stack.enter_context(callback.validation(record))

            prefetcher = stack.enter_context(closing(Prefetcher(batches, self.data_stall)))
            record.row["validation_loss"] = self.validation_loss = self.engine.evaluate(iter(prefetcher), count)

    def _write(self, record: Record) -> None:
        """Prints a record and writes it to the metrics."""
        self.progress.report(record.row)
        if self.metrics is not None and self._owns_folder():
            self.metrics.write(record.row, record.head_tensors)

    def _owns_folder(self) -> bool:
        """Whether this is rank 0, and no other job has taken the run folder."""
        return self.lease is not None and not self.lease.new_holder()

    def _stop_requested(self) -> bool:
        """Whether this rank got a signal, could not save, or lost the lease."""
        lost_lease = self.lease is not None and bool(self.lease.new_holder(cached=True))
        return self.stop.received is not None or self.saver.failed or lost_lease

    def _checkpoint_metadata(self) -> CheckpointMetadata:
        """The contents of meta.json for a checkpoint of the current step."""
        return CheckpointMetadata.of_step(
            self.step,
            config=self.config,
            dims=self.inputs.dims,
            data=self.data_fingerprint,
            versions=self.versions,
            validation_loss=self.validation_loss,
            expert_counts=self.engine.routers.state(),
        )

    def _finish(self) -> None:
        """Waits for the last checkpoint and closes all files."""
        with self.watchdog.extend_timeout(distributed.SAVE_MINUTES):
            self.saver.wait()

        for callback in self.callbacks:
            callback.on_close()

        if self.step < self.config.steps:
            self.progress.log(f"asked to stop: saved step {self.step}; the same command goes on from here")
        else:
            if self.lease is not None:
                with disk_errors(self.folder.finished):
                    metrics.write_finished(self.folder, self.step)
            self.progress.log(f"finished at step {self.step}: {self.folder.path}")

        with disk_errors(self.folder.path):
            if self.metrics is not None:
                self.metrics.close()
            if self.lease is not None:
                self.lease.end()

        dist.barrier()
