"""What the ranks of each group send one another in a training step.

The bytes of a call are those of the tensor handed to all_reduce and send, of the output of all_gather and of the
input of reduce_scatter: the whole, of which a ring moves (n - 1) / n (all_reduce: twice). Scalars (norms, losses,
flags) and validation are left out, and groups of one rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_mea.cluster.setting import LocalParameter, Setting, Stage

Group = Literal["tensor", "data", "pipeline"]

BUCKET = 500_000_000
"""Numbers in a bucket of gradients at most (training/engine.py)."""
REUSE_DISTANCE = 1_000_000_000
"""ZeRO 3 keeps gathered parameters that are used again within so many: `stage3_max_reuse_distance`."""
PERSISTENT = 100_000
"""ZeRO 3 keeps parameters whole up to this size: `stage3_param_persistence_threshold`."""


@dataclass(frozen=True)
class Traffic:
    """`count` calls of a collective in a step of one rank of `stage`, with `bytes` of payload in all."""

    stage: int
    group: Group
    collective: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Call:
    """One call, or `count` calls that carry `bytes` together."""

    group: Group
    collective: str
    bytes: int
    count: int = 1


def communication(setting: Setting) -> list[Traffic]:
    """Of a step of tensor rank 0 of every stage."""
    rows = []
    for stage in setting.stages:
        counts: Counter[tuple[Group, str]] = Counter()
        sizes: Counter[tuple[Group, str]] = Counter()
        for times, calls in (
            (setting.layout.micro_batches, _micro_batch(setting, stage)),
            (1, _step(setting, stage)),
        ):
            for call in calls:
                counts[call.group, call.collective] += times * call.count
                sizes[call.group, call.collective] += times * call.bytes
        rows += [Traffic(stage.index, *key, counts[key], sizes[key]) for key in counts]
    return rows


def _micro_batch(setting: Setting, stage: Stage) -> Iterator[Call]:
    layout = setting.layout
    if layout.tensor > 1:
        yield from _tensor(setting, stage)
    if setting.teacher:
        yield from _teacher(setting.teacher, setting.teacher.stages[stage.index])
    if layout.pipeline > 1:
        hidden = setting.tokens // setting.sequence_parts * setting.model.hidden_size * setting.number_bytes
        if not stage.has_head:
            yield Call("pipeline", "send", hidden)
            # Position ids travel beside the hidden states.
            yield Call("pipeline", "send", setting.tokens * 8)
        if not stage.has_embedding:
            yield Call("pipeline", "send", hidden)
    if layout.data > 1 and setting.zero_stage > 1:
        yield from _reduce_gradients(setting, stage)
        if setting.zero_stage == 3:
            yield from _gather_parameters(setting, stage)


def _step(setting: Setting, stage: Stage) -> Iterator[Call]:
    layout, size = setting.layout, setting.number_bytes
    if layout.tensor > 1:
        for layer in stage.blocks:
            yield from _head_calls(setting, layer, once_a_step=True)
    if layout.pipeline > 1 and setting.model.tie_word_embeddings and (stage.has_embedding or stage.has_head):
        # Gradients of the two copies, which bfloat16 runs hold in float32; then the one copy becomes the other.
        yield Call("pipeline", "all_reduce", setting.vocabulary * setting.model.hidden_size * 4)
        yield Call("pipeline", "broadcast", setting.vocabulary * setting.model.hidden_size * size)
    if layout.data == 1:
        return
    if setting.zero_stage == 1:
        yield from _reduce_gradients(setting, stage)
    if setting.zero_stage < 3:
        # One of decayed and one of exempt parameters.
        yield Call("data", "all_gather", stage.size * size, 2)
        return
    for parameter in stage.parameters:
        if parameter.size <= PERSISTENT:
            yield Call("data", "all_gather", _padded(parameter, layout.data) * size)


def _tensor(setting: Setting, stage: Stage) -> Iterator[Call]:
    """Forward and backward pass of a micro-batch over a tensor group (parallel/collectives.py)."""
    tokens, size = setting.tokens, setting.number_bytes
    if stage.has_embedding:
        yield from _leave(setting)
    for layer in stage.blocks:
        yield from block_calls(setting, layer)
    if stage.has_head:
        yield from _enter(setting)
        if setting.sequence_parts > 1:
            yield Call("tensor", "all_reduce", setting.model.hidden_size * size)
        # Largest logit, sum of exponentials and target logit of each token.
        chunks = -(-tokens // setting.chunk)
        yield Call("tensor", "all_reduce", 3 * tokens * 4, 3 if chunks == 1 else 2 * chunks)


def block_calls(setting: Setting, layer: int) -> Iterator[Call]:
    """Of one block's forward and backward pass, with what it recomputes."""
    model, size = setting.model, setting.number_bytes
    for _ in ("attention", "feed-forward"):
        yield from _enter(setting)
        yield from _leave(setting)
        if setting.sequence_parts > 1:
            # The norm in front has seen a part of the tokens.
            yield Call("tensor", "all_reduce", model.hidden_size * size)
    gains = [model.head_dim] * (2 * model.qk_norm)
    gains += [model.output_dim] * (model.has_head_norm and model.head_norm_affine)
    # lambda of differential heads is made of four vectors.
    gains += [model.head_dim] * (4 * (model.attention_variant == "differential"))
    if gains:
        yield Call("tensor", "all_reduce", sum(gains) * size, len(gains))
    yield from _head_calls(setting, layer, once_a_step=False)
    if setting.recomputes:
        # Recomputation ends with the last tensor that is needed, which lies in front of the last `leave`.
        if setting.sequence_parts > 1:
            yield Call("tensor", "all_gather", 2 * _hidden(setting), 2)
            yield Call("tensor", "reduce_scatter", _hidden(setting))
        else:
            yield Call("tensor", "all_reduce", _hidden(setting))
        yield from _gathered_heads(setting, layer, again=True)


def _teacher(setting: Setting, stage: Stage) -> Iterator[Call]:
    """A forward pass of the teacher and the divergence from it; `setting` is the teacher's own."""
    if setting.layout.tensor > 1:
        # What goes into a region or comes out of it meets half of the calls of `_enter` and `_leave`.
        regions = 2 * len(stage.blocks)
        if setting.sequence_parts > 1:
            into, out = regions + stage.has_head, regions + stage.has_embedding
            yield Call("tensor", "all_gather", into * _hidden(setting), into)
            yield Call("tensor", "reduce_scatter", out * _hidden(setting), out)
        else:
            out = regions + stage.has_embedding
            yield Call("tensor", "all_reduce", out * _hidden(setting), out)
        for layer in stage.blocks:
            yield from _gathered_heads(setting, layer)
        if stage.has_head:
            # Largest logits and sums of exponentials of both models, and the divergence of each token.
            yield Call("tensor", "all_reduce", 5 * setting.tokens * 4, 5)
    if setting.layout.pipeline > 1 and not stage.has_head:
        yield Call("pipeline", "send", _hidden(setting) // setting.sequence_parts)


def _gathered_heads(setting: Setting, layer: int, again: bool = False) -> Iterator[Call]:
    """What a forward pass of one block gathers of component heads; `again`: to recompute it."""
    for which in ("k", "v"):
        if again and setting.folds_outside and setting.projection(layer, which).form == "folded":
            continue
        yield from (call for call in _projection_calls(setting, layer, which) if call.collective == "all_gather")


def _head_calls(setting: Setting, layer: int, once_a_step: bool) -> Iterator[Call]:
    """Of a block's forward and backward pass, or of all micro-batches' together."""
    for which in ("k", "v"):
        shared = setting.folds_once_a_step and setting.projection(layer, which).form == "folded"
        if shared == once_a_step:
            yield from _projection_calls(setting, layer, which)


def _projection_calls(setting: Setting, layer: int, which: str) -> Iterator[Call]:
    """Component heads, as weights or activations, and the gradients of what every rank holds whole."""
    model, size, how = setting.model, setting.number_bytes, setting.projection(layer, which)
    rows = how.components * model.head_dim
    if how.form != "plain" and not how.own_columns:
        yield Call("tensor", "all_reduce", how.components * how.composites * size)
    if how.form == "plain" and how.own_columns:
        return
    bias = 1 if model.attention_bias else 0
    if not how.cut:
        yield Call("tensor", "all_reduce", rows * (model.hidden_size + bias) * size, 1 + bias)
    elif how.form == "combined":
        yield Call("tensor", "all_gather", rows * setting.tokens * size)
        yield Call("tensor", "reduce_scatter", rows * setting.tokens * size)
    else:
        yield Call("tensor", "all_gather", rows * (model.hidden_size + bias) * size, 1 + bias)
        yield Call("tensor", "reduce_scatter", rows * (model.hidden_size + bias) * size, 1 + bias)


def _hidden(setting: Setting) -> int:
    """Bytes of a micro-batch's hidden states."""
    return setting.tokens * setting.model.hidden_size * setting.number_bytes


def _enter(setting: Setting) -> Iterator[Call]:
    """Into a region: identity forward and all-reduce backward, or their sequence-parallel pair."""
    if setting.sequence_parts > 1:
        yield Call("tensor", "all_gather", _hidden(setting))
        yield Call("tensor", "reduce_scatter", _hidden(setting))
    else:
        yield Call("tensor", "all_reduce", _hidden(setting))


_leave = _enter
"""Out of a region: the same two calls, the other way round."""


def _reduce_gradients(setting: Setting, stage: Stage) -> Iterator[Call]:
    """Gradients over data parallelism, in the working precision (`communication_data_type`).

    ZeRO 1 once a step, 2 and 3 once a micro-batch. Of DeepSpeed's stages 1 and 2 both all-reduce whole buckets
    (`use_multi_rank_bucket_allreduce`); only stage 3 scatters.
    """
    size = setting.number_bytes
    if setting.zero_stage == 3:
        numbers = [_padded(parameter, setting.layout.data) for parameter in stage.parameters]
        yield Call("data", "reduce_scatter", sum(numbers) * size, _buckets(numbers))
    else:
        numbers = [parameter.size for parameter in stage.parameters]
        yield Call("data", "all_reduce", sum(numbers) * size, _buckets(numbers))


def _gather_parameters(setting: Setting, stage: Stage) -> Iterator[Call]:
    """ZeRO 3, each micro-batch: parameters that are not kept whole come in for the forward pass.

    They come in again for the backward pass where it is further than `REUSE_DISTANCE` away: parameters that have
    half of that behind them. Coalesced calls carry up to 5e7 numbers (`stage3_prefetch_bucket_size`).
    """
    behind, numbers = 0, 0
    for parameter in reversed(stage.parameters):
        if parameter.size > PERSISTENT:
            again = 2 * behind >= REUSE_DISTANCE
            numbers += _padded(parameter, setting.layout.data) * (1 + again)
        behind += parameter.size
    if numbers:
        yield Call("data", "all_gather", numbers * setting.number_bytes, 1 + numbers // 50_000_000)


def _padded(parameter: LocalParameter, parts: int) -> int:
    """Numbers of a parameter in equal parts."""
    return -(-parameter.size // parts) * parts


def _buckets(numbers: Iterable[int]) -> int:
    """How many buckets hold gradients of these sizes in this order."""
    count, filled = 0, BUCKET
    for size in numbers:
        if filled + size > BUCKET:
            count, filled = count + 1, 0
        filled += size
    return count
