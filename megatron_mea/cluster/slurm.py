"""What SLURM says and does: its commands, as far as a submission needs them (tested with 22.05)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mea.errors import RunError, UserError

_PROGRAMS = ("sbatch", "scontrol", "squeue", "sinfo")


@dataclass(frozen=True)
class Partition:
    """A part of the cluster: its nodes with GPUs, or all where none has any.

    `cpus` and `gpus` are those of the smallest of these nodes, `limit` is in seconds (None: unlimited).
    """

    name: str
    is_default: bool
    limit: int | None
    nodes: int
    cpus: int
    gpus: int


@dataclass(frozen=True)
class Job:
    id: str
    state: str


def problem() -> str:
    """Why there is no scheduler to ask; empty where there is one."""
    if missing := [program for program in _PROGRAMS if not shutil.which(program)]:
        return f"no {', '.join(missing)}"
    try:
        found = _run("scontrol", "ping")
    except RunError as error:
        return str(error)
    return "" if " UP" in found else f"scontrol ping: {found.strip()}"


def partitions() -> dict[str, Partition]:
    """By name; each appears once, whatever nodes it has."""
    found: dict[str, Partition] = {}
    for line in _run("sinfo", "--noheader", "--Node", "--format=%P|%l|%c|%G").splitlines():
        name, limit, cpus, gres = line.strip().split("|")
        gpus = sum(int(count) for count in re.findall(r"\bgpu:(?:[^,(]*:)?(\d+)", gres))
        key = name.rstrip("*")
        before = found.get(key)
        if before and before.gpus and not gpus:
            continue
        if before and gpus and not before.gpus:
            before = None
        found[key] = Partition(
            key,
            name.endswith("*"),
            None if limit == "infinite" else seconds(limit),
            1 + (before.nodes if before else 0),
            min(int(cpus.rstrip("+")), before.cpus) if before else int(cpus.rstrip("+")),
            min(gpus, before.gpus) if before else gpus,
        )
    return found


def waiting_or_running() -> list[Job]:
    """The jobs of this user, each element of an array by itself (`7_1`)."""
    lines = _run("squeue", "--noheader", "--array", "--me", "--format=%i|%T").splitlines()
    return [Job(*line.strip().split("|")) for line in lines]


def check_script(script: str) -> str:
    """What sbatch would do with a script: when and where it would start it.

    Raises:
        UserError: sbatch refuses it.
    """
    command = ["sbatch", "--test-only"]
    done = subprocess.run(command, input=script, capture_output=True, text=True, check=False, env=_environment())
    if done.returncode:
        raise UserError("sbatch", _without_name(done.stderr), "what `sbatch --test-only` accepts")
    return _without_name(done.stderr)


def submit(path: str, after: str | None = None) -> str:
    """Submits a script and returns the number of the job.

    Args:
        after: a job that must have ended, however it did.

    Raises:
        RunError: sbatch refuses.
    """
    dependency = [f"--dependency=afterany:{after}"] if after else []
    return _run("sbatch", "--parsable", *dependency, path).strip().split(";")[0]


def seconds(time: str) -> int | None:
    """SLURM's M, M:S, H:M:S, D-H, D-H:M or D-H:M:S in seconds; None where it is none of them."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not match:
        return None
    days, first, second, third = (int(part) if part else None for part in match.groups())
    if days is not None or third is not None:
        hours, minutes, rest = first, second or 0, third or 0
    else:
        hours, minutes, rest = 0, first, second or 0
    return (((days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    if done.returncode:
        raise RunError(f"{' '.join(command)}: {_without_name(done.stderr) or f'status {done.returncode}'}")
    return done.stdout


def _environment() -> dict[str, str]:
    """Without SBATCH_TIMELIMIT and its like, which win over what a script says."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SBATCH_")}


def _without_name(output: str) -> str:
    """The first lines of an error, without `sbatch: error:`."""
    return "; ".join(re.sub(r"^\w+: (error: )?", "", line) for line in output.strip().splitlines())


def option(options: Sequence[str], *names: str) -> str | None:
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
