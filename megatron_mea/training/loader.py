"""What a rank trains on, step by step, read ahead of the trainer by a thread."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_mea.config import Config
from megatron_mea.data.corpora import Batch, Corpora
from megatron_mea.errors import UserError
from megatron_mea.parallel.grid import Grid

AHEAD = 2
"""Steps that lie ready at most."""


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


class Loader:
    """Iterates over the steps from `first` to the last of the configuration.

    Attributes:
        waited: seconds that the trainer has waited here for data.
    """

    def __init__(self, corpora: Corpora, config: Config, grid: Grid, first: int) -> None:
        self.waited = 0.0
        self._corpora, self._config, self._grid = corpora, config, grid
        self._ready: queue.Queue[StepData | BaseException] = queue.Queue(AHEAD)
        self._stop = threading.Event()
        # A daemon does not keep a failing process from ending.
        self._thread = threading.Thread(target=self._read, args=(first,), name="data", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[StepData]:
        """Raises what reading raised, UserError for ids beyond the vocabulary."""
        while True:
            begin = time.monotonic()
            data = self._ready.get()
            self.waited += time.monotonic() - begin
            if isinstance(data, StopIteration):
                return
            if isinstance(data, BaseException):
                raise data
            yield data

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _read(self, first: int) -> None:
        try:
            for step in range(first, self._config.steps + 1):
                if not self._put(self._load(step)):
                    return
            self._put(StopIteration())
        except BaseException as error:
            self._put(error)

    def _load(self, step: int) -> StepData:
        grid, training = self._grid, self._config.training
        mine = rank_samples(step, self._config, grid.data_rank, grid.data_size)
        everybody = (step - 1) * training.global_batch_size + np.arange(training.global_batch_size)
        batches = [self._corpora.batch(micro) for micro in mine]
        targets = self._corpora.targets(everybody)
        if targets == 0:
            raise UserError("data.document_mask", "documents of one token", "a global batch with a token to predict")
        return StepData(step, mine, batches, targets)

    def _put(self, item: StepData | BaseException) -> bool:
        """Whether somebody still wants it."""
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False


def rank_samples(step: int, config: Config, rank: int, data_parallel_size: int) -> np.ndarray:
    """The sample numbers of one data-parallel rank in step `step` (from 1): (micro-batches, micro_batch_size).

    The global batch is dealt out micro-batch by micro-batch, so its samples do not depend on the layout.
    """
    training = config.training
    first = (step - 1) * training.global_batch_size
    samples = first + np.arange(training.global_batch_size)
    return samples.reshape(-1, data_parallel_size, training.micro_batch_size)[:, rank]
