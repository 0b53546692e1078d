"""What a rank trains and validates on, read ahead of the trainer by a thread."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from megatron_mea.config import Config
from megatron_mea.data.corpora import Batch, Corpora
from megatron_mea.errors import UserError
from megatron_mea.parallel.grid import Grid

AHEAD = 2
"""Items that lie ready at most."""

Item = TypeVar("Item")


@dataclass
class Waiting:
    """For how many seconds the trainer of this rank has waited for data."""

    seconds: float = 0.0

    def largest(self, device: torch.device) -> float:
        """The seconds since the last call, of the rank that has waited longest; collective.

        Args:
            device: of this rank.
        """
        seconds = torch.tensor(self.seconds, dtype=torch.float64, device=device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        self.seconds = 0.0
        return seconds.item()


class ReadAhead(Generic[Item]):
    """Iterates over `items` once, which a thread makes ready ahead of their use; `close` ends the thread.

    Args:
        items: made in the thread.
        waiting: counts the time for which an item was not ready.
    """

    def __init__(self, items: Iterable[Item], waiting: Waiting) -> None:
        self._items, self._waiting = items, waiting
        self._ready: queue.Queue[Item | BaseException] = queue.Queue(AHEAD)
        self._stop = threading.Event()
        # A daemon does not keep a failing process from ending.
        self._thread = threading.Thread(target=self._read, name="data", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        """Raises what making an item raised."""
        while True:
            begin = time.monotonic()
            item = self._ready.get()
            self._waiting.seconds += time.monotonic() - begin
            if isinstance(item, StopIteration):
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
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
        """Whether somebody still wants it."""
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False


@dataclass(frozen=True)
class StepData:
    """This rank's micro-batches of a step, the sample numbers in them (micro-batches, micro_batch_size), and the
    number of targets of the whole global batch."""

    step: int
    samples: np.ndarray
    batches: list[Batch]
    targets: int

    def hashes(self) -> list[list[str]]:
        """A digest of every window, by micro-batch."""
        return [
            [
                hashlib.sha256(ids.tobytes() + targets.tobytes()).hexdigest()[:16]
                for ids, targets in zip(batch.input_ids, batch.targets, strict=True)
            ]
            for batch in self.batches
        ]


def training_steps(corpora: Corpora, config: Config, grid: Grid, first: int) -> Iterator[StepData]:
    """The steps of this rank from `first` to the last of the configuration.

    Raises:
        UserError: an id is beyond the vocabulary, or a global batch has nothing to predict.
    """
    size = config.training.global_batch_size
    for step in range(first, config.steps + 1):
        mine = rank_samples(step, config, grid.data_rank, grid.data_size)
        batches = [corpora.batch(micro) for micro in mine]
        targets = corpora.targets((step - 1) * size + np.arange(size))
        if targets == 0:
            found = f"documents of one token alone in step {step}"
            raise UserError(corpora.key, found, "a global batch with a token to predict")
        yield StepData(step, mine, batches, targets)


def validation_batches(corpora: Corpora, config: Config, grid: Grid) -> Iterator[Batch]:
    """This rank's micro-batches of the first `evaluation.batches` global batches.

    Raises:
        UserError: an id is beyond the vocabulary.
    """
    for step in range(1, config.evaluation.batches + 1):
        for micro in rank_samples(step, config, grid.data_rank, grid.data_size):
            yield corpora.batch(micro)


def rank_samples(step: int, config: Config, rank: int, data_parallel_size: int) -> np.ndarray:
    """The sample numbers of one data-parallel rank in step `step` (from 1): (micro-batches, micro_batch_size).

    The global batch is dealt out micro-batch by micro-batch, so its samples do not depend on the layout.
    """
    training = config.training
    first = (step - 1) * training.global_batch_size
    samples = first + np.arange(training.global_batch_size)
    return samples.reshape(-1, data_parallel_size, training.micro_batch_size)[:, rank]
