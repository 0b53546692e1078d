"""Fixtures: `submit` as a command, and a SLURM cluster of four nodes; tests that need it are skipped without one."""

import os
import shutil
from collections.abc import Callable, Iterator

import pytest
from support.cluster import PROGRAMS, Cluster, ClusterError


@pytest.fixture(scope="session")
def _cluster() -> Iterator[Cluster]:
    if os.geteuid() != 0:
        pytest.skip("a SLURM cluster needs root")

    if missing := [program for program in PROGRAMS if not shutil.which(program)]:
        pytest.skip(f"not installed (tests/slurm/install.sh): {', '.join(missing)}")

    try:
        cluster = Cluster()
    except ClusterError as error:
        pytest.skip(f"no SLURM cluster can be started here: {error}")

    with cluster:
        yield cluster


@pytest.fixture
def cluster(_cluster: Cluster) -> Iterator[Cluster]:
    """Four nodes without jobs, shared by all tests; afterwards killed nodes are restored and jobs cancelled."""
    yield _cluster
    _cluster.clear()


@pytest.fixture
def submit(ask) -> Callable[..., tuple[int, str, str]]:
    """Runs `submit tiny.yaml` with arguments, by default for an hour on one GPU; returns status, stdout and stderr."""

    def submit(*arguments: str, nodes: int = 1, gpus: int = 1, time: str = "1:00:00") -> tuple[int, str, str]:
        resources = ["--nodes", str(nodes), "--gpus-per-node", str(gpus), "--time", time]
        return ask("submit", "tiny.yaml", *resources, *arguments)

    return submit
