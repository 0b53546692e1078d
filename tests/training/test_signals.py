"""Stop requests by signal, once and twice, whatever the process is doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_mea.training.signals import LAUNCHER_VARIABLE

pytestmark = pytest.mark.slow

WAITING = """
import hashlib, sys
from megatron_mea.training.signals import StopSignal
assert "torch" not in sys.modules
stop = StopSignal()
print("ready", flush=True)
# A call into a library that lets other threads run, as a collective does, and returns in some minutes.
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def run_script(script: str, *, environment: dict[str, str] | None = None, ignored: tuple = (), fds: tuple = ()):
    """Runs Python code that has a `StopSignal` in `stop`; returns status and stdout.

    Args:
        ignored: signals that the process ignores at its start.
        fds: descriptors that it inherits.
    """

    def ignore() -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    result = subprocess.run(
        [sys.executable, "-c", f"from megatron_mea.training.signals import StopSignal\n{STOP}\n{script}"],
        capture_output=True,
        text=True,
        env=environment,
        preexec_fn=ignore,
        pass_fds=fds,
        timeout=60,
        check=False,
    )
    return result.returncode, result.stdout


STOP = """
import os, signal, time
stop = StopSignal()

def wait_for_stop():
    deadline = time.monotonic() + 30
    while stop.received is None and time.monotonic() < deadline:
        time.sleep(0.01)
    print(stop.received)
"""


@pytest.mark.usefixtures("hangup")
def test_a_closed_terminal_stops_a_run_unless_nohup_started_it():
    hang_up = "os.kill(os.getpid(), signal.SIGHUP)\n"
    assert run_script(f"{hang_up}wait_for_stop()") == (0, "SIGHUP\n")
    # Nor does one that follows later interrupt the save.
    later = f"os.kill(os.getpid(), signal.SIGTERM)\nwait_for_stop()\ntime.sleep(2.3)\n{hang_up}time.sleep(0.3)"
    assert run_script(later) == (0, "SIGTERM\n")

    ignored = f"{hang_up}time.sleep(0.3)\nprint(stop.received)"
    assert run_script(ignored, ignored=(signal.SIGHUP,)) == (0, "None\n")


def test_a_run_stops_when_its_launcher_is_gone():
    """However early that is: the pipe has ended before the process begins."""
    for has_launcher, expected in ((False, "SIGTERM\n"), (True, "None\n")):
        read_end, write_end = os.pipe()
        if not has_launcher:
            os.close(write_end)
        environment = os.environ | {LAUNCHER_VARIABLE: str(read_end)}
        script = "time.sleep(0.3)\nprint(stop.received)" if has_launcher else "wait_for_stop()"
        script += "\nassert 'MEA_LAUNCHER_PIPE' not in os.environ"
        assert run_script(script, environment=environment, fds=(read_end,)) == (0, expected)
        os.close(read_end)
        if has_launcher:
            os.close(write_end)


KILLED_LAUNCHER = """
import os, signal, time
from megatron_mea.training.signals import LAUNCHER_VARIABLE, StopSignal
read_end, write_end = os.pipe()
os.environ[LAUNCHER_VARIABLE] = str(read_end)
stop = StopSignal()
os.kill(os.getpid(), signal.SIGTERM)
while stop.received is None:
    time.sleep(0.01)
time.sleep(2.3)
os.close(write_end)
time.sleep(0.3)
print(stop.received)
"""


def test_a_launcher_that_is_killed_later_does_not_interrupt_the_save():
    """It was told to stop, and killed since that took long."""
    environment = {name: value for name, value in os.environ.items() if name != "SLURM_JOB_ID"}
    result = subprocess.run(
        [sys.executable, "-c", KILLED_LAUNCHER], capture_output=True, text=True, env=environment, check=False
    )
    assert (result.returncode, result.stdout) == (0, "SIGTERM\n"), result.stderr


@pytest.mark.parametrize("value", ["", "x", "0", "900", "9" * 30])
def test_a_pipe_that_is_none_is_left_alone(value):
    environment = os.environ | {LAUNCHER_VARIABLE: value}
    script = "time.sleep(0.2)\nprint(stop.received)"
    assert run_script(script, environment=environment) == (0, "None\n")


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_second_signal_ends_a_process_that_hangs(second):
    with subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            # A terminal and a launcher repeat the first one.
            for _ in range(3):
                process.send_signal(signal.SIGUSR2)
                time.sleep(0.2)
            time.sleep(2)
            assert process.poll() is None
            process.send_signal(second)
            assert process.wait(timeout=5) == 128 + second
        finally:
            process.kill()


def test_the_first_signal_is_remembered():
    script = "from megatron_mea.training.signals import StopSignal; import os, signal, time; stop = StopSignal()\n"
    script += (
        "assert stop.received is None; os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.2); print(stop.received)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "SIGTERM\n")


def test_an_interruption_while_python_executes_a_string_keeps_its_status(tmp_path: Path) -> None:
    """A module that Python runs with -m ends by the signal where KeyboardInterrupt came out of such a string."""
    (tmp_path / "command.py").write_text(f"""if True:
        import sys
        from megatron_mea import cli
        text = "import os; os.kill(os.getpid(), {int(signal.SIGINT)})\\nwhile True: pass"
        cli.parse_arguments = lambda argv: ("train", {{}})
        cli.VERBS["train"] = lambda: exec(text)
        sys.exit(cli.main())
    """)
    command = [sys.executable, "-m", "command"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (130, "megatron-mea: interrupted\n")


def test_slurms_termination_does_not_interrupt_a_save():
    """SLURM sends TERM at the time limit of a job, after the signal that the job asked for, and kills in the end."""
    script = "from megatron_mea.training.signals import StopSignal; import os, signal, time; stop = StopSignal()\n"
    script += "os.kill(os.getpid(), signal.SIGUSR2); time.sleep(2.3); os.kill(os.getpid(), signal.SIGTERM)\n"
    script += "time.sleep(0.3); print(stop.received)"
    for environment, expected in (({"SLURM_JOB_ID": "7"}, (0, "SIGUSR2\n")), ({}, (143, ""))):
        base = {name: value for name, value in os.environ.items() if name != "SLURM_JOB_ID"}
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=base | environment)
        assert (result.returncode, result.stdout) == expected
