"""Lines that a training prints, with its rate and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from megatron_mea.config import Config


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
                *([f"fullest expert {max(row['expert_load']):.2f} x mean"] if "expert_load" in row else []),
                f"lr {row['lr']:.3g}",
                f"grad norm {row['grad_norm']:.3g}",
                f"{row['tokens_per_second']:,.0f} tokens/s",
                f"{f'{days} d ' if days else ''}{time_left} left",
            ]

        if "validation_loss" in row:
            parts.append(f"validation loss {row['validation_loss']:.4f}")

        self.log(" | ".join(parts))
