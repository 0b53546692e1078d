"""A schedule that had begun to fall and is extended: what is said, and which checkpoint is kept."""

from __future__ import annotations

import pytest

from megatron_mea.checkpoint.folder import CheckpointMetadata, folder_name, retain
from megatron_mea.config.load import parse_config
from megatron_mea.training.rate_jump import keep_checkpoint_before_jump

TREE = {
    "data": {"tokenizer": "none", "train": []},
    "optimizer": {"lr": 0.003},
    "run": {"dir": "none"},
}
WSD = {"kind": "wsd", "decay_steps": 6, "warmup_steps": 4}
COSINE = {"kind": "cosine", "warmup_steps": 4}
CONSTANT = {"kind": "constant", "warmup_steps": 4}


def config(*, schedule: dict, steps: int, lr: float = 0.003):
    tree = TREE | {"schedule": schedule, "training": {"steps": steps}, "optimizer": {"lr": lr}}
    return parse_config(tree, needs_data=False)


def resume(*, run_dir, step: int, before, after, checkpoints: tuple[int, ...]) -> list[str]:
    """Lines to print where a run with the configuration `before` goes on from `step` with `after`."""
    for number in checkpoints:
        path = run_dir / "checkpoints" / folder_name(number)
        path.mkdir(parents=True)
        (path / "COMPLETE").touch()

    metadata = CheckpointMetadata(
        step=step,
        samples=0,
        tokens=0,
        config=before.model_dump(mode="json"),
        data=[],
        layout={},
        versions={},
        validation_loss=None,
    )
    return keep_checkpoint_before_jump(run_dir=run_dir, metadata=metadata, config=after)


def test_the_checkpoint_before_the_decay_is_named_and_kept(tmp_path):
    before, after = config(schedule=WSD, steps=12), config(schedule=WSD, steps=20)
    (line,) = resume(run_dir=tmp_path, step=12, before=before, after=after, checkpoints=(3, 6, 9, 12))
    assert line == (
        "the learning rate jumps from 0.0003 at step 12 to 0.003 at step 13: it had begun to fall after step 6. "
        f"{tmp_path}/checkpoints/step_00000006 is from before that and is kept: run.resume_from=6 goes on from there"
    )

    retain(run_dir=tmp_path, keep=1, keep_every=None)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_00000006", "step_00000012"}


@pytest.mark.parametrize(
    ("step", "before", "after", "rates"),
    [
        # In the middle of the decay; a decay that is longer; another peak; another kind.
        (8, config(schedule=WSD, steps=12), config(schedule=WSD, steps=20), "0.0021 at step 8 to 0.003 at step 9"),
        (12, config(schedule=COSINE, steps=12), config(schedule=COSINE, steps=20), "0.0003 at step 12 to "),
        (12, config(schedule=WSD, steps=12), config(schedule=CONSTANT, steps=13), "0.0003 at step 12 to 0.003"),
        (8, config(schedule=WSD, steps=12), config(schedule=WSD, steps=12, lr=0.3), "0.0021 at step 8 to 0.165"),
    ],
)
def test_every_jump_is_said(tmp_path, step, before, after, rates):
    (line,) = resume(run_dir=tmp_path, step=step, before=before, after=after, checkpoints=(7, 8, 12))
    assert f"the learning rate jumps from {rates}" in line
    assert line.endswith(", and no checkpoint from before that is left")
    assert not list(tmp_path.rglob("PINNED"))


@pytest.mark.parametrize(
    ("step", "before", "after"),
    [
        # Nothing has changed; in the warm-up; before the decay; nothing left to do; no decay; a decay that goes on.
        (8, config(schedule=WSD, steps=12), config(schedule=WSD, steps=12)),
        (3, config(schedule=COSINE, steps=12), config(schedule=COSINE, steps=20)),
        (6, config(schedule=WSD, steps=12), config(schedule=WSD, steps=20)),
        (12, config(schedule=WSD, steps=12), config(schedule=WSD, steps=12)),
        (12, config(schedule=CONSTANT, steps=12), config(schedule=WSD, steps=30)),
        (6, config(schedule=COSINE, steps=12), config(schedule=COSINE, steps=12, lr=0.001)),
    ],
)
def test_no_jump_is_no_line(tmp_path, step, before, after):
    assert resume(run_dir=tmp_path, step=step, before=before, after=after, checkpoints=(3, 6, 12)) == []
    assert not list(tmp_path.rglob("PINNED"))


def test_a_configuration_that_cannot_be_read_has_no_rate(tmp_path):
    before = config(schedule=WSD, steps=12)
    broken = before.model_copy(update={"optimizer": before.optimizer.model_copy(update={"lr": -1.0})})
    after = config(schedule=WSD, steps=20)
    assert resume(run_dir=tmp_path, step=12, before=broken, after=after, checkpoints=(6, 12)) == []
