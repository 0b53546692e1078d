"""Memory of a rank: what lies there during the whole run, and what comes and goes within a step.

DeepSpeed 0.19.8 as training/engine.py sets it up, from its sources: `runtime/zero/stage_1_and_2.py` (ZeRO 1 and 2),
`runtime/bf16_optimizer.py` (ZeRO 1 in bfloat16) and `runtime/zero/stage3.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mea.cluster.activations import FLOAT32, recomputed_activations, stage_activations, step_folds
from megatron_mea.cluster.communication import BUCKET, PERSISTENT, REUSE_DISTANCE
from megatron_mea.cluster.setting import Setting, Stage


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank of a pipeline stage: the one that holds most.

    Args:
        stage: number of the pipeline stage.
        weights: the working copy; with ZeRO 3 this rank's part.
        gradients: what is held between micro-batches.
        master_and_moments: float32 weights and Adam's two moments.
        activations: kept for the backward pass, of all micro-batches in flight; a block's that is recomputed too.
        logits: the loss and its gradient, on the last stage.
        buffers: buckets of gradients, and with ZeRO 3 the parameters that are gathered.
        teacher: its weights in the working precision, with every ZeRO stage.
        passes: the peak of forward and backward passes beside the first three: activations, with logits and buffers,
            or with the larger of the two where they are not there at once.
        reduction: the peak beside the first three while gradients are averaged and weights updated; buffers included,
            activations and logits are gone.
    """

    stage: int
    weights: int
    gradients: int
    master_and_moments: int
    activations: int
    logits: int
    buffers: int
    passes: int
    reduction: int
    teacher: int = 0

    @property
    def total(self) -> int:
        """The peak of a step."""
        at_rest = self.weights + self.gradients + self.master_and_moments + self.teacher
        return at_rest + max(self.passes, self.reduction)


def memory(setting: Setting) -> list[Memory]:
    """Of one rank of every stage."""
    return [stage_memory(setting, stage) for stage in setting.stages]


def stage_memory(setting: Setting, stage: Stage) -> Memory:
    in_flight = min(setting.layout.pipeline - stage.index, setting.layout.micro_batches)
    one = stage_activations(setting, stage)
    kept = in_flight * one + step_folds(setting, stage)
    again = max((recomputed_activations(setting, layer) for layer in stage.blocks), default=0)
    # What the backward pass of a block makes: the gradients of both factors of its product, and those around the block.
    width = setting.model.intermediate_size // setting.layout.tensor + setting.model.hidden_size
    backward = again + 2 * setting.tokens * width * setting.number_bytes
    loss, (buffers, reduction) = logits(setting, stage), _buffers(setting, stage)
    # A bucket comes with the first gradient of a backward pass, after the loss. ZeRO 2 gives it back after each.
    stays = setting.zero_stage == 3 or (setting.zero_stage == 1 and setting.layout.micro_batches > 1)
    passes = kept + (max(loss, backward) + buffers if stays else max(loss, backward + buffers))
    if in_flight == setting.layout.micro_batches > 1:
        # All are there before the first gradient is, and gradients come as the activations of the first one go.
        passes -= min(stage.size * setting.number_bytes, one)
    teacher = setting.teacher.stages[stage.index].size * setting.number_bytes if setting.teacher else 0
    return Memory(stage.index, *_states(setting, stage), kept + again, loss, buffers, passes, reduction, teacher)


def logits(setting: Setting, stage: Stage) -> int:
    """Of the loss of a micro-batch, in float32: log-probabilities, their gradient and that of the logits.

    Over a tensor group, which computes the loss itself: logits, shifted logits and exponentials. In chunks: the logits
    of one and their log-probabilities, and the gradients of the matrix and of the hidden states. With a teacher
    the divergence takes most: both models' log-probabilities and the teacher's probabilities, while both models' logits
    are there, in bfloat16 a float32 copy of the model's own, and what cross-entropy keeps: one piece, or two of a
    group.
    """
    if not stage.has_head:
        return 0
    size = setting.number_bytes
    piece = setting.tokens * setting.vocabulary
    if setting.teacher is not None:
        kept = (2 if setting.layout.tensor > 1 else 1) + (size < FLOAT32)
        return (3 + kept) * piece * FLOAT32 + 2 * piece * size
    if setting.chunk == setting.tokens:
        return 3 * piece * FLOAT32
    hidden = setting.model.hidden_size
    one = setting.chunk * setting.vocabulary * (FLOAT32 + size)
    # A float32 gradient of the matrix is that sum itself.
    matrix = setting.vocabulary * hidden * (FLOAT32 + (size if size < FLOAT32 else 0))
    return one + matrix + setting.tokens * hidden * size


def _states(setting: Setting, stage: Stage) -> tuple[int, int, int]:
    """Weights, gradients, master and moments."""
    size, numbers = setting.number_bytes, stage.size
    mine = numbers / setting.layout.data
    several = setting.layout.micro_batches > 1
    if setting.zero_stage == 3:
        persistent = sum(p.size for p in stage.parameters if p.size <= PERSISTENT)
        # A float32 run updates its parts in place: they are the master.
        masters = 2 if size == FLOAT32 else 3
        return int((mine + persistent) * size), int(mine * size), int(masters * mine * FLOAT32)
    if setting.zero_stage == 2:
        gradients = mine * FLOAT32 if several or size < FLOAT32 else 0
    elif size < FLOAT32:
        # Accumulated in float32, beside autograd's own.
        gradients = numbers * (FLOAT32 + size)
    else:
        gradients = numbers * FLOAT32 if several else 0
    return numbers * size, int(gradients), int(3 * mine * FLOAT32)


def _buffers(setting: Setting, stage: Stage) -> tuple[int, int]:
    """Buffers of the passes, and the peak of reduction and update beside what is at rest."""
    layout, size, numbers = setting.layout, setting.number_bytes, stage.size
    mine = numbers / layout.data
    bucket = min(numbers, BUCKET) * size
    # This rank's gradients in one piece, and torch's Adam, which keeps two temporaries where it is not fused.
    update = mine * FLOAT32 * (1 if setting.device == "cuda" else 3)
    if setting.zero_stage == 3:
        whole = [p.size for p in stage.parameters if p.size > PERSISTENT]
        gathered = min(sum(whole), REUSE_DISTANCE // 2 + max(whole, default=0)) * size
        # A bucket is put in order in a copy, which the scattered parts hold until the next micro-batch's are there.
        buckets = bucket * (2 if layout.micro_batches > 1 else 1)
        return int(gathered + buckets), int(bucket + max(gathered + bucket, update))
    if setting.zero_stage == 1 and size < FLOAT32:
        # Both groups in one piece where they fit a bucket, and rounded for the way.
        rounded = numbers * (FLOAT32 + size) if numbers <= BUCKET else numbers * size
        return 0, int(max(rounded, update))
    # A bucket goes out in a copy, and what is this rank's comes into a buffer of its own.
    reduced = (bucket if layout.data > 1 else 0) + mine * size
    if setting.zero_stage == 2:
        # One bucket is filled while the other one is averaged.
        return 2 * bucket, int(max(2 * bucket + reduced, mine * size + update))
    # Gradients move into the bucket: those of several micro-batches count at rest already.
    counted = numbers * size if layout.micro_batches > 1 else 0
    # Under a pipeline DeepSpeed adds a bucket to the one that the passes have made.
    buckets = bucket * (2 if layout.pipeline > 1 else 1)
    moving = buckets + numbers * size - bucket + reduced
    # During the update other ranks' gradients still lie in the bucket.
    updating = (bucket if layout.data > 1 else 0) + mine * size + update
    return bucket, int(max(moving, updating) - counted)
