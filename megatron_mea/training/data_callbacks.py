"""Callbacks of the data: which samples a step had, and how long it waited for them."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_mea.parallel.grid import Grid
from megatron_mea.training.callbacks import Callback, TrainedStep
from megatron_mea.training.loader import DataStallTimer


class SampleHashes(Callback):
    """Adds `sample_hashes` to the metrics: a digest of every sample of the global batch, in its order."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def on_log(self, trained: TrainedStep) -> list[str]:
        hashes_by_rank: list[list[list[str]]] = [[]] * self._grid.dims.dp_cp
        group = self._grid.mpu.get_data_parallel_group()
        dist.all_gather_object(hashes_by_rank, trained.data.hashes(), group=group)
        # Data ranks take the micro-batches of a global batch in turn; the context ranks of each read the same.
        hashes_by_data_rank = hashes_by_rank[:: self._grid.dims.cp]
        trained.record.row["sample_hashes"] = [
            digest for turn in zip(*hashes_by_data_rank, strict=True) for micro_batch in turn for digest in micro_batch
        ]
        return []


class DataStall(Callback):
    """Adds `data_wait_seconds` to the metrics: the wait of the rank that has waited longest since the last row."""

    def __init__(self, timer: DataStallTimer, device: torch.device) -> None:
        self._timer, self._device = timer, device

    def on_log(self, trained: TrainedStep) -> list[str]:
        trained.record.row["data_wait_seconds"] = self._timer.max_over_ranks(self._device)
        return []
