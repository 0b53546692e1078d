"""Which samples a rank trains on in a step."""

from __future__ import annotations

import numpy as np

from megatron_mea.config import Config


def rank_samples(step: int, config: Config, rank: int, data_parallel_size: int) -> np.ndarray:
    """The sample numbers of one data-parallel rank in step `step` (from 1): (micro-batches, micro_batch_size).

    The global batch is dealt out micro-batch by micro-batch, so its samples do not depend on the layout.
    """
    training = config.training
    first = (step - 1) * training.global_batch_size
    samples = first + np.arange(training.global_batch_size)
    return samples.reshape(-1, data_parallel_size, training.micro_batch_size)[:, rank]
