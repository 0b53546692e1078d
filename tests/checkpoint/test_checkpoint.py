"""Checkpoint folders: integrity, retention, quarantine, and folders that are no checkpoints."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import Metadata

from megatron_mea.checkpoint import folder
from megatron_mea.checkpoint.resume import find_resume_point


def newest_intact(run: Path) -> tuple[Path | None, list[str]]:
    """Quarantines damaged checkpoints; returns the newest intact one, and the lines that a run prints."""
    resume_point = find_resume_point(
        checkpoints=folder.all_checkpoints(run), resume_step=None, find_corruption=folder.find_corruption
    )
    for checkpoint, reason in resume_point.quarantined:
        folder.quarantine(checkpoint, reason)

    return resume_point.source, resume_point.notes


def make_checkpoint(run: Path, step: int) -> Path:
    scratch = run / "checkpoints" / f".tmp-{folder.folder_name(step)}"
    (scratch / "tokenizer").mkdir(parents=True)
    (scratch / "shard").write_bytes(bytes(100) + str(step).encode())
    (scratch / "tokenizer/tokenizer.json").write_text("{}")
    (scratch / "meta.json").write_text("{}")
    (scratch / ".metadata").write_bytes(pickle.dumps(Metadata(state_dict_metadata={}, storage_data={})))
    folder.seal(scratch)
    final = run / "checkpoints" / folder.folder_name(step)
    folder.publish(scratch, final)
    return final


@settings(deadline=None, max_examples=30)
@given(
    steps=st.lists(st.integers(1, 60), unique=True, min_size=1, max_size=8),
    keep=st.integers(1, 4),
    keep_every=st.one_of(st.none(), st.integers(1, 20)),
    pinned=st.sets(st.integers(1, 60)),
)
def test_retention(tmp_path_factory, steps, keep, keep_every, pinned):
    run, pinned = tmp_path_factory.mktemp("run"), pinned & set(steps)
    for step in steps:
        path = make_checkpoint(run, step)
        if step in pinned:
            folder.pin(path)
            assert folder.find_corruption(path) is None

    folder.retain(run_dir=run, keep=keep, keep_every=keep_every)
    expected = set(sorted(steps)[-keep:]) | {step for step in steps if keep_every and step % keep_every == 0} | pinned
    assert {step for step, _ in folder.complete_checkpoints(run)} == expected
    assert {path.name for path in (run / "checkpoints").iterdir()} == {folder.folder_name(step) for step in expected}


def make_unreadable(path: Path) -> None:
    (path / "shard").unlink()
    # Reading it fails with an input/output error.
    (path / "shard").symlink_to("/proc/self/mem")


DAMAGES = {
    "a file unreadable": make_unreadable,
    "a byte flipped": lambda path: (path / "shard").write_bytes(bytes(99) + b"x2"),
    "a file truncated": lambda path: (path / "shard").write_bytes(b""),
    "a file missing": lambda path: (path / "tokenizer/tokenizer.json").unlink(),
    "COMPLETE garbled": lambda path: (path / "COMPLETE").write_text("{"),
    "COMPLETE lists nothing": lambda path: (path / "COMPLETE").write_text('{"sha256": {}}'),
    "COMPLETE empty": lambda path: (path / "COMPLETE").write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_skipped(tmp_path, damage):
    make_checkpoint(tmp_path, 1)
    damage(make_checkpoint(tmp_path, 2))
    newest, notes = newest_intact(tmp_path)
    assert newest == tmp_path / "checkpoints/step_00000001"
    assert len(notes) == 1
    assert "step_00000002 is damaged" in notes[0]
    assert (tmp_path / "checkpoints/damaged-step_00000002").is_dir()

    # A second damaged checkpoint of the same step: both are kept.
    damage(make_checkpoint(tmp_path, 2))
    newest_intact(tmp_path)
    assert (tmp_path / "checkpoints/damaged-step_00000002-2").is_dir()


def test_a_run_folder_that_nodes_do_not_share_makes_no_checkpoint(tmp_path):
    """The checksum of a rank's file is known, but the file is missing."""
    with pytest.raises(OSError, match="all nodes share"):
        folder.seal(tmp_path, {"__1_0.distcp": "0" * 64})
    assert not (tmp_path / folder.COMPLETE).exists()


def test_a_half_written_folder_is_no_checkpoint(tmp_path):
    final = make_checkpoint(tmp_path, 7)
    unsealed = tmp_path / "checkpoints/step_00000009"
    shutil.copytree(final, unsealed)
    (unsealed / folder.COMPLETE).unlink()
    shutil.copytree(final, tmp_path / "checkpoints/.tmp-step_00000010")
    assert [step for step, _ in folder.complete_checkpoints(tmp_path)] == [7]

    newest, notes = newest_intact(tmp_path)
    assert newest == final
    assert "step_00000009 is damaged (COMPLETE is missing or unreadable)" in notes[0]
    assert (tmp_path / "checkpoints/damaged-step_00000009").is_dir()


def test_no_intact_checkpoint_is_left(tmp_path):
    (make_checkpoint(tmp_path, 3) / "shard").unlink()
    newest, notes = newest_intact(tmp_path)
    assert newest is None
    assert notes[-1] == "no whole checkpoint is left: the run begins anew"


def test_numbers_beyond_eight_digits_sort_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000):
        make_checkpoint(tmp_path, step)

    assert newest_intact(tmp_path)[0].name == "step_100000000"


@pytest.mark.slow
def test_commands_but_train_need_no_deepspeed(trained, tmp_path):
    """And the package itself imports nothing heavy."""
    script = """if True:
        import sys
        from importlib.machinery import PathFinder
        # Not found rather than failing to import: accelerate and transformers ask find_spec.
        find = PathFinder.find_spec
        def find_spec(name, path=None, target=None):
            hidden = name.partition(".")[0] in ("deepspeed", "triton")
            return None if hidden else find(name, path, target)
        PathFinder.find_spec = staticmethod(find_spec)
        import megatron_mea
        assert not {"torch", "numpy", "pydantic", "transformers"} & set(sys.modules)
        from megatron_mea.cli import main
        run, out = sys.argv[1:]
        assert main(["inspect", run]) == 0
        assert main(["export", run, out]) == 0
        assert main(["generate", out, "--prompt", "And", "--max-new-tokens", "2"]) == 0
        assert main(["evaluate", run]) == 0
    """

    command = [sys.executable, "-c", script, str(trained), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_checkpoint_that_may_not_be_renamed_is_not_copied(tmp_path, monkeypatch):
    """For want of permission, say: it may have terabytes."""
    checkpoint = make_checkpoint(tmp_path, 1)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(PermissionError):
        folder.quarantine(checkpoint, "damaged")
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_checkpoints_of_an_overlay_cannot_be_renamed(is_interrupted, tmp_path, monkeypatch):
    """Those of its lower layer, an image's: they are copied, or removed in their place, COMPLETE first."""
    first, second = (make_checkpoint(tmp_path, step) for step in (1, 2))
    files = sorted(path.relative_to(first) for path in first.rglob("*"))

    def other_device(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "rename", other_device)
    moved = folder.quarantine(first, "damaged")
    assert sorted(path.relative_to(moved) for path in moved.rglob("*")) == files
    assert not first.exists()

    if is_interrupted:
        monkeypatch.setattr(shutil, "rmtree", other_device)
        with pytest.raises(OSError, match="cross-device"):
            folder.remove(second)
    else:
        folder.remove(second)
    assert folder.complete_checkpoints(tmp_path) == []
    assert second.exists() == is_interrupted
