"""The cluster of the other tests: names of its nodes, jobs that are requeued, and a node that loses power."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest
from support.cluster import Cluster

pytestmark = pytest.mark.slow


def submit(cluster: Cluster, folder: Path, *options: str, script: str) -> str:
    """Submits a job of two nodes with two tasks each, which writes to `folder`/log; returns its id."""
    command = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=2", "--open-mode=append", *options]
    return cluster.run(*command, f"--output={folder}/log", input=f"#!/bin/bash\n{script}\n").stdout.strip()


def task_lines(folder: Path) -> list[str]:
    """Lines that the job's tasks wrote, in order of rank; SLURM writes into the same file."""
    return sorted(line for line in (folder / "log").read_text().splitlines() if line.startswith("run "))


def test_tasks_know_their_node_and_a_requeued_job_that_it_was_started_again(cluster, tmp_path):
    report = (
        'echo "run ${SLURM_RESTART_COUNT:-0} $SLURM_PROCID $(hostname) $(getent hosts node1) $CUDA_VISIBLE_DEVICES"'
    )
    requeue_once = '[ -n "${SLURM_RESTART_COUNT:-}" ] || { scontrol requeue $SLURM_JOB_ID; sleep 60; }'
    job = submit(cluster, tmp_path, "--gpus-per-node=3", script=f"srun sh -c '{report}'\n{requeue_once}")
    cluster.wait(job, "COMPLETED", restarts=1)
    words = [line.split() for line in task_lines(tmp_path)]
    same_words = ["127.0.1.1", "node1", "0,1,2"]
    assert words == [["run", str(i // 4), str(i % 4), f"node{1 + i % 4 // 2}", *same_words] for i in range(8)]


def test_elements_of_an_array_have_a_state_each(cluster, tmp_path):
    job = submit(cluster, tmp_path, "--array=0-1", script="exit $SLURM_ARRAY_TASK_ID")
    cluster.wait(f"{job}_0", "COMPLETED")
    with pytest.raises(AssertionError, match="FAILED"):
        cluster.wait(f"{job}_1", "COMPLETED")

    assert sorted(element["ArrayTaskId"] for element in cluster.jobs(job)) == ["0", "1"]


@pytest.mark.parametrize("noticed", [True, False])
def test_a_node_that_loses_power_takes_its_tasks_along_and_the_job_moves(noticed, cluster, tmp_path):
    seconds = f"300.{time.time_ns()}"

    def count_tasks() -> int:
        count = 0
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # It has ended meanwhile.
                count += path.read_bytes().split(b"\0")[1:] == [seconds.encode(), b""]

        return count

    sleep_at_first = f'[ -n "${{SLURM_RESTART_COUNT:-}}" ] || srun sleep {seconds}'
    job = submit(cluster, tmp_path, script=sleep_at_first + "\nsrun sh -c 'echo run $(hostname)'")
    deadline = time.monotonic() + 30
    while count_tasks() < 4:
        assert time.monotonic() < deadline, cluster.job(job)
        time.sleep(0.1)

    cluster.kill_node("node2", noticed=noticed)
    assert count_tasks() <= 2

    cluster.wait(job, "COMPLETED", restarts=1)
    assert len(task_lines(tmp_path)) == 4
    assert "run node2" not in task_lines(tmp_path)
    assert count_tasks() == 0

    cluster.restore_node("node2")
    assert cluster.run("srun", "--nodelist=node2", "hostname").stdout == "node2\n"
