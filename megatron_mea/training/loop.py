"""The training loop: steps, validation, metrics, checkpoints, and stopping when asked."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_mea.checkpoint import folder
from megatron_mea.checkpoint.lease import Lease
from megatron_mea.checkpoint.resume import Choice, choose
from megatron_mea.checkpoint.saver import Saver
from megatron_mea.checkpoint.tensors import read_fragments
from megatron_mea.config import Config
from megatron_mea.errors import RunError, UserError
from megatron_mea.huggingface.weights import open_weights
from megatron_mea.outputs import written
from megatron_mea.parallel.parameter import named_specs
from megatron_mea.training import processes, records
from megatron_mea.training.build import build_engine
from megatron_mea.training.engine import NonFiniteError
from megatron_mea.training.heads import HeadOutputs, head_tensors, hlc_statistics
from megatron_mea.training.inputs import Inputs
from megatron_mea.training.loader import ReadAhead, StepData, Waiting, training_steps, validation_batches
from megatron_mea.training.pace import Pace
from megatron_mea.training.profile import Profiler
from megatron_mea.training.replicas import check_replicas
from megatron_mea.training.schedule import learning_rate
from megatron_mea.training.signals import StopSignal
from megatron_mea.training.watchdog import Watchdog
from megatron_mea.versions import versions

T = TypeVar("T")
_SHOWN = 20
"""Changed keys that are printed: every path of thousands of corpora may have changed."""


def run(config: Config, inputs: Inputs, stop: StopSignal) -> None:
    """Trains until the last step, or until a rank is asked to stop."""
    if config.training.deterministic:
        # Read when cuBLAS starts; without it torch refuses.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with closing(Watchdog(inputs.ranks.rank, processes.START_MINUTES)) as watchdog:
        device = processes.start_distributed(inputs.ranks)
        _Run(config, inputs, device, watchdog).train(stop)
    # Not where this fails: leaving a group may wait for the others, or end them before this rank has said why.
    processes.stop_distributed()


class _Run:
    def __init__(self, config: Config, inputs: Inputs, device: torch.device, watchdog: Watchdog) -> None:
        self.config, self.inputs, self.watchdog = config, inputs, watchdog
        self.dir, self.rank = Path(config.run.dir), inputs.ranks.rank
        self.versions, self.data = versions(), inputs.train.fingerprint()
        self.validation_loss: float | None = None
        self.waiting = Waiting()
        self.lease: Lease | None = None
        choice, notes = self._choose()
        watchdog.mark()
        self.meta = folder.Meta.read(choice.source) if choice.source else None
        self.step = self.meta.step if self.meta else 0
        self.progress = records.Progress(config, self.rank, self.step)
        self._say_start(device, choice, notes)
        self._check_lease()
        if self.rank == 0:
            folder.remove_leftovers(self.dir)
            for mark in (records.FINISHED, records.DIVERGED, records.FAILED):
                (self.dir / mark).unlink(missing_ok=True)
            for one, why in choice.aside:
                # A job that was started at the same time may have renamed it.
                with suppress(FileNotFoundError):
                    folder.set_aside(one, why)

        self.weights = inputs.weights
        if choice.source is None and self.weights is None and config.run.init_from is not None:
            # There were checkpoints, and all of them are damaged.
            self.weights = open_weights(Path(config.run.init_from), config.model)
        anew = choice.source is None and self.weights is None
        self.engine = build_engine(config, device, anew, inputs.teacher)
        watchdog.mark()
        self.grid = self.engine.grid
        self._load(choice.source)
        group = processes.writers_group()
        tokenizer = Path(config.data.tokenizer)
        self.saver = Saver(self.dir, config.checkpoint, tokenizer, group, self.lease, self.progress.say)
        self.metrics, self.heartbeat = None, None
        self.outputs = HeadOutputs(self.engine.model) if config.logging.tensorboard else None
        self.pace = Pace(self.engine.model, self.grid, device, watchdog.mark)
        self.profiler = Profiler(config.logging.profile, self.dir, None if self.grid.stage_rank else self.rank)
        # Making and loading the model took a while, and what follows cuts the metrics of whoever has the folder now.
        self._check_lease()
        if self.rank == 0:
            resumed = self.step if choice.source is not None else None
            with written(self.dir):
                records.write_config(config, self.dir, self.versions)
                self.metrics = records.Metrics(self.dir, resumed, config.logging.tensorboard)
            self.heartbeat = records.Heartbeat(self.dir)

    def train(self, stop: StopSignal) -> None:
        config, validates = self.config, self.inputs.validation is not None
        if self.step == 0 and validates:
            self._record({"step": 0, "tokens": 0, "validation_loss": self._validate()})
        loader = ReadAhead(training_steps(self.inputs.train, config, self.grid, self.step + 1), self.waiting)
        self.progress.start()
        for data in loader:
            step, lr = data.step, learning_rate(config, data.step)
            self.profiler.before(step)
            try:
                result = self.engine.train_step(data.batches, data.targets, lr, partial(self._wants_to_stop, stop))
            except NonFiniteError as error:
                explained = self._explain(error, data)
                if self.metrics is not None and not self.lease.lost_to():
                    # A full disk is told by what matters more.
                    with suppress(OSError):
                        records.write_diverged(self.dir, data.step, explained.partition("\n")[0])
                raise NonFiniteError(explained) from None
            self.watchdog.mark()
            if step == self.progress.first_step + 1:
                self.watchdog.minutes = config.parallel.timeout_minutes
                processes.shorten_timeouts(config.parallel.timeout_minutes, but=self.saver.group)
            self.step, last = step, step == config.steps
            with self.watchdog.patient(processes.SAVE_MINUTES):
                trace = self.profiler.after(step, last or result.stop)
            if trace is not None:
                self.progress.say(f"wrote a trace: {trace}")
            row = {
                "step": step,
                "tokens": step * config.tokens_per_step,
                "loss": result.loss,
                "lr": lr,
                "grad_norm": result.grad_norm,
            }
            validating = validates and (last or step % config.evaluation.interval == 0)
            logging = validating or last or step % config.logging.interval == 0 or config.logging.sample_hashes
            if config.training.replica_check_interval and step % config.training.replica_check_interval == 0:
                check_replicas(self.engine.model, self.grid, config)
            if result.distillation_loss is not None:
                row["distillation_loss"] = result.distillation_loss
            saving = last or result.stop or step % config.checkpoint.interval == 0
            if logging:
                row["tokens_per_second"] = self.progress.tokens_per_second(step)
                if config.logging.sample_hashes:
                    row["sample_hashes"] = self._all_hashes(data)
                if validating:
                    row["validation_loss"] = self._validate()
                row["data_wait_seconds"] = self.waiting.largest(self.engine.device)
                spread, outliers = self.pace.report()
                self._record(row | spread)
                for line in outliers:
                    self.progress.say(f"warning: {line}")
            if result.stop:
                self._check_lease()
            if saving:
                with self.watchdog.patient(processes.SAVE_MINUTES):
                    self.saver.save(self._meta(), self.engine.fragments(owned=True))
            self._beat(row, now=saving)
            if logging or saving:
                self.progress.mark(step)
            if result.stop and not last:
                break
        loader.close()
        with self.watchdog.patient(processes.SAVE_MINUTES):
            self.saver.wait()
        self._beat(row={}, now=True)
        if self.step < config.steps:
            self.progress.say(f"asked to stop: saved step {self.step}; the same command goes on from here")
        else:
            if self.rank == 0:
                with written(self.dir / records.FINISHED):
                    records.write_finished(self.dir, self.step)
            self.progress.say(f"finished at step {self.step}: {self.dir}")
        with written(self.dir):
            if self.metrics is not None:
                self.metrics.close()
            if self.lease is not None:
                self.lease.end()
        dist.barrier()

    def _beat(self, row: dict, now: bool) -> None:
        if self.heartbeat is not None:
            facts = {"steps": self.config.steps, "save_seconds": self.saver.seconds}
            facts |= {key: row[key] for key in ("loss", "tokens_per_second") if key in row}
            self.heartbeat.beat(self.step, facts, now)

    def _choose(self) -> tuple[Choice, list[str]]:
        """Chooses what to go on from, then takes the lease: a start that is refused must not stop a job that runs."""
        back_to, existing = self._of_first(lambda: (self.inputs.back_to, folder.all_checkpoints(self.dir)))
        choice = choose(existing, back_to, self._damage)
        notes, later = self._of_first(lambda: (self._take_lease(), folder.all_checkpoints(self.dir)))
        if later != existing:
            # The job that had the folder has saved meanwhile.
            choice = choose(later, back_to, self._damage)
        return choice, notes

    def _take_lease(self) -> list[str]:
        """Makes the run folder this job's own; returns lines to print."""
        self.dir.mkdir(parents=True, exist_ok=True)
        self.lease = Lease(self.dir)
        other = self.lease.take()
        return [f"{other} may still be writing {self.dir}: it is made to stop"] if other else []

    def _of_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0; where the run folder cannot be written, all ranks raise UserError."""
        found: list[Any] = [None]
        if self.rank == 0:
            try:
                found = [work()]
            except OSError as error:
                found = [UserError("run.dir", f"{self.dir}: {error.strerror}", "a folder that can be written")]
        dist.broadcast_object_list(found)
        if isinstance(found[0], UserError):
            raise found[0]
        return found[0]

    def _damage(self, checkpoint: Path) -> str | None:
        """What is wrong with a checkpoint; the ranks read it together."""
        found: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, folder.damage(checkpoint, self.rank, len(found)))
        return next((problem for problem in found if problem), None)

    def _wants_to_stop(self, stop: StopSignal) -> bool:
        lost = self.lease is not None and bool(self.lease.lost_to(now=False))
        return stop.received is not None or self.saver.failed or lost

    def _check_lease(self) -> None:
        """Raises on all ranks where another job writes the run folder now."""
        other = [self.lease.lost_to() if self.lease is not None else ""]
        dist.broadcast_object_list(other)
        if other[0]:
            raise RunError(
                f"{self.dir} was taken over by {other[0]}: this one stops at step {self.step} and saves nothing"
            )

    def _say_start(self, device: torch.device, choice: Choice, notes: list[str]) -> None:
        config, say = self.config, self.progress.say
        say(
            f"{self.inputs.ranks.world_size} process(es) on {device.type}, {config.training.precision}, "
            f"variant {config.model.attention_variant}, {config.steps} steps of {config.tokens_per_step:,} tokens"
        )
        for line in self.inputs.train.shares():
            say(f"train {line}")
        for line in [*self.inputs.warnings, *notes, *choice.notes]:
            say(f"warning: {line}")
        if choice.source is not None:
            say(f"resuming from {choice.source}")
            changes, more = self.inputs.changes[:_SHOWN], len(self.inputs.changes) - _SHOWN
            for line in [*changes, *([f"{more} more keys"] if more > 0 else [])]:
                say(f"changed since then: {line}")

    def _record(self, row: dict) -> None:
        self.progress.report(row)
        more = tensors = None
        if "validation_loss" in row and self.outputs is not None:
            # Every rank takes part in collecting them; rank 0 writes.
            named = named_specs(self.engine.model).items()
            names = [name for name, parameter in named if parameter.spec.kind == "hlc"]
            combinations = {name: self.engine.weight(name).cpu() for name in names}
            combinations = self._of_all_stages(combinations)
            more = hlc_statistics(combinations)
            tensors = head_tensors(combinations, self._of_all_stages(self.outputs.rms(self.grid.tensor)))
        if self.metrics is not None and not self.lease.lost_to():
            with written(self.dir / "metrics.jsonl"):
                self.metrics.write(row, more, tensors)

    def _all_hashes(self, data: StepData) -> list[str]:
        """Of every sample of the global batch, in its order."""
        ranks: list[list[list[str]]] = [[]] * self.grid.data_size
        dist.all_gather_object(ranks, data.hashes(), group=self.grid.mpu.get_data_parallel_group())
        return [digest for turn in zip(*ranks, strict=True) for micro_batch in turn for digest in micro_batch]

    def _of_all_stages(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The union over the pipeline's stages."""
        if self.grid.pipeline_size == 1:
            return tensors
        stages: list[dict[str, torch.Tensor]] = [{}] * self.grid.pipeline_size
        dist.all_gather_object(stages, tensors, group=self.grid.mpu.get_pipe_parallel_group())
        return {name: value for stage in stages for name, value in stage.items()}

    def _validate(self) -> float:
        """Mean cross-entropy over the first `evaluation.batches` global batches of the validation corpora."""
        corpora = self.inputs.validation
        assert corpora is not None

        count = self.config.evaluation.batches * self.engine.accumulation
        batches = validation_batches(corpora, self.config, self.grid)
        watched = self.outputs.watched() if self.outputs is not None else nullcontext()
        with closing(ReadAhead(batches, self.waiting)) as ahead, watched:
            self.validation_loss = self.engine.evaluate(iter(ahead), count)
        return self.validation_loss

    def _meta(self) -> folder.Meta:
        layout = self.inputs.layout
        return folder.Meta(
            step=self.step,
            samples=self.step * self.config.training.global_batch_size,
            tokens=self.step * self.config.tokens_per_step,
            config=self.config.model_dump(mode="json"),
            data=self.data,
            layout={
                "tensor_model_parallel_size": layout.tensor,
                "pipeline_model_parallel_size": layout.pipeline,
                "data_parallel_size": layout.data,
                "zero_stage": self.config.parallel.zero_stage,
            },
            versions=self.versions,
            validation_loss=self.validation_loss,
        )

    def _load(self, source: Path | None) -> None:
        if self.meta is not None and source is not None:
            self.validation_loss = self.meta.validation_loss
            read_fragments(source, self.engine.fragments())
        elif self.weights is not None:
            self.weights.read(self.engine.fragments(moments=False))
        else:
            return
        self.engine.loaded(updates=self.step)

    def _explain(self, error: NonFiniteError, data: StepData) -> str:
        """Names step and samples; nothing was updated, so the newest checkpoint is as good as it was."""
        first = (data.step - 1) * self.config.training.global_batch_size
        last = first + self.config.training.global_batch_size - 1
        lines = [f"step {data.step} stopped before its update: {error}", f"  samples {first} to {last}"]
        mine: list[str] = []
        for index, name in error.micro_batches.items():
            samples, gradient = data.samples[index], f", first in the gradient of {name}" if name else ""
            where = f"samples {samples.tolist()}{gradient}; {self.inputs.train.describe(samples)}"
            mine.append(f"  not finite on rank {self.rank}: {where}")
        bad = [n for n, p in named_specs(self.engine.model).items() if not getattr(p, "ds_tensor", p).isfinite().all()]
        ranks: list[tuple[list[str], list[str]]] = [([], [])] * dist.get_world_size()
        dist.all_gather_object(ranks, (mine, bad))
        lines += [line for found, _ in ranks for line in found]
        names = dict.fromkeys(name for _, found in ranks for name in found)
        lines.append(f"  parameters that are not finite: {', '.join(names) or 'none'}")
        lines.append(
            "  the newest checkpoint is untouched: lower optimizer.lr or look at the samples, and go on from it"
        )
        return "\n".join(lines)
