"""Collectives and sends of a training step, by process group.

The bytes of a call are those of the tensor handed to all_reduce and send, of the output of all_gather and of the
input of reduce_scatter: the full tensor, of which a ring moves (n - 1) / n (all_reduce: twice). Scalars (norms, losses,
flags) and validation are left out, and groups of one rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_mea.config.schema import Side
from megatron_mea.parallel.zero import (
    PERSISTENCE_THRESHOLD,
    PREFETCH_BUCKET_ELEMENTS,
    REUSE_DISTANCE,
    bucket_elements,
)
from megatron_mea.plan.activations import gathered_kv_bytes
from megatron_mea.plan.workload import LocalParameter, StageShard, Workload

Group = Literal["tensor", "context", "data", "pipeline"]
"""The data group has all ranks that hold the same parameters: data x context."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """`count` calls of a collective by one rank of pipeline stage `stage` in a step, `bytes` of payload in all."""

    stage: int
    group: Group
    collective: str
    count: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Call:
    """`count` calls of a collective that carry `bytes` together."""

    group: Group
    collective: str
    bytes: int
    count: int = 1


def communication_per_step(workload: Workload) -> list[Traffic]:
    """Traffic of a step of tensor rank 0 of every pipeline stage."""
    rows = []
    for stage in workload.stages:
        counts: Counter[tuple[Group, str]] = Counter()
        sizes: Counter[tuple[Group, str]] = Counter()
        for repeats, calls in (
            (workload.dims.num_micro_batches, _micro_batch_calls(workload, stage)),
            (1, _step_calls(workload, stage)),
        ):
            for call in calls:
                counts[call.group, call.collective] += repeats * call.count
                sizes[call.group, call.collective] += repeats * call.bytes

        rows += [
            Traffic(stage=stage.index, group=group, collective=collective, count=count, bytes=sizes[group, collective])
            for (group, collective), count in counts.items()
        ]

    return rows


def _micro_batch_calls(workload: Workload, stage: StageShard) -> Iterator[Call]:
    """Calls that every micro-batch repeats."""
    dims = workload.dims
    if dims.tp > 1:
        yield from _tensor_parallel_calls(workload, stage)
    if dims.cp > 1:
        for layer in stage.blocks:
            yield from _context_calls(workload, layer)
    if workload.teacher:
        yield from _teacher_calls(workload.teacher, workload.teacher.stages[stage.index])

    if dims.pp > 1:
        local_tokens = workload.tokens // workload.dims.sequence_shards
        hidden_bytes = local_tokens * workload.model.hidden_size * workload.element_bytes
        if not stage.has_head:
            yield Call(group="pipeline", collective="send", bytes=hidden_bytes)
            # Position ids travel beside the hidden states, those of all context ranks.
            yield Call(group="pipeline", collective="send", bytes=workload.full_tokens * 8)
        if not stage.has_embedding:
            yield Call(group="pipeline", collective="send", bytes=hidden_bytes)

    if dims.dp_cp > 1 and workload.dims.zero_stage > 1:
        yield from _reduce_gradients(workload, stage)
        if workload.dims.shards_parameters:
            yield from _gather_parameters(workload, stage)


def _step_calls(workload: Workload, stage: StageShard) -> Iterator[Call]:
    """Calls that a step makes once."""
    dims, element_bytes = workload.dims, workload.element_bytes
    if dims.tp > 1:
        for layer in stage.blocks:
            yield from _kv_calls(workload=workload, layer=layer, once_per_step=True)

    if dims.pp > 1 and workload.model.tie_word_embeddings and (stage.has_embedding or stage.has_head):
        # Gradients of the two copies, which bfloat16 runs hold in float32; then one copy overwrites the other.
        embedding_numel = workload.local_vocab_size * workload.model.hidden_size
        yield Call(group="pipeline", collective="all_reduce", bytes=embedding_numel * 4)
        yield Call(group="pipeline", collective="broadcast", bytes=embedding_numel * element_bytes)

    if dims.dp_cp == 1:
        return
    if workload.dims.zero_stage == 1:
        yield from _reduce_gradients(workload, stage)

    if not workload.dims.shards_parameters:
        # One call for parameters with weight decay, one for those without.
        yield Call(group="data", collective="all_gather", bytes=stage.local_numel * element_bytes, count=2)
        return

    for parameter in stage.parameters:
        if parameter.local_numel <= PERSISTENCE_THRESHOLD:
            padded_numel = _padded_numel(parameter, dims.dp_cp)
            yield Call(group="data", collective="all_gather", bytes=padded_numel * element_bytes)


def _tensor_parallel_calls(workload: Workload, stage: StageShard) -> Iterator[Call]:
    """Calls of a micro-batch's forward and backward pass over a tensor group (parallel/collectives.py)."""
    tokens, element_bytes = workload.tokens, workload.element_bytes
    if stage.has_embedding:
        yield from _exit_tp_region(workload)

    for layer in stage.blocks:
        yield from block_calls(workload, layer)

    if stage.has_head:
        yield from _enter_tp_region(workload)
        if workload.dims.sequence_shards > 1:
            # The gain of the norm in front, whose gradient covers a shard of the tokens.
            yield Call(group="tensor", collective="all_reduce", bytes=workload.model.hidden_size * element_bytes)

        # Largest logit, sum of exponentials and target logit of each token.
        chunks = -(-tokens // workload.loss_chunk_tokens)
        count = 3 if chunks == 1 else 2 * chunks
        yield Call(group="tensor", collective="all_reduce", bytes=3 * tokens * 4, count=count)


def block_calls(workload: Workload, layer: int) -> Iterator[Call]:
    """Calls of one block's forward and backward pass over a tensor group, including those that it recomputes."""
    model, element_bytes = workload.model, workload.element_bytes
    for _ in ("attention", "feed-forward"):
        yield from _enter_tp_region(workload)
        yield from _exit_tp_region(workload)
        if workload.dims.sequence_shards > 1:
            # The gain of the norm in front, whose gradient covers a shard of the tokens.
            yield Call(group="tensor", collective="all_reduce", bytes=model.hidden_size * element_bytes)

    gains = [model.head_dim] * (2 * model.qk_norm)
    gains += [model.output_dim] * (model.has_head_norm and model.head_norm_affine)
    replicated = [*gains, *workload.core_attention.replicated_parameters(model)]
    if replicated:
        yield Call(
            group="tensor", collective="all_reduce", bytes=sum(replicated) * element_bytes, count=len(replicated)
        )

    if model.is_routed(layer):
        # The router's weight, whose gradient is partial: a rank uses the weights of its own experts alone.
        router_numel = model.num_experts * model.hidden_size
        yield Call(group="tensor", collective="all_reduce", bytes=router_numel * element_bytes)

    yield from _kv_calls(workload=workload, layer=layer, once_per_step=False)
    if workload.full_recompute:
        # Recomputation ends with the last tensor that is needed, which comes before the last `exit_tp_region`.
        if workload.dims.sequence_shards > 1:
            yield Call(group="tensor", collective="all_gather", bytes=2 * _hidden_bytes(workload), count=2)
            yield Call(group="tensor", collective="reduce_scatter", bytes=_hidden_bytes(workload))
        else:
            yield Call(group="tensor", collective="all_reduce", bytes=_hidden_bytes(workload))
        yield from _component_gathers(workload=workload, layer=layer, recompute=True)


def _context_calls(workload: Workload, layer: int) -> Iterator[Call]:
    """Calls of one block's forward and backward pass over a context group, including those that it recomputes."""
    yield from _kv_gathers(workload, layer)
    scattered_bytes = sum(gathered_kv_bytes(workload=workload, layer=layer, side=side) for side in ("k", "v"))
    yield Call(group="context", collective="reduce_scatter", bytes=scattered_bytes, count=2)
    if workload.full_recompute or workload.selective_recompute:
        yield from _kv_gathers(workload, layer)

    training = workload.config.training
    if workload.model.is_routed(layer) and training.balance != "batch":
        # How often each sequence has chosen each expert, int64.
        count_bytes = training.micro_batch_size * workload.model.num_experts * 8
        passes = 2 if workload.full_recompute else 1
        yield Call(group="context", collective="all_reduce", bytes=passes * count_bytes, count=passes)


def _kv_gathers(workload: Workload, layer: int) -> Iterator[Call]:
    """All-gathers of one block's keys and values over a context group."""
    gathered_bytes = sum(gathered_kv_bytes(workload=workload, layer=layer, side=side) for side in ("k", "v"))
    yield Call(group="context", collective="all_gather", bytes=gathered_bytes, count=2)


def _teacher_calls(workload: Workload, stage: StageShard) -> Iterator[Call]:
    """Calls of a teacher's forward pass and of the divergence from it; `workload` is the teacher's."""
    if workload.dims.tp > 1:
        # Without a backward pass a region makes half of the calls of `_enter_tp_region` and `_exit_tp_region`.
        regions = 2 * len(stage.blocks)
        exits = regions + stage.has_embedding
        if workload.dims.sequence_shards > 1:
            entries = regions + stage.has_head
            yield Call(group="tensor", collective="all_gather", bytes=entries * _hidden_bytes(workload), count=entries)
            yield Call(group="tensor", collective="reduce_scatter", bytes=exits * _hidden_bytes(workload), count=exits)
        else:
            yield Call(group="tensor", collective="all_reduce", bytes=exits * _hidden_bytes(workload), count=exits)

        for layer in stage.blocks:
            yield from _component_gathers(workload, layer)

        if stage.has_head:
            # Largest logits and sums of exponentials of both models, and the divergence of each token.
            yield Call(group="tensor", collective="all_reduce", bytes=5 * workload.tokens * 4, count=5)

    if workload.dims.cp > 1:
        for layer in stage.blocks:
            yield from _kv_gathers(workload, layer)

    if workload.dims.pp > 1 and not stage.has_head:
        yield Call(group="pipeline", collective="send", bytes=_hidden_bytes(workload) // workload.dims.sequence_shards)


def _component_gathers(workload: Workload, layer: int, *, recompute: bool = False) -> Iterator[Call]:
    """All-gathers of component heads in one block's forward pass, or in its recomputation."""
    for side in ("k", "v"):
        saved = workload.folds_outside_recompute and workload.kv_projection(layer, side).form == "folded"
        if recompute and saved:
            continue
        calls = _kv_projection_calls(workload=workload, layer=layer, side=side)
        yield from (call for call in calls if call.collective == "all_gather")


def _kv_calls(*, workload: Workload, layer: int, once_per_step: bool) -> Iterator[Call]:
    """Calls for a block's keys and values that a step makes once, or those that every micro-batch makes."""
    for side in ("k", "v"):
        shared = workload.folds_once_per_step and workload.kv_projection(layer, side).form == "folded"
        if shared == once_per_step:
            yield from _kv_projection_calls(workload=workload, layer=layer, side=side)


def _kv_projection_calls(*, workload: Workload, layer: int, side: Side) -> Iterator[Call]:
    """Calls for component heads, as weights or activations, and for gradients of what every rank holds in full."""
    model, element_bytes = workload.model, workload.element_bytes
    projection = workload.kv_projection(layer, side)
    component_width = projection.component_width
    if projection.form != "plain" and not projection.shards_composites:
        yield Call(group="tensor", collective="all_reduce", bytes=projection.hlc_numel * element_bytes)
    if projection.form == "plain" and projection.shards_composites:
        return

    bias = 1 if model.attention_bias else 0
    weight_bytes = component_width * (model.hidden_size + bias) * element_bytes
    if not projection.sharded:
        yield Call(group="tensor", collective="all_reduce", bytes=weight_bytes, count=1 + bias)
    elif projection.form in ("combined", "components"):
        activation_bytes = component_width * workload.tokens * element_bytes
        yield Call(group="tensor", collective="all_gather", bytes=activation_bytes)
        yield Call(group="tensor", collective="reduce_scatter", bytes=activation_bytes)
    else:
        yield Call(group="tensor", collective="all_gather", bytes=weight_bytes, count=1 + bias)
        yield Call(group="tensor", collective="reduce_scatter", bytes=weight_bytes, count=1 + bias)


def _hidden_bytes(workload: Workload) -> int:
    """Bytes of a micro-batch's hidden states, before sequence parallelism shards them."""
    return workload.tokens * workload.model.hidden_size * workload.element_bytes


def _enter_tp_region(workload: Workload) -> Iterator[Call]:
    """Calls of `enter_tp_region`: identity forward and all-reduce backward, or their sequence-parallel pair."""
    if workload.dims.sequence_shards > 1:
        yield Call(group="tensor", collective="all_gather", bytes=_hidden_bytes(workload))
        yield Call(group="tensor", collective="reduce_scatter", bytes=_hidden_bytes(workload))
    else:
        yield Call(group="tensor", collective="all_reduce", bytes=_hidden_bytes(workload))


_exit_tp_region = _enter_tp_region
"""Calls of `exit_tp_region`: the same, with forward and backward exchanged."""


def _reduce_gradients(workload: Workload, stage: StageShard) -> Iterator[Call]:
    """Calls that average gradients over data and context ranks, in the parameter dtype (`communication_data_type`).

    ZeRO 1 once a step, 2 and 3 once a micro-batch. DeepSpeed's stages 1 and 2 both all-reduce full buckets
    (`use_multi_rank_bucket_allreduce`); only stage 3 scatters.
    """
    numels = [parameter.local_numel for parameter in stage.parameters]
    num_buckets = _num_buckets(numels, bucket_elements(stage.local_numel))
    collective = "all_reduce"
    if workload.dims.shards_parameters:
        collective = "reduce_scatter"
        numels = [_padded_numel(parameter, workload.dims.dp_cp) for parameter in stage.parameters]

    yield Call(group="data", collective=collective, bytes=sum(numels) * workload.element_bytes, count=num_buckets)


def _gather_parameters(workload: Workload, stage: StageShard) -> Iterator[Call]:
    """Calls with which ZeRO 3 gathers the partitioned parameters in each micro-batch.

    It gathers them for the forward pass, and again for the backward pass where that is further than `REUSE_DISTANCE`
    away: parameters that have half of that after them. Coalesced calls carry up to `PREFETCH_BUCKET_ELEMENTS`.
    """
    later_numel, gathered_numel = 0, 0
    for parameter in reversed(stage.parameters):
        if parameter.local_numel > PERSISTENCE_THRESHOLD:
            gathers = 2 if 2 * later_numel >= REUSE_DISTANCE else 1
            gathered_numel += _padded_numel(parameter, workload.dims.dp_cp) * gathers
        later_numel += parameter.local_numel

    if gathered_numel:
        yield Call(
            group="data",
            collective="all_gather",
            bytes=gathered_numel * workload.element_bytes,
            count=1 + gathered_numel // PREFETCH_BUCKET_ELEMENTS,
        )


def _padded_numel(parameter: LocalParameter, partitions: int) -> int:
    """Elements of a parameter, padded so that it splits into equal partitions."""
    return -(-parameter.local_numel // partitions) * partitions


def _num_buckets(numels: Iterable[int], size: int) -> int:
    """How many buckets of `size` elements hold gradients of these sizes in this order."""
    count, filled = 0, size
    for numel in numels:
        if filled + numel > size:
            count, filled = count + 1, 0
        filled += numel

    return count
