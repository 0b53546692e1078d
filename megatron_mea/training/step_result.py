"""What a training step gives: its losses and norms, the same on all ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Results of a step, the same on all ranks; a further scalar of some models is a field that defaults to None.

    Args:
        loss: nats a target, before the update.
        lr: learning rate of the step.
        grad_norm: before clipping.
        distillation_loss: the divergence from a teacher, without its weight and T^2.
        balance_loss, expert_load: of models with experts, as `RouterTotals.fields` has them.
        should_stop: whether a rank wants to stop.
    """

    loss: float
    lr: float
    grad_norm: float
    distillation_loss: float | None = None
    balance_loss: float | None = None
    expert_load: list[float] | None = None
    should_stop: bool = False

    def scalars(self) -> dict[str, float | list[float]]:
        """The fields of a row of the metrics."""
        fields = {name: value for name, value in vars(self).items() if name != "should_stop"}
        return {name: value for name, value in fields.items() if value is not None}
