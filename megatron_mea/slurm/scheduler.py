"""The SLURM commands that a submission needs: sbatch, scontrol, squeue and sinfo (tested with 22.05)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mea.errors import RunError, UserError

RESERVED_OPTIONS = {
    **{"--nodes": "--nodes", "-N": "--nodes", "--time": "--time", "-t": "--time", "--requeue": "--chain"},
    **dict.fromkeys(("--ntasks", "-n", "--ntasks-per-node", "--gpus", "-G", "--gpus-per-node"), "--gpus-per-node"),
    **dict.fromkeys(("--gpus-per-task", "--gres", "--ntasks-per-gpu"), "--gpus-per-node"),
    **{"--output": "nothing: the log lies in the run folder", "-o": "nothing: the log lies in the run folder"},
    **{"--open-mode": "nothing", "--no-requeue": "--chain", "--array": "the verb sweep", "-a": "the verb sweep"},
    **{"--chdir": "nothing: cd there and submit", "-D": "nothing: cd there and submit"},
    **{"--no-kill": "nothing: training needs all its nodes", "-k": "nothing: training needs all its nodes"},
}
"""Options of sbatch that this package sets, and what to use instead."""

_COMMANDS = ("sbatch", "scontrol", "squeue", "sinfo")


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A part of the cluster: its nodes with GPUs, or all where none has any.

    `cpus` and `gpus` are those of the smallest of these nodes, `time_limit` is in seconds (None: unlimited).
    """

    name: str
    is_default: bool
    time_limit: int | None
    nodes: int
    cpus: int
    gpus: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job, or an element of an array (`7_1`), and its state, such as PENDING."""

    id: str
    state: str


def unavailable_reason() -> str:
    """Why there is no scheduler to ask; empty where there is one."""
    if missing := [command for command in _COMMANDS if not shutil.which(command)]:
        return f"no {', '.join(missing)}"

    try:
        answer = _run("scontrol", "ping")
    except RunError as error:
        return str(error)

    return "" if " UP" in answer else f"scontrol ping: {answer.strip()}"


def partitions() -> dict[str, Partition]:
    """The cluster's partitions by name."""
    partitions: dict[str, Partition] = {}
    # A line a node and partition; the default partition's name ends with a star.
    for line in _run("sinfo", "--noheader", "--Node", "--format=%P|%l|%c|%G").splitlines():
        starred_name, time_limit, cpus, gres = line.strip().split("|")
        name = starred_name.rstrip("*")
        num_cpus = int(cpus.rstrip("+"))
        num_gpus = sum(int(count) for count in re.findall(r"\bgpu:(?:[^,(]*:)?(\d+)", gres))

        # Once a node has GPUs, those without do not count.
        earlier = partitions.get(name)
        if earlier and earlier.gpus and not num_gpus:
            continue
        if earlier and num_gpus and not earlier.gpus:
            earlier = None

        partitions[name] = Partition(
            name=name,
            is_default=starred_name.endswith("*"),
            time_limit=None if time_limit == "infinite" else parse_time(time_limit),
            nodes=1 + (earlier.nodes if earlier else 0),
            cpus=min(num_cpus, earlier.cpus) if earlier else num_cpus,
            gpus=min(num_gpus, earlier.gpus) if earlier else num_gpus,
        )

    return partitions


def pending_or_running_jobs() -> list[Job]:
    """The jobs of this user, each element of an array by itself (`7_1`)."""
    jobs = []
    for line in _run("squeue", "--noheader", "--array", "--me", "--format=%i|%T").splitlines():
        job_id, state = line.strip().split("|")
        jobs.append(Job(id=job_id, state=state))

    return jobs


def check_script(script: str) -> str:
    """Asks sbatch, without submitting, when and where it would start a script; returns its answer.

    Raises:
        UserError: sbatch refuses it.
    """
    completed = subprocess.run(
        ["sbatch", "--test-only"], input=script, capture_output=True, text=True, check=False, env=_environment()
    )
    answer = _strip_program_name(completed.stderr)
    if completed.returncode:
        raise UserError(where="sbatch", got=answer, expected="what `sbatch --test-only` accepts")

    return answer


def submit(path: str, after: str | None = None) -> str:
    """Submits a script and returns the number of the job.

    Args:
        after: a job that must have ended, however it did.

    Raises:
        RunError: sbatch refuses.
    """
    dependency = [f"--dependency=afterany:{after}"] if after else []
    return _run("sbatch", "--parsable", *dependency, path).strip().split(";")[0]


def parse_time(time: str) -> int | None:
    """Seconds of SLURM's M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None where it is none of them."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not match:
        return None

    days, first, second, third = (int(part) if part else None for part in match.groups())
    if days is not None or third is not None:
        hours, minutes, seconds = first, second or 0, third or 0
    else:
        hours, minutes, seconds = 0, first, second or 0

    return (((days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _run(*command: str) -> str:
    """Output of a command.

    Raises:
        RunError: it ends with another status than 0.
    """
    completed = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    if completed.returncode:
        reason = _strip_program_name(completed.stderr) or f"status {completed.returncode}"
        raise RunError(f"{' '.join(command)}: {reason}")

    return completed.stdout


def _environment() -> dict[str, str]:
    """This process's environment without SBATCH_TIMELIMIT and its like, which win over the lines of a script."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SBATCH_")}


def _strip_program_name(output: str) -> str:
    """The lines of a message in one, without `sbatch: error:` in front."""
    return "; ".join(re.sub(r"^\w+: (error: )?", "", line) for line in output.strip().splitlines())


def option_value(options: Sequence[str], *names: str) -> str | None:
    """The value of an option of sbatch, the last one given: `--name value`, `--name=value`, `-n value` or `-nvalue`."""
    value = None
    for index, word in enumerate(options):
        for name in names:
            if word == name:
                value = options[index + 1] if index + 1 < len(options) else ""
            elif name.startswith("--") and word.startswith(f"{name}="):
                value = word.partition("=")[2]
            elif not name.startswith("--") and word.startswith(name) and not word.startswith("--"):
                value = word[len(name) :]

    return value
