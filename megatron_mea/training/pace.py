"""How fast each rank is: the time of its own forward pass, since a whole step lasts as long on the fastest rank."""

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

SLOW = 1.25
"""Times the median of its stage, at which a rank is an outlier."""
_NOISE = 0.02
"""Seconds above the median that say nothing yet."""


class Pace:
    """Times the forward passes of this rank's part of the model, and compares the ranks.

    Waiting for other stages and for the gradients of other data ranks is not in it. The ranks of a tensor group wait
    for one another within a forward pass, and with ZeRO 3 all do: then a slow one shows as a slow group.

    Args:
        model: this rank's part; its `run` is wrapped.
        grid: where this rank stands.
        device: of this rank.
        mark: called for every pass, of validation too.
    """

    def __init__(self, model: Decoder, grid: Grid, device: torch.device, mark: Callable[[], None]) -> None:
        self._model, self._device, self._mark = model, device, mark
        # As many as are worth keeping when rows are rare.
        self._times: deque[Callable[[], float]] = deque(maxlen=1000)
        self._slow: set[int] = set()
        self._named: set[int] = set()
        self._hosts: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
        dist.all_gather_object(self._hosts, (socket.gethostname(), grid.pipeline_rank))
        model.run = self._timed(model.run)

    def report(self) -> tuple[dict[str, float], list[str]]:
        """Seconds of a forward pass since the last call, over the ranks, and lines that name outliers; collective.

        Returns:
            scalars for the metrics: `forward_seconds_min`, `_median` and `_max`.
            a line for each rank that is an outlier now and was one at the last call too, but not before.
        """
        seconds = [time() for time in self._times]
        self._times.clear()
        mine = torch.tensor([statistics.fmean(seconds) if seconds else 0.0], dtype=torch.float64, device=self._device)
        found = [torch.zeros_like(mine) for _ in self._hosts]
        dist.all_gather(found, mine)
        everyone = torch.cat(found).tolist()
        outliers = find_outliers(everyone, [stage for _, stage in self._hosts])
        lines = [
            f"rank {rank} on {self._hosts[rank][0]} takes {ratio:.2f} times the median for a forward pass "
            f"({everyone[rank]:.4g} s): a slow GPU or node"
            for rank, ratio in outliers.items()
            if rank in self._slow and rank not in self._named
        ]
        self._named = (self._named | self._slow) & outliers.keys()
        self._slow = set(outliers)
        spread = {"min": min(everyone), "median": statistics.median(everyone), "max": max(everyone)}
        return {f"forward_seconds_{name}": value for name, value in spread.items()}, lines

    def _timed(self, run: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(run)
        def timed(*arguments: Any) -> Any:
            self._mark()
            if not self._model.training:
                return run(*arguments)
            if self._device.type == "cuda":
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                result = run(*arguments)
                end.record()
                # A step has ended by the time that it is asked for, and with it the events.
                self._times.append(lambda: begin.elapsed_time(end) / 1000)
                return result
            start = time.perf_counter()
            result = run(*arguments)
            seconds = time.perf_counter() - start
            self._times.append(lambda: seconds)
            return result

        return timed


def find_outliers(seconds: list[float], stages: list[int]) -> dict[int, float]:
    """The ranks that take much longer than the median of their stage, with the ratio to it.

    Args:
        seconds: of a forward pass, by rank.
        stages: of the pipeline, by rank; they hold different layers.
    """
    medians = {
        stage: statistics.median(s for s, other in zip(seconds, stages, strict=True) if other == stage)
        for stage in set(stages)
    }
    return {
        rank: each / medians[stage]
        for rank, (each, stage) in enumerate(zip(seconds, stages, strict=True))
        if each > SLOW * medians[stage] and each - medians[stage] > _NOISE
    }
