"""Traces of a few steps, for chrome://tracing, Perfetto or TensorBoard."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_mea.config.schema import Profile
from megatron_mea.outputs import written

FOLDER = "profile"


class Profiler:
    """Records `settings.steps` steps from `settings.start` on, and writes them to RUN_DIR/profile.

    One rank of every pipeline stage records, since the others do the same work.

    Args:
        settings: None records nothing.
        rank: of this process; None where another records.
    """

    def __init__(self, settings: Profile | None, run_dir: Path, rank: int | None) -> None:
        records = settings is not None and rank is not None
        self._steps = range(settings.start, settings.start + settings.steps) if records else range(0)
        self._dir, self._rank = run_dir / FOLDER, rank
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Called before every step."""
        if self._profile is None and step in self._steps:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._first, self._profile = step, profile(activities=activities)
            self._profile.start()

    def after(self, step: int, last: bool) -> Path | None:
        """Called after every step; the file that was written, where this was the last to be recorded.

        Args:
            last: no step follows.

        Raises:
            RunError: the file cannot be written.
        """
        if self._profile is None or not (last or step == self._steps[-1]):
            return None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profile.stop()
        path = self._dir / f"steps_{self._first:08d}-{step:08d}_rank_{self._rank}.json.gz"
        with written(path):
            self._dir.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(path))
        self._profile = None
        return path
