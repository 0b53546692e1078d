"""Which process of how many this is, from the environment that launch/local.sh, torchrun or srun set."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_mea.errors import UserError

_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_OF_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    local_rank: int
    master_address: str
    master_port: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Ranks:
        """One rank of many where the five variables are set, or in a step of srun; alone elsewhere.

        A task of srun is a rank. Its master is the first node of the step and its port follows from the job, so that
        two jobs on one node do not meet; MASTER_ADDR and MASTER_PORT win where they are set.

        Raises:
            UserError: some are set and some are not, or one is not a number.
        """
        given = {key: environment[key] for key in _KEYS if environment.get(key)}
        if "RANK" not in given and "WORLD_SIZE" not in given:
            if not environment.get("SLURM_STEP_ID") or environment.get("SLURM_STEP_NUM_TASKS") == "1":
                return cls(0, 1, 0, "127.0.0.1", _free_port())
            given = _of_step(environment) | {key: given[key] for key in ("MASTER_ADDR", "MASTER_PORT") if key in given}
        missing = [key for key in _KEYS if key not in given]
        if missing:
            raise UserError("environment", f"{', '.join(given)} without {', '.join(missing)}", "all of these or none")
        try:
            rank, world, local, port = (int(given[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
        except ValueError:
            raise UserError("environment", given, "whole numbers in all but MASTER_ADDR") from None
        tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
        if environment.get("SLURM_STEP_ID") and tasks.isdecimal() and world < int(tasks):
            found = f"WORLD_SIZE={world} in a step of srun with {tasks} tasks"
            raise UserError("environment", found, "a rank a task", "unset RANK WORLD_SIZE LOCAL_RANK")
        if not 0 <= rank < world:
            raise UserError("environment", f"RANK={rank} with WORLD_SIZE={world}", "0 <= RANK < WORLD_SIZE")
        if not 0 < port < 65536 or local < 0:
            raise UserError(
                "environment", f"MASTER_PORT={port}, LOCAL_RANK={local}", "a port from 1 to 65535, a rank >= 0"
            )
        return cls(rank, world, local, given["MASTER_ADDR"], port)

    def export(self) -> None:
        """Writes the five variables, where torch and DeepSpeed look for them."""
        values = (self.rank, self.world_size, self.local_rank, self.master_address, self.master_port)
        os.environ.update(zip(_KEYS, map(str, values), strict=True))


def _of_step(environment: Mapping[str, str]) -> dict[str, str]:
    """The five variables of a task of srun."""
    found = {key: environment[theirs] for key, theirs in _OF_SLURM.items() if environment.get(theirs)}
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    if first := first_host(nodes):
        found["MASTER_ADDR"] = first
    if (job := environment.get("SLURM_JOB_ID", "")).isdecimal():
        found["MASTER_PORT"] = str(20000 + int(job) % 12000)
    return found


def first_host(nodes: str) -> str:
    """The first name of a list as SLURM writes it: `gpu[03-05,9],login1` begins with gpu03.

    A container mostly has no scontrol to ask.
    """
    host = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", host[0]) if host else ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
