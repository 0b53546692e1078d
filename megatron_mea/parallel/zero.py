"""DeepSpeed's configuration; `plan` counts with the sizes of ZeRO that it sets."""

from __future__ import annotations

from typing import Any

from megatron_mea.config.parallel_dims import ParallelDims
from megatron_mea.config.schema import Config

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


def deepspeed_config(*, config: Config, dims: ParallelDims, num_elements: int) -> dict[str, Any]:
    """DeepSpeed's configuration, for a model of `num_elements` parameters on this rank."""
    training = config.training
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": dims.num_micro_batches,
        "gradient_clipping": config.optimizer.grad_clip,
        "zero_optimization": _zero_optimization(stage=dims.zero_stage, num_elements=num_elements),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        # Every tensor rank sends its activations to the next stage; sequence parallelism has sharded them already.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }
    if training.precision == "bf16":
        settings["bf16"] = {"enabled": True}
        if not dims.shards_parameters:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}

    return settings


def _zero_optimization(*, stage: int, num_elements: int) -> dict[str, Any]:
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
