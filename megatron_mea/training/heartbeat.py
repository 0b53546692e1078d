"""heartbeat.json: where a run is, for watching it from outside."""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import Any

from megatron_mea.checkpoint.saver import Saver
from megatron_mea.outputs import replace_file
from megatron_mea.run_folder import RunFolder
from megatron_mea.training.callbacks import Callback, TrainedStep

_SECONDS = 5.0
"""Seconds between two heartbeats at least, but where a checkpoint was saved or the run ends."""


class Heartbeat(Callback):
    """A small file that rank 0 replaces as the run proceeds: step, time, and the newest of some measurements.

    Args:
        rank: of this process.
        step, steps: step after which the run begins; its last one.
        saver: of the run's checkpoints.
    """

    def __init__(self, *, folder: RunFolder, rank: int, step: int, steps: int, saver: Saver) -> None:
        self._path, self._rank, self._saver = folder.heartbeat, rank, saver
        self._step, self._written_at = step, 0.0
        self._facts: dict[str, Any] = {"steps": steps, "save_seconds": None}

    def on_step_end(self, trained: TrainedStep) -> None:
        self._step = trained.step
        self._facts |= {
            key: trained.record.row[key] for key in ("loss", "tokens_per_second") if key in trained.record.row
        }
        if trained.due.save or time.monotonic() - self._written_at >= _SECONDS:
            self._write()

    def on_close(self) -> None:
        self._write()

    def _write(self) -> None:
        if self._rank != 0:
            return

        self._written_at = time.monotonic()
        self._facts["save_seconds"] = self._saver.seconds
        job = {"job": os.environ["SLURM_JOB_ID"]} if "SLURM_JOB_ID" in os.environ else {}
        content = {"step": self._step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **self._facts, **job}

        # A heartbeat does not end a run: on a full disk metrics and checkpoints raise.
        with contextlib.suppress(OSError):
            replace_file(self._path, json.dumps(content) + "\n")
