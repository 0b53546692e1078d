"""Trackers: where the numbers of a run also go, beside its own record. TensorBoard is one.

To add one, write a subclass of `Tracker` and give it a row in `TRACKERS`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megatron_mea.config.schema import Logging
from megatron_mea.errors import shorten
from megatron_mea.run_folder import RunFolder

if TYPE_CHECKING:
    import torch


class Tracker:
    """Receives what a run logs, on rank 0 between two steps. A method that a subclass leaves out does nothing.

    A method that raises, or ends its program (SystemExit), costs the run its tracker and nothing else. One that waits
    makes the run wait.
    """

    def open(self, *, run: RunFolder, settings: Logging, step: int | None) -> bool | None:
        """Called before the other methods, once; returns False where `settings` do not want it: no other is called.

        Args:
            settings: the section `logging`.
            step: the step after which the run resumes; later ones may have been logged before. None: it begins anew.
        """

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Losses, rates and times of a logged step or validation, by name."""

    def tensors(self, values: Mapping[str, torch.Tensor], step: int) -> None:
        """Statistics of heads at a validation, by name; on the CPU, not to be changed."""

    def text(self, name: str, text: str, step: int) -> None:
        """A text about the run at its start: `config`, the resolved configuration and the versions of packages."""

    def close(self) -> None:
        """Called when the run stops as planned, or as asked."""


class TensorBoard(Tracker):
    """Event files in the run folder, with `logging.tensorboard`."""

    def open(self, *, run: RunFolder, settings: Logging, step: int | None) -> bool:
        if settings.tensorboard or run.tensorboard.exists():
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(run.tensorboard, purge_step=0 if step is None else step + 1)
            if not settings.tensorboard:
                # The purge is on disk, for a later run that writes here again.
                self._writer.close()

        return settings.tensorboard

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def tensors(self, values: Mapping[str, torch.Tensor], step: int) -> None:
        for name, tensor in values.items():
            self._writer.add_tensor(name, tensor, step)

    def text(self, name: str, text: str, step: int) -> None:
        # A block of code in Markdown.
        self._writer.add_text(name, textwrap.indent(text, "    "), step)

    def close(self) -> None:
        self._writer.close()


TRACKERS: dict[str, type[Tracker]] = {"TensorBoard": TensorBoard}
"""A row a tracker, by the name that a warning gives it."""
_FAILURES = (Exception, SystemExit)
"""A client may end its program; the messages of its exceptions may raise as well."""


class Trackers:
    """The trackers of a run that its configuration wants; one that raises is warned of, and not called again.

    Args:
        log: prints a line.
    """

    def __init__(self, *, run: RunFolder, settings: Logging, step: int | None, log: Callable[[str], None]) -> None:
        self._log = log
        self._trackers: dict[str, Tracker] = {}
        for name, tracker_class in TRACKERS.items():
            with self._dropped_on_failure(name):
                tracker = tracker_class()
                if tracker.open(run=run, settings=settings, step=step) is not False:
                    self._trackers[name] = tracker

    def for_each(self, call: Callable[[Tracker], None]) -> None:
        """Calls `call` with each tracker."""
        for name, tracker in list(self._trackers.items()):
            with self._dropped_on_failure(name):
                call(tracker)

    @contextmanager
    def _dropped_on_failure(self, name: str) -> Iterator[None]:
        try:
            yield
        except _FAILURES as error:
            self._trackers.pop(name, None)
            try:
                reason = shorten(error)
            except _FAILURES:
                reason = type(error).__name__
            self._log(f"warning: tracker {name} failed, and gets nothing more of this run: {reason}")
