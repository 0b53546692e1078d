"""A console that cannot be written: a training goes on and writes console.log, another verb ends with one message."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.runs import environment

from megatron_mea import console
from megatron_mea.console import READER_GONE, _StandardStream, _text_stream
from megatron_mea.errors import RunError


@pytest.fixture
def broken_pipe():
    """The descriptor of a pipe without a reader."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    yield write_end
    os.close(write_end)


@pytest.fixture
def full_disk():
    """A descriptor with no space left behind it."""
    descriptor = os.open("/dev/full", os.O_WRONLY)
    yield descriptor
    os.close(descriptor)


def open_stream(descriptor: int, *, is_result: bool, run_dir: Path | None = None) -> io.TextIOWrapper:
    """A text stream over a `_StandardStream`."""
    raw = _StandardStream(descriptor, name="standard output", is_result=is_result)
    raw.run_dir = run_dir
    return _text_stream(raw, like=None)


def test_a_result_that_nobody_reads_ends_the_command(broken_pipe):
    stream = open_stream(broken_pipe, is_result=True)
    with pytest.raises(SystemExit) as raised:
        print("a line", file=stream)
    assert raised.value.code == READER_GONE == 141
    # Python does so when it ends.
    stream.flush()


def test_a_result_on_a_full_disk_is_one_message(full_disk):
    stream = open_stream(full_disk, is_result=True)
    with pytest.raises(RunError, match=r"^standard output cannot be written: No space left on device$"):
        print("a line", file=stream)
    stream.flush()


def test_what_is_no_result_is_dropped(broken_pipe, full_disk):
    for descriptor in (broken_pipe, full_disk):
        stream = open_stream(descriptor, is_result=False)
        print("a line\n" * 10_000, file=stream)


def test_the_log_takes_over_once_there_is_a_folder(broken_pipe, tmp_path):
    stream = open_stream(broken_pipe, is_result=True, run_dir=tmp_path / "run")
    print("lost", file=stream)

    (tmp_path / "run").mkdir()
    lines = [f"line {number}" for number in range(5000)]
    print(lines[0], file=stream)
    print("\n".join(lines[1:]), file=stream)
    os.write(broken_pipe, b"a library\n")

    first, *rest = (tmp_path / "run/console.log").read_text().splitlines()
    assert first.endswith(f"standard output of process {os.getpid()} cannot be written (Broken pipe): it goes on here")
    assert rest == [*lines, "a library"]


def test_a_log_that_cannot_be_written_either_is_tried_again(full_disk, tmp_path):
    (tmp_path / "console.log").symlink_to("/dev/full")
    stream = open_stream(full_disk, is_result=True, run_dir=tmp_path)
    print("lost", file=stream)
    (tmp_path / "console.log").unlink()
    print("a line", file=stream)
    assert (tmp_path / "console.log").read_text().splitlines()[1:] == ["a line"]


@pytest.mark.parametrize(("room", "text"), [(0, "a line\n"), (5000, "x" * 20_000 + "\n")])
def test_a_training_does_not_wait_for_a_pager(tmp_path, monkeypatch, room, text):
    """A pipe that is full, or has no room for all, with a reader that does not read; other verbs wait for it."""
    monkeypatch.setattr(console, "_PATIENCE_SECONDS", 0.1)
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write_end, b"-" * 1024)
    os.set_blocking(write_end, True)
    os.read(read_end, room)

    stream = open_stream(write_end, is_result=True, run_dir=tmp_path)
    writer = threading.Thread(target=lambda: print(text, end="", file=stream), daemon=True)
    writer.start()
    writer.join(30)
    assert not writer.is_alive()

    first, *rest = (tmp_path / "console.log").read_text().splitlines(keepends=True)
    assert first.endswith("cannot be written (nobody has read it for 0.1 s): it goes on here\n")
    os.close(write_end)
    with open(read_end, encoding="utf-8") as pipe:
        assert pipe.read().lstrip("-") + "".join(rest) == text


def test_a_console_that_does_not_block_is_waited_for():
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    text, received = "x" * 20_000, []

    def read() -> None:
        while len("".join(received)) < len(text):
            received.append(os.read(read_end, 1000).decode())

    reader = threading.Thread(target=read)
    reader.start()
    stream = open_stream(write_end, is_result=True)
    stream.write(text)
    stream.flush()
    reader.join()
    assert "".join(received) == text
    for descriptor in (read_end, write_end):
        os.close(descriptor)


FULL, CLOSED = "No space left on device", "Bad file descriptor"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "status", "reason"),
    [
        ("plan {config}", READER_GONE, ""),
        ("inspect {run} > /dev/full", 1, FULL),
        ("prepare --help", READER_GONE, ""),
        ("--version > /dev/full", 1, FULL),
        ("--version >&-", 1, CLOSED),
        ("plan nowhere 2> /dev/full", 2, ""),
    ],
)
def test_other_verbs_end_with_one_message(tiny, trained, tmp_path, broken_pipe, line, status, reason):
    """Standard output is a pipe that nobody reads, where the line does not say otherwise."""
    config = tiny.write_config(tmp_path / "tiny.yaml")
    result = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m megatron_mea {line.format(config=config, run=trained)}"],
        stdout=broken_pipe,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    message = f"megatron-mea: standard output cannot be written: {reason}\n" if reason else ""
    assert (result.returncode, result.stderr) == (status, message)


@pytest.mark.slow
def test_a_training_outlives_its_console(tiny, tmp_path, broken_pipe):
    """Standard output is a pipe that nobody reads, and standard error a full disk."""
    config = tiny.write_config(tmp_path / "tiny.yaml", **{"training.steps": 4, "checkpoint.interval": 2})
    run = tmp_path / "run"
    with open("/dev/full", "wb") as full:
        subprocess.run(
            [sys.executable, "-m", "megatron_mea", "train", str(config), f"run.dir={run}", "logging.interval=1"],
            stdout=broken_pipe,
            stderr=full,
            env=environment(),
            timeout=100,
            check=True,
        )

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(5))
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step_00000002", "step_00000004"}

    log = (run / "console.log").read_text()
    assert all(f"step {step}/4 | " in log for step in range(5))
    assert log.endswith(f"finished at step 4: {run}\n")
