"""Finds slow ranks by the time of their own forward passes, since a full step takes equally long on all ranks."""

from __future__ import annotations

import socket
import statistics
import time
from collections import deque
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist

from megatron_mea.model.decoder import Decoder
from megatron_mea.parallel.grid import Grid
from megatron_mea.training.callbacks import Callback, TrainedStep
from megatron_mea.training.clock import AwakeClock

SLOW_RATIO = 1.25
"""A rank is a straggler above this multiple of the median of its pipeline stage."""
_NOISE_SECONDS = 0.02
"""Seconds above the median up to which a rank is no straggler: too short to tell from noise."""


class StragglerDetector(Callback):
    """Times the forward passes of this rank's part of the model, and compares the ranks.

    The time excludes waiting for other stages and for the gradients of other data ranks. The ranks of a tensor or
    context group wait for one another within a forward pass, and with ZeRO 3 all do: then a slow rank shows as a slow
    group. A pass in which this process was suspended is left out.

    Args:
        model: this rank's part; its `forward_hidden` is wrapped.
        grid: coordinates of this rank.
        device: of this rank.
        on_forward: called before every forward pass, of validation too.
        clock: which counts when this process was suspended.
    """

    def __init__(
        self, *, model: Decoder, grid: Grid, device: torch.device, on_forward: Callable[[], None], clock: AwakeClock
    ) -> None:
        self._model, self._device, self._on_forward, self._clock = model, device, on_forward, clock
        # The newest passes suffice where metrics are rare.
        self._timings: deque[Callable[[], float]] = deque(maxlen=1000)
        self._outliers: set[int] = set()
        self._reported: set[int] = set()
        self._hosts_and_stages: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
        dist.all_gather_object(self._hosts_and_stages, (socket.gethostname(), grid.pipeline_rank))
        model.forward_hidden = self._time_calls(model.forward_hidden)

    def on_log(self, trained: TrainedStep) -> list[str]:
        scalars, warnings = self.report()
        trained.record.row.update(scalars)
        return warnings

    def report(self) -> tuple[dict[str, float], list[str]]:
        """Compares the mean time of a forward pass since the last call between the ranks; collective.

        Returns:
            scalars for the metrics, in seconds: `forward_seconds_min`, `_median` and `_max`.
            a line for each rank that is an outlier now and was one at the last call too, but not before.
        """
        durations = [timing() for timing in self._timings]
        self._timings.clear()

        mean = statistics.fmean(durations) if durations else 0.0
        local_seconds = torch.tensor([mean], dtype=torch.float64, device=self._device)
        gathered = [torch.zeros_like(local_seconds) for _ in self._hosts_and_stages]
        dist.all_gather(gathered, local_seconds)
        seconds = torch.cat(gathered).tolist()

        outliers = find_stragglers(seconds, [stage for _, stage in self._hosts_and_stages])
        lines = [
            f"rank {rank} on {self._hosts_and_stages[rank][0]} takes {ratio:.2f} times the median for a forward pass "
            f"({seconds[rank]:.4g} s): a slow GPU or node"
            for rank, ratio in outliers.items()
            if rank in self._outliers and rank not in self._reported
        ]
        self._reported = (self._reported | self._outliers) & outliers.keys()
        self._outliers = set(outliers)

        spread = {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds)}
        return {f"forward_seconds_{name}": value for name, value in spread.items()}, lines

    def _time_calls(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def timed_forward(*args: Any, **kwargs: Any) -> Any:
            self._on_forward()
            if not self._model.training:
                return forward(*args, **kwargs)

            stops, stop_timer = self._clock.stops, self._start_timer()
            result = forward(*args, **kwargs)
            timing = stop_timer()
            if self._clock.stops == stops:
                self._timings.append(timing)

            return result

        return timed_forward

    def _start_timer(self) -> Callable[[], Callable[[], float]]:
        """Starts a timer; the result stops it, and returns a function for its seconds at the end of a step."""
        if self._device.type != "cuda":
            start = time.perf_counter()

            def stop() -> Callable[[], float]:
                seconds = time.perf_counter() - start
                return lambda: seconds

            return stop

        start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start_event.record()

        def record_end() -> Callable[[], float]:
            end_event.record()
            # By the end of the step the device has passed both events.
            return lambda: start_event.elapsed_time(end_event) / 1000

        return record_end


def find_stragglers(seconds: list[float], stages: list[int]) -> dict[int, float]:
    """Ranks that take much longer than the median of their pipeline stage, with the ratio to it.

    Args:
        seconds: of a forward pass, by rank.
        stages: pipeline stage, by rank; stages hold different layers, so each has its own median.
    """
    medians = {
        stage: statistics.median(s for s, other in zip(seconds, stages, strict=True) if other == stage)
        for stage in set(stages)
    }
    return {
        rank: duration / medians[stage]
        for rank, (duration, stage) in enumerate(zip(seconds, stages, strict=True))
        if duration > SLOW_RATIO * medians[stage] and duration - medians[stage] > _NOISE_SECONDS
    }
