"""Reads the folders of runs, as they are: finished, running, failed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_mea.config import Config
from megatron_mea.config.load import load_config
from megatron_mea.errors import UserError
from megatron_mea.inputs import read_json_object

CONFIG, METRICS = "config.yaml", "metrics.jsonl"
SUBMITTED = "slurm/config.yaml"
"""Where a sweep or `submit` leaves the configuration of a run that has not begun."""
_METRIC_KEYS = ("loss", "grad_norm", "validation_loss")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run's configuration and the metrics that it logged.

    Args:
        steps, tokens, loss, grad_norm: (rows,) of the rows with a loss.
        validation: (rows, 2) tokens and validation loss.
        diverged, failed: why; empty where it did not.
    """

    dir: Path
    config: Config
    steps: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    grad_norm: np.ndarray
    validation: np.ndarray
    diverged: str
    failed: str

    @property
    def variant(self) -> str:
        return self.config.model.attention_variant

    @property
    def lr(self) -> float:
        return self.config.optimizer.lr

    @property
    def seed(self) -> int:
        return self.config.training.seed

    @property
    def is_complete(self) -> bool:
        """Whether the last step of the configuration was logged."""
        return bool(len(self.steps)) and self.steps[-1] >= self.config.steps

    @property
    def final_loss(self) -> float:
        """Mean loss (nats) over the last tenth of the rows."""
        return float(self.loss[-max(1, len(self.loss) // 10) :].mean())

    @property
    def final_validation(self) -> float | None:
        """The last validation loss (nats); None where there was no validation."""
        return float(self.validation[-1, 1]) if len(self.validation) else None


def find_runs(paths: Sequence[str]) -> list[RunRecord]:
    """The runs in folders, each a run or a sweep's `--out`, also those that have not begun; by variant, rate and seed.

    Raises:
        UserError: there is no run, or one is not readable.
    """
    folders: dict[Path, None] = {}
    for path in map(Path, paths):
        run_folders = [path] if _is_run(path) else sorted(filter(_is_run, path.iterdir())) if path.is_dir() else []
        if not run_folders:
            problem = "no such folder" if not path.exists() else "a file" if path.is_file() else "no run in it"
            raise UserError(
                where=str(path), got=problem, expected=f"a run folder (with {CONFIG}), or a folder of run folders"
            )
        folders |= dict.fromkeys(folder.resolve() for folder in run_folders)

    return sorted(map(read_run, folders), key=lambda run: (run.variant, run.lr, run.seed))


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (CONFIG, SUBMITTED))


def read_run(path: Path) -> RunRecord:
    """One folder; a last line that is being written is left out, and a run that has not begun has no rows."""
    rows, problem = _read_rows(path / METRICS) if (path / METRICS).exists() else ([], "")
    trained = [row for row in rows if row.get("loss") is not None]

    def column(name: str) -> np.ndarray:
        return np.array([row.get(name, np.nan) for row in trained], dtype=float)

    validation = [(row["tokens"], row["validation_loss"]) for row in rows if row.get("validation_loss") is not None]
    config = _read_config(path / (CONFIG if (path / CONFIG).is_file() else SUBMITTED))
    return RunRecord(
        dir=path,
        config=config,
        steps=column("step"),
        tokens=column("tokens"),
        loss=column("loss"),
        grad_norm=column("grad_norm"),
        validation=np.array(validation, dtype=float).reshape(-1, 2),
        diverged=_read_reason(path / "DIVERGED"),
        failed=problem or _failure_reason(path),
    )


def _read_config(path: Path) -> Config:
    try:
        return load_config(path)
    except UserError as error:
        # One of many files: the key alone does not say which.
        raise UserError.from_problems(error.problems, f"in {path}") from None


def _read_rows(path: Path) -> tuple[list[dict], str]:
    """The rows of metrics up to a number that no run has, and what is wrong there; empty where nothing is."""
    rows: list[dict] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            sum(float(value) for value in (row["step"], row["tokens"], *(row.get(name) or 0 for name in _METRIC_KEYS)))
        except OverflowError:
            return rows, f"{path}:{number} has a number beyond what 64 bits hold"
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise UserError(
                where=f"{path}:{number}", got="no row of metrics", expected="a JSON object of numbers: step, tokens"
            ) from None
        rows.append(row)

    return rows, ""


def _read_reason(path: Path) -> str:
    try:
        return str(read_json_object(path)["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _failure_reason(path: Path) -> str:
    """Why a run failed, as a sweep on this machine or a SLURM job (launch/job.sh) noted it; empty where it did not."""
    if reason := _read_reason(path / "FAILED"):
        return reason

    ended = sorted((path / "slurm").glob("ended-*"), key=lambda file: file.stat().st_mtime)
    if not ended:
        return ""

    # The first line is the exit status, the rest the reason.
    status, _, reason = ended[-1].read_text(encoding="utf-8").partition("\n")
    return "" if status.strip() == "0" else reason.strip()
