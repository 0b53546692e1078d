"""What DeepSpeed runs on a rank: its layers, beside them a teacher's, and what is minimised."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import nn

from megatron_mea.attention.folds import Folds
from megatron_mea.model.decoder import Decoder
from megatron_mea.parallel.layers import cross_entropy_sum, divergence_sum
from megatron_mea.training.teacher import Teacher

Tensors = tuple[torch.Tensor, ...]


class Stage(nn.Module):
    """One stage of a pipeline, or all of it: one argument and one result, as DeepSpeed wants them between stages.

    In comes (token ids or hidden states, position ids), out goes (hidden states, position ids), or (hidden states,) of
    the last stage. In training a teacher's are behind them. Its hidden states travel as
    bytes, since DeepSpeed would send a gradient back for every tensor of floating point.
    """

    def __init__(self, decoder: Decoder, is_last: bool = True, teacher: Teacher | None = None) -> None:
        super().__init__()
        self.decoder, self.is_last, self.teacher = decoder, is_last, teacher

    def forward(self, inputs: Tensors, folded: Sequence[Folds] | None = None) -> Tensors:
        x, position_ids, *theirs = inputs
        if self.teacher is not None and self.training:
            seen = theirs[0].view(self.teacher.dtype) if theirs else x
            seen = self.teacher.run(seen, position_ids)
            theirs = [seen if self.is_last else seen.contiguous().view(torch.uint8)]
        x = self.decoder.run(x, position_ids, folded)
        # What is sent must be contiguous, which a part of the sequence is not.
        return (x, *theirs) if self.is_last else (x.contiguous(), position_ids, *theirs)

    def objective(self, outputs: Tensors, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is minimised, from the outputs of the last stage and the targets (batch, seq), and what it is made of.

        With a teacher (1 - weight) x cross-entropy + weight x T^2 x divergence (arXiv 1503.02531: T^2 keeps the size of
        the gradient, which shrinks as 1/T^2).

        Returns:
            the sum over all targets that are not `IGNORE`.
            (2,) float64: the sums of cross-entropy and divergence (zero without a teacher), in nats.
        """
        x, *theirs = outputs
        if self.teacher is None or not theirs:
            loss = self.decoder.loss(x, targets)
            return loss, torch.stack([loss.detach(), torch.zeros_like(loss)]).double()
        # The divergence needs all logits of both.
        logits = self.decoder.logits(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = cross_entropy_sum(logits.flatten(0, 1), targets.flatten(), self.decoder.vocab_size, self.decoder.tp)
        weight, temperature = self.teacher.settings.weight, self.teacher.settings.temperature
        flat = (logits.flatten(0, 1), self.teacher.logits(theirs[0]).flatten(0, 1), targets.flatten())
        divergence = divergence_sum(*flat, temperature, self.decoder.tp)
        minimised = (1 - weight) * loss + weight * temperature**2 * divergence
        return minimised, torch.stack([loss.detach(), divergence.detach()]).double()


class Last(nn.Module):
    """The last stage of a pipeline, down to what is minimised.

    The loss uses a parameter, the head's matrix, and in bfloat16 DeepSpeed drops every gradient that is there before
    the backward pass reaches what the stage's forward pass returned. So that must be the loss, not what a loss function
    takes, and the targets reach it by a way of their own: `targets`, in the order of the micro-batches.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage
        self.targets: deque[torch.Tensor] = deque()

    def forward(self, inputs: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Stage.objective`"""
        return self.stage.objective(self.stage(inputs), self.targets.popleft())


class Whole(nn.Module):
    """All stages in one, down to what is minimised."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        targets: torch.Tensor,
        folded: Sequence[Folds] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, seq) each, and what is folded already -> as `Stage.objective`"""
        return self.stage.objective(self.stage((input_ids, position_ids), folded), targets)
