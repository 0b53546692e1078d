"""Run folders under two jobs at once, with full disks, and with checkpoints that are links."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.runs import command, environment, rows, train

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tiny, tmp_path) -> Path:
    return tiny.write_config(tmp_path / "tiny.yaml")


def start(config: Path, *overrides: str, script: str | None = None) -> subprocess.Popen:
    """Starts a run in the background; with `script` in the place of the module."""
    arguments = command(config, "run", *overrides)
    if script is not None:
        arguments[1:3] = ["-c", script]
    return subprocess.Popen(
        arguments,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen, condition) -> None:
    """Waits until `condition()` holds, while the process runs."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def flip_last_byte(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_a_refused_start_stops_no_running_job(config):
    job = start(config, "training.steps=100000", "evaluation.interval=100000", "checkpoint.keep=1000000")
    run = config.parent / "run"
    wait_for(job, lambda: len(list((run / "checkpoints").glob("step_*"))) > 3)

    lease = (run / ".lease").read_text()
    flip_last_byte(next((run / "checkpoints/step_00000004").glob("*.distcp")))
    go_back = command(config, "run", "run.resume_from=4", "training.steps=100000", "evaluation.interval=100000")
    refused = subprocess.run(go_back, env=environment(), capture_output=True, text=True)
    assert refused.returncode == 2, refused.stderr
    assert "4, whose checkpoint is damaged" in refused.stderr
    assert (run / ".lease").read_text() == lease

    num_rows = len(rows(config, "run"))
    wait_for(job, lambda: len(rows(config, "run")) > num_rows + 4)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 0


STOPS_WITH_THE_LEASE = """if True:
    import os, signal, sys
    from megatron_mea.checkpoint.lease import Lease
    from megatron_mea.cli import main

    take = Lease.take

    def take_and_stop(self):
        previous = take(self)
        os.kill(os.getpid(), signal.SIGSTOP)
        return previous

    Lease.take = take_and_stop
    sys.exit(main(sys.argv[1:]))
"""


def test_a_starting_job_that_lost_the_lease_changes_nothing(config):
    """It hangs, as on a slow disk, right after it has taken the lease; another job finishes the run meanwhile."""
    run = config.parent / "run"
    slow = start(config, script=STOPS_WITH_THE_LEASE)
    wait_for(slow, lambda: Path(f"/proc/{slow.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    assert json.loads((run / ".lease").read_text())["pid"] == slow.pid
    assert not (run / "metrics.jsonl").exists()

    train(config, "run")
    contents = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    slow.send_signal(signal.SIGCONT)
    _, message = slow.communicate(timeout=120)
    assert slow.returncode == 1
    assert message.startswith(f"megatron-mea: {run} was taken over by process ")
    assert contents == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("limit", [300, 40_000])
def test_a_full_disk_ends_with_one_message(config, limit):
    """A limit on the size of a file stands in for the disk; config.yaml or, later, metrics.jsonl exceeds it."""
    script = f"""if True:
        import resource, sys
        from megatron_mea.cli import main
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        sys.exit(main(sys.argv[1:]))
    """
    _, _, *arguments = command(config, "run", "training.steps=100000", "checkpoint.interval=100000")
    arguments += ["evaluation.interval=100000"]
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments[1:]], env=environment(), capture_output=True, text=True
    )
    path = config.parent / "run" if limit == 300 else config.parent / "run/metrics.jsonl"
    assert result.returncode == 1
    assert result.stderr == f"megatron-mea: {path} cannot be written: File too large\n"


def test_old_checkpoints_that_are_links(config, tmp_path):
    """Archived to another disk, for example: the link is removed, and its target stays."""
    train(config, "run", "checkpoint.interval=1", "training.steps=2", "schedule.warmup_steps=1")
    folder, archive = config.parent / "run/checkpoints", tmp_path / "archive"
    (folder / "step_00000001").rename(archive)
    (folder / "step_00000001").symlink_to(archive)

    output = train(config, "run", "checkpoint.interval=1", "checkpoint.keep=1", "training.steps=3")
    assert "warning: a checkpoint" not in output
    assert [path.name for path in folder.iterdir()] == ["step_00000003"]
    assert (archive / "COMPLETE").exists()


def test_a_file_named_checkpoints_is_refused(config):
    (config.parent / "run").mkdir()
    (config.parent / "run/checkpoints").touch()
    refused = subprocess.run(command(config, "run"), env=environment(), capture_output=True, text=True)
    assert refused.returncode == 2
    assert "run.dir" in refused.stderr
    assert "run/checkpoints, which is a file" in refused.stderr
