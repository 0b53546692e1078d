"""What a run leaves behind: metrics.jsonl, TensorBoard, config.yaml, FINISHED, and the lines on the screen."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mea.checkpoint.folder import flush
from megatron_mea.config import Config, dump_config

if TYPE_CHECKING:
    import torch

FINISHED, DIVERGED, FAILED = "FINISHED", "DIVERGED", "FAILED"
HEARTBEAT = "heartbeat.json"
_BEAT = 5.0
"""Seconds between two heartbeats at least."""


class Metrics:
    """Appends rows to metrics.jsonl, and the same scalars to TensorBoard; for rank 0.

    Opening it for a run that resumes after `step` (None: begins anew) drops later rows and a half-written last line;
    the rows before stay as they are, byte for byte.
    """

    def __init__(self, run_dir: Path, step: int | None, tensorboard: bool) -> None:
        path = run_dir / "metrics.jsonl"
        _keep_rows(path, -1 if step is None else step)
        self._file = path.open("a", encoding="utf-8")
        self._board = None
        board = run_dir / "tensorboard"
        if tensorboard or board.exists():
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(board, purge_step=0 if step is None else step + 1)
            if not tensorboard:
                # What was purged stays so when it is written again one day.
                self._board.close()
                self._board = None

    def write(
        self,
        row: Mapping[str, Any],
        more: Mapping[str, float] | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """One row, flushed to disk; `more` are scalars and `tensors` for TensorBoard alone."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._board is not None:
            scalars = {key: value for key, value in row.items() if key not in ("step", "tokens", "sample_hashes")}
            for key, value in {**scalars, **(more or {})}.items():
                self._board.add_scalar(key, value, row["step"])
            for key, tensor in (tensors or {}).items():
                self._board.add_tensor(key, tensor, row["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


class Heartbeat:
    """A small file that is replaced as the run goes on, for those who watch it from outside; for rank 0."""

    def __init__(self, run_dir: Path) -> None:
        self._path, self._last = run_dir / HEARTBEAT, 0.0
        self._facts: dict[str, Any] = {}

    def beat(self, step: int, facts: Mapping[str, Any], now: bool = False) -> None:
        """Writes step, time and the newest `facts`, unless it has just been written; `now`: in any case."""
        self._facts |= facts
        if not now and time.monotonic() - self._last < _BEAT:
            return
        self._last = time.monotonic()
        job = {"job": os.environ["SLURM_JOB_ID"]} if "SLURM_JOB_ID" in os.environ else {}
        beat = {"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **self._facts, **job}
        scratch = self._path.with_name(f".{self._path.name}.tmp")
        # A full disk is told by what matters more.
        with contextlib.suppress(OSError):
            scratch.write_text(json.dumps(beat) + "\n")
            scratch.replace(self._path)


def _keep_rows(path: Path, step: int) -> None:
    """Leaves the rows of steps up to `step` in metrics.jsonl, byte for byte."""
    if not path.exists():
        return
    content = path.read_bytes()
    kept = b"".join(line for line in content.splitlines(keepends=True) if _is_row(line, step))
    if kept != content:
        write_atomically(path, kept.decode())


def _is_row(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


class Progress:
    """Rate and time left; speaks on rank 0 alone."""

    def __init__(self, config: Config, rank: int, step: int) -> None:
        self.config, self.rank, self.first_step = config, rank, step
        self._last_step = step
        self.start()

    def start(self) -> None:
        """Begins to measure: what came before is not training."""
        self._begin = self._last = time.monotonic()

    def say(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)

    def tokens_per_second(self, step: int) -> float:
        """Of training alone, since the last row, validation or save."""
        seconds = max(time.monotonic() - self._last, 1e-9)
        return (step - self._last_step) * self.config.tokens_per_step / seconds

    def mark(self, step: int) -> None:
        """Begins to measure anew: what came since the last step's end is no training."""
        self._last, self._last_step = time.monotonic(), step

    def report(self, row: Mapping[str, Any]) -> None:
        """One line for a row of the metrics."""
        step, last = row["step"], self.config.steps
        parts = [f"step {step}/{last}"]
        if "loss" in row:
            per_step = (time.monotonic() - self._begin) / max(step - self.first_step, 1)
            left = time.strftime("%H:%M:%S", time.gmtime(per_step * (last - step)))
            days = int(per_step * (last - step) // 86400)
            parts += [
                f"loss {row['loss']:.4f}",
                *([f"distillation loss {row['distillation_loss']:.4f}"] if "distillation_loss" in row else []),
                f"lr {row['lr']:.3g}",
                f"grad norm {row['grad_norm']:.3g}",
                f"{row['tokens_per_second']:,.0f} tokens/s",
                f"{f'{days} d ' if days else ''}{left} left",
            ]
        if "validation_loss" in row:
            parts.append(f"validation loss {row['validation_loss']:.4f}")
        self.say(" | ".join(parts))


def write_config(config: Config, run_dir: Path, made_by: Mapping[str, str]) -> None:
    """config.yaml: the resolved configuration, with the versions that made it in a comment."""
    made_by = " ".join(f"{name}={value}" for name, value in made_by.items())
    write_atomically(run_dir / "config.yaml", f"# {made_by}\n{dump_config(config)}")


def write_finished(run_dir: Path, step: int) -> None:
    write_atomically(run_dir / FINISHED, json.dumps({"step": step}) + "\n")


def write_diverged(run_dir: Path, step: int, reason: str) -> None:
    """For sweeps and reports: a rate that diverges is a result."""
    write_atomically(run_dir / DIVERGED, json.dumps({"step": step, "reason": reason}) + "\n")


def write_atomically(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(text, encoding="utf-8")
    flush(scratch)
    scratch.replace(path)
    flush(path.parent)
