"""Reads the folders of runs, as they are: finished, running, failed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_mea.config import Config
from megatron_mea.config.load import load_config
from megatron_mea.errors import UserError

CONFIG, METRICS = "config.yaml", "metrics.jsonl"
SUBMITTED = "slurm/config.yaml"
"""Of a run that a sweep or `submit` made, before it has begun."""
_MEASURED = ("loss", "grad_norm", "validation_loss")


@dataclass(frozen=True)
class Run:
    """What a run has recorded.

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
    def is_whole(self) -> bool:
        return bool(len(self.steps)) and self.steps[-1] >= self.config.steps

    @property
    def final_loss(self) -> float:
        """Mean over the last tenth of the rows."""
        return float(self.loss[-max(1, len(self.loss) // 10) :].mean())

    @property
    def final_validation(self) -> float | None:
        return float(self.validation[-1, 1]) if len(self.validation) else None


def find_runs(paths: Sequence[str]) -> list[Run]:
    """The runs in folders, each a run or a sweep's `--out`, also those that have not begun; by variant, rate and seed.

    Raises:
        UserError: there is no run, or one is not readable.
    """
    folders: dict[Path, None] = {}
    for path in map(Path, paths):
        found = [path] if _is_run(path) else sorted(filter(_is_run, path.iterdir())) if path.is_dir() else []
        if not found:
            what = "no such folder" if not path.exists() else "a file" if path.is_file() else "no run in it"
            raise UserError(str(path), what, f"a run folder (with {CONFIG}), or a folder of run folders")
        folders |= dict.fromkeys(each.resolve() for each in found)
    return sorted(map(read_run, folders), key=lambda run: (run.variant, run.lr, run.seed))


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (CONFIG, SUBMITTED))


def read_run(path: Path) -> Run:
    """One folder; a last line that is being written is left out, and a run that has not begun has no rows."""
    rows = list(_rows(path / METRICS)) if (path / METRICS).exists() else []
    trained = [row for row in rows if row.get("loss") is not None]

    def column(name: str) -> np.ndarray:
        return np.array([row.get(name, np.nan) for row in trained], dtype=float)

    validation = [(row["tokens"], row["validation_loss"]) for row in rows if row.get("validation_loss") is not None]
    config = _config(path / (CONFIG if (path / CONFIG).is_file() else SUBMITTED))
    columns = (column(name) for name in ("step", "tokens", "loss", "grad_norm"))
    measured = np.array(validation, dtype=float).reshape(-1, 2)
    return Run(path, config, *columns, measured, _reason(path / "DIVERGED"), _failure(path))


def _config(path: Path) -> Config:
    try:
        return load_config(path)
    except UserError as error:
        # One of many files: the key alone does not say which.
        raise UserError.of(error.problems, f"in {path}") from None


def _rows(path: Path) -> Iterable[dict]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            sum(float(value) for value in (row["step"], row["tokens"], *(row.get(name) or 0 for name in _MEASURED)))
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                return
            raise UserError(f"{path}:{number}", "no row of metrics", "a JSON object of numbers: step, tokens") from None
        yield row


def _reason(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _failure(path: Path) -> str:
    """As a sweep on this machine left it, or as a SLURM job did (launch/job.sh): a status, then the reason."""
    if reason := _reason(path / "FAILED"):
        return reason
    ended = sorted((path / "slurm").glob("ended-*"), key=lambda each: each.stat().st_mtime)
    if not ended:
        return ""
    status, _, reason = ended[-1].read_text(encoding="utf-8").partition("\n")
    return "" if status.strip() == "0" else reason.strip()
