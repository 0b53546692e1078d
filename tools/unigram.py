"""Cross-entropy of a unigram model, which a language model must beat:  python tools/unigram.py TRAIN VALIDATION

Both are prefixes of prepared data. Token frequencies are counted on TRAIN with one added to each count.
"""

import sys

import numpy as np

from megatron_mea.data.indexed import IndexedReader


def unigram_loss(train: np.ndarray, validation: np.ndarray) -> float:
    """Mean of -ln p over `validation` (tokens,), p from the counts of `train` (tokens,); nats a token."""
    size = int(max(train.max(), validation.max())) + 1
    counts = np.bincount(train, minlength=size) + 1
    return float(-np.log(counts / counts.sum())[validation[1:]].mean())


if __name__ == "__main__":
    prefixes = sys.argv[1:]
    if len(prefixes) != 2:
        sys.exit(__doc__)
    print(f"unigram model:  {unigram_loss(*(IndexedReader(prefix).tokens[:] for prefix in prefixes)):.4f}")
