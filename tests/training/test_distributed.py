"""A port that rank 0 cannot listen on is named, by torch's own error."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_mea.errors import MachineError, UserError
from megatron_mea.training.distributed import port_errors
from megatron_mea.training.rank_env import RankEnv


@contextmanager
def start_store(port: int) -> Iterator[dist.TCPStore]:
    """Rank 0's store, as the ranks of a run meet in it."""
    rank_env = RankEnv(rank=0, world_size=2, local_rank=0, master_address="127.0.0.1", master_port=port)
    with port_errors(rank_env):
        yield dist.TCPStore("127.0.0.1", port, 2, is_master=True, timeout=timedelta(seconds=5), wait_for_workers=False)


def test_a_port_in_use_is_named(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError) as raised, start_store(port):
            pass

        (problem,) = raised.value.problems
        assert problem.where == "MASTER_PORT"
        assert problem.got == f"{port} on {socket.gethostname()}: already in use"
        assert "unset MASTER_PORT" in problem.hint

        # A job that is tried again may find it free.
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        with pytest.raises(MachineError, match=f"error: MASTER_PORT\n  got:      {port} on "), start_store(port):
            pass


def test_other_errors_of_the_network_stay(monkeypatch):
    rank_env = RankEnv(rank=0, world_size=2, local_rank=0, master_address="127.0.0.1", master_port=1)
    with pytest.raises(dist.DistNetworkError, match="connection lost"), port_errors(rank_env):
        raise dist.DistNetworkError("connection lost")
