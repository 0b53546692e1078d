"""Shared fixtures: a tiny prepared corpus, finished runs on it, and commands that run in a folder of their own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Before anything imports transformers: no test may use the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import settings
from support.desk import Desk
from support.faults import once
from support.runs import train
from support.tiny import Tiny

from megatron_mea.cli import main

pytest_plugins = ["support.fast"]

# On a busy machine the time of an example says nothing.
settings.register_profile("untimed", deadline=None)
# `--full`: for properties that leave the number of examples to the profile.
settings.register_profile("full", deadline=None, max_examples=3000)
settings.load_profile("untimed")


@pytest.fixture
def hangup() -> Iterator[None]:
    """SIGHUP as a terminal has it, for the processes of a test, though the tests may run under nohup."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, previous)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The tiny tokenizer, corpora and configuration; read-only."""
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of two steps with a checkpoint after each; copy it before changing it."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny.write_config(
        folder / "tiny.yaml", **{"training.steps": 2, "checkpoint.interval": 1, "run.dir": str(folder / "run")}
    )
    command = [sys.executable, "-m", "megatron_mea", "train", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def config(request: pytest.FixtureRequest, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of the tiny configuration with the module's SETTINGS, in a new folder: the module's runs share it."""
    return tiny.write_config(tmp_path_factory.mktemp("runs") / "run.yaml", **request.module.SETTINGS)


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    """Folder of an uninterrupted run of one process; copy it before changing it."""
    train(config, "whole")
    return config.parent / "whole"


@pytest.fixture
def no_parity(monkeypatch) -> None:
    """Exports without the comparison of logits, which writes nothing."""
    from megatron_mea.huggingface import export
    from megatron_mea.huggingface.parity_check import Parity

    monkeypatch.setattr(export, "check_parity", lambda **_: Parity(difference=0.0, scale=1.0, tokens=1))


@pytest.fixture
def one_engine(monkeypatch) -> Iterator[None]:
    """Trains in this process with one process group and one engine, which take seconds to make."""
    from megatron_mea.training import distributed, run_start

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in (variables | {"DS_ACCELERATOR": "cpu"}).items():
        monkeypatch.setenv(name, str(value))

    stop = distributed.stop_distributed
    monkeypatch.setattr(distributed, "start_distributed", once(distributed.start_distributed))
    monkeypatch.setattr(distributed, "stop_distributed", lambda: None)
    monkeypatch.setattr(run_start, "build_engine", once(run_start.build_engine))
    yield
    stop()


@pytest.fixture
def desk(tiny, tmp_path, monkeypatch) -> Iterator[Desk]:
    """A new current folder with tiny.yaml, and a PATH without SLURM's commands."""
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
