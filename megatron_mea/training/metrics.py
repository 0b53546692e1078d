"""Files that a run writes beside checkpoints (metrics.jsonl, TensorBoard, config.yaml, FINISHED), and its output."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mea.config import Config, dump_config
from megatron_mea.inputs import parse_json_object, read_lines
from megatron_mea.outputs import flush, remove_leftovers, replace_file, scratch_folder, write_file
from megatron_mea.run_folder import RunFolder

if TYPE_CHECKING:
    import torch

_HEARTBEAT_SECONDS = 5.0
"""Seconds between two heartbeats at least."""


class Metrics:
    """Appends rows to metrics.jsonl, and the same scalars to TensorBoard; for rank 0.

    Args:
        step: the step after which the run resumes; None: step 0. Later rows and a half-written last line are
            removed; the rows before stay as they are, byte for byte.
        tensorboard: write to TensorBoard. If not, later rows of an earlier TensorBoard folder are purged all the same.
    """

    def __init__(self, *, run_dir: Path, step: int | None, tensorboard: bool) -> None:
        path = RunFolder(run_dir).metrics
        _truncate_rows(path, -1 if step is None else step)
        self._file = path.open("a", encoding="utf-8")
        flush(run_dir)

        self._tensorboard = None
        folder = RunFolder(run_dir).tensorboard
        if tensorboard or folder.exists():
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(folder, purge_step=0 if step is None else step + 1)
            if not tensorboard:
                # The purge is on disk, for a later run that writes here again.
                self._tensorboard.close()
                self._tensorboard = None

    def write(
        self,
        row: Mapping[str, Any],
        *,
        extra_scalars: Mapping[str, float] | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Writes a row and flushes it to disk; `extra_scalars` and `tensors` go to TensorBoard only."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

        if self._tensorboard is not None:
            scalars = {key: value for key, value in row.items() if key not in ("step", "tokens", "sample_hashes")}
            for key, value in {**scalars, **(extra_scalars or {})}.items():
                self._tensorboard.add_scalar(key, value, row["step"])

            for key, tensor in (tensors or {}).items():
                self._tensorboard.add_tensor(key, tensor, row["step"])

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


class Heartbeat:
    """heartbeat.json: a small file that is replaced as the run proceeds, for watching it from outside; for rank 0."""

    def __init__(self, run_dir: Path) -> None:
        self._path, self._written_at = RunFolder(run_dir).heartbeat, 0.0
        self._facts: dict[str, Any] = {}

    def beat(self, step: int, facts: Mapping[str, Any], *, force: bool = False) -> None:
        """Writes step, time and the newest `facts`, unless it was written within the last seconds; `force`: anyway."""
        self._facts |= facts
        if not force and time.monotonic() - self._written_at < _HEARTBEAT_SECONDS:
            return

        self._written_at = time.monotonic()
        job = {"job": os.environ["SLURM_JOB_ID"]} if "SLURM_JOB_ID" in os.environ else {}
        content = {"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **self._facts, **job}

        # A heartbeat does not end a run: on a full disk metrics and checkpoints raise.
        with contextlib.suppress(OSError):
            replace_file(self._path, json.dumps(content) + "\n")


def _truncate_rows(path: Path, step: int) -> None:
    """Removes the rows of steps after `step` from metrics.jsonl, and what is no row; the others stay, byte for byte."""
    remove_leftovers(path)
    if not path.exists() or all(_is_row(line, step) for line in read_lines(path)):
        return

    # A rename leaves the old rows or the new ones, and the removed rows have no value.
    with scratch_folder(path) as scratch:
        with (scratch / "rows").open("wb") as stream:
            stream.writelines(line for line in read_lines(path) if _is_row(line, step))

        flush(scratch / "rows")
        (scratch / "rows").replace(path)
        flush(path.parent)


def _is_row(line: bytes, last_step: int) -> bool:
    """Whether a line is complete, and its step is not after `last_step`."""
    try:
        return line.endswith(b"\n") and parse_json_object(line)["step"] <= last_step
    except (ValueError, KeyError, TypeError):
        return False


class Progress:
    """Prints lines on rank 0, with training rate and time left.

    Args:
        step: the step after which training begins.
        clock: in seconds.
    """

    def __init__(self, *, config: Config, rank: int, step: int, clock: Callable[[], float]) -> None:
        self.config, self.rank, self.first_step, self._clock = config, rank, step, clock
        self._interval_step = step
        self.start()

    def start(self) -> None:
        """Starts the clocks when training begins, without the time before."""
        self._training_start = self._interval_start = self._clock()

    def log(self, line: str) -> None:
        """Prints a line, on rank 0 only."""
        if self.rank == 0:
            print(line, flush=True)

    def tokens_per_second(self, step: int) -> float:
        """Tokens per second, over all ranks, of the training steps since the last `mark`."""
        seconds = max(self._clock() - self._interval_start, 1e-9)
        return (step - self._interval_step) * self.config.tokens_per_step / seconds

    def mark(self, step: int) -> None:
        """Starts a new interval for the rate after validation, logging or a save, which are no training."""
        self._interval_start, self._interval_step = self._clock(), step

    def report(self, row: Mapping[str, Any]) -> None:
        """Prints a row of the metrics as a line."""
        step, last = row["step"], self.config.steps
        parts = [f"step {step}/{last}"]
        if "loss" in row:
            seconds_per_step = (self._clock() - self._training_start) / max(step - self.first_step, 1)
            time_left = time.strftime("%H:%M:%S", time.gmtime(seconds_per_step * (last - step)))
            days = int(seconds_per_step * (last - step) // 86400)
            parts += [
                f"loss {row['loss']:.4f}",
                *([f"distillation loss {row['distillation_loss']:.4f}"] if "distillation_loss" in row else []),
                f"lr {row['lr']:.3g}",
                f"grad norm {row['grad_norm']:.3g}",
                f"{row['tokens_per_second']:,.0f} tokens/s",
                f"{f'{days} d ' if days else ''}{time_left} left",
            ]

        if "validation_loss" in row:
            parts.append(f"validation loss {row['validation_loss']:.4f}")

        self.log(" | ".join(parts))


def write_config(*, config: Config, run_dir: Path, versions: Mapping[str, str]) -> None:
    """Writes config.yaml: the resolved configuration, after a comment with the versions of packages."""
    comment = " ".join(f"{name}={value}" for name, value in versions.items())
    write_file(RunFolder(run_dir).config, f"# {comment}\n{dump_config(config)}")


def write_finished(run_dir: Path, step: int) -> None:
    """Writes FINISHED, with the last step of the run."""
    write_file(RunFolder(run_dir).finished, json.dumps({"step": step}) + "\n")


def write_diverged(*, run_dir: Path, step: int, reason: str) -> None:
    """Writes DIVERGED for sweeps and reports, to which a learning rate that diverges is a result."""
    write_file(RunFolder(run_dir).diverged, json.dumps({"step": step, "reason": reason}) + "\n")
