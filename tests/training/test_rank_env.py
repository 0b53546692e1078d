"""Rank and world size from launch/local.sh, torchrun, srun, or no launcher."""

from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mea.errors import UserError
from megatron_mea.training.rank_env import RankEnv, first_host

FIVE = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
BATCH = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "cpu7,gpu[03-05,9]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = BATCH | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-05,9]",
}
MASTER = {"MASTER_ADDR": "fast7", "MASTER_PORT": "29500"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (FIVE, RankEnv(rank=1, world_size=4, local_rank=1, master_address="10.0.0.1", master_port=1234)),
        (STEP, RankEnv(rank=5, world_size=8, local_rank=1, master_address="gpu03", master_port=20000 + 345)),
        (
            STEP | {"SLURM_JOB_ID": "45678"},
            RankEnv(rank=5, world_size=8, local_rank=1, master_address="gpu03", master_port=20000 + 9678),
        ),
        (STEP | MASTER, RankEnv(rank=5, world_size=8, local_rank=1, master_address="fast7", master_port=29500)),
        (
            STEP | {"MASTER_PORT": "7"},
            RankEnv(rank=5, world_size=8, local_rank=1, master_address="gpu03", master_port=7),
        ),
        (
            STEP | {"SLURM_STEP_NODELIST": ""},
            RankEnv(rank=5, world_size=8, local_rank=1, master_address="cpu7", master_port=20345),
        ),
        # torchrun within a job.
        (
            STEP | FIVE | {"SLURM_STEP_NUM_TASKS": "2"},
            RankEnv(rank=1, world_size=4, local_rank=1, master_address="10.0.0.1", master_port=1234),
        ),
    ],
)
def test_one_rank_of_many(environment, expected):
    assert RankEnv.from_environment(environment) == expected


@pytest.mark.parametrize(
    "environment",
    [{}, BATCH, STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, dict.fromkeys(FIVE, ""), MASTER],
    ids=["nothing", "batch shell", "step of one task", "empty values", "master alone"],
)
def test_alone(environment):
    rank_env = RankEnv.from_environment(environment)
    assert (rank_env.rank, rank_env.world_size, rank_env.local_rank) == (0, 1, 0)
    assert rank_env.master_address == "127.0.0.1"
    assert 0 < rank_env.master_port < 65536


@pytest.mark.parametrize("missing", sorted(FIVE))
@pytest.mark.parametrize("environment", [{}, BATCH, STEP], ids=["no job", "batch shell", "step"])
def test_four_of_the_five_are_refused(environment, missing):
    with pytest.raises(UserError, match=f"without {missing}\n"):
        RankEnv.from_environment(environment | {key: value for key, value in FIVE.items() if key != missing})


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID"])
def test_a_step_that_says_too_little_is_refused(missing):
    with pytest.raises(UserError, match=" without "):
        RankEnv.from_environment({key: value for key, value in STEP.items() if key != missing})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({key: "one"}, "whole numbers") for key in FIVE if key != "MASTER_ADDR"),
        ({"RANK": "4"}, "RANK=4 with WORLD_SIZE=4"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0"),
    ],
)
def test_wrong_numbers_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        RankEnv.from_environment(FIVE | change)


def test_an_exported_rank_env_is_read_back(monkeypatch):
    rank_env = RankEnv(rank=1, world_size=2, local_rank=0, master_address="gpu03", master_port=4321)
    monkeypatch.setattr(os, "environ", {})
    rank_env.export()
    assert RankEnv.from_environment(os.environ) == rank_env


WORDS = st.text("abz09-._", min_size=1, max_size=4)
RANGES = st.lists(st.tuples(st.integers(0, 120), st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=3)
HOSTS = st.lists(st.lists(st.one_of(WORDS, RANGES), min_size=1, max_size=4), min_size=1, max_size=3)


def to_slurm(part: str | list[tuple[int, int, int]]) -> str:
    """A part of a host name in a SLURM node list: a word, or [03-05,9]."""
    if isinstance(part, str):
        return part
    ends = [(f"{low:0{width}}", f"{low + more:0{width}}" if more else "") for low, more, width in part]
    return "[" + ",".join(low + (f"-{high}" if high else "") for low, high in ends) + "]"


def expand(part: str | list[tuple[int, int, int]]) -> list[str]:
    """All values of a part of a host name."""
    if isinstance(part, str):
        return [part]
    return [f"{number:0{width}}" for low, more, width in part for number in range(low, low + more + 1)]


@given(HOSTS)
def test_the_first_host_of_a_list(hosts):
    node_list = ",".join("".join(map(to_slurm, host)) for host in hosts)
    names = ["".join(parts) for host in hosts for parts in itertools.product(*map(expand, host))]
    assert first_host(node_list) == names[0]


def test_no_host():
    assert first_host("") == ""


def test_leaked_variables_of_the_submitting_shell_are_refused():
    """With them every task would train alone, and write the same run."""
    leaked = STEP | FIVE | {"RANK": "0", "WORLD_SIZE": "1"}
    with pytest.raises(UserError, match="WORLD_SIZE=1 in a step of srun with 8 tasks"):
        RankEnv.from_environment(leaked)
