"""A learning rate that jumps up where a run goes on: a schedule that had fallen already was extended."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from megatron_mea.checkpoint.folder import CheckpointMetadata, complete_checkpoints, pin
from megatron_mea.config import Config
from megatron_mea.training.schedule import decay_start, learning_rate

_NOTEWORTHY = 1.01
"""Ratio of two rates from which on it is said."""


def keep_checkpoint_before_jump(*, run_dir: Path, metadata: CheckpointMetadata, config: Config) -> list[str]:
    """A warning where the next step's rate is above that of the checkpoint's step, whose schedule had begun to fall.

    The newest checkpoint from before that fall is the one to extend the run from: it is named, and kept from here on.

    Args:
        metadata: of the checkpoint that the run resumes from.
        config: with which it goes on.
    """
    step = metadata.step
    try:
        old_config = Config.model_validate(metadata.config)
    except ValidationError:
        # What an older program wrote and this one cannot read has no rate to compare with.
        return []

    last_before = decay_start(old_config)
    if not last_before < step < config.steps:
        return []

    old, new = learning_rate(old_config, step), learning_rate(config, step + 1)
    if new <= _NOTEWORTHY * old:
        return []

    warning = (
        f"the learning rate jumps from {old:.3g} at step {step} to {new:.3g} at step {step + 1}: it had begun to fall "
        f"after step {last_before}"
    )
    earlier = [(number, folder) for number, folder in complete_checkpoints(run_dir) if number <= last_before]
    if not earlier:
        return [f"{warning}, and no checkpoint from before that is left"]

    number, folder = earlier[-1]
    with suppress(OSError):
        pin(folder)

    return [f"{warning}. {folder} is from before that and is kept: run.resume_from={number} goes on from there"]
