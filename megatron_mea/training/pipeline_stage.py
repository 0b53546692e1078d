"""Modules that DeepSpeed runs on a rank: its layers, those of a teacher beside them, and the loss."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import nn

from megatron_mea.attention.folds import FoldedKV
from megatron_mea.model.decoder import Decoder
from megatron_mea.parallel.layers import cross_entropy_sum, kl_divergence_sum
from megatron_mea.training.teacher import Teacher

Tensors = tuple[torch.Tensor, ...]
NUM_LOSS_TERMS = 2
"""Terms that `PipelineStage.compute_loss` sums up: cross-entropy and divergence."""


class PipelineStage(nn.Module):
    """One pipeline stage, or all layers of a model without a pipeline; a tuple in, a tuple out, as DeepSpeed wants it.

    Takes (token ids or hidden states, position ids) and returns (hidden states, position ids); the last stage returns
    (hidden states,). In training with a teacher, the teacher's hidden states come last in either tuple. Between stages
    they are sent as bytes, since DeepSpeed would send back a gradient for every floating-point tensor.
    """

    def __init__(self, decoder: Decoder, *, is_last: bool = True, teacher: Teacher | None = None) -> None:
        super().__init__()
        self.decoder, self.is_last, self.teacher = decoder, is_last, teacher

    def forward(self, inputs: Tensors, folded: Sequence[FoldedKV] | None = None) -> Tensors:
        hidden_states, position_ids, *teacher_states = inputs
        if self.teacher is not None and self.training:
            teacher_input = teacher_states[0].view(self.teacher.dtype) if teacher_states else hidden_states
            teacher_output = self.teacher.forward_hidden(teacher_input, position_ids)
            teacher_states = [teacher_output if self.is_last else teacher_output.contiguous().view(torch.uint8)]

        hidden_states = self.decoder.forward_hidden(hidden_states, position_ids, folded=folded)
        if self.is_last:
            return (hidden_states, *teacher_states)

        # Sends need contiguous tensors, which a shard of the sequence is not.
        return (hidden_states.contiguous(), position_ids, *teacher_states)

    def compute_loss(self, outputs: Tensors, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The training objective and its terms, from the outputs of the last stage and the targets (batch, seq).

        With a teacher it is (1 - weight) x cross-entropy + weight x T^2 x divergence, otherwise the cross-entropy. T^2
        restores the size of the gradient, which shrinks as 1/T^2 (arXiv 1503.02531).

        Returns:
            the objective, summed over all targets that are not `IGNORE_INDEX`; a scalar.
            (NUM_LOSS_TERMS,) float64: the sums of cross-entropy and divergence (zero without a teacher), in nats.
        """
        hidden_states, *teacher_states = outputs
        if self.teacher is None or not teacher_states:
            loss = self.decoder.loss(hidden_states, targets)
            return loss, torch.stack([loss.detach(), torch.zeros_like(loss)]).double()

        # The divergence needs all logits of model and teacher.
        logits = self.decoder.logits(hidden_states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = cross_entropy_sum(
            logits.flatten(0, 1), targets.flatten(), vocab_size=self.decoder.config.vocab_size, tp=self.decoder.tp
        )

        weight, temperature = self.teacher.settings.weight, self.teacher.settings.temperature
        divergence = kl_divergence_sum(
            logits.flatten(0, 1),
            self.teacher.logits(teacher_states[0]).flatten(0, 1),
            targets.flatten(),
            temperature=temperature,
            tp=self.decoder.tp,
        )
        objective = (1 - weight) * loss + weight * temperature**2 * divergence
        return objective, torch.stack([loss.detach(), divergence.detach()]).double()


class LastStageWithLoss(nn.Module):
    """The last pipeline stage with the training objective.

    The loss uses a parameter, the head's matrix, and in bfloat16 DeepSpeed drops every gradient that exists before the
    backward pass reaches the output of the stage's forward pass. So forward returns the loss, rather than inputs of a
    loss function, and takes the targets from the queue `targets`, in the order of the micro-batches.
    """

    def __init__(self, stage: PipelineStage) -> None:
        super().__init__()
        self.stage = stage
        self.targets: deque[torch.Tensor] = deque()

    def forward(self, inputs: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs of `PipelineStage` -> outputs of `PipelineStage.compute_loss`"""
        return self.stage.compute_loss(self.stage(inputs), self.targets.popleft())


class ModelWithLoss(nn.Module):
    """A model without a pipeline, with the training objective."""

    def __init__(self, stage: PipelineStage) -> None:
        super().__init__()
        self.stage = stage

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        targets: torch.Tensor,
        *,
        folded: Sequence[FoldedKV] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Three tensors (batch, seq), and weights folded before -> outputs of `PipelineStage.compute_loss`"""
        return self.stage.compute_loss(self.stage((input_ids, position_ids), folded), targets)
