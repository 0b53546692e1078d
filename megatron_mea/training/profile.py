"""Traces of a few training steps, for chrome://tracing, Perfetto or TensorBoard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_mea.config.schema import Profile
from megatron_mea.outputs import disk_errors
from megatron_mea.run_folder import RunFolder
from megatron_mea.training.callbacks import Callback, TrainedStep
from megatron_mea.training.distributed import SAVE_MINUTES
from megatron_mea.training.watchdog import Watchdog


class Profiler(Callback):
    """Records `settings.steps` steps from `settings.start` on, and writes them to RUN_DIR/profile.

    One rank of every pipeline stage records, since the others do the same work.

    Args:
        settings: the section `logging.profile`; None records nothing.
        rank: of this process; None on ranks that record nothing.
        watchdog: given more time for writing.
        log: prints a line, on rank 0.
    """

    def __init__(
        self,
        *,
        settings: Profile | None,
        folder: RunFolder,
        rank: int | None,
        watchdog: Watchdog,
        log: Callable[[str], None],
    ) -> None:
        is_recorder = settings is not None and rank is not None
        self._steps = range(settings.start, settings.start + settings.steps) if is_recorder else range(0)
        self._dir, self._rank, self._watchdog, self._log = folder.profile, rank, watchdog, log
        self._profile: profile | None = None

    def on_step_begin(self, step: int) -> None:
        if self._profile is None and step in self._steps:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._first_step, self._profile = step, profile(activities=activities)
            self._profile.start()

    def on_update(self, trained: TrainedStep) -> None:
        if self._profile is not None and (trained.due.last or trained.step == self._steps[-1]):
            with self._watchdog.extend_timeout(SAVE_MINUTES):
                path = self._write(self._profile, trained.step)

            self._profile = None
            self._log(f"wrote a trace: {path}")

    def _write(self, recorded: profile, step: int) -> Path:
        """Ends recording and writes the trace.

        Raises:
            RunError: the file cannot be written.
        """
        if torch.cuda.is_available():
            torch.cuda.synchronize()

        recorded.stop()
        path = self._dir / f"steps_{self._first_step:08d}-{step:08d}_rank_{self._rank}.json.gz"
        with disk_errors(path):
            self._dir.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(path))

        return path
