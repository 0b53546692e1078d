"""Writing: locks, leftovers, links, mount points, and files that are restored."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_mea import outputs
from megatron_mea.errors import RunError, UserError
from megatron_mea.outputs import (
    check_free_folder,
    print_and_write,
    publish,
    remove_leftovers,
    reserve_output,
    restored_on_failure,
    scratch_folder,
    write_file,
    write_files,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_leftovers_of_the_dead_are_removed_and_nothing_else(tmp_path):
    for name in (".out-0123abcd.tmp", ".out-89abcdef.tmp", ".out-b-0123abcd.tmp", ".out-notes", ".out-01234567.tmp.x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()

    with scratch_folder(tmp_path / "out") as living:
        assert living.parent == tmp_path
        remove_leftovers(tmp_path / "out")
        check_free_folder(tmp_path / "out")
        with scratch_folder(tmp_path / "out") as second:
            assert second != living
        assert names(tmp_path) == sorted([living.name, ".out-b-0123abcd.tmp", ".out-notes", ".out-01234567.tmp.x"])

    assert not living.exists()


def test_where_there_are_no_locks_nothing_is_taken_for_a_leftover(tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(outputs.fcntl, "flock", no_locks)
    with scratch_folder(tmp_path / "out") as living:
        remove_leftovers(tmp_path / "out")
        assert living.exists()
    assert names(tmp_path) == []


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A folder on another file system than the temporary one."""
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        pytest.skip("no /dev/shm")
    folder = shm / f"mea-test-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("exists", [False, True])
def test_a_link_to_another_file_system(exists, elsewhere, tmp_path):
    """Renames happen there, and the link stays."""
    if exists:
        (elsewhere / "model").mkdir()
    for name in ("model", "result"):
        (tmp_path / name).symlink_to(elsewhere / name)

    out = tmp_path / "model"
    check_free_folder(out)
    with reserve_output(out, folder=True), scratch_folder(out) as scratch:
        assert scratch.parent == elsewhere
        (scratch / "new").mkdir()
        (scratch / "new/file").write_text("whole")
        publish(scratch / "new", out)

    write_file(tmp_path / "result", "text")
    assert (elsewhere / "model/file").read_text() == "whole"
    assert (elsewhere / "result").read_text() == "text"
    assert out.is_symlink()
    assert (tmp_path / "result").is_symlink()
    assert names(elsewhere) == ["model", "result"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_a_mount_point_is_refused_before_any_work(kind, tmp_path):
    """Its name cannot be given to another folder; `bind` is one on the same file system."""
    out, source = tmp_path / "a point", tmp_path / "source"
    out.mkdir()
    source.mkdir()
    arguments = ["-t", "tmpfs", "tmpfs"] if kind == "tmpfs" else ["--bind", str(source)]
    if subprocess.run(["mount", *arguments, str(out)], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs root, and to mount")

    try:
        with pytest.raises(UserError, match="a mount point") as caught:
            check_free_folder(out)
        assert str(out / "model") in str(caught.value)
        # A folder in it is fine.
        check_free_folder(out / "model")
        with scratch_folder(out / "model") as scratch:
            (scratch / "new").mkdir()
            publish(scratch / "new", out / "model")
    finally:
        subprocess.run(["umount", str(out)], check=True)


@pytest.mark.parametrize("has_links", [True, False])
def test_files_are_restored_together(has_links, tmp_path, monkeypatch):
    def no_links(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    old, new, link = tmp_path / "old", tmp_path / "new", tmp_path / "link"
    old.write_text("earlier")
    link.symlink_to("old")

    def replace_both() -> None:
        with restored_on_failure([old, new, link]) as staging:
            for path in (old, new, link):
                staging[path].write_text("later")
                staging[path].replace(path)
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        replace_both()
    assert (names(tmp_path), old.read_text()) == (["link", "old"], "earlier")
    assert link.readlink() == Path("old")

    write_files({old: "later", new: b"bytes"})
    assert (names(tmp_path), old.read_text(), new.read_bytes()) == (["link", "new", "old"], "later", b"bytes")


def test_a_result_is_printed_though_the_disk_is_full_and_written_though_the_console_is_gone(tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/mine").touch()
    with pytest.raises(RunError, match="folder cannot be written: Is a directory"):
        print_and_write("a result", {tmp_path / "file": "text", tmp_path / "folder": "text"})
    assert capsys.readouterr().out == "a result\n"
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["mine"]

    class Gone:
        def write(self, _: str) -> None:
            raise BrokenPipeError

    with contextlib.redirect_stdout(Gone()), pytest.raises(BrokenPipeError):
        print_and_write("a result", {tmp_path / "file": "text"})
    assert (tmp_path / "file").read_text() == "text"


def test_an_output_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, folder, got in (
        (tmp_path / "pipe", False, "a device or pipe"),
        (Path("/dev/null"), False, "a device or pipe"),
        (tmp_path, False, "a folder"),
        (tmp_path / "pipe", True, "a device or pipe"),
    ):
        with pytest.raises(UserError) as caught, reserve_output(path, folder=folder):
            pass
        assert caught.value.problems[0].got == got


def test_parents_go_where_one_of_them_cannot_be_made(tmp_path, monkeypatch):
    mkdir = os.mkdir

    def full(path: str, *arguments: object) -> None:
        if Path(path).name == "b":
            raise OSError(28, "No space left on device")
        mkdir(path, *arguments)

    monkeypatch.setattr(os, "mkdir", full)
    with pytest.raises(UserError, match="No space left"), reserve_output(tmp_path / "a/b/c", folder=True):
        pass
    assert names(tmp_path) == []
