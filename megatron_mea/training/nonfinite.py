"""A loss or gradient that is not finite: where it comes from, found by a replay, and the message that ends the run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import torch
import torch.distributed as dist

from megatron_mea.config import Config
from megatron_mea.data.corpora import Batch, Corpora
from megatron_mea.errors import RunError
from megatron_mea.model.decoder import Decoder
from megatron_mea.parallel.grid import Grid
from megatron_mea.parallel.parameter import ParameterSpec, parameters_by_name
from megatron_mea.training.loader import StepData, to_device
from megatron_mea.training.pipeline_stage import PipelineStage
from megatron_mea.training.zero_state import stored_shard, stored_start

_MAX_EXPERTS = 8
"""Experts of a parameter that a message names."""


class NonFiniteError(RunError):
    """A loss or gradient that is not finite; raised before any parameter has changed.

    `micro_batches` maps the index of each micro-batch of this rank that is not finite to the first parameter, in the
    order of the backward pass, whose gradient shows it, with the experts; None where that cannot be told.
    """

    def __init__(self, message: str, micro_batches: Mapping[int, str | None] | None = None) -> None:
        super().__init__(message)
        self.micro_batches = dict(micro_batches or {})


def locate_nonfinite(
    batches: Sequence[Batch], *, stage: PipelineStage, grid: Grid, device: torch.device
) -> dict[int, str | None]:
    """Replays the micro-batches without DeepSpeed, which has dropped the gradients; collective.

    Returns:
        as `NonFiniteError.micro_batches`.
    """
    nonfinite: dict[int, str | None] = {}
    for index, batch in enumerate(batches):
        loss, gradients = _replay(batch, stage=stage, grid=grid, device=device)
        names: list[str | None] = [] if loss.isfinite() else [None]
        names += [
            _with_experts(spec.name, _nonfinite_experts(spec, gradient))
            for spec, gradient in gradients
            if not gradient.isfinite().all()
        ]
        if names:
            # Backward runs through the parameters from the last to the first.
            nonfinite[index] = names[-1]

    stages: list[dict[int, str | None]] = [nonfinite] * grid.dims.pp
    if grid.dims.pp > 1:
        dist.all_gather_object(stages, nonfinite, group=grid.mpu.get_pipe_parallel_group())

    merged: dict[int, str | None] = {}
    for found in stages:
        # Backward begins at the last stage, so its names win.
        merged |= {index: name for index, name in found.items() if name or index not in merged}

    return dict(sorted(merged.items()))


def _replay(
    batch: Batch, *, stage: PipelineStage, grid: Grid, device: torch.device
) -> tuple[torch.Tensor, list[tuple[ParameterSpec, torch.Tensor]]]:
    """Forward and backward of a micro-batch through all stages, one after the other.

    Returns:
        a scalar that is finite if the outputs of this rank's stage are; the gradients of parameters.
    """
    is_first_stage = grid.pipeline_rank == 0
    input_ids, position_ids, targets = to_device(batch, device=device, cp=grid.cp)

    inputs: list[torch.Tensor] = [input_ids]
    if not is_first_stage:
        inputs = _empty_inputs(input_ids, stage=stage, grid=grid)
        for tensor in inputs:
            dist.recv(tensor, grid.mpu.stage_to_global(grid.pipeline_rank - 1))
        inputs[0].requires_grad_()

    output, *others = stage((inputs[0], position_ids, *inputs[1:]))
    gradient = None
    if grid.is_last_stage:
        output, _ = stage.compute_loss((output, *others), targets)
    else:
        next_rank = grid.mpu.stage_to_global(grid.pipeline_rank + 1)
        for tensor in (output.detach(), *others[1:]):
            dist.send(tensor, next_rank)
        gradient = torch.empty_like(output)
        dist.recv(gradient, next_rank)

    # With ZeRO 3 no rank holds full parameters between the passes, so there is nothing to differentiate.
    parameters = [] if grid.dims.shards_parameters else list(parameters_by_name(stage.decoder).values())
    wanted = [*parameters, *([] if is_first_stage else inputs[:1])]
    gradients = torch.autograd.grad(output, wanted, gradient, allow_unused=True) if wanted else ()
    if not is_first_stage:
        dist.send(gradients[-1].contiguous(), grid.mpu.stage_to_global(grid.pipeline_rank - 1))

    by_spec = [
        (parameter.spec, grad) for parameter, grad in zip(parameters, gradients, strict=False) if grad is not None
    ]
    return output.detach().sum(), by_spec


def _empty_inputs(input_ids: torch.Tensor, *, stage: PipelineStage, grid: Grid) -> list[torch.Tensor]:
    """Buffers for the previous stage's hidden states (batch, seq, hidden) and, with a teacher, the bytes of its."""
    batch_size, seq_length = input_ids.shape
    seq_length //= grid.dims.sequence_shards
    widths_and_dtypes = [(stage.decoder.config.hidden_size, next(stage.decoder.parameters()).dtype)]
    if (teacher := stage.teacher) is not None:
        widths_and_dtypes.append((teacher.hidden_size * teacher.dtype.itemsize, torch.uint8))

    return [
        torch.empty((batch_size, seq_length, width), dtype=dtype, device=input_ids.device)
        for width, dtype in widths_and_dtypes
    ]


def describe_nonfinite(
    error: NonFiniteError, *, data: StepData, config: Config, corpora: Corpora, model: Decoder
) -> str:
    """A message with the step, its samples, and the parameters that are not finite on any rank; collective.

    Nothing was updated, so the newest checkpoint is as good as it was.
    """
    first = (data.step - 1) * config.training.global_batch_size
    last = first + config.training.global_batch_size - 1
    lines = [f"step {data.step} stopped before its update: {error}", f"  samples {first} to {last}"]

    local_lines: list[str] = []
    for index, name in error.micro_batches.items():
        samples, gradient = data.samples[index], f", first in the gradient of {name}" if name else ""
        where = f"samples {samples.tolist()}{gradient}; {corpora.describe(samples)}"
        local_lines.append(f"  not finite on rank {dist.get_rank()}: {where}")

    local_experts = {
        name: _nonfinite_experts(parameter.spec, stored_shard(parameter), start=stored_start(parameter))
        for name, parameter in parameters_by_name(model).items()
        if not stored_shard(parameter).isfinite().all()
    }
    ranks: list[tuple[list[str], dict[str, set[int]]]] = [([], {})] * dist.get_world_size()
    dist.all_gather_object(ranks, (local_lines, local_experts))
    lines += [line for rank_lines, _ in ranks for line in rank_lines]
    experts: dict[str, set[int]] = {}
    for _, rank_experts in ranks:
        for name, numbers in rank_experts.items():
            experts.setdefault(name, set()).update(numbers)

    names = [_with_experts(name, numbers) for name, numbers in experts.items()]
    lines.append(f"  parameters that are not finite: {', '.join(names) or 'none'}")
    lines.append("  the newest checkpoint is untouched: lower optimizer.lr or look at the samples, and go on from it")
    return "\n".join(lines)


def _nonfinite_experts(spec: ParameterSpec, values: torch.Tensor, *, start: int = 0) -> set[int]:
    """The experts of a stack with values that are not finite; none of another parameter.

    Args:
        values: of this rank's shard, from the element `start` of the flattened shard on.
    """
    if not spec.is_stack:
        return set()

    flat, size, first = values.detach().flatten(), prod(spec.local_shape[1:]), spec.global_offset[0]
    return {
        first + index
        for index in range(spec.local_shape[0])
        if not flat[max(0, index * size - start) : max(0, (index + 1) * size - start)].isfinite().all()
    }


def _with_experts(name: str, experts: Iterable[int]) -> str:
    """A parameter's name, with the numbers of the first of these experts."""
    numbers = sorted(experts)
    if not numbers:
        return name

    shown, more = ", ".join(map(str, numbers[:_MAX_EXPERTS])), len(numbers) - _MAX_EXPERTS
    return f"{name} (expert{'s' if len(numbers) > 1 else ''} {shown}{f' and {more} more' if more > 0 else ''})"
