"""Jobs as a user submits them, on a real SLURM: stopped, preempted, without a node, failing, hanging, chained."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.cluster import Cluster
from support.runs import ROOT, command, environment, rows

from megatron_mea.checkpoint.folder import complete_checkpoints

pytestmark = pytest.mark.slow

FAULTY = ROOT / "tests/support/faulty.py"
TIME = "1:00:00"


class ClusterDesk:
    """A folder to submit jobs from to the cluster."""

    def __init__(self, *, cluster: Cluster, folder: Path, config: Path) -> None:
        self.cluster, self.folder, self.config = cluster, folder, config

    def set_fault(self, fault: str | None) -> None:
        """Gives jobs that are submitted from now on a fault, KIND:RANK:STEP as in support/faulty.py, or none."""
        site = (ROOT / "launch/site.env").read_text()
        if fault:
            python = self.folder / f"python-{fault.replace(':', '-')}"
            python.write_text(f'#!/bin/bash\nexec {sys.executable} {FAULTY} {fault} "$@"\n')
            python.chmod(0o755)
            site = site.replace('PYTHON=""', f"PYTHON={python}")

        (self.folder / "launch").mkdir(exist_ok=True)
        (self.folder / "launch/site.env").write_text(site)

    def ask(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        """Runs a command of megatron-mea in the folder."""
        return self.cluster.run(
            sys.executable,
            "-m",
            "megatron_mea",
            *arguments,
            check=check,
            cwd=self.folder,
            env={"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )

    def submit(
        self, name: str, *overrides: str, nodes: int = 2, tasks: int = 1, limit: str = TIME, options: tuple = ()
    ) -> str:
        """Submits a run with `tasks` ranks a node; returns the id of its job, the last one of a chain."""
        resources = ["--nodes", str(nodes), "--gpus-per-node", str(tasks), "--time", limit]
        out = self.ask("submit", str(self.config), f"run.dir={name}", *overrides, *resources, *options).stdout
        assert out.startswith("Submitted batch job ")

        return re.findall(r"Submitted batch job (\d+)", out)[-1]

    def log(self, name: str, job: str) -> str:
        path = self.folder / name / "slurm" / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def wait_until(self, condition: Callable[[], object], timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def wait_for_step(self, name: str, step: int) -> None:
        metrics = self.folder / name / "metrics.jsonl"
        self.wait_until(lambda: metrics.exists() and f'"step": {step},' in metrics.read_text())


@pytest.fixture(scope="module")
def desk(_cluster: Cluster, tiny, tmp_path_factory: pytest.TempPathFactory) -> ClusterDesk:
    folder = tmp_path_factory.mktemp("desk")
    settings = {"training.micro_batch_size": 1, "evaluation.interval": 50, "checkpoint.interval": 20}
    desk = ClusterDesk(cluster=_cluster, folder=folder, config=tiny.write_config(folder / "tiny.yaml", **settings))
    desk.set_fault(None)

    return desk


@pytest.fixture
def train_uninterrupted(desk: ClusterDesk) -> Callable[..., list[dict]]:
    """Trains a run without SLURM or interruption; returns its metrics."""

    def train(name: str, *overrides: str, processes: int) -> list[dict]:
        completed = subprocess.run(
            command(desk.config, name, *overrides, processes=processes),
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert completed.returncode == 0, completed.stderr

        return rows(desk.config, name)

    return train


def test_a_job_that_reaches_its_limit_goes_on_and_exports(desk: ClusterDesk, cluster: Cluster, train_uninterrupted):
    """2 nodes x 2 tasks: told before the limit, saves, requeues itself, finishes with the losses of one run."""
    desk.set_fault("slow:0:1")
    overrides = ["training.steps=220", "checkpoint.interval=1000"]
    job = desk.submit("limited", *overrides, tasks=2, limit="2:00")
    expected = train_uninterrupted("limited-uninterrupted", *overrides, processes=4)
    assert cluster.wait(job_id=job, states="COMPLETED", timeout=300) == "COMPLETED"

    log = desk.log("limited", job)
    assert re.search(r"preflight: 4 rank\(s\) on 2 node\(s\) \(node\d, node\d\), cpu", log)
    assert "got USR2" in log
    assert "into the queue again" in log
    assert "attempt 2" in log
    assert "finished at step 220" in log
    assert rows(desk.config, "limited") == expected

    heartbeat = json.loads((desk.folder / "limited/heartbeat.json").read_text())
    assert (heartbeat["step"], heartbeat["steps"], heartbeat["job"]) == (220, 220, job)

    desk.ask("export", "limited", "exported")
    assert (desk.folder / "exported/model.safetensors").exists()

    resources = ["--nodes", "2", "--gpus-per-node", "2", "--time", TIME]
    refused = desk.ask("submit", str(desk.config), "run.dir=limited", *overrides, *resources, check=False)
    assert refused.returncode == 2
    assert "limited, finished at step 220" in refused.stderr


def test_a_preempted_job_saves_and_goes_on(desk: ClusterDesk, cluster: Cluster, train_uninterrupted):
    desk.set_fault("slow:0:1")
    overrides = ["training.steps=60", "checkpoint.interval=1000"]
    job = desk.submit("of a day/preempted", *overrides, options=("--", "--nodelist=node[1-2]", "--exclusive"))
    desk.wait_for_step("of a day/preempted", 5)
    options = ["--partition=urgent", "--nodelist=node[1-2]", "--exclusive", "--output=/dev/null"]
    urgent_job = cluster.run("sbatch", "--parsable", *options, "--wrap=sleep 1").stdout.strip()
    assert cluster.wait(job_id=urgent_job, states="COMPLETED", timeout=90) == "COMPLETED"
    assert cluster.wait(job_id=job, states="COMPLETED", timeout=180, restarts=1) == "COMPLETED"
    assert rows(desk.config, "of a day/preempted") == train_uninterrupted(
        "preempted-uninterrupted", *overrides, processes=2
    )


def test_a_job_that_loses_a_node_goes_on_without_it(desk: ClusterDesk, cluster: Cluster, train_uninterrupted):
    desk.set_fault("slow:0:1")
    overrides = ["training.steps=60", "checkpoint.interval=10"]
    job = desk.submit("robbed", *overrides)
    desk.wait_until(lambda: complete_checkpoints(desk.folder / "robbed"))
    lost_node = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).stdout.split()[1]
    cluster.kill_node(lost_node, noticed=True)
    assert cluster.wait(job_id=job, states="COMPLETED", timeout=180, restarts=1) == "COMPLETED"
    assert lost_node not in cluster.job(job)["NodeList"]
    assert rows(desk.config, "robbed") == train_uninterrupted("robbed-uninterrupted", *overrides, processes=2)


def test_a_rank_that_raises_ends_the_job_for_good(desk: ClusterDesk, cluster: Cluster):
    desk.set_fault("raise:1:3")
    job = desk.submit("raises", "training.steps=100000", "evaluation.interval=100000")
    desk.wait_for_step("raises", 2)
    began = time.monotonic()
    assert cluster.wait(job, "FAILED") == "FAILED"
    assert time.monotonic() - began < 15

    log = desk.log("raises", job)
    assert "1: [rank1]: ValueError: a fault that comes every time" in log
    assert "a rank failed by itself, which another attempt would not mend: ValueError: a fault that comes" in log
    assert cluster.job(job)["Restarts"] == "0"
    assert cluster.job(job)["ExitCode"] == "1:0"


def test_a_users_error_is_not_tried_again(desk: ClusterDesk, cluster: Cluster):
    desk.set_fault(None)
    job = desk.submit("wrong", "training.steps=5", nodes=1, options=("--", "--hold"))
    config = desk.folder / "wrong/slurm/config.yaml"
    tree = yaml.safe_load(config.read_text())
    tree["data"]["train"][0]["path"] = "nowhere"
    config.write_text(yaml.safe_dump(tree))
    cluster.run("scontrol", "release", job)
    assert cluster.wait(job_id=job, states="FAILED", timeout=90) == "FAILED"
    assert "0: megatron-mea: error: nowhere.idx" in desk.log("wrong", job)
    assert (cluster.job(job)["Restarts"], cluster.job(job)["ExitCode"]) == ("0", "2:0")


@pytest.mark.parametrize("kind", ["kill", "hang"])
def test_no_third_attempt_without_progress(kind: str, desk: ClusterDesk, cluster: Cluster):
    desk.set_fault(f"{kind}:1:3")
    job = desk.submit(kind, "training.steps=1000", "parallel.timeout_minutes=0.05")
    assert cluster.wait(job_id=job, states="FAILED", timeout=180, restarts=1) == "FAILED"

    log = desk.log(kind, job)
    assert "2 attempts in a row began at step 0 and saved nothing newer: not tried again" in log
    assert cluster.job(job)["Restarts"] == "1"

    if kind == "hang":
        for rank in (0, 1):
            assert f"{rank}: rank {rank}: no progress for 0.05 minutes; the stacks of rank {rank}:" in log
        assert re.search(r"1: rank 1: .*faulty.py.* in step", log)
        assert re.search(r"0: rank 0: .*engine.py.* in train_step", log)


def test_one_job_a_run_and_it_ends_when_asked(desk: ClusterDesk, cluster: Cluster):
    desk.set_fault("slow:0:1")
    overrides = ["training.steps=100000", "checkpoint.interval=100000"]
    resources = ["--nodes", "1", "--gpus-per-node", "1", "--time", TIME]
    job = desk.submit("asked", *overrides, nodes=1)
    desk.wait_for_step("asked", 4)
    arguments = ["submit", str(desk.config), "run.dir=asked", *overrides, *resources]
    refused = desk.ask(*arguments, check=False)
    assert refused.returncode == 2
    assert "run.dir" in refused.stderr
    assert "trains" in refused.stderr or f"job {job} is RUNNING" in refused.stderr

    # Somebody submits the script by hand.
    script = desk.folder / "asked/slurm/train.sbatch"
    second = cluster.run("sbatch", "--parsable", str(script)).stdout.strip()
    assert cluster.wait(second, "FAILED") == "FAILED"
    assert f"job {job} trains {desk.folder}/asked already" in desk.log("asked", second)
    assert cluster.job(job)["JobState"] == "RUNNING"

    cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait(job, "COMPLETED") == "COMPLETED"

    step = complete_checkpoints(desk.folder / "asked")[-1][0]
    assert f"stopped as asked at step {step}; submit again to go on" in desk.log("asked", job)
    assert cluster.job(job)["Restarts"] == "0"

    out = desk.ask(*arguments).stdout
    assert f"begins        at step {step}, the newest checkpoint, of 100000" in out

    third = re.findall(r"Submitted batch job (\d+)", out)[0]
    desk.wait_for_step("asked", step + 4)
    cluster.run("scancel", third)
    assert cluster.wait(third, "CANCELLED") == "CANCELLED"

    cluster.wait(third, "CANCELLED")
    time.sleep(8)
    assert cluster.job(third)["JobState"] == "CANCELLED"
    assert cluster.job(third)["Restarts"] == "0"


def test_a_chain_goes_on_where_requeue_is_forbidden(desk: ClusterDesk, cluster: Cluster, train_uninterrupted):
    desk.set_fault("slow:0:1")
    overrides = ["training.steps=40", "checkpoint.interval=1000"]
    last = desk.submit("chained", *overrides, nodes=1, options=("--chain", "3"))
    first = str(int(last) - 2)
    desk.wait_for_step("chained", 10)
    cluster.run("scancel", "--batch", "--signal=USR2", first)
    assert cluster.wait(job_id=last, states="COMPLETED", timeout=120) == "COMPLETED"
    assert "the next job of the chain goes on" in desk.log("chained", first)
    assert "finished at step 40" in desk.log("chained", str(int(first) + 1))
    assert "finished already" in desk.log("chained", last)
    assert {cluster.job(str(int(first) + n))["Restarts"] for n in range(3)} == {"0"}
    assert rows(desk.config, "chained") == train_uninterrupted("chained-uninterrupted", *overrides, processes=1)


def test_a_sweep_is_an_array_of_which_one_element_is_requeued(desk: ClusterDesk, cluster: Cluster, train_uninterrupted):
    desk.set_fault("slow:0:1")
    arguments = ["sweep", str(desk.config), "training.steps=40", "checkpoint.interval=1000"]
    arguments += ["--learning-rates", "1e-2,3e-3", "--out", "sweep", "--submit", "--time", TIME]
    out = desk.ask(*arguments).stdout
    job = out.split()[3]
    assert out.startswith(f"Submitted batch job {job}\n")

    slow = "sweep/mea-lr3e-3"
    desk.wait_for_step(slow, 5)
    cluster.run("scancel", "--batch", "--signal=USR2", f"{job}_1")
    for element, restarts in (("0", "0"), ("1", "1")):
        name = f"{job}_{element}"
        assert cluster.wait(job_id=name, states="COMPLETED", timeout=120, restarts=int(restarts)) == "COMPLETED"
        assert cluster.job(name)["Restarts"] == restarts

    assert rows(desk.config, slow) == train_uninterrupted(
        "sweep-uninterrupted", *arguments[2:4], "optimizer.lr=3e-3", processes=1
    )
    assert "all 2 runs are done" in desk.ask(*arguments).stdout


def test_the_same_configuration_runs_everywhere(desk: ClusterDesk):
    """A job trains the file as it was submitted, which also trains without SLURM."""
    submitted = desk.folder / "chained/slurm/config.yaml"
    completed = subprocess.run(
        [sys.executable, "-m", "megatron_mea", "train", str(submitted), "run.dir=alone", "training.steps=2"],
        cwd=desk.folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr


def test_data_is_prepared_on_another_node(desk: ClusterDesk, cluster: Cluster, tiny):
    """`launch/prepare.sbatch` passes its arguments on, and the environment of the one who submits."""
    source = tiny.train.with_suffix(".jsonl")
    script = [str(ROOT / "launch/prepare.sbatch"), "--input", str(source), "--tokenizer", str(tiny.tokenizer)]
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    folder = desk.folder / "with space"
    folder.mkdir()
    options = ["--parsable", "--cpus-per-task=2"]
    job = cluster.run("sbatch", *options, *script, "--out", "made/train", cwd=folder, env=environment).stdout.strip()
    assert cluster.wait(job, "COMPLETED") == "COMPLETED"

    for kind in ("bin", "idx"):
        assert (folder / f"made/train.{kind}").read_bytes() == Path(f"{tiny.train}.{kind}").read_bytes()

    assert "documents" in (folder / f"prepare-{job}.log").read_text()
