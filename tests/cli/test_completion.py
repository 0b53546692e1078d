"""What real shells make of a line when Tab is pressed, as README.md registers the completion."""

from __future__ import annotations

import os
import pty
import select
import shutil
import sys
import termios
import time
from pathlib import Path

import pytest
from support.runs import ROOT

REGISTER = f"{sys.executable} -m argcomplete.scripts.register_python_argcomplete"
SHELLS = {  # name: command line, lines that register the completion
    "bash": (["bash", "--norc", "-i"], [f'eval "$({REGISTER} megatron-mea)"']),
    "zsh": (["zsh", "-f", "-i"], ["autoload -U compinit", "compinit -D -u", f'eval "$({REGISTER} megatron-mea)"']),
    "fish": (["fish", "-N", "-i"], [f"{REGISTER} --shell fish megatron-mea | source"]),
}
LINES = [  # typed before Tab, added by it
    ("tra", "in "),
    ("plan --w", "orld-size "),
    ("export M O --target st", "ock "),
    ("export M O --target=v", "llm "),
    ("import M O --variant talk", "ing_heads "),
    ("inspect run", "s.of.mine/"),
    ("train my", ".yaml "),
    ("train my.yaml optimizer.l", "r="),
    ("train my.yaml model.attention_variant=talk", "ing_heads "),
    ("submit my.yaml optimizer.lr=1 --nodes 2 optimizer.w", "eight_decay="),
    ("plan my.yaml --json data.tr", "ain="),
]
SECONDS = 60

pytestmark = pytest.mark.slow
pytest.importorskip("argcomplete")


class Terminal:
    """A shell on a terminal of its own."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.chdir(folder)
            path = f"{folder}/bin{os.pathsep}{os.environ['PATH']}"
            os.execvpe(command[0], command, os.environ | {"PATH": path, "TERM": "dumb", "HOME": str(folder)})

        # A line that is not wrapped is shown as it is.
        termios.tcsetwinsize(self._terminal, (50, 200))

    def type(self, text: str, until: str) -> None:
        """Types and reads until the terminal shows `until`."""
        os.write(self._terminal, text.encode())
        shown, end = "", time.monotonic() + SECONDS
        while until not in shown:
            assert select.select([self._terminal], [], [], max(end - time.monotonic(), 0))[0], (text, until, shown)
            shown += os.read(self._terminal, 1 << 16).decode(errors="replace")

    def close(self) -> None:
        os.close(self._terminal)
        os.waitpid(self._pid, 0)


@pytest.mark.parametrize("name", SHELLS)
def test_lines_are_completed(name, tmp_path):
    command, lines = SHELLS[name]
    if not shutil.which(command[0]):
        pytest.skip(f"{name} is not installed: bash tests/cli/install.sh")

    (tmp_path / "bin").mkdir()
    (tmp_path / "runs.of.mine").mkdir()
    (tmp_path / "my.yaml").touch()
    # What takes seconds to import cannot be, here.
    for module in ("torch", "transformers", "numpy"):
        (tmp_path / f"bin/{module}.py").write_text("raise SystemExit(1)")
    program = tmp_path / "bin/megatron-mea"
    search_path = os.pathsep.join((f"{tmp_path}/bin", str(ROOT), os.environ.get("PYTHONPATH", "")))
    program.write_text(f'#!/bin/sh\nPYTHONPATH={search_path} exec {sys.executable} -m megatron_mea "$@"\n')
    program.chmod(0o755)

    terminal = Terminal(command, tmp_path)
    try:
        for line in [*lines, "true"]:
            terminal.type(f"{line}; echo do''ne\n", until="done")
        for typed, added in LINES:
            # Ctrl-U empties the line.
            terminal.type(f"megatron-mea {typed}\t", until=f"{typed}{added}")
            terminal.type("\x15echo do''ne\n", until="done")
    finally:
        terminal.close()
