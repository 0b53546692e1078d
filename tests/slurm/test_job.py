"""The script of a job from its start to its end, with small scripts in place of srun, scontrol and squeue."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

START = "2026-01-01T00:00:01"
WAIT_FOR_USR2 = "trap 'exit 0' USR2; while :; do sleep 0.05; done"
SITE = "PYTHON=python-of-site\nCONTAINER=(--container-image='an image')\nMAX_FRUITLESS=2\nMAX_FAILURES=3\n"


class Job:
    """A job script of `submit`, and the commands of SLURM that answer it.

    Attributes:
        run: the run folder.
        path: the script.
        ended: the file with the status for which no attempt begins again.
        state_command: bash that answers for the job's state.
        other_jobs: output of squeue for the running jobs.
        requeue_command: bash that `scontrol requeue` runs.
    """

    def __init__(self, *, desk, submit, name: str, chain: int = 1) -> None:
        self.desk, self.run = desk, desk.folder / name
        desk.write_site(SITE + "setup() { export FROM_SETUP=1; }\n")
        status, script, err = submit(f"run.dir={name}", "--chain", str(chain), "--dry-run")
        assert status == 0, err

        self.path = self.run / "slurm/train.sbatch"
        self.path.parent.mkdir(parents=True)
        self.path.write_text(script)
        (line,) = [line for line in script.splitlines() if line.startswith("SUBMISSION=")]
        self.ended = self.run / f"slurm/ended-{line.removeprefix('SUBMISSION=')}"
        self.log = desk.folder / "log"
        self.state_command, self.other_jobs = "echo RUNNING", ""
        # SLURM ends the shell of a job that it requeues, here the leader of a session.
        self.requeue_command = "(sleep 0.2; kill -TERM $(cut -d ' ' -f 6 /proc/self/stat)) & exit 0"

    def set_srun(self, training: str, preflight: str = "exit 0") -> None:
        """Sets the bash that srun runs for a training, and for the preflight before it."""
        run = shlex.quote(str(self.run))
        self.desk.add_program("srun", f"run={run}\ncase $* in *.preflight*) {preflight} ;; esac\n{training}")

    def save_command(self, step: int) -> str:
        """Bash that leaves a checkpoint."""
        return f'mkdir -p "$run/checkpoints/step_{step:08}"'

    def start(self) -> subprocess.Popen:
        """Starts the script as SLURM would."""
        self.desk.add_program(
            "scontrol",
            f"case $1 in\nrequeue) {self.requeue_command} ;;\nshow) printf 'node1\\nnode2\\n' ;;\nesac",
        )
        this_job = (
            f"*--jobs=7*%T) {self.state_command} ;;\n*--jobs=7*%o) echo {START} {shlex.quote(str(self.path))} ;;\n"
        )
        self.desk.add_program("squeue", f"case $* in\n{this_job}*) printf '{self.other_jobs}' ;;\nesac")

        allocation = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS_PER_NODE": "1"}
        allocation |= {"RETRY_SECONDS": "0", "RANK": "0", "WORLD_SIZE": "1"}
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "MASTER"))}
        environment |= allocation | {"PATH": f"{self.desk.bin}:/usr/bin:/bin"}
        with self.log.open("w") as log:
            return subprocess.Popen(
                ["bash", self.path], env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def attempt(self, signal_number: int | None = None) -> tuple[int, str]:
        """Runs the job, with a signal as soon as it trains; returns its status and its log."""
        calls, process = len(self.desk.calls("srun")), self.start()
        try:
            if signal_number is not None:
                self.wait_until(lambda: len(self.desk.calls("srun")) == calls + 2)
                time.sleep(0.2)
                process.send_signal(signal_number)
            return process.wait(timeout=10), self.log.read_text()
        finally:
            self.kill(process)

    def kill(self, process: subprocess.Popen) -> None:
        """Ends the processes that the script has left, as SLURM does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

        process.wait()

    def wait_until(self, condition) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def requeued(self) -> bool:
        return "requeue 7" in self.desk.calls("scontrol")


@pytest.fixture(params=["run", "my first run"])
def job(request, desk, submit) -> Job:
    return Job(desk=desk, submit=submit, name=request.param)


@pytest.fixture
def simple_job(desk, submit) -> Job:
    return Job(desk=desk, submit=submit, name="run")


def test_a_job_that_finishes(job):
    environment = "MASTER_ADDR MASTER_PORT OMP_NUM_THREADS MEA_FAILURE_FILE SRUN_CPUS_PER_TASK FROM_SETUP RANK"
    job.set_srun(
        f"for name in {environment}; do printf '%s=%s\\n' $name \"${{!name:-}}\"; done\n"
        f'{job.save_command(4)}; echo \'{{"step": 4}}\' > "$run/FINISHED"'
    )
    status, log = job.attempt()
    assert status == 0, log
    assert "job 7 on node[1-2], attempt 1, step 0 of 4" in log
    assert log.endswith("finished at step 4\n")
    assert not job.requeued()

    srun_options = "--container-image=an image --label --kill-on-bad-exit=1 --wait=60 python-of-site -m"
    assert job.desk.calls("srun") == [
        f"{srun_options} megatron_mea.slurm.preflight {job.run}",
        f"{srun_options} megatron_mea train {job.run}/slurm/config.yaml",
    ]
    assert f"MASTER_ADDR=node1\nMASTER_PORT=20007\nOMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')}" in log
    assert f"MEA_FAILURE_FILE={job.run}/slurm/failed-7-0\nSRUN_CPUS_PER_TASK=1\nFROM_SETUP=1\nRANK=\n" in log

    # It is started again, by whoever.
    status, log = job.attempt()
    assert (status, len(job.desk.calls("srun"))) == (0, 2)
    assert log.endswith("finished already\n")


def test_a_run_that_is_to_go_further_is_not_finished(simple_job):
    (simple_job.run / "FINISHED").write_text('{"step": 3}')
    simple_job.set_srun("echo trained; exit 0")
    assert "trained" in simple_job.attempt()[1]


@pytest.mark.parametrize(("note", "status"), [("2\nUserError: error: run.dir", 2), ("1\nValueError: a bug", 1)])
@pytest.mark.parametrize("program", ["preflight", "training"])
def test_a_rank_that_fails_by_itself_ends_it_for_good(program, note, status, job):
    fails = f"printf '%s\\n' {shlex.quote(note)} > \"$MEA_FAILURE_FILE\"; exit 143"
    job.set_srun(**{"training": "exit 1", program: fails})
    actual, log = job.attempt()
    assert actual == status
    assert f"a rank failed by itself, which another attempt would not mend: {note[2:]}\n" in log
    assert not job.requeued()

    calls = len(job.desk.calls("srun"))
    actual, log = job.attempt()
    assert (actual, len(job.desk.calls("srun"))) == (status, calls)
    assert log.endswith(f"another attempt would not mend: {note[2:]}\n")
    assert "ended already: a rank failed by itself" in log


@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP])
def test_a_job_that_is_told_saves_and_is_requeued(number, job):
    job.set_srun(f"trap '{job.save_command(3)}; exit 0' USR2; while :; do sleep 0.05; done")
    status, log = job.attempt(number)
    assert status == 0, log
    assert f"got {number.name.removeprefix('SIG')}\n" in log
    assert f"srun ended with status 0 at step 3 after {number.name.removeprefix('SIG')}\n" in log
    assert log.endswith("into the queue again\n")
    assert job.requeued()
    assert not job.ended.exists()


def test_usr1_ends_it_for_good(job):
    job.set_srun(f"trap '{job.save_command(3)}; exit 0' USR2; while :; do sleep 0.05; done")
    status, log = job.attempt(signal.SIGUSR1)
    assert status == 0
    assert log.endswith("stopped as asked at step 3; submit again to go on\n")
    assert not job.requeued()
    assert job.ended.read_text().startswith("0\n")

    status, log = job.attempt()
    assert (status, len(job.desk.calls("srun"))) == (0, 2)
    assert log.endswith("ended already: stopped as asked at step 3; submit again to go on\n")


def test_a_signal_during_the_preflight_starts_no_training(simple_job):
    simple_job.set_srun("exit 9", preflight=WAIT_FOR_USR2)
    process = simple_job.start()
    simple_job.wait_until(lambda: simple_job.desk.calls("srun"))
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(30) == 0

    simple_job.kill(process)
    assert len(simple_job.desk.calls("srun")) == 1
    assert simple_job.requeued()


def test_two_attempts_without_a_new_checkpoint_are_enough(job):
    job.set_srun("exit 137")
    status, log = job.attempt()
    assert (status, "into the queue again" in log) == (0, True)

    status, log = job.attempt()
    assert status == 1
    assert log.endswith("2 attempts in a row began at step 0 and saved nothing newer: not tried again\n")
    assert job.attempt()[1].endswith(f"ended already: {log.splitlines()[-1].partition('] ')[2]}\n")


def test_an_attempt_with_a_new_checkpoint_counts_anew(simple_job):
    simple_job.set_srun(f"{simple_job.save_command(5)}; exit 0")
    assert [simple_job.attempt()[0] for _ in range(2)] == [0, 0]

    status, log = simple_job.attempt()
    assert status == 1
    assert log.endswith("2 attempts in a row began at step 5 and saved nothing newer: not tried again\n")


def test_a_job_that_fails_again_and_again(job):
    for step in (1, 2, 3):
        job.set_srun(f"{job.save_command(step)}; exit 137")
        status, log = job.attempt()

    assert status == 137
    assert log.endswith("failed 3 times: not tried again\n")
    assert job.ended.read_text() == "137\nfailed 3 times: not tried again\n"


def test_a_preflight_that_fails_is_tried_on_other_nodes(simple_job):
    simple_job.set_srun("exit 9", preflight="exit 1")
    status, log = simple_job.attempt()
    assert (status, simple_job.requeued(), len(simple_job.desk.calls("srun"))) == (0, True, 1)
    assert "srun ended with status 1 at step 0\n" in log


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING"])
def test_a_job_that_was_ended_is_not_requeued(state, simple_job):
    simple_job.state_command = f"echo {state}"
    simple_job.set_srun("exit 143")
    status, log = simple_job.attempt()
    assert status == 143
    assert log.endswith("ended from outside: only SLURM may requeue it\n")
    assert not simple_job.requeued()
    assert not simple_job.ended.exists()


@pytest.mark.parametrize("answer", ["echo slurm_load_jobs error >&2; exit 1", "true"])
def test_a_scheduler_that_does_not_answer_ends_no_run(answer, simple_job):
    simple_job.state_command = answer
    simple_job.set_srun("exit 143")
    status, log = simple_job.attempt()
    assert (status, simple_job.requeued()) == (0, True), log


def test_a_requeue_is_tried_again(simple_job):
    simple_job.requeue_command = (
        f"[ -e {simple_job.run}/second ] || {{ touch {simple_job.run}/second; exit 1; }}; {simple_job.requeue_command}"
    )
    simple_job.set_srun("exit 143")
    status, log = simple_job.attempt()
    assert status == 0, log
    assert simple_job.desk.calls("scontrol").count("requeue 7") == 2


def test_an_attempt_that_comes_back_from_the_dead_leaves_the_run_alone(simple_job):
    """Its node was taken for lost, and the job goes on elsewhere."""
    other_attempt = f'echo "0 7-1 now" >> "$run/slurm/{simple_job.ended.name.replace("ended", "attempts")}"'
    simple_job.set_srun(f'{other_attempt}; echo "1 MachineError: taken over" > "$MEA_FAILURE_FILE"; exit 1')
    status, log = simple_job.attempt()
    assert status == 1
    assert log.endswith("another attempt has taken over\n")
    assert not simple_job.requeued()
    assert not simple_job.ended.exists()


def test_a_second_signal_is_not_passed_on_and_a_stop_stays_one(simple_job):
    simple_job.set_srun(
        f"trap 'echo told; sleep 0.5; {simple_job.save_command(3)}; exit 0' USR2; while :; do sleep 0.05; done"
    )
    process = simple_job.start()
    simple_job.wait_until(lambda: len(simple_job.desk.calls("srun")) == 2)
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        time.sleep(0.2)
        process.send_signal(number)

    assert process.wait(30) == 0

    log = simple_job.log.read_text()
    assert log.count("told") == 1
    assert log.endswith("stopped as asked at step 3; submit again to go on\n")
    assert not simple_job.requeued()


def test_attempts_that_are_stopped_before_their_first_step_do_no_wrong(simple_job):
    simple_job.set_srun("exit 9", preflight=WAIT_FOR_USR2)
    for _ in range(3):
        process = simple_job.start()
        calls = len(simple_job.desk.calls("srun"))
        simple_job.wait_until(lambda calls=calls: len(simple_job.desk.calls("srun")) > calls)
        time.sleep(0.2)
        process.send_signal(signal.SIGUSR2)
        assert process.wait(30) == 0
        simple_job.kill(process)

    assert simple_job.desk.calls("scontrol").count("requeue 7") == 3


def test_a_setup_that_fails(simple_job):
    script = simple_job.path.read_text().replace("export FROM_SETUP=1;", "echo $UNSET; false;")
    simple_job.path.write_text(script)
    simple_job.set_srun("exit 9")
    status, log = simple_job.attempt()
    assert status == 2
    assert log.endswith("setup() of site.env failed\n")
    assert simple_job.desk.calls("srun") == []


def test_a_cluster_that_refuses_to_requeue(simple_job):
    simple_job.requeue_command = "echo 'Requested operation is disabled' >&2; exit 1"
    simple_job.set_srun("exit 143")
    status, log = simple_job.attempt()
    assert status == 1
    assert log.endswith("Requested operation is disabled\n" + log.splitlines()[-1] + "\n")
    assert "this cluster refuses to requeue: submit again, or a chain" in log.splitlines()[-1]
    assert simple_job.desk.calls("scontrol").count("requeue 7") == 1


def test_a_job_of_a_chain_leaves_it_to_the_next(desk, submit):
    job = Job(desk=desk, submit=submit, name="run", chain=2)
    job.set_srun(f"{job.save_command(3)}; exit 137")
    status, log = job.attempt()
    assert status == 137
    assert log.endswith("the next job of the chain goes on\n")
    assert not job.requeued()


@pytest.mark.parametrize(
    ("other", "leaves"),
    [
        ("9 2026-01-01T00:00:00 {path}", True),
        ("6 2026-01-01T00:00:01 {path}", True),
        ("9 2026-01-01T00:00:01 {path}", False),
        ("6 2026-01-01T00:00:02 {path}", False),
        ("7 2026-01-01T00:00:00 {path}", False),
        ("9 2026-01-01T00:00:00 {parent}/my other/slurm/train.sbatch", False),
        ("", False),
    ],
    ids=["started before", "as old and first", "as old and second", "started later", "itself", "similar", "none"],
)
def test_another_job_that_runs_with_this_script(other, leaves, job):
    job.other_jobs = (
        f"8 2026-01-01T00:00:00 /somewhere/else.sh\\n{other.format(path=job.path, parent=job.desk.folder)}\\n"
    )
    job.set_srun("exit 143")
    status, log = job.attempt()
    if leaves:
        assert status == 2, log
        assert log.endswith(f"job {other[0]} trains {job.run} already: this one leaves it alone\n")
        assert job.desk.calls("srun") == []
        # A requeued attempt must not find itself ended by that.
        assert not job.ended.exists()
    else:
        assert job.desk.calls("srun") != []


def test_the_python_of_submit_is_the_default(desk, submit):
    status, script, _ = submit("--dry-run")
    assert status == 0

    assignment = next(line for line in script.splitlines() if line.startswith("PYTHON=${"))
    command = f'CONTAINER=() PYTHON=; {assignment}; echo "$PYTHON"'
    completed = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert Path(completed.stdout.strip()) == Path(sys.executable)
