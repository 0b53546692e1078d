"""How evenly documents spread the work of attention over the ranks of a context group."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_mea.attention.document_mask import visible_pairs
from megatron_mea.config.parallel_dims import ParallelDims
from megatron_mea.config.schema import Config
from megatron_mea.data.corpora import Corpora
from megatron_mea.errors import RunError, UserError

_MAX_SAMPLES = 64
_MAX_TOKENS = 1 << 24
"""Samples and tokens whose documents are looked at; a micro-batch at least."""


@dataclass(frozen=True, kw_only=True)
class AttentionBalance:
    """Work of attention, in visible pairs of a query and a key, over the ranks of a context group.

    Args:
        busiest_over_mean: the ranks wait in every layer for the busiest of a micro-batch: its work over their mean;
            None where the data cannot be read.
        basis: which documents that is true of.
    """

    busiest_over_mean: float | None
    basis: str


def attention_balance(config: Config, dims: ParallelDims) -> AttentionBalance:
    """The balance for the documents of a run's first samples; even where each window is one document (zigzag)."""
    if not config.data.document_mask:
        return AttentionBalance(busiest_over_mean=1.0, basis="windows of one document")

    data = config.data
    try:
        corpora = Corpora(
            corpora=data.train,
            seq_length=data.seq_length,
            vocab_size=config.model.vocab_size,
            seed=config.training.seed,
            key="data.train",
            document_mask=True,
        )
        return _balance_of_first_samples(corpora, config, cp_size=dims.cp)
    except (UserError, RunError) as error:
        return AttentionBalance(busiest_over_mean=None, basis=" ".join(str(error).split()))


def _balance_of_first_samples(corpora: Corpora, config: Config, *, cp_size: int) -> AttentionBalance:
    micro_batch_size = config.training.micro_batch_size
    num_samples = min(_MAX_SAMPLES, _MAX_TOKENS // corpora.seq_length, config.steps * config.training.global_batch_size)
    num_micro_batches = max(1, num_samples // micro_batch_size)
    samples = np.arange(num_micro_batches * micro_batch_size).reshape(num_micro_batches, micro_batch_size)
    positions = (torch.from_numpy(corpora.position_ids(micro_batch)) for micro_batch in samples)
    pairs = [visible_pairs(position_ids, document_mask=True, cp_size=cp_size) for position_ids in positions]
    # shape: (micro-batches, c, micro-batch) -> (micro-batches, c)
    work = torch.stack(pairs).sum(2).double()
    return AttentionBalance(
        busiest_over_mean=float(work.amax(1).sum() / work.mean(1).sum()), basis=f"the first {samples.size} samples"
    )
