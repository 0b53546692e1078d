"""Training and validation batches of a rank, and a thread that reads them ahead of the trainer."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from megatron_mea.config import Config
from megatron_mea.data.corpora import Batch, Corpora
from megatron_mea.errors import UserError
from megatron_mea.parallel.grid import ContextGroup, Grid

PREFETCH_DEPTH = 2
"""Items that are ready at most."""

Item = TypeVar("Item")


@dataclass
class DataStallTimer:
    """Seconds for which the trainer of this rank has waited for data, by `clock`."""

    clock: Callable[[], float] = time.monotonic
    seconds: float = 0.0

    def max_over_ranks(self, device: torch.device) -> float:
        """Seconds since the last call, of the rank that has waited longest; collective.

        Args:
            device: of this rank.
        """
        seconds = torch.tensor(self.seconds, dtype=torch.float64, device=device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        self.seconds = 0.0
        return seconds.item()


class Prefetcher(Generic[Item]):
    """Iterates over `items` once, while a thread reads the next ones; `close` ends the thread.

    Args:
        items: iterated in the thread.
        stall_timer: counts the time for which an item was not ready.
    """

    def __init__(self, items: Iterable[Item], stall_timer: DataStallTimer) -> None:
        self._items, self._stall_timer = items, stall_timer
        self._ready: queue.Queue[Item | BaseException] = queue.Queue(PREFETCH_DEPTH)
        self._stop = threading.Event()
        # A daemon does not keep a failing process from ending.
        self._thread = threading.Thread(target=self._read, name="data", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        """The items in order; raises here what their iteration raises in the thread."""
        while True:
            start = self._stall_timer.clock()
            item = self._ready.get()
            self._stall_timer.seconds += self._stall_timer.clock() - start

            if isinstance(item, StopIteration):
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Ends the thread, whether or not all items were read."""
        self._stop.set()
        self._thread.join()

    def _read(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    return
            self._put(StopIteration())
        except BaseException as error:
            self._put(error)

    def _put(self, item: Item | BaseException) -> bool:
        """Puts an item into the queue once there is room; False where `close` was called first."""
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass

        return False


def to_device(batch: Batch, *, device: torch.device, cp: ContextGroup) -> tuple[torch.Tensor, ...]:
    """This rank's token ids (batch, seq / c), the position ids of all tokens (batch, seq), and this rank's targets."""
    input_ids, position_ids, targets = map(torch.tensor, (batch.input_ids, batch.position_ids, batch.targets))
    tensors = [cp.shard(input_ids, dim=1), position_ids, cp.shard(targets, dim=1)]
    if device.type == "cuda":
        # From pinned memory the copy is asynchronous.
        tensors = [tensor.pin_memory() for tensor in tensors]

    return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)


@dataclass(frozen=True, kw_only=True)
class StepData:
    """This rank's micro-batches of a step.

    Args:
        samples: (micro-batches, micro_batch_size) sample numbers.
        num_targets: of the global batch, over all ranks.
    """

    step: int
    samples: np.ndarray
    batches: list[Batch]
    num_targets: int

    def hashes(self) -> list[list[str]]:
        """A digest of every sample, by micro-batch."""
        return [
            [
                hashlib.sha256(ids.tobytes() + targets.tobytes()).hexdigest()[:16]
                for ids, targets in zip(batch.input_ids, batch.targets, strict=True)
            ]
            for batch in self.batches
        ]


def training_steps(*, corpora: Corpora, config: Config, grid: Grid, first: int) -> Iterator[StepData]:
    """Data of this rank for the steps from `first` to the last of the configuration.

    Raises:
        UserError: an id is beyond the vocabulary, or a global batch has nothing to predict.
    """
    batch_size = config.training.global_batch_size
    for step in range(first, config.steps + 1):
        samples = rank_samples(step=step, config=config, rank=grid.data_rank, data_parallel_size=grid.dims.dp)
        batches = [corpora.batch(micro_batch) for micro_batch in samples]

        num_targets = corpora.count_targets((step - 1) * batch_size + np.arange(batch_size))
        if num_targets == 0:
            got = f"documents of one token alone in step {step}"
            raise UserError(where=corpora.key, got=got, expected="a global batch with a token to predict")

        yield StepData(step=step, samples=samples, batches=batches, num_targets=num_targets)


def validation_batches(*, corpora: Corpora, config: Config, grid: Grid) -> Iterator[Batch]:
    """This rank's micro-batches of the first `evaluation.batches` global batches.

    Raises:
        UserError: an id is beyond the vocabulary.
    """
    for step in range(1, config.evaluation.batches + 1):
        samples = rank_samples(step=step, config=config, rank=grid.data_rank, data_parallel_size=grid.dims.dp)
        for micro_batch in samples:
            yield corpora.batch(micro_batch)


def rank_samples(*, step: int, config: Config, rank: int, data_parallel_size: int) -> np.ndarray:
    """Sample numbers of a data-parallel rank in step `step` (from 1): (micro-batches, micro_batch_size).

    Ranks take micro-batches of the global batch in turn, so its samples do not depend on the layout.
    """
    training = config.training
    first = (step - 1) * training.global_batch_size
    samples = first + np.arange(training.global_batch_size)
    return samples.reshape(-1, data_parallel_size, training.micro_batch_size)[:, rank]
