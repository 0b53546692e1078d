"""What follows a training step, and the callbacks that the loop calls around it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_mea.config import Config
from megatron_mea.training.loader import StepData
from megatron_mea.training.step_result import StepResult


@dataclass(frozen=True, kw_only=True)
class Due:
    """What follows a step.

    Args:
        log: a row of the metrics.
        validate: a validation loss in that row.
        save: a checkpoint.
        last: nothing: no step comes after it, because of the configuration or a stop request.
    """

    log: bool
    validate: bool
    save: bool
    last: bool


def what_is_due(step: int, *, config: Config, stop_requested: bool) -> Due:
    """What follows `step` (from 1). A step that validates, and the run's last one, is logged; whoever stops saves."""
    is_final = step == config.steps
    last = is_final or stop_requested
    validate = bool(config.data.validation) and (is_final or step % config.evaluation.interval == 0)
    return Due(
        log=validate or is_final or step % config.logging.interval == 0 or config.logging.sample_hashes,
        validate=validate,
        save=last or step % config.checkpoint.interval == 0,
        last=last,
    )


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is written of a step: a row of metrics.jsonl, which callbacks may add fields to, and statistics of heads."""

    row: dict[str, Any]
    head_tensors: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainedStep:
    """A step after its update: this rank's data, its result, what follows, and the record, which is written if due."""

    data: StepData
    result: StepResult
    due: Due
    record: Record

    @property
    def step(self) -> int:
        """Number of the step, from 1."""
        return self.data.step


class Callback:
    """A concern of a run beside training, validating, logging and saving; a method that is left out does nothing.

    All ranks have the same callbacks, and call the same method of each in the same order after the same step: any
    method may be collective, if it is so on every rank.
    """

    def on_step_begin(self, step: int) -> None:
        """Before the forward pass, with the step's data at hand."""

    def on_update(self, trained: TrainedStep) -> None:
        """After the update, before anything is logged, validated or saved."""

    def validation(self, record: Record) -> AbstractContextManager[None]:
        """Entered around a validation, whose loss goes into `record`; that of step 0 comes before the first step."""
        return nullcontext()

    def on_log(self, trained: TrainedStep) -> list[str]:
        """Before the record of a step is written; returns warnings to print after it."""
        return []

    def on_step_end(self, trained: TrainedStep) -> None:
        """Last of all: what is due has been done."""

    def on_close(self) -> None:
        """After the last checkpoint is complete, where no error ends the run."""
