"""The cluster that other tests trust: its nodes' names, jobs that come back, and a node that loses power."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest
from cluster import Cluster


def submit(cluster: Cluster, folder: Path, script: str, *options: str) -> str:
    """The id of a job of two nodes with two tasks each, which writes to `folder`/log."""
    command = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=2", "--open-mode=append", *options]
    return cluster.run(*command, f"--output={folder}/log", input=f"#!/bin/bash\n{script}\n").stdout.strip()


def said(folder: Path) -> list[str]:
    """What the job's tasks wrote, in order of rank; SLURM writes into the same file."""
    return sorted(line for line in (folder / "log").read_text().splitlines() if line.startswith("run "))


def test_tasks_know_their_node_and_a_requeued_job_that_it_was_started_again(cluster, tmp_path):
    say = 'echo "run ${SLURM_RESTART_COUNT:-0} $SLURM_PROCID $(hostname) $(getent hosts node1) $CUDA_VISIBLE_DEVICES"'
    again = '[ -n "${SLURM_RESTART_COUNT:-}" ] || { scontrol requeue $SLURM_JOB_ID; sleep 60; }'
    job = submit(cluster, tmp_path, f"srun sh -c '{say}'\n{again}", "--gpus-per-node=3")
    cluster.wait(job, "COMPLETED", restarts=1)
    words = [line.split() for line in said(tmp_path)]
    here = ["127.0.1.1", "node1", "0,1,2"]
    assert words == [["run", str(i // 4), str(i % 4), f"node{1 + i % 4 // 2}", *here] for i in range(8)]


def test_elements_of_an_array_have_a_state_each(cluster, tmp_path):
    job = submit(cluster, tmp_path, "exit $SLURM_ARRAY_TASK_ID", "--array=0-1")
    cluster.wait(f"{job}_0", "COMPLETED")
    with pytest.raises(AssertionError, match="FAILED"):
        cluster.wait(f"{job}_1", "COMPLETED")
    assert sorted(element["ArrayTaskId"] for element in cluster.jobs(job)) == ["0", "1"]


@pytest.mark.parametrize("noticed", [True, False])
def test_a_node_that_loses_power_takes_its_tasks_along_and_the_job_moves(noticed, cluster, tmp_path):
    seconds = f"300.{time.time_ns()}"

    def tasks() -> int:
        found = 0
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # It has ended meanwhile.
                found += path.read_bytes().split(b"\0")[1:] == [seconds.encode(), b""]
        return found

    first = f'[ -n "${{SLURM_RESTART_COUNT:-}}" ] || srun sleep {seconds}'
    job = submit(cluster, tmp_path, first + "\nsrun sh -c 'echo run $(hostname)'")
    deadline = time.monotonic() + 30
    while tasks() < 4:
        assert time.monotonic() < deadline, cluster.job(job)
        time.sleep(0.1)
    cluster.kill_node("node2", noticed=noticed)
    assert tasks() <= 2
    cluster.wait(job, "COMPLETED", restarts=1)
    assert len(said(tmp_path)) == 4
    assert "run node2" not in said(tmp_path)
    assert tasks() == 0
    cluster.restore_node("node2")
    assert cluster.run("srun", "--nodelist=node2", "hostname").stdout == "node2\n"
