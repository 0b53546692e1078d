"""A port that rank 0 cannot listen on is named, by torch's own error; what ranks wait for has no end of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta

import pytest
import torch.distributed as dist
from support.runs import environment

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


LATE = """
import sys, time
import torch
import torch.distributed as dist
from megatron_mea.training import distributed
from megatron_mea.training.rank_env import RankEnv

distributed.START_MINUTES = 5 / 60
rank = int(sys.argv[1])
distributed.start_distributed(
    RankEnv(rank=rank, world_size=2, local_rank=rank, master_address="127.0.0.1", master_port=int(sys.argv[2]))
)
distributed.leave_timeouts_to_watchdog()
dist.barrier()
if rank == 0:
    dist.recv(torch.ones(1), 1)
else:
    time.sleep(6)
    dist.send(torch.ones(1), 0)
dist.barrier()
"""


@pytest.mark.slow
def test_a_stage_waits_for_its_neighbour_for_as_long_as_the_watchdog_lets_it():
    """gloo's sends and receives, unlike its collectives, keep the timeout that their group was made with."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = str(server.getsockname()[1])

    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LATE, str(rank), port],
            env=environment() | {"CUDA_VISIBLE_DEVICES": ""},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=100)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
