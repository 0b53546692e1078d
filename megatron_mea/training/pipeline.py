"""The training engine where the layers lie on several ranks: DeepSpeed's pipeline, one forward one backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_mea.data.corpora import Batch
from megatron_mea.model.decoder import Decoder
from megatron_mea.parallel.parameter import named_specs
from megatron_mea.training.engine import Engine


class PipelineEngine(Engine):
    """As `Engine`, for one stage of the decoder on each rank; ZeRO 0 and 1."""

    def _module(self) -> dict[str, Any]:
        from deepspeed.pipe import PipelineModule

        self._losses: list[torch.Tensor] = []
        self._tied: torch.nn.Parameter | None = None
        self._scale = 1.0
        # DeepSpeed takes the layers of all stages and keeps its own: ours are made stage by stage, so all but one of
        # these places are never looked at.
        stages = [_Stage(self.model, self.grid.is_last_stage)] * self.grid.pipeline_size
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

    def _loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = self.model.loss(logits, targets)
        self._losses.append(loss.detach().double())
        return loss * self._scale

    def _take_losses(self) -> torch.Tensor:
        """The sum of the losses since the last call; zero on all stages but the last."""
        total = torch.stack([torch.zeros((), dtype=torch.float64, device=self.device), *self._losses]).sum()
        self._losses.clear()
        return total

    def _run(self, batches: Sequence[Batch], scale: float) -> torch.Tensor:
        self._scale = scale
        self.engine.train_batch(self._micro_batches(iter(batches)))
        if self._tied is not None:
            # Gradients are averaged in one flat buffer a stage, where the two copies lie at different places and
            # three and more ranks add up in a different order: the first stage's copy is the one that counts.
            dist.broadcast(self._tied.data, self.grid.mpu.stage_to_global(0), group=self.grid.ends)
        return self._take_losses()

    def _evaluate(self, batches: Iterator[Batch], count: int) -> torch.Tensor:
        micro_batches = self._micro_batches(batches)
        self.engine.eval_batch(micro_batches, reduce_output=None, bcast_loss=False, num_micro_batches=count)
        return self._take_losses()

    def _micro_batches(self, batches: Iterator[Batch]) -> Iterator[tuple[tuple[torch.Tensor, ...], torch.Tensor]]:
        for batch in batches:
            input_ids, position_ids, targets = self._to_device(batch)
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
        grid, model = self.grid, self.model
        before, after = (grid.mpu.stage_to_global((grid.pipeline_rank + step) % grid.pipeline_size) for step in (-1, 1))
        x, position_ids, targets = self._to_device(batch)
        inputs: list[torch.Tensor] = []
        if grid.pipeline_rank > 0:
            cut = grid.tensor.size if grid.tensor.sequence_parallel else 1
            shape = (x.shape[0], x.shape[1] // cut, self.config.model.hidden_size)
            x = torch.empty(shape, dtype=next(model.parameters()).dtype, device=self.device)
            dist.recv(x, before)
            inputs = [x.requires_grad_()]
        output, gradient = model.run(x, position_ids), None
        if grid.is_last_stage:
            output = model.loss(output, targets)
        else:
            dist.send(output.detach().contiguous(), after)
            gradient = torch.empty_like(output, memory_format=torch.contiguous_format)
            dist.recv(gradient, after)
        by_name, to_send = self._gradients(output, gradient, inputs)
        if grid.pipeline_rank > 0:
            dist.send(to_send[0].contiguous(), before)
        return output.detach().sum(), by_name


class _Stage(nn.Module):
    """The interface that DeepSpeed wants between stages: one argument, a tuple of tensors."""

    def __init__(self, decoder: Decoder, is_last: bool) -> None:
        super().__init__()
        self.decoder, self.is_last = decoder, is_last

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        x, position_ids = inputs
        # What is sent must be contiguous, which a part of the sequence is not.
        x = self.decoder.run(x, position_ids).contiguous()
        return x if self.is_last else (x, position_ids)
