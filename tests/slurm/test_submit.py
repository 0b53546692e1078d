"""`submit --dry-run` where there is no scheduler: the script, its options, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mea.checkpoint.lease import Lease
from megatron_mea.config.load import load_config
from megatron_mea.slurm import scheduler
from megatron_mea.slurm.resources import Resources, signal_lead

DRY = "--dry-run"


def sbatch_options(script: str) -> list[str]:
    """The options that sbatch reads: those before the first command, without their quotes."""
    lines = []
    for line in script.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith("#SBATCH "):
            lines += [" ".join(shlex.split(line.removeprefix("#SBATCH ")))]

    return lines


@pytest.mark.slow
def test_a_script_without_a_scheduler(desk, submit):
    before = desk.files()
    status, script, err = submit(DRY, "training.micro_batch_size=1", nodes=2, gpus=2)
    assert (status, err) == (0, "")
    assert desk.files() == before
    assert script.startswith("#!/bin/bash\n")
    assert "{{" not in script

    completed = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert (completed.returncode, completed.stderr) == (0, "")

    options = sbatch_options(script)
    assert len(options) == script.count("\n#SBATCH")
    assert options == [
        "--job-name=mea-run",
        "--nodes=2",
        "--ntasks-per-node=2",
        "--time=1:00:00",
        f"--output={desk.folder}/run/slurm/%j.log",
        "--open-mode=append",
        "--signal=B:USR2@40",
        "--gpus-per-node=2",
        "--requeue",
    ]
    assert f"\nRUN_DIR={desk.folder}/run\nCONFIG={desk.folder}/run/slurm/config.yaml\nSTEPS=4\n" in script
    assert "\nREQUEUE=yes\n" in script
    assert f"PYTHON=${{PYTHON:-{sys.executable}}}" in script


@pytest.mark.slow
def test_options_are_quoted_and_come_last(submit):
    options = ["--qos", "high", "--comment=two words", "-A", "team", "--exclude=node[1-3]", "--mail-type", "END,FAIL"]
    status, script, _ = submit(DRY, "--chain", "3", "--", *options)
    assert status == 0

    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    expected = ["--no-requeue", "--qos high", "'--comment=two words'", "-A team", "'--exclude=node[1-3]'"]
    assert lines[-6:] == [*expected, "--mail-type END,FAIL"]
    assert "\nREQUEUE=no\n" in script


@pytest.mark.slow
def test_groups_that_do_not_share_a_node_are_warned_of(submit, monkeypatch):
    changes = ["training.micro_batch_size=1", "parallel.context_parallel_size=2"]
    for gpus, words in ((2, False), (1, True)):
        status, script, _ = submit(DRY, *changes, nodes=4 // gpus, gpus=gpus)
        assert status == 0
        assert ("the 2 ranks that share a sequence" in script) == words
        assert ("do not share a node of 1: with " in script) == words

    # With enough tokens a rank the gather takes less than attention.
    monkeypatch.setattr("megatron_mea.slurm.submit._MIN_TOKENS_ACROSS_NODES", 1)
    status, script, _ = submit(DRY, *changes, nodes=4, gpus=1)
    assert status == 0
    assert "ranks that share a sequence" not in script


@pytest.mark.slow
def test_values_may_stand_behind_options(ask):
    resources = ["--nodes", "1", "optimizer.lr=0.5", "--gpus-per-node", "1", "run.dir=other", "--time", "60"]
    status, script, _ = ask("submit", "tiny.yaml", "run.dir=first", *resources, "training.steps=7", DRY)
    assert status == 0
    assert "/other\n" in script
    assert "\nSTEPS=7\n" in script


@pytest.mark.parametrize("more", [["--nod", "1"], ["--qos=high"], ["surplus"], ["--lr=3"]])
def test_what_is_no_option_is_refused(more, submit):
    status, out, err = submit(DRY, "--bogus", *more)
    assert (status, out) == (2, "")
    assert "error: --bogus\n  got:      an unknown option\n" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--nodes=2", "--nodes"),
        ("-N2", "--nodes"),
        ("-t", "--time"),
        ("--gres=gpu:8", "--gpus-per-node"),
        ("-n", "--gpus-per-node"),
        ("-G8", "--gpus-per-node"),
        ("--ntasks-per-node=1", "--gpus-per-node"),
        ("--requeue", "--chain"),
        ("--no-requeue", "--chain"),
        ("-o", "nothing: the log lies in the run folder"),
        ("--array=0-3", "the verb sweep"),
        ("-k", "nothing: training needs all its nodes"),
    ],
)
def test_options_that_submit_sets_are_refused(word, expected, submit):
    status, out, err = submit(DRY, "--", word)
    assert (status, out) == (2, "")
    assert f"error: -- {word}\n  got:      an option that `submit` sets\n  expected: {expected}\n" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ({"nodes": 0}, "--nodes"),
        ({"gpus": -1}, "--gpus-per-node"),
        ({"time": "soon"}, "--time"),
        ({"time": "0"}, "--time"),
        ({"time": "1:2:3:4"}, "--time"),
        ({"time": "-5"}, "--time"),
        ({"time": "0:30"}, "--time"),
    ],
)
def test_impossible_resources_are_refused(arguments, where, ask):
    values = {"nodes": 1, "gpus": 1, "time": "1:00:00"} | arguments
    resources = [f"--nodes={values['nodes']}", f"--gpus-per-node={values['gpus']}", f"--time={values['time']}"]
    status, out, err = ask("submit", "tiny.yaml", *resources, DRY)
    assert (status, out) == (2, "")
    assert err.startswith(f"megatron-mea: error: {where}\n")


def test_all_contradictions_are_told_at_once(submit):
    _, _, err = submit(DRY, "--chain", "0", "--", "--array=1", nodes=0, time="x")
    assert re.findall("error: (.*)", err) == ["--nodes", "--time", "--chain", "-- --array=1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5", 300),
        ("1:30", 90),
        ("2:00:00", 7200),
        ("1-0", 86400),
        ("1-2", 93600),
        ("1-2:3", 93780),
        ("1-2:3:4", 93784),
        *((text, None) for text in ("", "-1", "1-", "1:", "1h", "1.5", "1:2:3:4", "1-2-3", "infinite", "5 ")),
    ],
)
def test_seconds(text, expected):
    assert scheduler.parse_time(text) == expected


@given(st.integers(0, 30), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_seconds_of_every_spelling(days, hours, minutes, seconds):
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    assert scheduler.parse_time(f"{days}-{hours}:{minutes:02}:{seconds:02}") == total
    assert scheduler.parse_time(f"{days}-{hours:02}:{minutes:02}") == total - seconds
    assert scheduler.parse_time(f"{days}-{hours}") == total - seconds - 60 * minutes
    assert scheduler.parse_time(f"{24 * days + hours}:{minutes}:{seconds}") == total
    assert scheduler.parse_time(f"{total // 60}:{seconds:02}") == total
    assert scheduler.parse_time(f"{total // 60}") == total - seconds


def write_heartbeat(desk, **fields) -> None:
    """Writes heartbeat.json of the run, with more fields."""
    (desk.folder / "run").mkdir(exist_ok=True)
    (desk.folder / "run/heartbeat.json").write_text(json.dumps({"step": 1, "steps": 4, "time": "", **fields}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "lead"),
    [
        ({"save_seconds": 2.0, "tokens_per_second": 1000.0}, 40),
        ({"save_seconds": 100.0, "tokens_per_second": 1000.0}, 230),
        # 128 tokens a step, and a validation on two batches that costs two thirds of a step.
        ({"save_seconds": 100.0, "tokens_per_second": 2.0}, 434),
        ({"save_seconds": 100.0}, 230),
    ],
)
def test_a_run_says_how_early_it_must_be_told(fields, lead, desk, submit):
    write_heartbeat(desk, **fields)
    _, script, _ = submit(DRY)
    assert f"--signal=B:USR2@{lead}" in sbatch_options(script)


@pytest.mark.slow
@pytest.mark.parametrize("save", [{}, {"save_seconds": None}])
def test_a_run_that_has_not_saved_yet_is_estimated_by_its_size(save, desk, submit, monkeypatch):
    monkeypatch.setattr("megatron_mea.slurm.resources.checkpoint_bytes", lambda model: 40e9)
    leads = []
    for fields in (None, save):
        if fields is not None:
            write_heartbeat(desk=desk, tokens_per_second=1000.0, **fields)
        leads += [line for line in sbatch_options(submit(DRY, nodes=2)[1]) if line.startswith("--signal")]

    assert leads == ["--signal=B:USR2@230"] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signal", "message"),
    [
        ("--signal=B:USR1@90", "B:USR2@SECONDS"),
        ("--signal=USR2@90", "B:USR2@SECONDS"),
        ("--signal=B:USR2", "B:USR2@SECONDS"),
        ("--signal=B:USR2@39", "at least 40 s before the limit"),
        ("--signal=B:USR2@3600", "more than 3600 s"),
    ],
)
def test_a_signal_that_would_come_too_late_is_refused(signal, message, submit):
    status, out, err = submit(DRY, "--", signal)
    assert (status, out) == (2, "")
    assert message in err


@pytest.mark.slow
def test_an_earlier_signal_wins(submit):
    status, script, _ = submit(DRY, "--", "--signal", "B:USR2@600")
    assert status == 0

    signals = [option for option in sbatch_options(script) if option.startswith("--signal")]
    assert signals == ["--signal=B:USR2@40", "--signal B:USR2@600"]


@pytest.mark.slow
def test_a_run_that_somebody_trains_is_refused(desk, submit):
    write_heartbeat(desk)
    Lease(desk.folder / "run").take()
    status, out, err = submit(DRY)
    assert (status, out) == (2, "")
    assert f"got:      run, which process {os.getpid()} on " in err

    # Not heard of for long, on whatever host it is; ended; or a run that was copied.
    stale = os.stat(desk.folder / "run/heartbeat.json").st_mtime - 100
    os.utime(desk.folder / "run/heartbeat.json", (stale, stale))
    assert submit(DRY)[0] == 0

    write_heartbeat(desk)
    assert submit(DRY)[0] == 2

    lease = json.loads((desk.folder / "run/.lease").read_text())
    (desk.folder / "run/.lease").write_text(json.dumps(lease | {"ended": True}))
    assert submit(DRY)[0] == 0


@pytest.mark.slow
def test_a_finished_run_is_refused(trained, desk, submit):
    shutil.copytree(trained, desk.folder / "run")
    same_steps = ["training.steps=2", "checkpoint.interval=1"]
    status, out, err = submit(DRY, *same_steps)
    assert (status, out) == (2, "")
    assert "got:      run, finished at step 2\n" in err
    assert "hint:     raise training.steps" in err
    assert submit(DRY, "training.steps=3", "checkpoint.interval=1")[0] == 0


@pytest.mark.parametrize(
    ("more", "gpus", "where"),
    [
        (["data.train=[{path: nowhere}]"], 1, "nowhere.idx"),
        (["data.tokenizer=nowhere"], 1, "data.tokenizer"),
        ([], 3, "training.global_batch_size"),
        (["parallel.tensor_model_parallel_size=2"], 1, "parallel.tensor_model_parallel_size"),
    ],
)
def test_a_run_that_would_fail_is_refused(more, gpus, where, submit):
    status, out, err = submit(DRY, *more, gpus=gpus)
    assert (status, out) == (2, "")
    assert where in err


@pytest.mark.slow
def test_a_tensor_group_over_two_nodes_is_warned_of(submit):
    status, script, _ = submit(DRY, "parallel.tensor_model_parallel_size=2", nodes=2)
    assert status == 0
    assert "# warning: the 2 ranks of a tensor group" in script


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--chain", "2"]])
def test_without_a_scheduler_nothing_is_written(more, desk, submit):
    before = desk.files()
    status, out, err = submit(*more)
    assert (status, out) == (2, "")
    assert "got:      no sbatch, scontrol, squeue, sinfo\n" in err
    assert desk.files() == before


def test_options_are_found_in_all_spellings():
    def find(*words: str) -> str | None:
        return scheduler.option_value(words, "--partition", "-p")

    assert find("--qos=x") is None
    assert find("--partition=a") == find("--partition", "a") == find("-p", "a") == find("-pa") == "a"
    assert find("-p", "a", "--partition=b") == "b"
    assert find("--partition") == ""


EVIL = "p\necho INJECTED; exit 0 #"


@pytest.mark.slow
def test_no_value_brings_a_line_of_its_own(submit, monkeypatch, desk):
    """From options, the environment and run.dir: behind the end of a line stands a command."""
    for arguments, variables in (
        (["--", f"--comment={EVIL}"], {}),
        ([], {"SBATCH_PARTITION": EVIL}),
        ([], {"SBATCH_ACCOUNT": "a\x1b[2J"}),
        ([f"run.dir={json.dumps(EVIL)}"], {}),
    ):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)

            status, out, err = submit(DRY, *arguments)

        assert (status, out) == (2, ""), (arguments, variables)
        assert "control characters" in err or "run.dir" in err
        assert "\x1b" not in err
        assert "\necho INJECTED" not in err


@pytest.mark.parametrize(
    ("text", "got"),
    [("PARTITION='a\n#b'", "values of several lines"), ("cat <<E\nE\n", "a here-document"), (b"QOS=\xff", "not UTF-8")],
)
@pytest.mark.slow
def test_site_env_sets_values_in_lines(text, got, submit, desk):
    path = desk.folder / "launch/site.env"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    status, out, err = submit(DRY)
    assert (status, out) == (2, "")
    assert "launch/site.env" in err
    assert f"got:      {got}" in err


@pytest.mark.parametrize(
    "contents",
    [b"", b"[]", b"[" * 100_000, b"\xff", b'{"save_seconds": "long", "tokens_per_second": []}']
    + [
        f'{{"save_seconds": {n}, "tokens_per_second": {n}}}'.encode() for n in ("-1", "NaN", "1e400", "9" * 400, "true")
    ],
    ids=range(10),
)
def test_a_heartbeat_that_is_none_leaves_the_estimate(contents, desk):
    """Of the seconds before the limit at which a run is told to save."""
    resources = Resources(nodes=1, gpus_per_node=1, time="1:00:00")
    config = load_config("tiny.yaml")
    estimate = signal_lead(config, resources)
    Path("run").mkdir()
    Path("run/heartbeat.json").write_bytes(contents)
    assert signal_lead(config, resources) == estimate
