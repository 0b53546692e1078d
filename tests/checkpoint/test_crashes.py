"""A run of two processes that is killed and damaged repeatedly ends with the metrics of an undisturbed run."""

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
from support.runs import command, environment, rows, train

from megatron_mea.checkpoint.folder import complete_checkpoints, find_corruption

pytestmark = pytest.mark.slow

FAILING_DISK = """
import os, resource, threading, time
def fail():
    while not os.path.exists(os.environ["DISK_IS_FULL"]):
        time.sleep(0.01)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
if os.environ.get("RANK") == "1":
    threading.Thread(target=fail, daemon=True).start()
"""
"""sitecustomize.py: from some moment on the system refuses the writes of rank 1, which are those of checkpoints."""


def rank_pids(process: subprocess.Popen) -> dict[int, int]:
    """Process ids of the ranks of a running local.sh, by rank."""
    pids = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            variables = (path.parent / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        if parent == process.pid:
            pids |= {int(item[5:]): int(path.parent.name) for item in variables if item.startswith(b"RANK=")}

    return pids


def kill_a_rank(process: subprocess.Popen, *, run: Path, rng: random.Random) -> None:
    os.kill(rank_pids(process)[rng.randrange(2)], signal.SIGKILL)


def kill_all(process: subprocess.Popen, *, run: Path, rng: random.Random) -> None:
    os.killpg(process.pid, signal.SIGKILL)


def kill_during_a_save(process: subprocess.Popen, *, run: Path, rng: random.Random) -> None:
    deadline = time.monotonic() + 60
    while not list((run / "checkpoints").glob(".tmp-step_*")):
        assert time.monotonic() < deadline

    time.sleep(rng.random() * 0.05)
    kill_all(process, run=run, rng=rng)


def fill_the_disk(process: subprocess.Popen, *, run: Path, rng: random.Random) -> None:
    (run / "disk-is-full").touch()


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def halve(path: Path, rng: random.Random) -> None:
    os.truncate(path, path.stat().st_size // 2)


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


@dataclass(frozen=True, kw_only=True)
class Incident:
    """A failure of a run, later damage to a file of its newest checkpoint, and the exit status (None: any but 0)."""

    name: str
    fail: Callable[..., None]
    damage: Callable[[Path, random.Random], None] | None = None
    file: str = ""
    status: int | None = None


SHARD = "__1_0.distcp"
INCIDENTS = [
    Incident(name="a rank killed, a byte flipped", fail=kill_a_rank, damage=flip, file=SHARD),
    Incident(name="all killed during a save", fail=kill_during_a_save),
    Incident(name="disk full", fail=fill_the_disk, status=1),
    Incident(name="all killed, a shard missing", fail=kill_all, damage=remove, file=SHARD),
    Incident(name="all killed, newest truncated", fail=kill_all, damage=halve, file=SHARD),
    Incident(name="a rank killed", fail=kill_a_rank),
    Incident(
        name="all killed during a save, meta.json flipped", fail=kill_during_a_save, damage=flip, file="meta.json"
    ),
    Incident(name="all killed, COMPLETE truncated", fail=kill_all, damage=halve, file="COMPLETE"),
    Incident(
        name="all killed during a save, metadata missing", fail=kill_during_a_save, damage=remove, file=".metadata"
    ),
    Incident(name="all killed", fail=kill_all),
]


def disturb(*, config: Path, incident: Incident, rng: random.Random, overrides: tuple[str, ...]) -> tuple[int, int]:
    """Resumes the run until the incident; returns (step it resumed from, step of its newest checkpoint)."""
    run = config.parent / "disturbed"
    intact = [step for step, folder in complete_checkpoints(run) if find_corruption(folder) is None]
    resume_step = intact[-1] if intact else 0
    (run / "disk-is-full").unlink(missing_ok=True)

    site = config.parent / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(FAILING_DISK)
    variables = {"PYTHONPATH": str(site), "DISK_IS_FULL": str(run / "disk-is-full")}
    with (config.parent / "output").open("w+") as output:
        process = subprocess.Popen(
            command(config, "disturbed", *overrides, processes=2),
            env=environment() | variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        metrics, last_step = run / "metrics.jsonl", resume_step + 4 + rng.randrange(4)
        deadline = time.monotonic() + 120
        while not (metrics.exists() and re.search(rf'"step": {last_step},', metrics.read_text())):
            assert process.poll() is None, Path(output.name).read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)

        incident.fail(process, run=run, rng=rng)
        status = process.wait(timeout=60)
        output.seek(0)
        printed = output.read()

    assert status != 0
    assert incident.status in (None, status), printed
    if incident.status is not None:
        assert re.search(
            r"the checkpoint of step \d+ could not be written: rank 1: \[Errno 27\] File too large", printed
        )

    assert ("resuming from" in printed) == bool(resume_step)
    if resume_step:
        assert f"resuming from {run}/checkpoints/step_{resume_step:08d}\n" in printed

    newest_step, newest = complete_checkpoints(run)[-1]
    if incident.damage is not None:
        incident.damage(newest / incident.file, rng)
    return resume_step, newest_step


def check(*, tiny, folder: Path, incidents: list[Incident], seed: int) -> None:
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
    rng = random.Random(seed)
    for number, incident in enumerate(incidents, 1):
        start, stop = disturb(config=config, incident=incident, rng=rng, overrides=overrides)
        print(f"incident {number}, {incident.name}: resumed from {start}, saved {stop}", file=sys.stderr)

    train(config, "disturbed", *overrides, processes=2)
    train(config, "calm", *overrides, "checkpoint.interval=1000", "checkpoint.async_save=false", processes=2)
    assert rows(config, "disturbed") == rows(config, "calm")
    assert json.loads((folder / "disturbed/FINISHED").read_text())["step"] == 14 * (len(incidents) + 1)
    assert not list((folder / "disturbed/checkpoints").glob(".tmp*"))
    quarantined = [path.name for path in (folder / "disturbed/checkpoints").glob("damaged-*")]
    assert len(quarantined) == sum(incident.damage is not None for incident in incidents)


def test_three_incidents(tiny, tmp_path):
    check(tiny=tiny, folder=tmp_path, incidents=INCIDENTS[:3], seed=1)


@pytest.mark.full
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_thirty_incidents(tiny, tmp_path, seed):
    check(tiny=tiny, folder=tmp_path, incidents=INCIDENTS, seed=seed)
