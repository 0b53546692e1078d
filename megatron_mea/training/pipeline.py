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
from megatron_mea.training.loader import to_device
from megatron_mea.training.pipeline_stage import NUM_LOSS_TERMS, LastStageWithLoss
from megatron_mea.training.zero_state import pipeline_module


class PipelineEngine(Engine):
    """`Engine` with one pipeline stage of the decoder on each rank; ZeRO 0 and 1."""

    def _deepspeed_arguments(self) -> dict[str, Any]:
        self._loss_sums = torch.zeros(NUM_LOSS_TERMS, dtype=torch.float64, device=self.device)
        self._loss_scale = 1.0
        self._last_stage = LastStageWithLoss(self.stage) if self.grid.is_last_stage else None

        self._tied_weight: torch.nn.Parameter | None = None
        if self.config.model.tie_word_embeddings and self.grid.embedding_group is not None:
            self._tied_weight = parameters_by_name(self.model)["model.embed_tokens.weight"]

        stage = self._last_stage or self.stage
        return {"model": pipeline_module(stage, grid=self.grid, loss=self._loss, tied_weight=self._tied_weight)}

    def _loss(self, outputs: tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        """Scaled loss of a micro-batch from the outputs of `LastStageWithLoss`, for DeepSpeed."""
        loss, loss_sums = outputs
        self._loss_sums += loss_sums
        return loss * self._loss_scale

    def _pop_loss_sums(self) -> torch.Tensor:
        """The sums of `PipelineStage.compute_loss` since the last call; zero on all stages but the last."""
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
            input_ids, position_ids, targets = to_device(batch, device=self.device, cp=self.grid.cp)
            if self._last_stage is not None:
                self._last_stage.targets.append(targets)
            yield (input_ids, position_ids), targets
