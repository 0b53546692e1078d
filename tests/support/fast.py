"""The fast tier: `--fast` leaves out the tests that are marked `slow` or `full`, and fails those that start a process.

What starts a process is a rank, a command line, a browser, a data worker, a compiler or a SLURM daemon: none belongs
into what is run before every commit.
"""

from __future__ import annotations

import multiprocessing.process
import sys
import time
from collections.abc import Iterator

import pytest

PROCESS_EVENTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.exec"}
"""Audit events of Python with which a process begins."""


class ProcessGuard:
    """Raises where a process is started while `test` names the running test.

    Audit hooks cannot be removed, so there is one for the full session.
    """

    def __init__(self) -> None:
        self.test = ""
        sys.addaudithook(self.audit)

    def audit(self, event: str, _: tuple) -> None:
        if self.test and event in PROCESS_EVENTS:
            self.refuse(event)

    def refuse(self, event: str) -> None:
        raise AssertionError(f"{self.test} starts a process ({event}): mark it `slow`")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="only tests that start no process; see tests/run.sh")
    parser.addoption("--full", action="store_true", help="every occurrence of a fault, not the first, middle and last")


def pytest_configure(config: pytest.Config) -> None:
    config.began = time.monotonic()
    if config.getoption("--fast"):
        config.process_guard = ProcessGuard()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--fast"):
        return
    left_out = [item for item in items if item.get_closest_marker("slow") or item.get_closest_marker("full")]
    items[:] = [item for item in items if item not in set(left_out)]
    config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Guards a test with all its fixtures, those of the module and of the session included."""
    if not item.config.getoption("--fast"):
        return (yield)

    guard = item.config.process_guard
    guard.test = item.nodeid
    # A spawned process raises no event.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing.process.BaseProcess, "start", lambda _: guard.refuse("multiprocessing"))
        result = yield

    guard.test = ""
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """How many test functions ran, and for how long."""
    if not config.getoption("--fast"):
        return
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    functions = {report.nodeid.partition("[")[0] for report in reports if getattr(report, "when", "") == "call"}
    seconds = time.monotonic() - config.began
    passed = not any(terminalreporter.stats.get(outcome) for outcome in ("failed", "error"))
    terminalreporter.write_line(
        f"fast tier: {len(functions)} test functions in {seconds:.0f} s"
        + ("; none of them started a process" if passed else "")
    )
