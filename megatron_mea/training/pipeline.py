"""The training engine of a pipeline: DeepSpeed's pipeline engine with its 1F1B schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron_mea.data.corpora import Batch
from megatron_mea.parallel.parameter import parameters_by_name
from megatron_mea.training.engine import Engine
from megatron_mea.training.pipeline_stage import LastStageWithLoss


class PipelineEngine(Engine):
    """`Engine` with one pipeline stage of the decoder on each rank; ZeRO 0 and 1."""

    def _deepspeed_arguments(self) -> dict[str, Any]:
        from deepspeed.pipe import PipelineModule

        self._loss_sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._tied_weight: torch.nn.Parameter | None = None
        self._loss_scale = 1.0

        # DeepSpeed takes the layers of all stages and picks those of this rank. Ours are built stage by stage, so it
        # picks one entry of this list and ignores the others.
        self._last_stage = LastStageWithLoss(self.stage) if self.grid.is_last_stage else None
        stages = [self._last_stage or self.stage] * self.grid.dims.pp
        module = PipelineModule(
            stages, topology=self.grid.mpu.topology(), loss_fn=self._loss, partition_method="uniform"
        )

        tied_weights = []
        if self.config.model.tie_word_embeddings and self.grid.embedding_group is not None:
            weight = self._tied_weight = parameters_by_name(self.model)["model.embed_tokens.weight"]
            tied_weights = [(weight, self.grid.embedding_group)]
            # DeepSpeed reads this attribute, so that its gradient norm counts the matrix once.
            weight.ds_pipe_replicated = self.grid.is_last_stage

        # DeepSpeed ties layers; here a single matrix is tied.
        module.get_tied_weights_and_groups = lambda: tied_weights
        return {"model": module}

    def _loss(self, outputs: tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        """Scaled loss of a micro-batch from the outputs of `LastStageWithLoss`, for DeepSpeed."""
        loss, loss_sums = outputs
        self._loss_sums += loss_sums
        return loss * self._loss_scale

    def _pop_loss_sums(self) -> torch.Tensor:
        """(2,) sums of `PipelineStage.compute_loss` since the last call; zero on all stages but the last."""
        loss_sums = self._loss_sums.clone()
        self._loss_sums.zero_()
        return loss_sums

    def _run_step(self, batches: Sequence[Batch], loss_scale: float) -> torch.Tensor:
        self._loss_scale = loss_scale
        self.engine.train_batch(self._micro_batches(iter(batches)))

        if self._tied_weight is not None:
            # Gradients are averaged in one flat buffer a stage, where the two copies lie at different places and
            # three and more ranks add up in a different order: the first stage's copy is the one that counts.
            dist.broadcast(self._tied_weight.data, self.grid.mpu.stage_to_global(0), group=self.grid.embedding_group)

        return self._pop_loss_sums()

    def _evaluate(self, batches: Iterator[Batch], count: int) -> torch.Tensor:
        micro_batches = self._micro_batches(batches)
        with self._without_teacher():
            self.engine.eval_batch(micro_batches, reduce_output=None, bcast_loss=False, num_micro_batches=count)

        return self._pop_loss_sums()[0]

    @contextmanager
    def _without_teacher(self) -> Iterator[None]:
        """Lets stages exchange fewer tensors, without a teacher's; DeepSpeed otherwise remembers number and shapes."""
        if self.stage.teacher is None:
            yield
            return

        self.engine.reset_activation_shape()
        yield
        self.engine.reset_activation_shape()

    def _micro_batches(self, batches: Iterator[Batch]) -> Iterator[tuple[tuple[torch.Tensor, ...], torch.Tensor]]:
        for batch in batches:
            input_ids, position_ids, targets = self._to_device(batch)
            if self._last_stage is not None:
                self._last_stage.targets.append(targets)
            yield (input_ids, position_ids), targets

    def _locate_nonfinite(self, batches: Sequence[Batch]) -> dict[int, str | None]:
        """As `Engine._locate_nonfinite`, over all stages: backward begins at the last stage, so its names win."""
        stages: list[dict[int, str | None]] = [{}] * self.grid.dims.pp
        dist.all_gather_object(
            stages, super()._locate_nonfinite(batches), group=self.grid.mpu.get_pipe_parallel_group()
        )

        nonfinite: dict[int, str | None] = {}
        for stage in stages:
            nonfinite |= {index: name for index, name in stage.items() if name or index not in nonfinite}

        return dict(sorted(nonfinite.items()))

    def _replay(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Forward and backward of a micro-batch through all stages, one after the other."""
        grid = self.grid
        previous_rank, next_rank = (
            grid.mpu.stage_to_global((grid.pipeline_rank + step) % grid.dims.pp) for step in (-1, 1)
        )
        is_first_stage = grid.pipeline_rank == 0
        input_ids, position_ids, targets = self._to_device(batch)

        inputs: list[torch.Tensor] = [input_ids]
        if not is_first_stage:
            batch_size, seq_length = input_ids.shape
            inputs = self._empty_inputs(batch_size, seq_length)
            for tensor in inputs:
                dist.recv(tensor, previous_rank)
            inputs[0].requires_grad_()

        output, *others = self.stage((inputs[0], position_ids, *inputs[1:]))
        gradient = None
        if grid.is_last_stage:
            output, _ = self.stage.compute_loss((output, *others), targets)
        else:
            for tensor in (output.detach(), *others[1:]):
                dist.send(tensor, next_rank)
            gradient = torch.empty_like(output)
            dist.recv(gradient, next_rank)

        by_name, input_gradients = self._gradients(output, gradient, inputs=[] if is_first_stage else inputs[:1])
        if not is_first_stage:
            dist.send(input_gradients[0].contiguous(), previous_rank)

        return output.detach().sum(), by_name

    def _empty_inputs(self, batch_size: int, seq_length: int) -> list[torch.Tensor]:
        """Buffers for the previous stage's hidden states (batch, seq, hidden) and, with a teacher, the bytes of its."""
        seq_length //= self.grid.tp.size if self.grid.tp.sequence_parallel else 1
        widths_and_dtypes = [(self.config.model.hidden_size, next(self.model.parameters()).dtype)]
        if (teacher := self.stage.teacher) is not None:
            widths_and_dtypes.append((teacher.hidden_size * teacher.dtype.itemsize, torch.uint8))

        return [
            torch.empty((batch_size, seq_length, width), dtype=dtype, device=self.device)
            for width, dtype in widths_and_dtypes
        ]
