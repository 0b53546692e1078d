"""Layouts: which sizes of the tensor, pipeline, context and data groups fit a configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from megatron_mea.config.parallel_dims import ParallelDims
from megatron_mea.config.schema import Config, Model
from megatron_mea.errors import Problem, UserError

_TENSOR_KEY, _PIPELINE_KEY = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
_CONTEXT_KEY = "parallel.context_parallel_size"
_MAX_WORLD_SIZES = 64
"""Most numbers of processes in a message."""
TEACHER_KEY = "training.distillation.teacher"


def check_layout(config: Config, world_size: int | None = None) -> ParallelDims:
    """The layout of a run on `world_size` processes; by default those of one copy of the model.

    Raises:
        UserError: no such layout is possible; the message ends with a table of the layouts that are.
    """
    parallel = config.parallel
    if world_size is None:
        model_size = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        world_size = model_size * parallel.context_parallel_size

    problems = list(_layout_problems(config, world_size))
    if problems:
        raise UserError.from_problems(problems, footer="\n".join(_layout_table(config, world_size)))

    return ParallelDims.from_config(config, world_size)


def possible_layouts(config: Config, world_size: int) -> list[ParallelDims]:
    """The layouts that `world_size` processes can have with this model and batch, and ZeRO 0 or 1.

    The sequence stays whole where `config` leaves it whole: splitting it is for those who ask for it.
    """
    replica_shapes, data_sizes = _possible_sizes(config)
    layouts = []
    for tensor, pipeline, context in replica_shapes:
        replica = tensor * pipeline * context
        if world_size % replica == 0 and world_size // replica in data_sizes:
            dims = ParallelDims.from_config(config, world_size, tp=tensor, pp=pipeline, cp=context)
            layouts.append(replace(dims, zero_stage=1))

    return layouts


def _possible_sizes(config: Config) -> tuple[list[tuple[int, int, int]], set[int]]:
    """The tensor, pipeline and context parallel sizes that work with this model, and the data parallel sizes.

    Few numbers, since a tensor group divides the heads, a context group the sequence and data ranks the micro-batches.
    """
    training = config.training
    tensor_sizes = [
        size for size in _divisors(config.model.num_attention_heads) if not any(_tensor_problems(config, size))
    ]
    pipeline_sizes = range(1, config.model.num_hidden_layers + 1)
    context_sizes = _divisors(config.data.seq_length) if config.parallel.context_parallel_size > 1 else [1]
    replica_shapes = [
        (tensor, pipeline, context)
        for tensor in tensor_sizes
        for pipeline in pipeline_sizes
        for context in context_sizes
        if not any(_sequence_problems(config=config, tensor=tensor, context=context))
    ]
    micro_batches = training.global_batch_size // training.micro_batch_size
    return replica_shapes, set(_divisors(micro_batches))


def _layout_problems(config: Config, world_size: int) -> Iterator[Problem]:
    parallel = config.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    context = parallel.context_parallel_size
    yield from _model_problems(config=config, tensor=tensor, pipeline=pipeline)
    yield from _sequence_problems(config=config, tensor=tensor, context=context)
    if pipeline > 1 and parallel.zero_stage > 1:
        expected = f"0 or 1 where {_PIPELINE_KEY} is above 1"
        yield Problem(where="parallel.zero_stage", got=parallel.zero_stage, expected=expected)

    sizes = {_TENSOR_KEY: tensor, _PIPELINE_KEY: pipeline} | ({_CONTEXT_KEY: context} if context > 1 else {})
    replica = math.prod(sizes.values())
    if world_size % replica:
        yield Problem(
            where=" x ".join(sizes),
            got=f"{' x '.join(map(str, sizes.values()))} on {world_size} processes",
            expected="a product that divides the number of processes",
        )
        return

    global_batch, micro_batch = config.training.global_batch_size, config.training.micro_batch_size
    data = world_size // replica
    if global_batch % (micro_batch * data):
        yield Problem(
            where="training.global_batch_size",
            got=global_batch,
            expected="a multiple of training.micro_batch_size x data-parallel size = "
            f"{micro_batch} x {data} = {micro_batch * data}",
        )


def check_teacher(config: Config, teacher: Model) -> None:
    """Checks that a model can teach the one of `config`, whose own layout has been checked before.

    Raises:
        UserError: the teacher has another vocabulary or a shorter context, or cannot be sharded on the layout.
    """
    distillation, parallel = config.training.distillation, config.parallel
    assert distillation is not None
    path, vocab_size, seq_length = distillation.teacher, config.model.vocab_size, config.data.seq_length

    problems = []
    if teacher.vocab_size != vocab_size:
        got = f"{path}, with vocab_size = {teacher.vocab_size}"
        expected = f"model.vocab_size = {vocab_size}: probabilities of the same ids"
        problems.append(Problem(where=TEACHER_KEY, got=got, expected=expected))

    if teacher.max_position_embeddings < seq_length:
        got = f"{path}, with max_position_embeddings = {teacher.max_position_embeddings}"
        problems.append(Problem(where=TEACHER_KEY, got=got, expected=f"at least data.seq_length = {seq_length}"))

    teacher_problems = _model_problems(
        config=config.model_copy(update={"model": teacher}),
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
    )
    for problem in teacher_problems:
        got = f"{path}, on {problem.where} = {problem.got}"
        problems.append(Problem(where=TEACHER_KEY, got=got, expected=problem.expected.replace("model.", "its ")))

    if problems:
        raise UserError.from_problems(problems)


def _model_problems(*, config: Config, tensor: int, pipeline: int) -> Iterator[Problem]:
    """Problems that do not depend on the number of processes."""
    yield from _tensor_problems(config, tensor)
    layers = config.model.num_hidden_layers
    if pipeline > layers:
        yield Problem(where=_PIPELINE_KEY, got=pipeline, expected=f"at most model.num_hidden_layers = {layers}")


def _tensor_problems(config: Config, size: int) -> Iterator[Problem]:
    """Tensor group sizes by which heads, features or vocabulary cannot be sharded (docs/parallelism.md)."""
    model = config.model
    parts = [("num_attention_heads", "query heads")]
    if len(model.routed_layers) < model.num_hidden_layers:
        parts.append(("intermediate_size", "features"))
    if model.num_experts:
        parts.append(("num_experts", "experts"))

    for key, unit in parts:
        value = getattr(model, key)
        if value % size:
            yield Problem(
                where=_TENSOR_KEY,
                got=size,
                expected=f"a divisor of model.{key} = {value}: ranks hold equal parts of the {unit}",
            )

    composites, variant = model.num_key_value_heads, model.variant
    if variant.combines_scores and size > 1:
        yield Problem(where=_TENSOR_KEY, got=size, expected=f"1: each head of `{variant.name}` needs the scores of all")

    if (group := variant.heads_per_output) > 1:
        for key in ("num_attention_heads", "num_key_value_heads"):
            if getattr(model, key) % (group * size):
                units = f"{getattr(model, key) // group}: heads whose outputs are one stay on a rank"
                yield Problem(where=_TENSOR_KEY, got=size, expected=f"a divisor of model.{key} / {group} = {units}")
    elif composites % size and size % composites:
        yield Problem(
            where=_TENSOR_KEY, got=size, expected=f"a divisor or a multiple of model.num_key_value_heads = {composites}"
        )

    if model.vocab_size < size * size:
        yield Problem(
            where="model.vocab_size", got=model.vocab_size, expected=f"at least {size * size} on {size} ranks"
        )

    if config.parallel.sequence_parallel and size == 1:
        yield Problem(where="parallel.sequence_parallel", got=True, expected=f"false where {_TENSOR_KEY} is 1")


def _sequence_problems(*, config: Config, tensor: int, context: int) -> Iterator[Problem]:
    """Sizes of the tensor and the context group by which a sequence cannot be sharded."""
    seq_length = config.data.seq_length
    if context > 1 and seq_length % (2 * context):
        yield Problem(
            where=_CONTEXT_KEY,
            got=context,
            expected=f"a number c such that 2 c divides data.seq_length = {seq_length}: two chunks a rank",
        )
        return

    if config.parallel.sequence_parallel and seq_length // context % tensor:
        sizes = f"{_TENSOR_KEY} = {tensor}" + (f" and {_CONTEXT_KEY} = {context}" if context > 1 else "")
        multiple = tensor if context == 1 else math.lcm(2 * context, context * tensor)
        yield Problem(where="data.seq_length", got=seq_length, expected=f"a multiple of {multiple} with {sizes}")


def _layout_table(config: Config, world_size: int) -> Iterator[str]:
    """Lines of the table of possible layouts, or of the numbers of processes that have one."""
    training = config.training
    splits_context = config.parallel.context_parallel_size > 1
    sequence = f"data.seq_length = {config.data.seq_length}, " if splits_context else ""
    settings = (
        f"this model, {sequence}training.global_batch_size = {training.global_batch_size} and "
        f"training.micro_batch_size = {training.micro_batch_size}"
    )
    layouts = possible_layouts(config, world_size)
    if not layouts:
        world_sizes = _possible_world_sizes(config, 2 * world_size)
        yield f"no layout of {world_size} processes works with {settings}; numbers of processes that do:"
        nearest = sorted(sorted(world_sizes, key=lambda size: abs(size - world_size))[:_MAX_WORLD_SIZES])
        yield f"  {', '.join(map(str, nearest)) or f'none up to {2 * world_size}'}" + (
            f" (the nearest of {len(world_sizes)})" if len(nearest) < len(world_sizes) else ""
        )
        return

    yield f"layouts of {world_size} processes that work with {settings}:"
    yield f"  tensor  pipeline  {'context  ' if splits_context else ''}data  micro-batches  zero_stage"
    for dims in layouts:
        context = f"{dims.cp:7}  " if splits_context else ""
        zero_stages = "0, 1" if dims.pp > 1 else "0, 1, 2, 3"
        yield f"  {dims.tp:6}  {dims.pp:8}  {context}{dims.dp:4}  {dims.num_micro_batches:13}  {zero_stages}"


def _possible_world_sizes(config: Config, largest: int) -> set[int]:
    """Numbers of processes up to `largest` that have a layout."""
    replica_shapes, data_sizes = _possible_sizes(config)
    replica_sizes = set(map(math.prod, replica_shapes))
    return {size * data for size in replica_sizes for data in data_sizes if size * data <= largest}


def _divisors(number: int) -> list[int]:
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})
