"""The index of a stranger's checkpoint: nothing of it runs, and what it names lies in its folder."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.foreign import examples
from support.old_runs import unpack

from megatron_mea.checkpoint.folder import COMPLETE, INDEX, find_corruption, sha256
from megatron_mea.checkpoint.index import read_index
from megatron_mea.checkpoint.tensors import read_tensors, tensor_shapes, weight_shapes
from megatron_mea.cli import main
from megatron_mea.errors import UserError


class Evil:
    """Runs code where it is loaded by a pickle that runs code."""

    def __reduce__(self):
        return eval, ("open('RAN', 'w').close()",)


@pytest.fixture(scope="module")
def checkpoint_source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    unpack("mea", folder)
    return folder


@pytest.fixture
def checkpoint(checkpoint_source, tmp_path, monkeypatch) -> Path:
    """A copy of a checkpoint, in the current folder."""
    shutil.copytree(checkpoint_source, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("run/checkpoints/step_00000002")


def seal_again(folder: Path, **checksums: str | None) -> None:
    """Gives all files their right checksums in COMPLETE, but for these; None leaves a file out."""
    complete = json.loads((folder / COMPLETE).read_text())
    complete["sha256"] |= {name: sha256(folder / name) for name in complete["sha256"]} | checksums
    complete["sha256"] = {name: digest for name, digest in complete["sha256"].items() if digest is not None}
    (folder / COMPLETE).write_text(json.dumps(complete))


def rewrite(folder: Path, change) -> None:
    """Changes the index, and seals the folder again."""
    index = read_index(folder / INDEX)
    change(index)
    (folder / INDEX).write_bytes(pickle.dumps(index))
    seal_again(folder)


VERBS = [
    "inspect run",
    "export run out",
    "evaluate run",
    "generate run --prompt a",
    "compress run out --component-heads 1",
    "sensitivity run --component-heads 1 --data corpus --out out.json",
    "train run.yaml run.dir=new run.init_from=run",
    "train run.yaml run.dir=new training.distillation.teacher=run",
]


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_runs_the_code_of_an_index(verb, checkpoint, capsys, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29555")
    (checkpoint / INDEX).write_bytes(pickle.dumps(Evil()))
    seal_again(checkpoint)
    assert main(verb.split()) == 2
    error = capsys.readouterr().err
    assert not Path("RAN").exists()
    assert ".metadata is unreadable (it names builtins.eval, which is no part of an index)" in error
    assert not Path("out").exists()
    assert not Path("new").exists()


@pytest.mark.parametrize(
    "evil",
    [
        b"cos\nsystem\n(S'touch RAN'\ntR.",
        b"\x80\x04\x8c\x05torch\x8c\x13serialization.load\x93.",
        pickle.dumps(torch.load),
        pickle.dumps({"a": Evil}),
        b"",
        b"\x80\x04]\x94h\x00a.",
        pickle.dumps([1, 2]),
    ],
)
def test_what_is_no_index_is_damage(evil, checkpoint):
    (checkpoint / INDEX).write_bytes(evil)
    seal_again(checkpoint)
    assert find_corruption(checkpoint).startswith(".metadata is unreadable (")
    with pytest.raises(UserError, match="the index of a checkpoint of this package"):
        tensor_shapes(checkpoint)
    assert not Path("RAN").exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b", "..", "", "a\0b"])
def test_a_file_outside_of_the_folder(name, checkpoint):
    def change(index) -> None:
        for info in index.storage_data.values():
            info.relative_path = name

    rewrite(checkpoint, change)
    assert find_corruption(checkpoint) is not None
    with pytest.raises(UserError):
        read_tensors(checkpoint, weight_shapes(checkpoint))


@pytest.mark.parametrize("name", ["../../../run.yaml", "/etc/hostname"])
def test_complete_names_files_of_the_folder_alone(name, checkpoint):
    seal_again(checkpoint, **{name: sha256(checkpoint / name)})
    assert find_corruption(checkpoint) == f"COMPLETE lists {name!r}, which is not in the folder"


def test_a_shard_that_complete_leaves_out(checkpoint, capsys):
    """A truncated one would pass."""
    shard = checkpoint / "__0_0.distcp"
    os.truncate(shard, 1000)
    seal_again(checkpoint, **{shard.name: None})
    assert find_corruption(checkpoint) == "COMPLETE does not list __0_0.distcp"
    assert main(["inspect", "run"]) == 2
    assert "COMPLETE does not list __0_0.distcp" in capsys.readouterr().err


@pytest.mark.parametrize("offset", [10, 10**15])
def test_places_that_hold_no_tensor(offset, checkpoint):
    def change(index) -> None:
        for info in index.storage_data.values():
            info.offset = offset

    rewrite(checkpoint, change)
    with pytest.raises(UserError, match="tensors that cannot be read"):
        read_tensors(checkpoint, weight_shapes(checkpoint))


@examples(60)
@given(position=st.floats(0, 1), byte=st.integers(0, 255), length=st.integers(0, 9))
def test_any_index_is_one_or_is_refused(position, byte, length, checkpoint_source):
    """Bytes overwritten, inserted or cut off."""
    source = checkpoint_source / "run/checkpoints/step_00000002" / INDEX
    raw, path = source.read_bytes(), checkpoint_source / "index"
    start = int(position * len(raw))
    path.write_bytes(raw[:start] + bytes([byte]) * length + raw[start + (length or len(raw)) :])
    try:
        index = read_index(path)
    except UserError:
        return

    assert all(Path(info.relative_path).name == info.relative_path for info in index.storage_data.values())
