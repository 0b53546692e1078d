"""A run of two processes that is killed and damaged again and again ends as one that nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from runs import command, environment, rows, train

from megatron_mea.checkpoint.folder import checkpoints_of, damage

FAILING_DISK = """
import os, resource, threading, time
def fail():
    while not os.path.exists(os.environ["DISK_IS_FULL"]):
        time.sleep(0.01)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
if os.environ.get("RANK") == "1":
    threading.Thread(target=fail, daemon=True).start()
"""
"""Rank 1 writes nothing but its part of a checkpoint: from some moment on the system refuses that."""


def ranks_of(process: subprocess.Popen) -> dict[int, int]:
    """Process ids of a running local.sh's ranks."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            variables = (path.parent / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        if parent == process.pid:
            found |= {int(one[5:]): int(path.parent.name) for one in variables if one.startswith(b"RANK=")}
    return found


def kill_one(process: subprocess.Popen, run: Path, chance: random.Random) -> None:
    os.kill(ranks_of(process)[chance.randrange(2)], signal.SIGKILL)


def kill_all(process: subprocess.Popen, run: Path, chance: random.Random) -> None:
    os.killpg(process.pid, signal.SIGKILL)


def kill_during_a_save(process: subprocess.Popen, run: Path, chance: random.Random) -> None:
    deadline = time.monotonic() + 60
    while not list((run / "checkpoints").glob(".tmp-step_*")):
        assert time.monotonic() < deadline
    time.sleep(chance.random() * 0.05)
    kill_all(process, run, chance)


def fill_the_disk(process: subprocess.Popen, run: Path, chance: random.Random) -> None:
    (run / "disk-is-full").touch()


def flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def halve(path: Path, chance: random.Random) -> None:
    os.truncate(path, path.stat().st_size // 2)


def remove(path: Path, chance: random.Random) -> None:
    path.unlink()


@dataclass(frozen=True)
class Incident:
    """How a run ends, what happens to a file of its newest checkpoint then, and the exit status (None: any but 0)."""

    name: str
    end: Callable[[subprocess.Popen, Path, random.Random], None]
    damage: Callable[[Path, random.Random], None] | None = None
    file: str = ""
    status: int | None = None


SHARD = "__1_0.distcp"
INCIDENTS = [
    Incident("a rank killed, a byte flipped", kill_one, flip, SHARD),
    Incident("all killed during a save", kill_during_a_save),
    Incident("disk full", fill_the_disk, status=1),
    Incident("all killed, a shard missing", kill_all, remove, SHARD),
    Incident("all killed, newest truncated", kill_all, halve, SHARD),
    Incident("a rank killed", kill_one),
    Incident("all killed during a save, meta.json flipped", kill_during_a_save, flip, "meta.json"),
    Incident("all killed, COMPLETE truncated", kill_all, halve, "COMPLETE"),
    Incident("all killed during a save, metadata missing", kill_during_a_save, remove, ".metadata"),
    Incident("all killed", kill_all),
]


def disturb(config: Path, incident: Incident, chance: random.Random, overrides: tuple[str, ...]) -> tuple[int, int]:
    """Goes on with the run until something happens to it; returns (step it went on from, step it went on to)."""
    run = config.parent / "disturbed"
    whole = [step for step, folder in checkpoints_of(run) if damage(folder) is None]
    expected = whole[-1] if whole else 0
    (run / "disk-is-full").unlink(missing_ok=True)
    site = config.parent / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(FAILING_DISK)
    extra = {"PYTHONPATH": str(site), "DISK_IS_FULL": str(run / "disk-is-full")}
    with (config.parent / "output").open("w+") as output:
        process = subprocess.Popen(
            command(config, "disturbed", *overrides, processes=2),
            env=environment() | extra,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        metrics, until = run / "metrics.jsonl", expected + 4 + chance.randrange(4)
        deadline = time.monotonic() + 120
        while not (metrics.exists() and re.search(rf'"step": {until},', metrics.read_text())):
            assert process.poll() is None, Path(output.name).read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        incident.end(process, run, chance)
        status = process.wait(timeout=60)
        output.seek(0)
        printed = output.read()
    assert status != 0
    assert incident.status in (None, status), printed
    if incident.status is not None:
        assert re.search(
            r"the checkpoint of step \d+ could not be written: rank 1: \[Errno 27\] File too large", printed
        )
    assert ("resuming from" in printed) == bool(expected)
    if expected:
        assert f"resuming from {run}/checkpoints/step_{expected:08d}\n" in printed
    reached = checkpoints_of(run)[-1][0]
    if incident.damage is not None:
        incident.damage(checkpoints_of(run)[-1][1] / incident.file, chance)
    return expected, reached


def check(tiny, folder: Path, incidents: list[Incident], seed: int) -> None:
    config = tiny.write_config(
        folder / "run.yaml",
        **{
            "training.steps": 14 * (len(incidents) + 1),
            "training.global_batch_size": 8,
            "evaluation.interval": 10,
            "checkpoint.interval": 1,
            "checkpoint.keep": 3,
        },
    )
    overrides = ("parallel.zero_stage=2",)
    chance = random.Random(seed)
    for number, incident in enumerate(incidents, 1):
        expected, reached = disturb(config, incident, chance, overrides)
        print(f"incident {number}, {incident.name}: went on from {expected} to {reached}", file=sys.stderr)
    train(config, "disturbed", *overrides, processes=2)
    train(config, "calm", *overrides, "checkpoint.interval=1000", "checkpoint.async_save=false", processes=2)
    assert rows(config, "disturbed") == rows(config, "calm")
    assert json.loads((folder / "disturbed/FINISHED").read_text())["step"] == 14 * (len(incidents) + 1)
    assert not list((folder / "disturbed/checkpoints").glob(".tmp*"))
    left = [path.name for path in (folder / "disturbed/checkpoints").glob("damaged-*")]
    assert len(left) == sum(incident.damage is not None for incident in incidents)


def test_three_incidents(tiny, tmp_path):
    check(tiny, tmp_path, INCIDENTS[:3], seed=1)


@pytest.mark.full
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_thirty_incidents(tiny, tmp_path, seed):
    check(tiny, tmp_path, INCIDENTS, seed)
