"""Checkpoint folders: what counts as whole, what is kept, and what nothing may mistake for a checkpoint."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mea.checkpoint import folder
from megatron_mea.checkpoint.resume import choose


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    choice = choose(folder.all_checkpoints(run), None, folder.damage)
    for one, why in choice.aside:
        folder.set_aside(one, why)
    return choice.source, choice.notes


def make(run: Path, step: int) -> Path:
    scratch = run / "checkpoints" / f".tmp-{folder.folder_name(step)}"
    (scratch / "tokenizer").mkdir(parents=True)
    (scratch / "shard").write_bytes(bytes(100) + str(step).encode())
    (scratch / "tokenizer/tokenizer.json").write_text("{}")
    for name in ("meta.json", ".metadata"):
        (scratch / name).write_text("{}")
    folder.seal(scratch)
    final = run / "checkpoints" / folder.folder_name(step)
    folder.publish(scratch, final)
    return final


@settings(deadline=None, max_examples=30)
@given(
    steps=st.lists(st.integers(1, 60), unique=True, min_size=1, max_size=8),
    keep=st.integers(1, 4),
    every=st.one_of(st.none(), st.integers(1, 20)),
)
def test_retention(tmp_path_factory, steps, keep, every):
    run = tmp_path_factory.mktemp("run")
    for step in steps:
        make(run, step)
    folder.retain(run, keep, every)
    expected = set(sorted(steps)[-keep:]) | {step for step in steps if every and step % every == 0}
    assert {step for step, _ in folder.checkpoints_of(run)} == expected
    assert {path.name for path in (run / "checkpoints").iterdir()} == {folder.folder_name(step) for step in expected}


def unreadable(path: Path) -> None:
    (path / "shard").unlink()
    # A file whose reading fails with an input/output error.
    (path / "shard").symlink_to("/proc/self/mem")


DAMAGES = {
    "a file unreadable": unreadable,
    "a byte flipped": lambda path: (path / "shard").write_bytes(bytes(99) + b"x2"),
    "a file truncated": lambda path: (path / "shard").write_bytes(b""),
    "a file missing": lambda path: (path / "tokenizer/tokenizer.json").unlink(),
    "COMPLETE garbled": lambda path: (path / "COMPLETE").write_text("{"),
    "COMPLETE lists nothing": lambda path: (path / "COMPLETE").write_text('{"sha256": {}}'),
    "COMPLETE empty": lambda path: (path / "COMPLETE").write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    make(tmp_path, 1)
    damage(make(tmp_path, 2))
    found, notes = newest_whole(tmp_path)
    assert found == tmp_path / "checkpoints/step_00000001"
    assert len(notes) == 1
    assert "step_00000002 is damaged" in notes[0]
    assert (tmp_path / "checkpoints/damaged-step_00000002").is_dir()
    # Damaged again at the same step: both stay for a look.
    damage(make(tmp_path, 2))
    newest_whole(tmp_path)
    assert (tmp_path / "checkpoints/damaged-step_00000002-2").is_dir()


def test_what_one_node_wrote_elsewhere_makes_no_checkpoint(tmp_path):
    """A rank's part whose checksum is known but which is not there: the run folder is not shared."""
    with pytest.raises(OSError, match="all nodes share"):
        folder.seal(tmp_path, {"__1_0.distcp": "0" * 64})
    assert not (tmp_path / folder.COMPLETE).exists()


def test_what_is_half_written_is_no_checkpoint(tmp_path):
    final = make(tmp_path, 7)
    unsealed = tmp_path / "checkpoints/step_00000009"
    shutil.copytree(final, unsealed)
    (unsealed / folder.COMPLETE).unlink()
    shutil.copytree(final, tmp_path / "checkpoints/.tmp-step_00000010")
    assert [step for step, _ in folder.checkpoints_of(tmp_path)] == [7]
    found, notes = newest_whole(tmp_path)
    assert found == final
    assert "step_00000009 is damaged (COMPLETE is missing or unreadable)" in notes[0]
    assert (tmp_path / "checkpoints/damaged-step_00000009").is_dir()


def test_nothing_whole_is_left(tmp_path):
    (make(tmp_path, 3) / "shard").unlink()
    found, notes = newest_whole(tmp_path)
    assert found is None
    assert notes[-1] == "no whole checkpoint is left: the run begins anew"


def test_numbers_beyond_eight_digits_sort_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000):
        make(tmp_path, step)
    assert newest_whole(tmp_path)[0].name == "step_100000000"


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
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
