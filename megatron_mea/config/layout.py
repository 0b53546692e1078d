"""Layouts: how many processes share a model, and which numbers of them can."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_mea.config.schema import Config, Model
from megatron_mea.errors import Problem, UserError

_TENSOR, _PIPELINE = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
TEACHER = "training.distillation.teacher"


@dataclass(frozen=True)
class Layout:
    """Sizes of the tensor, pipeline and data groups; `micro_batches` of each data rank make a step."""

    tensor: int
    pipeline: int
    data: int
    micro_batches: int

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def pipeline_bubble(self) -> float:
        """The part of a step that a stage idles: (p - 1) / (m + p - 1) (Megatron-LM, arXiv 2104.04473)."""
        return (self.pipeline - 1) / (self.micro_batches + self.pipeline - 1)


def check_layout(config: Config, world_size: int | None = None) -> Layout:
    """The layout of a run on `world_size` processes; by default one copy of the model.

    Raises:
        UserError: it cannot work; the message ends with a table of those that can.
    """
    parallel, training = config.parallel, config.training
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if world_size is None:
        world_size = tensor * pipeline
    problems = list(_problems(config, tensor, pipeline, parallel.zero_stage, world_size))
    if problems:
        raise UserError.of(problems, footer="\n".join(_table(config, world_size)))
    data = world_size // (tensor * pipeline)
    return Layout(tensor, pipeline, data, training.global_batch_size // (training.micro_batch_size * data))


def possible_layouts(config: Config, world_size: int) -> list[Layout]:
    """The layouts that `world_size` processes can have with this model and batch, and ZeRO 0 or 1."""
    layouts = []
    for tensor in _divisors(world_size):
        for pipeline in _divisors(world_size // tensor):
            if not any(_problems(config, tensor, pipeline, 1, world_size)):
                data = world_size // (tensor * pipeline)
                micro_batches = config.training.global_batch_size // (config.training.micro_batch_size * data)
                layouts.append(Layout(tensor, pipeline, data, micro_batches))
    return layouts


def _problems(config: Config, tensor: int, pipeline: int, zero_stage: int, world_size: int) -> Iterator[Problem]:
    yield from _model_problems(config, tensor, pipeline)
    if pipeline > 1 and zero_stage > 1:
        yield Problem("parallel.zero_stage", zero_stage, f"0 or 1 where {_PIPELINE} is above 1")
    if world_size % (tensor * pipeline):
        yield Problem(
            f"{_TENSOR} x {_PIPELINE}",
            f"{tensor} x {pipeline} on {world_size} processes",
            "a product that divides the number of processes",
        )
        return
    batch, micro = config.training.global_batch_size, config.training.micro_batch_size
    data = world_size // (tensor * pipeline)
    if batch % (micro * data):
        yield Problem(
            "training.global_batch_size",
            batch,
            f"a multiple of training.micro_batch_size x data-parallel size = {micro} x {data} = {micro * data}",
        )


def check_teacher(config: Config, teacher: Model) -> None:
    """Whether a model can teach the one of the configuration, whose own layout has been checked.

    Raises:
        UserError: it has another vocabulary or a shorter context, or cannot be cut as the layout cuts.
    """
    distillation, parallel = config.training.distillation, config.parallel
    assert distillation is not None
    theirs, ours, seq_length = distillation.teacher, config.model.vocab_size, config.data.seq_length
    problems = []
    if teacher.vocab_size != ours:
        found = f"{theirs}, with vocab_size = {teacher.vocab_size}"
        problems.append(Problem(TEACHER, found, f"model.vocab_size = {ours}: probabilities of the same ids"))
    if teacher.max_position_embeddings < seq_length:
        found = f"{theirs}, with max_position_embeddings = {teacher.max_position_embeddings}"
        problems.append(Problem(TEACHER, found, f"at least data.seq_length = {seq_length}"))
    cut = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    for each in _model_problems(config.model_copy(update={"model": teacher}), *cut):
        found = f"{theirs}, on {each.where} = {each.found}"
        problems.append(Problem(TEACHER, found, each.allowed.replace("model.", "its ")))
    if problems:
        raise UserError.of(problems)


def _model_problems(config: Config, tensor: int, pipeline: int) -> Iterator[Problem]:
    """What does not depend on the number of processes."""
    yield from _tensor_problems(config, tensor)
    layers = config.model.num_hidden_layers
    if pipeline > layers:
        yield Problem(_PIPELINE, pipeline, f"at most model.num_hidden_layers = {layers}")


def _tensor_problems(config: Config, size: int) -> Iterator[Problem]:
    """What the ranks of a tensor group must be able to share (docs/parallelism.md)."""
    model = config.model
    for key, of in (("num_attention_heads", "query heads"), ("intermediate_size", "features")):
        value = getattr(model, key)
        if value % size:
            yield Problem(_TENSOR, size, f"a divisor of model.{key} = {value}: ranks hold equal parts of the {of}")
    composites = model.num_key_value_heads
    if model.attention_variant == "talking_heads" and size > 1:
        yield Problem(_TENSOR, size, "1: each head of `talking_heads` needs the scores of all")
    if model.attention_variant == "differential":
        for key in ("num_attention_heads", "num_key_value_heads"):
            if getattr(model, key) % (2 * size):
                pairs = f"a divisor of model.{key} / 2 = {getattr(model, key) // 2}: pairs of heads stay on a rank"
                yield Problem(_TENSOR, size, pairs)
    elif composites % size and size % composites:
        yield Problem(_TENSOR, size, f"a divisor or a multiple of model.num_key_value_heads = {composites}")
    if model.vocab_size < size * size:
        yield Problem("model.vocab_size", model.vocab_size, f"at least {size * size} on {size} ranks")
    if config.parallel.sequence_parallel:
        if size == 1:
            yield Problem("parallel.sequence_parallel", True, f"false where {_TENSOR} is 1")
        elif config.data.seq_length % size:
            yield Problem("data.seq_length", config.data.seq_length, f"a multiple of {_TENSOR} = {size}")


def _table(config: Config, world_size: int) -> Iterator[str]:
    training = config.training
    given = (
        f"this model, training.global_batch_size = {training.global_batch_size} and training.micro_batch_size = "
        f"{training.micro_batch_size}"
    )
    layouts = possible_layouts(config, world_size)
    if not layouts:
        works = [str(size) for size in range(1, 2 * world_size + 1) if possible_layouts(config, size)]
        yield f"no layout of {world_size} processes works with {given}; numbers of processes that do:"
        yield f"  {', '.join(works) or f'none up to {2 * world_size}'}"
        return
    yield f"layouts of {world_size} processes that work with {given}:"
    yield "  tensor  pipeline  data  micro-batches  zero_stage"
    for each in layouts:
        stages = "0, 1" if each.pipeline > 1 else "0, 1, 2, 3"
        yield f"  {each.tensor:6}  {each.pipeline:8}  {each.data:4}  {each.micro_batches:13}  {stages}"


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
