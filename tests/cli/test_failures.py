"""Exit status and message of a failing command, and the failure file that its job reads."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mea import failures
from megatron_mea.errors import MachineError, RunError, UserError

GLOO_ERROR = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:7")
DistBackendError = type("DistBackendError", (RuntimeError,), {})
DistStoreError = type("DistStoreError", (RuntimeError,), {})
AcceleratorError = type("AcceleratorError", (RuntimeError,), {})


@pytest.fixture
def failure_file(tmp_path, monkeypatch) -> Path:
    """Path of the failure file in an environment without ranks; waiting takes no time."""
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(failures.FAILURE_FILE_VARIABLE, str(tmp_path / "note"))
    monkeypatch.setattr(failures.time, "sleep", lambda seconds: None)
    return tmp_path / "note"


def failing(error: BaseException, cause: BaseException | None = None):
    """A function that raises `error` from `cause`."""

    def work():
        raise error from cause

    return work


def test_work_that_is_done(failure_file, capsys):
    assert failures.exit_status(lambda: None) == 0
    assert not failure_file.exists()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "status", "writes_file"),
    [
        (UserError(where="run.dir", got="3", expected="a folder"), 2, True),
        (RunError("the loss is not finite"), 1, True),
        (MachineError("node7: no GPU"), 1, False),
        (GLOO_ERROR, 1, False),
        (DistBackendError("NCCL communicator was aborted"), 1, False),
        (DistStoreError("timed out"), 1, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_an_expected_end_is_one_message(error, status, writes_file, failure_file, capsys):
    assert failures.exit_status(failing(error)) == status

    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("megatron-mea: ")
    assert "Traceback" not in err
    assert failure_file.exists() == writes_file

    if writes_file:
        assert failure_file.read_text() == f"{status}\n{type(error).__name__}: {error}\n"


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), 2, "File name too long"),
        (PermissionError(errno.EACCES, "Permission denied", "weights"), 2, "'weights'\n  got:      Permission denied"),
        (OSError(errno.EMFILE, "Too many open files", "weights"), 2, "ulimit -n 65536"),
        (RuntimeError("Unable to open weights: Too many open files (os error 24)"), 2, "ulimit -n 65536"),
        (OSError(errno.ENOSPC, "No space left on device", "weights"), 1, "'weights': No space left on device"),
        (MemoryError("Unable to allocate 9 TiB"), 1, "Unable to allocate 9 TiB"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_the_system_refuses_is_one_message(error, status, expected, failure_file, capsys):
    assert failures.exit_status(failing(error)) == status
    assert expected in capsys.readouterr().err
    assert failure_file.read_text().startswith(f"{status}\n")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_leaves_it_to_another_node(number, failure_file, capsys):
    assert failures.exit_status(failing(OSError(number, os.strerror(number), b"weights"))) == 1
    assert f"'weights': {os.strerror(number)}" in capsys.readouterr().err
    assert not failure_file.exists()


@pytest.mark.parametrize("name", ["x" * 300, "d/" * 3000 + "x"], ids=["name", "path"])
@pytest.mark.parametrize(
    "command",
    [
        "tokenizer --input {} --vocab-size 500 --out out",
        "prepare --input {} --tokenizer {} --out out",
        "train {}",
        "plan {}",
        "plan tiny.yaml run.dir={}",
        "plan tiny.yaml data.tokenizer={}",
        "submit {} --nodes 1 --gpus-per-node 1 --time 1:00:00",
        "sweep {} --out out",
        "report {} --out out.html",
        "inspect {}",
        "export {} out",
        "export out {}",
        "import {} out",
        "compress {} out --component-heads 1",
        "sensitivity {} --component-heads 1 --data out --out out.json",
        "evaluate {}",
        "generate {} --prompt a",
    ],
)
def test_names_that_no_file_can_have(command, name, desk, ask):
    status, out, err = ask(*command.format(name, name).split())
    assert (status, out) == (2, "")
    assert err.count("megatron-mea: error: ") == 1
    assert "Traceback" not in err


@pytest.mark.slow
def test_few_open_files():
    """A soft limit is raised; a hard one is refused, since torch's store would wait for ever."""
    inspect = f"exec {sys.executable} -m megatron_mea inspect nowhere"
    for limit, expected in (("-n 64", "at least 256"), ("-Sn 64", "nowhere")):
        done = subprocess.run(f"ulimit {limit}; {inspect}", shell=True, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert expected in done.stderr


IN_A_GROUP = """
import atexit, os, threading, time
import torch.distributed as dist
from megatron_mea.errors import UserError
from megatron_mea.failures import end_with_status, exit_status

class Aborts:
    def __del__(self, abort=os.abort):
        abort()

# Python deletes it last of all, as it does torch's threads.
kept = Aborts()

def work():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    threading.Thread(target=lambda: (time.sleep(0.5), print("written"))).start()
    atexit.register(print, "closed", end="")
    raise UserError(where="run.dir", got="3", expected="a folder")

raise SystemExit(end_with_status(lambda: exit_status(work)))
"""


@pytest.mark.slow
def test_a_process_group_does_not_change_the_status():
    """Nothing is lost: threads end, callbacks are called, and what they print is there."""
    done = subprocess.run([sys.executable, "-c", IN_A_GROUP], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "megatron-mea: error: run.dir\n  got:      3\n" in done.stderr
    assert done.stdout == "written\nclosed"


@pytest.mark.parametrize(
    ("error", "writes_file"), [(ValueError("a bug"), True), (AcceleratorError("CUDA error: uncorrectable ECC"), False)]
)
def test_what_nobody_expects_is_raised(error, writes_file, failure_file):
    with pytest.raises(type(error)):
        failures.exit_status(failing(error))
    assert failure_file.exists() == writes_file
    if writes_file:
        assert failure_file.read_text() == "1\nValueError: a bug\n"


def test_the_first_note_stays(failure_file):
    failures.exit_status(failing(UserError(where="run.dir", got="3", expected="a folder")))
    first = failure_file.read_text()
    failures.exit_status(failing(RunError("later")))
    assert failure_file.read_text() == first


def test_a_note_that_cannot_be_written_changes_nothing(failure_file, monkeypatch):
    monkeypatch.setenv(failures.FAILURE_FILE_VARIABLE, str(failure_file / "nowhere"))
    assert failures.exit_status(failing(RunError("broken"))) == 1


@pytest.mark.parametrize("cause", [GLOO_ERROR, DistBackendError("gone")])
def test_another_process_that_is_gone_may_be_the_cause(cause, failure_file, capsys):
    """A cause counts, since DeepSpeed and autograd wrap errors of collectives; an exception's context does not."""
    assert failures.is_peer_failure(_raised_by(failing(ValueError("wrapped"), cause)))
    assert failures.exit_status(failing(ValueError("wrapped"), cause)) == 1
    assert "another process, or the network to it, is gone: wrapped" in capsys.readouterr().err
    assert not failure_file.exists()

    def raise_while_handling():
        try:
            raise cause
        except RuntimeError:
            raise ValueError("a bug of ours")  # noqa: B904

    assert not failures.is_peer_failure(_raised_by(raise_while_handling))


def test_only_gloos_own_errors_tell_of_others():
    assert not failures.is_peer_failure(RuntimeError("shape mismatch"))
    assert not failures.is_peer_failure(ValueError("Connection reset by peer"))
    assert failures.is_peer_failure(RuntimeError("Timed out waiting 60000ms for recv operation to complete"))


@pytest.mark.parametrize(
    ("variables", "prefix"),
    [
        ({"RANK": "0"}, ""),
        ({"RANK": "3"}, "rank 3: "),
        ({"SLURM_PROCID": "2"}, "rank 2: "),
        ({"RANK": "0", "SLURM_PROCID": "2"}, ""),
        ({"RANK": "x"}, ""),
    ],
)
def test_a_message_names_its_rank(variables, prefix, failure_file, capsys, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    failures.exit_status(failing(RunError("broken")))
    failures.exit_status(failing(GLOO_ERROR))
    assert capsys.readouterr().err.splitlines() == [
        f"megatron-mea: {prefix}broken",
        f"megatron-mea: {prefix}another process, or the network to it, is gone: Connection closed by peer [10.0.0.2]:7",
    ]


TWO_RANKS = """
import os, signal, sys, threading, time
import torch, torch.distributed as dist
from megatron_mea.failures import exit_status

def work():
    dist.init_process_group("gloo")
    numbers = torch.ones(1000)
    dist.all_reduce(numbers)
    if os.environ["RANK"] == "1":
        # While the other one waits for it.
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(numbers)

sys.exit(exit_status(work))
"""


@pytest.mark.slow
def test_the_survivor_of_two_says_so_in_one_line(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        failures.FAILURE_FILE_VARIABLE: str(tmp_path / "note"),
    }
    survivor, victim = (
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS],
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    )

    try:
        _, message = survivor.communicate(timeout=60)
        victim.communicate(timeout=60)
    finally:
        survivor.kill()
        victim.kill()

    assert (survivor.returncode, victim.returncode) == (1, -signal.SIGKILL)
    assert message.startswith("megatron-mea: another process, or the network to it, is gone: ")
    assert message.count("\n") == 1, message
    assert not (tmp_path / "note").exists()


def _raised_by(work) -> BaseException:
    """The exception that `work` raises."""
    try:
        work()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")
