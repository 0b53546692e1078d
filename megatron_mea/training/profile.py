"""Traces of a few training steps, for chrome://tracing, Perfetto or TensorBoard."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_mea.config.schema import Profile
from megatron_mea.outputs import disk_errors
from megatron_mea.run_folder import RunFolder


class Profiler:
    """Records `settings.steps` steps from `settings.start` on, and writes them to RUN_DIR/profile.

    One rank of every pipeline stage records, since the others do the same work.

    Args:
        settings: the section `logging.profile`; None records nothing.
        rank: of this process; None on ranks that record nothing.
    """

    def __init__(self, *, settings: Profile | None, run_dir: Path, rank: int | None) -> None:
        is_recorder = settings is not None and rank is not None
        self._steps = range(settings.start, settings.start + settings.steps) if is_recorder else range(0)
        self._dir, self._rank = RunFolder(run_dir).profile, rank
        self._profile: profile | None = None

    def start_step(self, step: int) -> None:
        """Called before every step; starts the profiler before the first one to be recorded."""
        if self._profile is None and step in self._steps:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._first_step, self._profile = step, profile(activities=activities)
            self._profile.start()

    def end_step(self, step: int, *, last: bool) -> Path | None:
        """Called after every step; writes the trace after the last one to be recorded.

        Args:
            last: no step follows.

        Returns:
            the trace, where one was written.

        Raises:
            RunError: the file cannot be written.
        """
        if self._profile is None or not (last or step == self._steps[-1]):
            return None

        if torch.cuda.is_available():
            torch.cuda.synchronize()

        self._profile.stop()
        path = self._dir / f"steps_{self._first_step:08d}-{step:08d}_rank_{self._rank}.json.gz"
        with disk_errors(path):
            self._dir.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(path))

        self._profile = None
        return path
