"""Trained steps, as the loop hands them to callbacks."""

from __future__ import annotations

import numpy as np

from megatron_mea.training.callbacks import Due, Record, TrainedStep
from megatron_mea.training.loader import StepData
from megatron_mea.training.step_result import StepResult


def trained(step: int, *, save: bool = False, last: bool = False) -> TrainedStep:
    """A step of no data after which a row of the metrics is due."""
    result = StepResult(loss=2.0, lr=1e-3, grad_norm=0.5, should_stop=last)
    return TrainedStep(
        data=StepData(step=step, samples=np.empty((0, 1), np.int64), batches=[], num_targets=1),
        result=result,
        due=Due(log=True, validate=False, save=save, last=last),
        record=Record(row={"step": step} | result.scalars()),
    )
