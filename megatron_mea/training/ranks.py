"""Which process of how many this is, from the environment that launch/local.sh, srun or torchrun set."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_mea.errors import UserError

_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    local_rank: int
    master_address: str
    master_port: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Ranks:
        """One rank of many where the five variables are set; alone where none of them is.

        Raises:
            UserError: some are set and some are not, or one is not a number.
        """
        given = {key: environment[key] for key in _KEYS if environment.get(key)}
        if "RANK" not in given and "WORLD_SIZE" not in given:
            return cls(0, 1, 0, "127.0.0.1", _free_port())
        missing = [key for key in _KEYS if key not in given]
        if missing:
            raise UserError("environment", f"{', '.join(given)} without {', '.join(missing)}", "all of these or none")
        try:
            rank, world, local, port = (int(given[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
        except ValueError:
            raise UserError("environment", given, "whole numbers in all but MASTER_ADDR") from None
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
