"""Checks of the nodes before a job trains on them."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mea.failures import FAILURE_FILE_VARIABLE
from megatron_mea.slurm import preflight


def report(rank: int, host: str, **changes) -> preflight.Report:
    """A report without problems but for `changes`."""
    fields = {"clock": 1000.0, "device": "cuda:0", "versions": {"torch": "2.13"}}
    fields |= {"machine_problem": "", "folder_problem": ""}

    return preflight.Report(rank=rank, host=host, **(fields | changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([{}, {}, {}], []),
        ([{}, {}, {"machine_problem": "no GPU"}], [("machine", "c, rank 2: no GPU")]),
        ([{}, {"clock": 1059.0}, {}], []),
        ([{}, {"clock": 1061.0}, {}], [("machine", "b: its clock is +61 s off")]),
        ([{"clock": 900.0}, {}, {}], [("machine", "a: its clock is -100 s off")]),
        ([{}, {"folder_problem": "it is not shared"}, {}], [("folder", "b: it is not shared")]),
        ([{}, {}, {"versions": {"torch": "2.11"}}], [("versions", "torch: 2.13 on a, b; 2.11 on c")]),
        ([{}, {"versions": {}}, {}], [("versions", "torch: 2.13 on a, c; absent on b")]),
        (
            [{"machine_problem": "hot"}, {"folder_problem": "full"}, {"versions": {"torch": "2.13", "cuda": "1"}}],
            [("machine", "a, rank 0: hot"), ("folder", "b: full"), ("versions", "cuda: absent on a, b; 1 on c")],
        ),
        # A node without git knows no revision.
        ([{"versions": {"git": "1"}}, {"versions": {}}, {"versions": {"git": "1"}}], []),
        ([{"device": "GPU 1"}, {"device": "GPU 1"}, {"device": "GPU 2"}], []),
        (
            [{"device": "GPU 1"}, {"device": "cpu"}, {"device": "GPU 2"}],
            [("machine", "some nodes have GPUs: GPU on a, cpu on b, GPU on c")],
        ),
    ],
)
def test_problems_name_the_node(changes, expected):
    reports = [
        report(rank=rank, host=host, **change) for rank, (host, change) in enumerate(zip("abc", changes, strict=True))
    ]
    assert list(preflight.find_problems(reports)) == expected


def test_a_node_is_named_once_for_all_its_ranks():
    reports = [report(rank=rank, host="ab"[rank // 4], folder_problem="full" if rank > 3 else "") for rank in range(8)]
    assert list(preflight.find_problems(reports)) == [("folder", "b: full")]

    reports = [report(rank=rank, host="ab"[rank // 4], versions={"cuda": str(rank // 4)}) for rank in range(8)]
    assert list(preflight.find_problems(reports)) == [("versions", "cuda: 0 on a; 1 on b")]


PATCHED = """
import os, sys
import torch
from megatron_mea.slurm import preflight
from megatron_mea.failures import exit_status
from megatron_mea.training.rank_env import RankEnv
from pathlib import Path
preflight._SHARED_FOLDER_TIMEOUT = 1.0
is_rank_1 = os.environ["RANK"] == "1"
{patch}
sys.exit(exit_status(lambda: preflight.preflight(Path(sys.argv[1]), RankEnv.from_environment(), timeout={timeout})))
"""


class Pair:
    """Two processes with the environment that launch/local.sh sets, and a file for the note of one that fails."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.note = folder, folder / "note"

    def run(self, *python: str, dirs: tuple[str, ...] = ("run", "run")) -> list[tuple[int, str, str]]:
        """Status, stdout and stderr of a rank for each of `dirs`, its run folder."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])

        job_environment = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            FAILURE_FILE_VARIABLE: str(self.note),
        }
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        processes = [
            subprocess.Popen(
                [sys.executable, *python, str(self.folder / name)],
                env=environment
                | job_environment
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, name in enumerate(dirs)
        ]
        try:
            outputs = [process.communicate(timeout=100) for process in processes]
        finally:
            for process in processes:
                process.kill()

        assert list(self.folder.rglob(".preflight-*")) == []

        return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]

    def patched(self, patch: str = "", timeout: float = 60, **options) -> list[tuple[int, str, str]]:
        """Status, stdout and stderr of ranks that execute `patch` before the preflight."""
        return self.run("-c", PATCHED.format(patch=patch, timeout=timeout), **options)


@pytest.fixture
def pair(tmp_path) -> Pair:
    return Pair(tmp_path)


@pytest.mark.slow
def test_two_that_can_train_together(pair):
    first, second = pair.run("-m", "megatron_mea.slurm.preflight")
    assert first[0] == second[0] == 0, first[2] + second[2]

    host = re.escape(socket.gethostname())
    line = (
        rf"preflight: 2 rank\(s\) on 1 node\(s\) \({host}\), cpu, torch \S+; all-reduce of 17 MB in \S+ s; \d+ s in all"
    )
    assert re.fullmatch(line + "\n", first[1])
    assert second[1] == ""
    assert not pair.note.exists()


@pytest.mark.slow
def test_a_folder_that_is_not_shared(pair):
    first, second = pair.patched(dirs=("run", "elsewhere"))
    assert (first[0], second[0]) == (2, 1)
    assert "error: run.dir" in first[2]
    assert "not shared" in first[2]
    assert second[1:] == ("", "")

    status, message = pair.note.read_text().split("\n", 1)
    assert status == "2"
    assert message.startswith("UserError: error: run.dir")


@pytest.mark.slow
def test_a_folder_that_cannot_be_written(pair):
    (pair.folder / "run").write_text("a file")
    first, second = pair.patched()
    assert (first[0], second[0]) == (2, 1)
    assert "error: run.dir" in first[2]
    assert pair.note.read_text().startswith("2\n")


@pytest.mark.slow
def test_versions_that_differ(pair):
    first, second = pair.patched('if is_rank_1: preflight._software_versions = lambda: {"torch": "1.0"}')
    assert (first[0], second[0]) == (2, 1)

    host = socket.gethostname()
    assert "error: environment" in first[2]
    assert f"deepspeed: 0.19.8 on {host}; absent on {host}" in first[2]
    assert re.search(rf"torch: \S+ on {re.escape(host)}; 1\.0 on", first[2])
    assert second[1:] == ("", "")
    assert pair.note.read_text().startswith("2\nUserError: ")


@pytest.mark.slow
def test_a_bad_node_is_named_and_leaves_no_note(pair):
    """Another node may do better: the job is to be tried again."""
    broken = 'preflight._check_device = lambda rank_env: (torch.device("cpu"), "cuda:1 multiplies wrongly")'
    first, second = pair.patched(f"if is_rank_1: {broken}")
    assert (first[0], second[0]) == (1, 1)
    assert f"preflight: {socket.gethostname()}, rank 1: cuda:1 multiplies wrongly" in first[2]
    assert "--exclude=NODE" in first[2]
    assert second[1:] == ("", "")
    assert not pair.note.exists()


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named(pair):
    ((status, out, err),) = pair.patched(timeout=2, dirs=("run",))
    assert (status, out) == (1, "")
    assert f"preflight: no word from rank(s) 1 in 2 s; those of {socket.gethostname()} are there" in err
    assert not pair.note.exists()
