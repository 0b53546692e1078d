"""Memory of a rank: what it holds during the full run, and the peaks within a step.

DeepSpeed 0.19.8 as parallel/zero.py configures it, from its sources: `runtime/zero/stage_1_and_2.py` (ZeRO 1 and 2),
`runtime/bf16_optimizer.py` (ZeRO 1 in bfloat16) and `runtime/zero/stage3.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mea.attention.core import FLOAT32
from megatron_mea.config.schema import Model
from megatron_mea.optimizers import MASTER_BYTES
from megatron_mea.parallel.zero import PERSISTENCE_THRESHOLD, REUSE_DISTANCE, bucket_elements
from megatron_mea.plan.activations import (
    context_backward,
    feed_forward_temporaries,
    recomputed_activations,
    stage_activations,
    step_folds,
)
from megatron_mea.plan.workload import StageShard, Workload

_BF16_BYTES = 2


def cache_bytes_per_token(model: Model) -> int:
    """Bytes of a token's keys and values in all layers of the exported model's cache, in bfloat16.

    With `qk_norm` a float32 number for each composite head is beside the keys.
    """
    scalars = FLOAT32 * model.num_key_value_heads if model.qk_norm else 0
    widths = [model.component_width(layer, side) for layer in range(model.num_hidden_layers) for side in ("k", "v")]
    return _BF16_BYTES * sum(widths) + scalars * model.num_hidden_layers


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank of a pipeline stage: the one that holds most.

    Args:
        stage: index of the pipeline stage.
        weights: in the parameter dtype; with ZeRO 3 this rank's partition.
        gradients: what is held between micro-batches.
        master_and_moments: float32 weights and the optimizer's state.
        activations: saved for backward by all micro-batches in flight, and those of one block that are recomputed.
        logits: the loss and its gradient, on the last stage.
        buffers: buckets of gradients, and with ZeRO 3 the parameters that are gathered.
        peak_forward_backward: the peak of forward and backward passes beyond weights, gradients, master and moments:
            activations, with logits and buffers, or with the larger of the two where they never exist at once.
        peak_update: the peak beyond the same while gradients are averaged and weights updated; buffers included,
            activations and logits are freed by then.
        teacher: its weights in the parameter dtype, with every ZeRO stage.
    """

    stage: int
    weights: int
    gradients: int
    master_and_moments: int
    activations: int
    logits: int
    buffers: int
    peak_forward_backward: int
    peak_update: int
    teacher: int = 0

    @property
    def total(self) -> int:
        """The peak of a step."""
        at_rest = self.weights + self.gradients + self.master_and_moments + self.teacher
        return at_rest + max(self.peak_forward_backward, self.peak_update)


def stage_memory(workload: Workload, stage: StageShard) -> Memory:
    """Memory of the rank of a pipeline stage that holds most."""
    in_flight = min(workload.dims.pp - stage.index, workload.dims.num_micro_batches)
    microbatch_bytes = stage_activations(workload, stage)
    saved_bytes = in_flight * microbatch_bytes + step_folds(workload, stage)
    recomputed_bytes = max((recomputed_activations(workload, layer) for layer in stage.blocks), default=0)

    temporary_bytes = max((feed_forward_temporaries(workload, layer) for layer in stage.blocks), default=0)
    backward_bytes = recomputed_bytes + temporary_bytes
    if workload.dims.cp > 1:
        backward_bytes = max([backward_bytes, *(context_backward(workload, layer) for layer in stage.blocks)])
    logits_bytes = loss_activations(workload, stage)
    buffer_bytes, peak_update = _buffers_and_update_peak(workload, stage)

    # A bucket comes with the first gradient of a backward pass, after the loss. ZeRO 2 frees it after each pass.
    dims = workload.dims
    bucket_stays = dims.shards_parameters or (dims.zero_stage == 1 and dims.num_micro_batches > 1)
    if bucket_stays:
        peak_forward_backward = saved_bytes + max(logits_bytes, backward_bytes) + buffer_bytes
    else:
        peak_forward_backward = saved_bytes + max(logits_bytes, backward_bytes + buffer_bytes)

    if in_flight == workload.dims.num_micro_batches > 1:
        # All activations exist before the first gradient does, and gradients come as the first micro-batch's are freed.
        peak_forward_backward -= min(stage.local_numel * workload.element_bytes, microbatch_bytes)

    weights, gradients, master_and_moments = _model_states(workload, stage)
    teacher = workload.teacher.stages[stage.index].local_numel * workload.element_bytes if workload.teacher else 0
    return Memory(
        stage=stage.index,
        weights=weights,
        gradients=gradients,
        master_and_moments=master_and_moments,
        activations=saved_bytes + recomputed_bytes,
        logits=logits_bytes,
        buffers=buffer_bytes,
        peak_forward_backward=peak_forward_backward,
        peak_update=peak_update,
        teacher=teacher,
    )


def loss_activations(workload: Workload, stage: StageShard) -> int:
    """Bytes of the loss of a micro-batch, in float32: log-probabilities, their gradient and that of the logits.

    Over a tensor group, which computes the loss itself: logits, shifted logits and exponentials. In chunks: the logits
    of one and their log-probabilities, and the gradients of the matrix and of the hidden states. With a teacher
    the divergence takes most: both models' log-probabilities and the teacher's probabilities, while both models' logits
    exist, in bfloat16 a float32 copy of the model's own, and what cross-entropy saves: one tensor of their shape, or
    two over a tensor group.
    """
    if not stage.has_head:
        return 0

    element_bytes = workload.element_bytes
    logits_numel = workload.tokens * workload.local_vocab_size
    if workload.teacher is not None:
        num_saved = (2 if workload.dims.tp > 1 else 1) + (element_bytes < FLOAT32)
        return (3 + num_saved) * logits_numel * FLOAT32 + 2 * logits_numel * element_bytes

    if workload.loss_chunk_tokens == workload.tokens:
        return 3 * logits_numel * FLOAT32

    hidden = workload.model.hidden_size
    chunk_bytes = workload.loss_chunk_tokens * workload.local_vocab_size * (FLOAT32 + element_bytes)
    # The matrix gradient is summed in float32; a bfloat16 run rounds it into a second tensor.
    rounded_bytes = element_bytes if element_bytes < FLOAT32 else 0
    matrix_gradient_bytes = workload.local_vocab_size * hidden * (FLOAT32 + rounded_bytes)
    return chunk_bytes + matrix_gradient_bytes + workload.tokens * hidden * element_bytes


def _model_states(workload: Workload, stage: StageShard) -> tuple[int, int, int]:
    """Bytes of the weights, of the gradients, and of master weights with moments."""
    element_bytes, local_numel = workload.element_bytes, stage.local_numel
    partition_numel = local_numel / workload.dims.dp_cp
    accumulates = workload.dims.num_micro_batches > 1

    if workload.dims.shards_parameters:
        persistent = sum(p.local_numel for p in stage.parameters if p.local_numel <= PERSISTENCE_THRESHOLD)
        weights = int((partition_numel + persistent) * element_bytes)
        # A float32 run updates its partition in place: that is the master.
        master_bytes = MASTER_BYTES * local_numel if element_bytes == FLOAT32 else 0
        return weights, int(partition_numel * element_bytes), (stage.state_bytes - master_bytes) // workload.dims.dp_cp

    if workload.dims.zero_stage == 2:
        gradients = partition_numel * FLOAT32 if accumulates or element_bytes < FLOAT32 else 0
    elif element_bytes < FLOAT32:
        # Accumulated in float32, beside autograd's own.
        gradients = local_numel * (FLOAT32 + element_bytes)
    else:
        gradients = local_numel * FLOAT32 if accumulates else 0

    return local_numel * element_bytes, int(gradients), stage.state_bytes // workload.dims.dp_cp


def _buffers_and_update_peak(workload: Workload, stage: StageShard) -> tuple[int, int]:
    """Bytes of the buffers of forward and backward, and the peak of reduction and update beyond what is at rest."""
    dims, element_bytes, local_numel = workload.dims, workload.element_bytes, stage.local_numel
    partition_numel = local_numel / dims.dp_cp
    bucket_bytes = bucket_elements(local_numel) * element_bytes
    # This rank's gradients as one tensor, and torch's Adam, which allocates two temporaries where it is not fused.
    adam_bytes = partition_numel * FLOAT32 * (1 if workload.device == "cuda" else 3)

    if workload.dims.shards_parameters:
        partitioned = [p.local_numel for p in stage.parameters if p.local_numel > PERSISTENCE_THRESHOLD]
        gathered_bytes = min(sum(partitioned), REUSE_DISTANCE // 2 + max(partitioned, default=0)) * element_bytes
        # A bucket is reordered in a copy, which the scattered parts hold until the next micro-batch's exist.
        bucket_copies = bucket_bytes * (2 if dims.num_micro_batches > 1 else 1)
        buffers = int(gathered_bytes + bucket_copies)
        return buffers, int(bucket_bytes + max(gathered_bytes + bucket_bytes, adam_bytes))

    if workload.dims.zero_stage == 1 and element_bytes < FLOAT32:
        # Both parameter groups as one tensor where they fit a bucket, and rounded to be sent.
        if local_numel == bucket_elements(local_numel):
            rounded_bytes = local_numel * (FLOAT32 + element_bytes)
        else:
            rounded_bytes = local_numel * element_bytes
        return 0, int(max(rounded_bytes, adam_bytes))

    # A bucket is sent from a copy, and this rank's partition is received into a buffer of its own.
    copy_bytes = bucket_bytes if dims.dp_cp > 1 else 0
    reduced_bytes = copy_bytes + partition_numel * element_bytes
    if workload.dims.zero_stage == 2:
        # One bucket is filled while the other one is averaged.
        peak_update = max(2 * bucket_bytes + reduced_bytes, partition_numel * element_bytes + adam_bytes)
        return 2 * bucket_bytes, int(peak_update)

    # Gradients move into the bucket: those of several micro-batches count at rest already.
    at_rest_bytes = local_numel * element_bytes if dims.num_micro_batches > 1 else 0
    # In a pipeline DeepSpeed adds a bucket to the one that the passes have allocated.
    buckets_bytes = bucket_bytes * (2 if dims.pp > 1 else 1)
    reducing_bytes = buckets_bytes + local_numel * element_bytes - bucket_bytes + reduced_bytes
    # During the update other ranks' gradients are still in the bucket.
    updating_bytes = copy_bytes + partition_numel * element_bytes + adam_bytes
    return bucket_bytes, int(max(reducing_bytes, updating_bytes) - at_rest_bytes)
