"""Rank, world size and master address of this process, from the environment that a launcher set."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_mea.errors import UserError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM_VARIABLES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}


@dataclass(frozen=True, kw_only=True)
class RankEnv:
    """Rank, world size and master address of this process, as launch/local.sh, torchrun or srun set them."""

    rank: int
    world_size: int
    local_rank: int
    master_address: str
    master_port: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> RankEnv:
        """Reads the five variables of torchrun, or those of a step of srun; without either, a single rank.

        A task of srun is a rank. Its master is the first node of the step and its port follows from the job, so that
        two jobs on one node do not meet; MASTER_ADDR and MASTER_PORT win where they are set.

        Raises:
            UserError: some are set and some are not, or one is not a number.
        """
        variables = {key: environment[key] for key in _VARIABLES if environment.get(key)}
        if "RANK" not in variables and "WORLD_SIZE" not in variables:
            if not environment.get("SLURM_STEP_ID") or environment.get("SLURM_STEP_NUM_TASKS") == "1":
                return cls(rank=0, world_size=1, local_rank=0, master_address="127.0.0.1", master_port=_free_port())

            master = {key: variables[key] for key in ("MASTER_ADDR", "MASTER_PORT") if key in variables}
            variables = _slurm_step_variables(environment) | master

        missing = [key for key in _VARIABLES if key not in variables]
        if missing:
            raise UserError(
                where="environment",
                got=f"{', '.join(variables)} without {', '.join(missing)}",
                expected="all of these or none",
            )

        try:
            rank, world_size, local_rank, port = (
                int(variables[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
            )
        except ValueError:
            expected = "whole numbers in all but MASTER_ADDR"
            raise UserError(where="environment", got=variables, expected=expected) from None

        tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
        if environment.get("SLURM_STEP_ID") and tasks.isdecimal() and world_size < int(tasks):
            got = f"WORLD_SIZE={world_size} in a step of srun with {tasks} tasks"
            raise UserError(
                where="environment", got=got, expected="a rank a task", hint="unset RANK WORLD_SIZE LOCAL_RANK"
            )

        if not 0 <= rank < world_size:
            raise UserError(
                where="environment", got=f"RANK={rank} with WORLD_SIZE={world_size}", expected="0 <= RANK < WORLD_SIZE"
            )

        if not 0 < port < 65536 or local_rank < 0:
            raise UserError(
                where="environment",
                got=f"MASTER_PORT={port}, LOCAL_RANK={local_rank}",
                expected="a port from 1 to 65535, a rank >= 0",
            )

        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            master_address=variables["MASTER_ADDR"],
            master_port=port,
        )

    def export(self) -> None:
        """Sets the five environment variables, which torch and DeepSpeed read."""
        values = (self.rank, self.world_size, self.local_rank, self.master_address, self.master_port)
        os.environ.update(zip(_VARIABLES, map(str, values), strict=True))


def _slurm_step_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The five variables for a task of srun; without those that SLURM's own do not give."""
    variables = {
        key: environment[slurm_key] for key, slurm_key in _SLURM_VARIABLES.items() if environment.get(slurm_key)
    }
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    if host := first_host(nodes):
        variables["MASTER_ADDR"] = host
    if (job := environment.get("SLURM_JOB_ID", "")).isdecimal():
        variables["MASTER_PORT"] = str(20000 + int(job) % 12000)

    return variables


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: gpu03 of `gpu[03-05,9],login1`; empty for an empty list.

    Parsed here because containers mostly have no scontrol.
    """
    host = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", host[0]) if host else ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
