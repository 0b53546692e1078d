"""The sizes with which DeepSpeed's ZeRO runs: the engine sets them, and `plan` counts with them."""

from __future__ import annotations

from typing import Any

REUSE_DISTANCE = 1_000_000_000
"""ZeRO 3 keeps gathered parameters that are reused within so many elements."""
PERSISTENCE_THRESHOLD = 100_000
"""ZeRO 3 never partitions parameters of up to so many elements."""
PREFETCH_BUCKET_ELEMENTS = 50_000_000
"""Elements that ZeRO 3 gathers in a call at most."""
_MAX_BUCKET_ELEMENTS = 500_000_000


def bucket_elements(num_elements: int) -> int:
    """Elements of a bucket of gradients on a rank that holds so many elements of parameters.

    It is allocated at full size, 2 GB, were it not for the bound.
    """
    return min(_MAX_BUCKET_ELEMENTS, num_elements)


def zero_optimization(*, stage: int, num_elements: int) -> dict[str, Any]:
    """DeepSpeed's section `zero_optimization` for a rank that holds so many elements of parameters."""
    return {
        "stage": stage,
        "reduce_bucket_size": bucket_elements(num_elements),
        # Averages gradients during the backward pass. ZeRO 1 averages after the last backward pass of a
        # step, which DeepSpeed's bfloat16 optimizer and its pipeline do not overlap.
        "overlap_comm": stage >= 2,
        "stage3_max_reuse_distance": REUSE_DISTANCE,
        "stage3_param_persistence_threshold": PERSISTENCE_THRESHOLD,
        "stage3_prefetch_bucket_size": PREFETCH_BUCKET_ELEMENTS,
    }
