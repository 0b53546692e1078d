"""A cluster for the tests of this folder, or the reason why there is none."""

import os
import shutil
from collections.abc import Iterator

import pytest
from cluster import PROGRAMS, Cluster, ClusterError


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
    """Four nodes without jobs, the same ones for all tests; what a test has killed or left running is put in order."""
    yield _cluster
    _cluster.clear()
