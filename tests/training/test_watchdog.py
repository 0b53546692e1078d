"""The watchdog ends a rank that makes no progress, and no other."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from unittest.mock import MagicMock

import pytest
from support.runs import ROOT, command, environment

pytestmark = pytest.mark.slow

FAULTY = ROOT / "tests/support/faulty.py"

ALIVE = """
import sys, time
from megatron_mea.training import watchdog
assert "torch" not in sys.modules
watchdog._GRACE = 0
dog = watchdog.Watchdog(3, 0.4 / 60)
with dog.extend_timeout(1):
    time.sleep(0.9)
for _ in range(3):
    time.sleep(0.2)
    dog.mark()
"""


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ("dog.close(); time.sleep(0.9)", 0),
        ("dog.minutes = 1; time.sleep(0.9)", 0),
        ("with dog.extend_timeout(1): time.sleep(0.9)\ntime.sleep(60)", 1),
    ],
)
def test_marks_and_pauses_keep_a_process_alive(more, status):
    result = subprocess.run([sys.executable, "-c", ALIVE + more], capture_output=True, text=True, timeout=30)
    assert result.returncode == status, result.stderr
    if status:
        lines = result.stderr.splitlines()
        assert lines[0] == "rank 3: no progress for 0.00666667 minutes; the stacks of rank 3:"
        assert all(line.startswith("rank 3: ") for line in lines)
        assert any('File "<string>"' in line for line in lines)
    else:
        assert result.stderr == ""


def test_a_rank_that_cannot_write_its_stacks_ends_all_the_same():
    """It has no file descriptor left for them."""
    script = ALIVE + "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\ntime.sleep(20)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 1, result.stderr


def test_leaving_the_process_group_is_watched_too(monkeypatch):
    """It may wait for other ranks, and has no end of its own either."""
    from megatron_mea.training import loop

    calls = MagicMock()
    monkeypatch.setattr(loop, "start_run", MagicMock())
    monkeypatch.setattr(loop, "Trainer", MagicMock())
    monkeypatch.setattr(loop, "Watchdog", calls.watchdog)
    monkeypatch.setattr(loop.distributed, "start_distributed", MagicMock())
    monkeypatch.setattr(loop.distributed, "stop_distributed", calls.leave)
    config = MagicMock()
    config.training.deterministic = False
    loop.run(config=config, inputs=MagicMock(), stop=MagicMock())
    assert [name for name, *_ in calls.mock_calls if name in ("leave", "watchdog().close")] == [
        "leave",
        "watchdog().close",
    ]


SUSPENDED = """
import os, signal, subprocess, sys, time
from megatron_mea.training import watchdog
watchdog._GRACE = 0
dog = watchdog.Watchdog(3, 3 / 60)
start, before = time.monotonic(), dog.clock()
# Another process, since this one cannot wake itself.
subprocess.Popen(["sh", "-c", f"sleep 6; kill -CONT {os.getpid()}"])
os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(0.5)
assert time.monotonic() - start > 6
assert dog.clock() - before < 3, dog.clock() - before
print("awake", flush=True)
time.sleep(60)
"""


def test_a_suspended_process_is_no_hang_and_a_hang_after_it_is_one():
    result = subprocess.run([sys.executable, "-c", SUSPENDED], capture_output=True, text=True, timeout=30, check=False)
    assert (result.returncode, result.stdout) == (1, "awake\n"), result.stderr
    assert result.stderr.startswith("rank 3: no progress for 0.05 minutes; the stacks of rank 3:\n")


def test_a_rank_that_hangs_ends_all_with_their_stacks(tiny, tmp_path):
    config = tiny.write_config(tmp_path / "tiny.yaml", **{"training.steps": 100})
    python = tmp_path / "python"
    # Only the ranks have the fault, not the checks of local.sh before them.
    wrap = f'if [ "$1" = -m ]; then set -- {FAULTY} hang:1:4 "$@"; fi'
    python.write_text(f'#!/bin/bash\n{wrap}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)

    result = subprocess.run(
        command(config, "run", "parallel.timeout_minutes=0.05", processes=2),
        env=environment() | {"PYTHON": str(python), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 1

    metrics = tmp_path / "run/metrics.jsonl"
    assert '"step": 3,' in metrics.read_text()
    # 3 s until the watchdog ends the rank, 5 s for the stacks of the others.
    assert time.time() - metrics.stat().st_mtime < 25
    for rank in (0, 1):
        assert f"rank {rank}: no progress for 0.05 minutes; the stacks of rank {rank}:\n" in result.stderr
    assert re.search(r"rank 1: .*faulty\.py.* in step", result.stderr)
    assert re.search(r"rank 0: .*engine\.py.* in train_step", result.stderr)


SLOW = """
import sys, time
from megatron_mea.training.signals import StopSignal
from megatron_mea.cli import main
from megatron_mea.training import loop, watchdog
validation_batches, batches = loop.validation_batches, []

def slow(**arguments):
    for batch in validation_batches(**arguments):
        time.sleep(0.25)
        batches.append(batch)
        yield batch

loop.validation_batches = slow
status = main(sys.argv[1:])
assert len(batches) == 24, len(batches)
sys.exit(status)
"""


def test_a_long_validation_is_no_hang(tiny, tmp_path):
    """12 batches of 0.25 s before and after the step, with a limit of 2.4 s."""
    config = tiny.write_config(
        tmp_path / "tiny.yaml", **{"training.steps": 1, "schedule.warmup_steps": 0, "evaluation.batches": 6}
    )
    settings = [f"run.dir={tmp_path / 'run'}", "parallel.timeout_minutes=0.04"]
    result = subprocess.run(
        [sys.executable, "-c", SLOW, "train", str(config), *settings],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr

    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "validation_loss" in row] == [0, 1]
    for row in rows[1:]:
        assert 0 < row["forward_seconds_min"] <= row["forward_seconds_median"] <= row["forward_seconds_max"]
