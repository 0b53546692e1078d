"""The training engine where the layers lie on several ranks: DeepSpeed's pipeline, one forward one backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron_mea.data.corpora import Batch
from megatron_mea.parallel.parameter import named_specs
from megatron_mea.training.engine import Engine
from megatron_mea.training.stage import Last


class PipelineEngine(Engine):
    """As `Engine`, for one stage of the decoder on each rank; ZeRO 0 and 1."""

    def _module(self) -> dict[str, Any]:
        from deepspeed.pipe import PipelineModule

        self._sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._tied: torch.nn.Parameter | None = None
        self._scale = 1.0
        # DeepSpeed takes the layers of all stages and keeps its own: ours are made stage by stage, so all but one of
        # these places are never looked at.
        self._last = Last(self.stage) if self.grid.is_last_stage else None
        stages = [self._last or self.stage] * self.grid.pipeline_size
        module = PipelineModule(
            stages, topology=self.grid.mpu.topology(), loss_fn=self._loss, partition_method="uniform"
        )
        tied = []
        if self.config.model.tie_word_embeddings and self.grid.ends is not None:
            weight = self._tied = named_specs(self.model)["model.embed_tokens.weight"]
            tied = [(weight, self.grid.ends)]
            # What DeepSpeed looks for, so that its gradient norm counts the matrix once.
            weight.ds_pipe_replicated = self.grid.is_last_stage
        # DeepSpeed ties whole layers, and what is tied here is a matrix.
        module.get_tied_weights_and_groups = lambda: tied
        return {"model": module}

    def _loss(self, outputs: tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        loss, sums = outputs
        self._sums += sums
        return loss * self._scale

    def _take_sums(self) -> torch.Tensor:
        """Those of `Stage.objective` since the last call; zero on all stages but the last."""
        total = self._sums.clone()
        self._sums.zero_()
        return total

    def _run(self, batches: Sequence[Batch], scale: float) -> torch.Tensor:
        self._scale = scale
        self.engine.train_batch(self._micro_batches(iter(batches)))
        if self._tied is not None:
            # Gradients are averaged in one flat buffer a stage, where the two copies lie at different places and
            # three and more ranks add up in a different order: the first stage's copy is the one that counts.
            dist.broadcast(self._tied.data, self.grid.mpu.stage_to_global(0), group=self.grid.ends)
        return self._take_sums()

    def _evaluate(self, batches: Iterator[Batch], count: int) -> torch.Tensor:
        micro_batches = self._micro_batches(batches)
        with self._without_teacher():
            self.engine.eval_batch(micro_batches, reduce_output=None, bcast_loss=False, num_micro_batches=count)
        return self._take_sums()[0]

    @contextmanager
    def _without_teacher(self) -> Iterator[None]:
        """Fewer tensors travel between the stages, of which DeepSpeed otherwise remembers number and shapes."""
        if self.stage.teacher is None:
            yield
            return
        self.engine.reset_activation_shape()
        yield
        self.engine.reset_activation_shape()

    def _micro_batches(self, batches: Iterator[Batch]) -> Iterator[tuple[tuple[torch.Tensor, ...], torch.Tensor]]:
        for batch in batches:
            input_ids, position_ids, targets = self._to_device(batch)
            if self._last is not None:
                self._last.targets.append(targets)
            yield (input_ids, position_ids), targets

    def _not_finite(self, batches: Sequence[Batch]) -> dict[int, str | None]:
        """The backward pass begins at the last stage, so what that one finds comes first."""
        stages: list[dict[int, str | None]] = [{}] * self.grid.pipeline_size
        dist.all_gather_object(stages, super()._not_finite(batches), group=self.grid.mpu.get_pipe_parallel_group())
        found: dict[int, str | None] = {}
        for stage in stages:
            found |= {index: name for index, name in stage.items() if name or index not in found}
        return dict(sorted(found.items()))

    def _repeat(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Forward and backward of a micro-batch through all stages, one after the other."""
        grid = self.grid
        before, after = (grid.mpu.stage_to_global((grid.pipeline_rank + step) % grid.pipeline_size) for step in (-1, 1))
        x, position_ids, targets = self._to_device(batch)
        states: list[torch.Tensor] = [x]
        if grid.pipeline_rank > 0:
            states = self._empty_states(*x.shape)
            for state in states:
                dist.recv(state, before)
            states[0].requires_grad_()
        output, *others = self.stage((states[0], position_ids, *states[1:]))
        gradient = None
        if grid.is_last_stage:
            output, _ = self.stage.objective((output, *others), targets)
        else:
            for state in (output.detach(), *others[1:]):
                dist.send(state, after)
            gradient = torch.empty_like(output)
            dist.recv(gradient, after)
        by_name, to_send = self._gradients(output, gradient, states[:1] if grid.pipeline_rank > 0 else [])
        if grid.pipeline_rank > 0:
            dist.send(to_send[0].contiguous(), before)
        return output.detach().sum(), by_name

    def _empty_states(self, batch: int, seq: int) -> list[torch.Tensor]:
        """For hidden states of a micro-batch from the stage before, and the bytes of a teacher's."""
        seq //= self.grid.tensor.size if self.grid.tensor.sequence_parallel else 1
        kinds = [(self.config.model.hidden_size, next(self.model.parameters()).dtype)]
        if (teacher := self.stage.teacher) is not None:
            kinds.append((teacher.hidden_size * teacher.dtype.itemsize, torch.uint8))
        return [torch.empty((batch, seq, width), dtype=dtype, device=self.device) for width, dtype in kinds]
