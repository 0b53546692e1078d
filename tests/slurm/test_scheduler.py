"""`submit` with a scheduler that answers: partitions, running jobs, refusals of sbatch, and the files that are left."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from support.desk import SINFO

from megatron_mea.slurm.scheduler import Partition, partitions

pytestmark = pytest.mark.slow

DRY = "--dry-run"
FAILS = "echo 'sbatch: error: Batch job submission failed: Invalid qos specification' >&2; exit 1"


@pytest.mark.parametrize(
    ("sinfo", "expected"),
    [
        (
            SINFO,
            [
                Partition(name="gpu", is_default=True, time_limit=86400, nodes=2, cpus=64, gpus=4),
                Partition(name="cpu", is_default=False, time_limit=None, nodes=1, cpus=32, gpus=0),
            ],
        ),
        ("a|30:00|8|gpu:2\n", [Partition(name="a", is_default=False, time_limit=1800, nodes=1, cpus=8, gpus=2)]),
        (
            "a|UNLIMITED|8|gpu:a100:4(S:0),gpu:h100_3g.40gb:2(S:1),nvme:1\n",
            [Partition(name="a", is_default=False, time_limit=None, nodes=1, cpus=8, gpus=6)],
        ),
        (
            "a|2-12:00:00|8+|shard:16,mps:100\n",
            [Partition(name="a", is_default=False, time_limit=216000, nodes=1, cpus=8, gpus=0)],
        ),
        ("", []),
    ],
)
def test_partitions(sinfo, expected, desk):
    desk.slurm(sinfo=sinfo)
    assert partitions() == {partition.name: partition for partition in expected}


def test_a_submission(desk, submit):
    desk.slurm()
    status, out, err = submit("training.steps=7", "--", "--qos=high")
    assert (status, err) == (0, "")

    state = desk.folder / "run/slurm"
    assert out.startswith("Submitted batch job 42\n")

    for line in (
        "world size    1 = 1 node(s) x 1: tensor 1 x pipeline 1 x data 1",
        "begins        anew, of 7",
        f"log           {state}/42.log",
        "scheduler     Job 43 to start at 2026-01-01T00:00:00 on gpu7",
        "cancel        scancel 42",
    ):
        assert f"  {line}\n" in out + "\n"

    assert desk.calls("sbatch") == ["--test-only", f"--parsable {state}/train.sbatch"]

    script = (state / "train.sbatch").read_text()
    assert "#SBATCH --gpus-per-node=1\n#SBATCH --cpus-per-task=16\n#SBATCH --requeue\n#SBATCH --qos=high\n" in script
    assert yaml.safe_load((state / "config.yaml").read_text())["training"]["steps"] == 7
    assert {path.name for path in desk.files()} >= {"run", "slurm"}


def test_a_whole_node_is_for_the_job_alone(desk, submit):
    desk.slurm()
    _, script, _ = submit(DRY, "training.micro_batch_size=1", gpus=4)
    assert "#SBATCH --exclusive\n" in script
    assert "#SBATCH --cpus-per-task=16\n" in script


def test_a_partition_without_gpus(desk, submit):
    desk.slurm()
    status, script, _ = submit(DRY, "--", "-p", "cpu", gpus=2)
    assert status == 0
    assert "--gpus" not in script.partition("RUN_DIR=")[0]

    for line in ("--exclusive", "--cpus-per-task=16", "-p cpu"):
        assert f"#SBATCH {line}\n" in script

    assert "# warning: partition cpu schedules no GPUs: 2 tasks on each of its nodes, exclusively" in script


@pytest.mark.parametrize(
    ("arguments", "options", "where", "expected"),
    [
        ({"time": "1-00:00:01"}, [], "--time", "at most 1 day, 0:00:00 (H:M:S), the limit of partition gpu"),
        ({"nodes": 3}, [], "--nodes", "at most 2, all of partition gpu"),
        ({"nodes": 2}, ["--partition=cpu"], "--nodes", "at most 1, all of partition cpu"),
        ({"gpus": 8}, [], "--gpus-per-node", "at most 4"),
    ],
)
def test_what_the_partition_lacks_is_refused(arguments, options, where, expected, desk, submit):
    desk.slurm()
    small = ["training.global_batch_size=24", "training.micro_batch_size=1", "evaluation.batches=1"]
    status, out, err = submit(DRY, *small, "--", *options, **arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"megatron-mea: error: {where}\n")
    assert f"  expected: {expected}\n" in err
    # The other one has no limit.
    assert submit(DRY, *small, "--", "--partition=cpu", time="9-0")[0] == 0


def test_a_partition_of_site_env_counts(desk, submit):
    desk.write_site("PARTITION=cpu\nsetup() { :; }\n")
    desk.slurm()
    assert submit(DRY, time="9-0")[0] == 0
    assert submit(DRY, "--", "-pgpu", time="9-0")[0] == 2


@pytest.mark.parametrize("name", ["run", "a run"])
def test_a_script_that_has_a_job_is_refused(name, desk, submit):
    """Alone or as the element of an array, by whichever path its folder was named."""
    desk.slurm(squeue="7|RUNNING\n41_1|PENDING\n41_2|PENDING\n")
    (desk.folder / name / "slurm").mkdir(parents=True)
    (desk.folder / name / "slurm/jobs").write_text("41_2\n")
    before = desk.files()
    status, out, err = submit(f"run.dir={name}")
    assert (status, out) == (2, "")
    assert f"got:      {name}, for which job 41_2 is PENDING\n" in err
    assert "scancel 41_2" in err
    assert desk.files() == before
    assert submit("run.dir=another")[0] == 0


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("echo 'Slurmctld(primary) at login1 is DOWN'", "scontrol ping: Slurmctld(primary) at login1 is DOWN"),
        ("echo 'slurm_load: no controller' >&2; exit 1", "scontrol ping: no controller"),
    ],
)
def test_a_controller_that_does_not_answer(answer, message, desk, submit):
    desk.slurm()
    desk.add_program("scontrol", answer)
    status, out, err = submit()
    assert (status, out) == (2, "")
    assert message in err
    # For a look at the script it is not needed.
    assert submit(DRY)[0] == 0


def test_what_sbatch_would_refuse_is_not_written(desk, submit):
    desk.slurm()
    desk.add_program("sbatch", FAILS)
    before = desk.files()
    status, out, err = submit()
    assert (status, out) == (2, "")
    assert "error: sbatch\n  got:      Batch job submission failed: Invalid qos specification\n" in err
    assert desk.files() == before
    assert desk.calls("sbatch") == ["--test-only"]


def test_nothing_is_left_where_sbatch_fails(desk, submit):
    desk.slurm(sbatch=FAILS)
    before = desk.files()
    status, out, err = submit("run.dir=new/folder")
    assert (status, out) == (1, "")
    assert "Batch job submission failed: Invalid qos specification" in err
    assert desk.files() == before


def file_contents(desk) -> dict:
    """Contents by path of the files that `submit` could have changed."""
    return {path: path.read_bytes() for path in desk.files() if path.is_file() and path.parent != desk.bin}


def test_an_earlier_submission_stays_as_it_was(desk, submit):
    desk.slurm()
    assert submit()[0] == 0

    before = file_contents(desk)
    desk.slurm(sbatch=FAILS)
    assert submit("training.steps=9")[0] == 1
    assert file_contents(desk) == before


def test_a_chain(desk, submit):
    desk.slurm(sbatch='echo "$(cat number 2>/dev/null)7;cluster"; printf 1 >> number')
    status, out, _ = submit("--chain", "3")
    assert status == 0

    path = f"{desk.folder}/run/slurm/train.sbatch"
    assert desk.calls("sbatch")[1:] == [
        f"--parsable {path}",
        f"--parsable --dependency=afterany:7 {path}",
        f"--parsable --dependency=afterany:17 {path}",
    ]
    assert "Submitted batch job 7\nSubmitted batch job 17, after 7\nSubmitted batch job 117, after 17\n" in out
    assert "scancel 117 17 7" in out

    script = (desk.folder / "run/slurm/train.sbatch").read_text()
    assert "#SBATCH --no-requeue\n" in script


def test_a_chain_that_breaks_tells_of_its_jobs(desk, submit):
    desk.slurm(sbatch=f"case $2 in --dep*) {FAILS} ;; esac; echo 42")
    status, out, err = submit("--chain", "3")
    assert (status, out) == (1, "")
    assert "Invalid qos specification; submitted before: job 42" in err
    # It needs them.
    assert (desk.folder / "run/slurm/config.yaml").exists()
    assert (desk.folder / "run/slurm/train.sbatch").exists()


def test_a_run_goes_on_from_its_checkpoint(desk, submit, trained):
    desk.slurm()
    shutil.copytree(trained, desk.folder / "run")
    assert json.loads((desk.folder / "run/FINISHED").read_text()) == {"step": 2}

    status, out, _ = submit("training.steps=5", "checkpoint.interval=1")
    assert status == 0
    assert "  begins        at step 2, the newest checkpoint, of 5\n" in out


def test_a_node_without_gpus_takes_none_from_its_partition(desk, submit):
    desk.slurm(sinfo="all*|infinite|32|(null)\nall*|infinite|96|gpu:8\nall*|infinite|64|gpu:4\n")
    script = submit(DRY, gpus=2)[1]
    assert "#SBATCH --gpus-per-node=2\n" in script
    assert "#SBATCH --cpus-per-task=16\n" in script


def test_of_the_environment_only_where_to_run_is_taken_over(desk, submit, monkeypatch):
    """SBATCH_... would win over the script, unseen."""
    for name, value in (("PARTITION", "cpu"), ("ACCOUNT", "mine"), ("TIMELIMIT", "1")):
        monkeypatch.setenv(f"SBATCH_{name}", value)

    desk.slurm(sbatch='echo "limit: ${SBATCH_TIMELIMIT:-none} ${SBATCH_PARTITION:-none}" > seen; echo 42')
    assert submit()[0] == 0
    assert (desk.folder / "seen").read_text() == "limit: none none\n"

    script = (desk.folder / "run/slurm/train.sbatch").read_text()
    assert "#SBATCH --partition=cpu\n#SBATCH --account=mine\n" in script


def test_every_partition_of_a_list_counts(desk, submit):
    desk.slurm()
    assert submit(DRY, "--", "--partition=cpu,gpu", time="9-0")[0] == 2
