"""The folder of a run: the name of every file and folder in it, which no other module writes down.

What lies in a checkpoint is named by `checkpoint/folder.py`. A job (launch/job.sh) has files of its own in slurm/:
attempts-*, failures-*, failed-* and nccl-*, and its log.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mea.inputs import read_json_object

_MAX_REASON = 10_000
"""Characters of what a job noted."""
_PREFLIGHT = ".preflight-"


def _entry(*names: str) -> property:
    """A file or folder, by its path from the run folder."""
    return property(lambda folder: Path(folder.path, *names))


@dataclass(frozen=True, init=False)
class RunFolder:
    """The files of a run that trains, waits, or has ended; none of them need exist."""

    path: Path

    def __init__(self, path: str | Path) -> None:
        object.__setattr__(self, "path", Path(path))

    config = _entry("config.yaml")
    """The resolved configuration, after a comment with the versions of packages."""
    metrics = _entry("metrics.jsonl")
    """A row a logged step or validation: step, tokens, losses, rates."""
    heads = _entry("heads.jsonl")
    """A row a validation: the matrices that combine heads, and the size of each head's output."""
    tensorboard = _entry("tensorboard")
    """Event files of TensorBoard, which nothing reads back."""
    checkpoints = _entry("checkpoints")
    """A folder a checkpoint (`checkpoint/folder.py`)."""
    lease = _entry(".lease")
    """The job that may write here (`checkpoint/lease.py`)."""
    heartbeat = _entry("heartbeat.json")
    """Step, time and newest measurements, replaced as the run proceeds."""
    finished = _entry("FINISHED")
    """The last step of a run that has ended as planned."""
    diverged = _entry("DIVERGED")
    """Step and reason of a run whose loss or gradient was not finite."""
    failed = _entry("FAILED")
    """Status and reason of a run of a sweep that failed."""
    console_log = _entry("console.log")
    """Output that the console could not take."""
    train_log = _entry("train.log")
    """Output of a run that a sweep started on its machine."""
    profile = _entry("profile")
    """Traces of steps (`logging.profile`)."""
    slurm = _entry("slurm")
    """Files of jobs. The folder of a sweep has one as well, for the script of its array."""
    job_config = _entry("slurm", "config.yaml")
    """The resolved configuration that jobs and sweeps train with, also before the run has begun."""
    job_script = _entry("slurm", "train.sbatch")
    """The script of a job that was submitted for this run alone."""
    array_script = _entry("slurm", "sweep.sbatch")
    """The script of a sweep's job array, in the folder of the sweep."""
    job_ids = _entry("slurm", "jobs")
    """The ids of the jobs that were submitted last."""
    failure_note = _entry("slurm", "failed-sweep")
    """Status and reason of the first rank that failed, in a sweep on this machine."""

    def preflight_marker(self, name: str) -> Path:
        """A file that is there while the nodes of a job are compared (`slurm/preflight.py`)."""
        return self.path / f"{_PREFLIGHT}{name}"

    def preflight_markers(self) -> list[Path]:
        """Those that are there."""
        return list(self.path.glob(f"{_PREFLIGHT}*"))

    @property
    def marks(self) -> tuple[Path, ...]:
        """How a run has ended, if it has; removed when it goes on."""
        return self.finished, self.diverged, self.failed

    def finished_step(self) -> int | None:
        """The step in FINISHED; None where the run is not finished."""
        try:
            return int(read_json_object(self.finished)["step"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            return None

    def read_heartbeat(self) -> dict[str, Any] | None:
        """Contents of heartbeat.json; None where it cannot be read."""
        try:
            return read_json_object(self.heartbeat)
        except (OSError, ValueError):
            return None

    def divergence_reason(self) -> str:
        """Why the run diverged; empty where it did not."""
        return _read_reason(self.diverged)

    def failure_reason(self) -> str:
        """Why the run failed, as a sweep on this machine or a SLURM job (launch/job.sh) noted it; empty: it did not."""
        if reason := _read_reason(self.failed):
            return reason

        ended = sorted(self.slurm.glob("ended-*"), key=lambda file: file.stat().st_mtime)
        if not ended:
            return ""

        # The first line is the exit status, the rest the reason.
        with ended[-1].open(encoding="utf-8", errors="replace") as stream:
            status, _, reason = stream.read(_MAX_REASON).partition("\n")
        return "" if status.strip() == "0" else reason.strip()


def _read_reason(mark: Path) -> str:
    try:
        return str(read_json_object(mark)["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
