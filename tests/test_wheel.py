"""What is installed is all that the package reads beside its modules."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from support.runs import ROOT

FILES = ("megatron_mea", "launch", "setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
BUILD = "from setuptools import build_meta; print(build_meta.build_sdist('..'), build_meta.build_wheel('..'))"


@pytest.mark.slow
def test_templates_are_in_the_wheel(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in FILES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)

    done = subprocess.run([sys.executable, "-c", BUILD], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sdist, wheel = done.stdout.split()[-2:]

    page = {"megatron_mea/experiments/page.html.jinja"}
    templates = {f"launch/{name}" for name in ("train.sbatch", "sweep.sbatch", "prepare.sbatch", "job.sh", "site.env")}
    with zipfile.ZipFile(tmp_path / wheel) as archive:
        assert page | {f"megatron_mea/{name}" for name in templates} <= set(archive.namelist())
    with tarfile.open(tmp_path / sdist) as archive:
        assert page | templates <= {name.partition("/")[2] for name in archive.getnames()}
