"""The training loop: steps, validation, metrics, checkpoints, and stopping when asked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mea.checkpoint import folder, tensors
from megatron_mea.checkpoint.resume import newest_whole
from megatron_mea.config import Config
from megatron_mea.config.layout import Layout
from megatron_mea.data.corpora import Batch, Corpora
from megatron_mea.data.tokenizer import copy_tokenizer
from megatron_mea.errors import UserError
from megatron_mea.parallel.parameter import named_specs
from megatron_mea.training import processes, records
from megatron_mea.training.build import build_engine
from megatron_mea.training.engine import NonFiniteError
from megatron_mea.training.loader import Loader, StepData, rank_samples
from megatron_mea.training.ranks import Ranks
from megatron_mea.training.replicas import check_replicas
from megatron_mea.training.schedule import learning_rate
from megatron_mea.training.signals import StopSignal


@dataclass(frozen=True)
class Inputs:
    """What was opened and checked before processes met.

    `warnings` and `changes` (of a configuration that resumes) are lines to print.
    """

    ranks: Ranks
    layout: Layout
    train: Corpora
    validation: Corpora | None
    warnings: list[str]
    changes: list[str]


def run(config: Config, inputs: Inputs, stop: StopSignal) -> None:
    """Trains until the last step, or until a rank is asked to stop."""
    if config.training.deterministic:
        # Read when cuBLAS starts; without it torch refuses.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    device = processes.start_distributed(inputs.ranks)
    # Not where this fails: leaving a group may wait for the others, or end them before this rank has said why.
    _Run(config, inputs, device).train(stop)
    processes.stop_distributed()


class _Run:
    def __init__(self, config: Config, inputs: Inputs, device: torch.device) -> None:
        self.config, self.inputs = config, inputs
        self.dir, self.rank = Path(config.run.dir), inputs.ranks.rank
        self.versions = records.versions()
        self.validation_loss: float | None = None
        source, notes = self._choose_checkpoint()
        self.meta = folder.Meta.read(source) if source else None
        self.step = self.meta.step if self.meta else 0
        self.progress = records.Progress(config, self.rank, self.step)
        self._say_start(device, source, notes)

        self.engine = build_engine(config, device, initialized=source is None)
        self.grid = self.engine.grid
        if source is not None:
            self._load(source)
        if self.rank == 0:
            records.write_config(config, self.dir, self.versions)
            (self.dir / records.FINISHED).unlink(missing_ok=True)
        self.metrics = None
        if self.rank == 0:
            resumed = self.step if source is not None else None
            self.metrics = records.Metrics(self.dir, resumed, config.logging.tensorboard)

    def train(self, stop: StopSignal) -> None:
        config, validates = self.config, self.inputs.validation is not None
        if self.step == 0 and validates:
            self._record({"step": 0, "tokens": 0, "validation_loss": self._validate()})
        loader = Loader(self.inputs.train, config, self.grid, self.step + 1)
        waited = 0.0
        self.progress.start()
        for data in loader:
            step, lr = data.step, learning_rate(config, data.step)
            try:
                result = self.engine.train_step(data.batches, data.targets, lr, stop.received is not None)
            except NonFiniteError as error:
                raise NonFiniteError(self._explain(error, data)) from None
            if step == self.progress.first_step + 1:
                processes.shorten_timeouts(config.parallel.timeout_minutes)
            self.step, last = step, step == config.steps
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
            saving = last or result.stop or step % config.checkpoint.interval == 0
            if logging:
                row["tokens_per_second"] = self.progress.tokens_per_second(step)
                row["data_wait_seconds"], waited = loader.waited - waited, loader.waited
                if config.logging.sample_hashes:
                    row["sample_hashes"] = self._all_hashes(data)
                if validating:
                    row["validation_loss"] = self._validate()
                self._record(row)
            if saving:
                self._save()
            if logging or saving:
                self.progress.mark(step)
            if result.stop and not last:
                self.progress.say(f"asked to stop: saved step {step}; the same command goes on from here")
                break
        else:
            if self.rank == 0:
                records.write_finished(self.dir, self.step)
            self.progress.say(f"finished at step {self.step}: {self.dir}")
        loader.close()
        if self.metrics is not None:
            self.metrics.close()
        dist.barrier()

    def _choose_checkpoint(self) -> tuple[Path | None, list[str]]:
        """Rank 0 verifies and chooses, so that all ranks go on from the same one."""
        chosen: list = [None]
        if self.rank == 0:
            try:
                self.dir.mkdir(parents=True, exist_ok=True)
                chosen = [newest_whole(self.dir)]
            except OSError as error:
                chosen = [UserError("run.dir", f"{self.dir}: {error.strerror}", "a folder that can be written")]
        dist.broadcast_object_list(chosen)
        if isinstance(chosen[0], UserError):
            raise chosen[0]
        return chosen[0]

    def _say_start(self, device: torch.device, source: Path | None, notes: list[str]) -> None:
        config, say = self.config, self.progress.say
        say(
            f"{self.inputs.ranks.world_size} process(es) on {device.type}, {config.training.precision}, "
            f"variant {config.model.attention_variant}, {config.steps} steps of {config.tokens_per_step:,} tokens"
        )
        for line in self.inputs.train.shares():
            say(f"train {line}")
        for line in [*self.inputs.warnings, *notes]:
            say(f"warning: {line}")
        if source is not None:
            say(f"resuming from {source}")
            for line in self.inputs.changes:
                say(f"changed since then: {line}")

    def _record(self, row: dict) -> None:
        self.progress.report(row)
        more = None
        if "validation_loss" in row and self.config.logging.tensorboard:
            # Every rank takes part in collecting them; rank 0 writes.
            named = named_specs(self.engine.model).items()
            names = [name for name, parameter in named if parameter.spec.kind == "hlc"]
            more = records.hlc_statistics({name: self.engine.weight(name).cpu() for name in names})
            more = self._of_all_stages(more)
        if self.metrics is not None:
            self.metrics.write(row, more)

    def _all_hashes(self, data: StepData) -> list[str]:
        """Of every sample of the global batch, in its order."""
        ranks: list[list[list[str]]] = [[]] * self.grid.data_size
        dist.all_gather_object(ranks, data.hashes(), group=self.grid.mpu.get_data_parallel_group())
        return [digest for turn in zip(*ranks, strict=True) for micro_batch in turn for digest in micro_batch]

    def _of_all_stages(self, statistics: dict[str, float]) -> dict[str, float]:
        """The union over the pipeline's stages, on rank 0."""
        if self.grid.pipeline_size == 1:
            return statistics
        stages: list[dict[str, float]] = [{}] * self.grid.pipeline_size
        dist.all_gather_object(stages, statistics, group=self.grid.mpu.get_pipe_parallel_group())
        return {name: value for stage in stages for name, value in stage.items()}

    def _validate(self) -> float:
        """Mean cross-entropy over the first `evaluation.batches` global batches of the validation corpora."""
        corpora = self.inputs.validation
        assert corpora is not None

        def batches() -> Iterator[Batch]:
            for step in range(1, self.config.evaluation.batches + 1):
                for micro in rank_samples(step, self.config, self.grid.data_rank, self.grid.data_size):
                    yield corpora.batch(micro)

        count = self.config.evaluation.batches * self.engine.accumulation
        self.validation_loss = self.engine.evaluate(batches(), count)
        return self.validation_loss

    def _save(self) -> None:
        final = self.dir / "checkpoints" / folder.folder_name(self.step)
        scratch = final.with_name(f".tmp-{final.name}")
        if self.rank == 0:
            # A save that was cut short earlier has left its scratch folder.
            for leftover in final.parent.glob(".tmp-step_*"):
                shutil.rmtree(leftover)
            scratch.mkdir(parents=True)
        dist.barrier()
        tensors.write_tensors(scratch, self.engine.state(), self.grid.stage_rank, self.grid.stage_size)
        dist.barrier()
        if self.rank == 0:
            copy_tokenizer(self.config.data.tokenizer, scratch / folder.TOKENIZER)
            self._meta().write(scratch)
            folder.seal(scratch)
            folder.remove(final)
            folder.publish(scratch, final)
            folder.retain(self.dir, self.config.checkpoint.keep, self.config.checkpoint.keep_every)
        dist.barrier()

    def _meta(self) -> folder.Meta:
        layout = self.inputs.layout
        return folder.Meta(
            step=self.step,
            samples=self.step * self.config.training.global_batch_size,
            tokens=self.step * self.config.tokens_per_step,
            config=self.config.model_dump(mode="json"),
            data=self.inputs.train.fingerprint(),
            layout={
                "tensor_model_parallel_size": layout.tensor,
                "pipeline_model_parallel_size": layout.pipeline,
                "data_parallel_size": layout.data,
                "zero_stage": self.config.parallel.zero_stage,
            },
            versions=self.versions,
            validation_loss=self.validation_loss,
        )

    def _load(self, source: Path) -> None:
        assert self.meta is not None
        self.validation_loss = self.meta.validation_loss
        shapes = tensors.tensor_shapes(source)

        def read(name: str) -> torch.Tensor:
            return tensors.read_tensors(source, {name: shapes[name]})[name]

        self.engine.load_state(read, updates=self.step)

    def _explain(self, error: NonFiniteError, data: StepData) -> str:
        """Names step and samples; nothing was updated, so the newest checkpoint is as good as it was."""
        first = (data.step - 1) * self.config.training.global_batch_size
        last = first + self.config.training.global_batch_size - 1
        lines = [f"step {data.step} stopped before its update: {error}", f"  samples {first} to {last}"]
        if error.micro_batches:
            for index, name in error.micro_batches.items():
                samples, gradient = data.samples[index], f", first in the gradient of {name}" if name else ""
                where = f"samples {samples.tolist()}{gradient}; {self.inputs.train.describe(samples)}"
                lines.append(f"  not finite on rank {self.rank}: {where}")
        bad = [n for n, p in named_specs(self.engine.model).items() if not getattr(p, "ds_tensor", p).isfinite().all()]
        lines.append(f"  parameters that are not finite: {', '.join(bad) or 'none'}")
        lines.append(
            "  the newest checkpoint is untouched: lower optimizer.lr or look at the samples, and go on from it"
        )
        return "\n".join(lines)
