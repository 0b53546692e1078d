"""`.lease`, meta.json and COMPLETE with anything in them: a value, or one message, in little memory."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.foreign import edited_json, examples
from support.limits import traced_memory_below, within_limits
from support.old_runs import unpack

from megatron_mea.checkpoint.folder import (
    COMPLETE,
    META,
    CheckpointMetadata,
    find_corruption,
    intact_checkpoints,
    read_checksums,
    sha256,
)
from megatron_mea.checkpoint.lease import Lease, lease_holder
from megatron_mea.checkpoint.resume import check_resume
from megatron_mea.checkpoint.run_config import load_run_config
from megatron_mea.errors import UserError

HOLDER = {
    "token": "0123abcd",
    "host": socket.gethostname(),
    "pid": os.getpid(),
    "job": "7",
    "since": "2026-11-30 08:00:00",
    "ended": False,
}


@given(raw=edited_json(HOLDER) | st.binary(max_size=99))
@example(raw=b'{"token": "' + b"x" * (1 << 20) + b'"}')
@example(raw=json.dumps(HOLDER | {"pid": -1}).encode())
@examples(200)
def test_whatever_a_lease_holds(tmp_path_factory, raw: bytes) -> None:
    """It names a holder, in one printable line, or nobody."""
    folder = tmp_path_factory.getbasetemp()
    (folder / ".lease").write_bytes(raw)
    with within_limits(), traced_memory_below(50_000_000):
        lease = Lease(folder)
        for holder in (lease_holder(folder), lease.new_holder(), lease.take()):
            assert len(holder or "") < 1000
            assert (holder or "").isprintable()
            assert (holder or "").isascii()
    assert lease_holder(folder) is not None, "ours now"
    lease.end()
    assert lease_holder(folder) is None or lease.new_holder()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    unpack("mea", folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(run_folder) -> Path:
    return run_folder / "run/checkpoints/step_00000002"


@pytest.fixture(scope="module")
def original(checkpoint) -> dict[str, bytes]:
    """Both files as they were; imports are done here, whose memory is not counted."""
    assert find_corruption(checkpoint) is None
    return {name: (checkpoint / name).read_bytes() for name in (META, COMPLETE)}


@given(data=st.data())
@examples(100)
def test_whatever_meta_json_holds(run_folder, checkpoint, original, data) -> None:
    """With the right checksum, so that it is read."""
    (checkpoint / META).write_bytes(data.draw(edited_json(json.loads(original[META]))))
    complete = json.loads(original[COMPLETE])
    checksums = complete["sha256"] | {META: sha256(checkpoint / META)}
    (checkpoint / COMPLETE).write_text(json.dumps(complete | {"sha256": checksums}))

    with contextlib.chdir(run_folder), within_limits(), traced_memory_below(50_000_000), contextlib.suppress(UserError):
        assert intact_checkpoints("run"), "it is what was sealed"
        metadata = CheckpointMetadata.read(checkpoint)
        assert metadata.step >= 0
        config, lines = load_run_config("run.yaml")
        assert all(line.isprintable() for line in lines)
        check_resume(metadata=metadata, config=config, fingerprint=None)


@given(data=st.data())
@examples(100)
def test_whatever_complete_holds(checkpoint, original, data) -> None:
    (checkpoint / META).write_bytes(original[META])
    (checkpoint / COMPLETE).write_bytes(data.draw(edited_json(json.loads(original[COMPLETE]))))
    with within_limits(), traced_memory_below(50_000_000), contextlib.suppress(UserError):
        problem = find_corruption(checkpoint)
        assert problem is None or problem.isprintable()


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800", "\x1b[2J", "a\nb", ""])
def test_names_that_no_file_has(name, checkpoint, original, tmp_path) -> None:
    copied = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, copied)
    (copied / META).write_bytes(original[META])
    (copied / COMPLETE).write_text(json.dumps({"sha256": json.loads(original[COMPLETE])["sha256"] | {name: "0"}}))
    problem = find_corruption(copied)
    assert problem is not None
    assert problem.isprintable()
    assert len(problem) < 500


@pytest.mark.parametrize("checksums", [7, "ab", [["a", "b"], [1, 2]], {"a": 1}, {"a": None}])
def test_checksums_that_are_none(checksums, tmp_path) -> None:
    (tmp_path / COMPLETE).write_text(json.dumps({"sha256": checksums}))
    with pytest.raises((ValueError, TypeError)):
        read_checksums(tmp_path)
