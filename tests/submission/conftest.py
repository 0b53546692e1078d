"""Commands of megatron-mea, asked in a folder where no SLURM is but the one that a test makes."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator

import pytest
from desk import Desk

from megatron_mea.cli import main


@pytest.fixture
def desk(tiny, tmp_path, monkeypatch) -> Iterator[Desk]:
    desk, tools = Desk(tmp_path / "desk"), tmp_path / "tools"
    tiny.write_config(desk.folder / "tiny.yaml")
    tools.mkdir()
    for name in ("bash", "cat"):
        (tools / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", f"{desk.bin}{os.pathsep}{tools}")
    monkeypatch.chdir(desk.folder)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield desk
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def ask(desk, capfd) -> Callable[..., tuple[int, str, str]]:
    """Runs a command of megatron-mea; returns its status, stdout and stderr."""

    def ask(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            status = main(arguments)
        except SystemExit as error:
            status = error.code
        return status, *capfd.readouterr()

    return ask


@pytest.fixture
def submit(ask) -> Callable[..., tuple[int, str, str]]:
    """`submit tiny.yaml` on one node with one GPU for an hour, and more arguments."""

    def submit(*more: str, nodes: int = 1, gpus: int = 1, time: str = "1:00:00") -> tuple[int, str, str]:
        resources = ["--nodes", str(nodes), "--gpus-per-node", str(gpus), "--time", time]
        return ask("submit", "tiny.yaml", *resources, *more)

    return submit
