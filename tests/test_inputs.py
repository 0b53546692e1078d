"""Small files from anywhere: an object, or one of two kinds of errors; no pipe is waited for."""

from __future__ import annotations

import os

import pytest

from megatron_mea.errors import shorten
from megatron_mea.inputs import read_json_object
from megatron_mea.run_folder import RunFolder


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"[1]", "a JSON list"),
        (b"7", "a JSON int"),
        (b"{", "Expecting"),
        (b"\xff", "decode"),
        (b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "nested too deeply"),
        (b'{"a": "' + b"x" * 100 + b'"}', "more than 99 bytes"),
        (b"", "Expecting"),
    ],
)
def test_what_is_no_object(raw, reason, tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=reason):
        read_json_object(path, max_bytes=99 if reason.endswith("bytes") else 1 << 20)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "none", ""):
        with pytest.raises(OSError, match=r"no regular file|No such file"):
            read_json_object(tmp_path / name)


@pytest.mark.parametrize("step", ["1e400", '"x"', "null", "[1]"])
def test_a_finished_step_that_is_none(step, tmp_path):
    (tmp_path / "FINISHED").write_text(f'{{"step": {step}}}')
    assert RunFolder(tmp_path).finished_step() is None


def test_long_values_are_shortened():
    assert shorten("x") == "'x'"
    assert len(shorten("9" * 5000)) < 200
    assert shorten("9" * 5000).startswith("'999")
    assert shorten("9" * 5000).endswith("999'")
