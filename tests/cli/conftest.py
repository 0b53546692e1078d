"""Commands run in this process, on a copy of the `tiny` data; `train` stops where it would start torch."""

from __future__ import annotations

import shutil
import signal
import sys
import types

import numpy as np
import pytest
from support.refusals import LAYOUTS, PROBLEM, PROGRESS_BAR, TrainingStarted, snapshot

from megatron_mea.cli import main
from megatron_mea.data.indexed import IndexedWriter
from megatron_mea.errors import Problem


@pytest.fixture
def workdir(tiny, tmp_path, monkeypatch):
    """The current folder: a copy of `tiny` with relative paths in tiny.yaml, and no training behind `train`."""
    folder = tmp_path / "work"
    shutil.copytree(tiny.root, folder)
    corpora = {f"data.{name}": [{"path": name}] for name in ("train", "validation")}
    tiny.write_config(folder / "tiny.yaml", **{"data.tokenizer": "tokenizer"}, **corpora)
    monkeypatch.chdir(folder)

    for name, tokens in (("none", []), ("short", [0] * 32), ("beyond", [384] * 99), ("negative", [-1] * 99)):
        with IndexedWriter(name, np.dtype(np.int32)) as writer:
            writer.add(np.array(tokens), np.array([len(tokens)]))
            writer.commit()

    with IndexedWriter("ones", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(2000) % 384, np.ones(2000, np.int32))
        writer.commit()

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def run(**arguments):
        raise TrainingStarted(arguments)

    loop = types.ModuleType("megatron_mea.training.loop")
    loop.run = run
    monkeypatch.setitem(sys.modules, loop.__name__, loop)

    numbers = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield folder
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run_folder(workdir, trained):
    """The folder `run`: a copy of the trained run, of which tiny.yaml has 2 of 4 steps still to do."""
    shutil.copytree(trained, workdir / "run")
    (workdir / "run/FINISHED").unlink()
    return workdir / "run"


@pytest.fixture
def run_refused(workdir, capfd):
    """Runs a command, checks that it is refused with one message and changes no file, and returns the problems."""

    def run_refused(*argv):
        before = snapshot(workdir.parent)
        status = main(argv)
        out, err = capfd.readouterr()
        err = PROGRESS_BAR.sub("", err)

        assert (status, out) == (2, "")
        assert err.startswith("megatron-mea: ")
        assert err.count("megatron-mea: ") == 1

        message = LAYOUTS.split(err)[0]
        assert message.splitlines()[-1].startswith(("  expected: ", "  hint: "))
        assert "Traceback" not in err
        assert snapshot(workdir.parent) == before

        return [Problem(**match.groupdict("")) for match in PROBLEM.finditer(err[err.index("error: ") :])]

    return run_refused
