"""The learning rate of a step: a pure function of the configuration and the step."""

from __future__ import annotations

import math

from megatron_mea.config.schema import Config


def learning_rate(config: Config, step: int) -> float:
    """The rate with which step `step` (from 1) updates the parameters.

    Linear warm-up to the peak at step `warmup_steps`; then `cosine` reaches min_lr_ratio x peak at the last
    step, `constant` stays, and `wsd` stays and falls linearly to the same value over the last `decay_steps`.
    """
    schedule, peak, last = config.schedule, config.optimizer.lr, config.steps
    if step < schedule.warmup_steps:
        return peak * step / schedule.warmup_steps

    floor = schedule.min_lr_ratio
    if schedule.kind == "constant":
        return peak

    if schedule.kind == "cosine":
        progress = (step - schedule.warmup_steps) / (last - schedule.warmup_steps)
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))

    progress = max(step - decay_start(config), 0) / schedule.decay_steps
    return peak * (1 - (1 - floor) * progress)


def decay_start(config: Config) -> int:
    """The last step before the rate falls; the last one of all where it does not."""
    schedule = config.schedule
    if schedule.kind == "cosine":
        return schedule.warmup_steps

    return config.steps - (schedule.decay_steps or 0)
