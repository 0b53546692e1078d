"""A folder to submit jobs from, with small shell scripts in place of SLURM's commands, or with none."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

BASH = shutil.which("bash")
SINFO = "gpu*|1-00:00:00|64|gpu:h100:4(S:0-1)\ngpu*|1-00:00:00|96|gpu:h100:8(S:0-1)\ncpu|infinite|32|(null)\n"


class Desk:
    """A folder to submit jobs from, with tiny.yaml in it: the current one.

    Attributes:
        folder: its path.
        bin: the only folder in PATH apart from one with bash and cat.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)

    def add_program(self, name: str, script: str) -> None:
        """Writes a command that runs `script` in bash and records its arguments, a line a call."""
        path, calls = self.bin / name, shlex.quote(str(self.folder / f"{name}.calls"))
        path.write_text(f'#!{BASH}\nprintf "%s\\n" "$*" >> {calls}\n{script}\n')
        path.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        """Arguments of every call of a command so far."""
        path = self.folder / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []

    def slurm(self, *, sinfo: str = SINFO, squeue: str = "", sbatch: str = "echo 42") -> None:
        """Adds SLURM's commands: `sinfo` and `squeue` are their outputs, `sbatch` is bash for a real submission."""
        self.add_program("sinfo", f"printf '%s' {shlex.quote(sinfo)}")
        self.add_program("squeue", f"printf '%s' {shlex.quote(squeue)}")
        self.add_program("scontrol", "echo 'Slurmctld(primary) at login1 is UP'")
        answer = "echo 'sbatch: Job 43 to start at 2026-01-01T00:00:00 on gpu7' >&2"
        self.add_program("sbatch", f'if [ "$1" = --test-only ]; then cat > /dev/null; {answer}; exit; fi\n{sbatch}')

    def files(self) -> set[Path]:
        """Every file and folder in this one, except the records of calls."""
        return {path for path in self.folder.rglob("*") if path.suffix != ".calls"}

    def write_site(self, text: str) -> None:
        """Writes launch/site.env."""
        (self.folder / "launch").mkdir(exist_ok=True)
        (self.folder / "launch/site.env").write_text(text)
