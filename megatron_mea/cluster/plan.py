"""The `plan` verb: what a run would need and do, before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_mea.cluster.communication import Traffic, communication
from megatron_mea.cluster.flops import Flops, flops_per_token, stage_flops
from megatron_mea.cluster.memory import Memory, memory
from megatron_mea.cluster.setting import Device, Setting
from megatron_mea.config.layout import TEACHER, Layout, check_layout, check_teacher
from megatron_mea.config.schema import Config
from megatron_mea.huggingface.weights import stored_settings

SAVED = 12
"""Bytes of a parameter in a checkpoint: master weight and two moments, float32."""
PARTS = (
    "weights",
    "gradients",
    "master_and_moments",
    "teacher",
    "activations",
    "logits",
    "buffers",
    "passes",
    "reduction",
    "total",
)


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: of the model, where a tied matrix counts once, and of a rank of each stage."""

    total: int
    embedding: int
    head: int
    attention: int
    head_combination: int
    feed_forward: int
    norms: int
    per_rank: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """All of it; memory and traffic are those of one rank of each pipeline stage, the one that holds most.

    `stage_flops` are those of a token on each stage, its tensor ranks together.
    """

    world_size: int
    layout: Layout
    zero_stage: int
    steps: int
    tokens_per_step: int
    parameters: Parameters
    memory: tuple[Memory, ...]
    flops: Flops
    stage_flops: tuple[float, ...]
    communication: tuple[Traffic, ...]

    @property
    def checkpoint(self) -> int:
        """Bytes on the disk."""
        return SAVED * self.parameters.total

    @property
    def checkpoint_copy(self) -> int:
        """Bytes of the host's memory in which a rank keeps its share while it is written, and for the next save."""
        return SAVED * max(self.parameters.per_rank) // self.layout.data


def make_plan(config: Config, world_size: int | None = None, device: Device = "cuda") -> Plan:
    """The plan of a run on `world_size` processes; by default one copy of the model.

    Raises:
        UserError: the layout cannot work, or a teacher is missing or cannot teach this model on it.
    """
    layout = check_layout(config, world_size)
    setting = Setting(config, layout, device, _teacher(config, layout, device))
    return Plan(
        layout.world_size,
        setting.layout,
        config.parallel.zero_stage,
        config.steps,
        config.tokens_per_step,
        count_parameters(setting),
        tuple(memory(setting)),
        flops_per_token(setting),
        stage_flops(setting),
        tuple(communication(setting)),
    )


def _teacher(config: Config, layout: Layout, device: Device) -> Setting | None:
    """Its settings are read, its weights are not looked at."""
    if config.training.distillation is None:
        return None
    model = stored_settings(Path(config.training.distillation.teacher), TEACHER)
    check_teacher(config, model)
    return Setting(config.model_copy(update={"model": model}), layout, device, learns=False)


def count_parameters(setting: Setting) -> Parameters:
    """From the specifications that the decoder's parameters carry."""
    whole = {parameter.name: parameter.whole for stage in setting.stages for parameter in stage.parameters}

    def sum_of(*marks: str) -> int:
        return sum(size for name, size in whole.items() if any(mark in name for mark in marks))

    norms, combination = sum_of("norm"), sum_of(".hlc_", "_mix.")
    return Parameters(
        total=sum(whole.values()),
        embedding=sum_of("embed_tokens"),
        head=sum_of("lm_head"),
        attention=sum_of("_proj", ".lambda_") - sum_of(".mlp."),
        head_combination=combination,
        feed_forward=sum_of(".mlp."),
        norms=norms,
        per_rank=tuple(stage.size for stage in setting.stages),
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """A flat structure for machines: sizes in bytes, counts, FLOPs of one token, all of one rank or one step."""
    layout = plan.layout
    return {
        "world_size": plan.world_size,
        "layout": {"tensor": layout.tensor, "pipeline": layout.pipeline, "data": layout.data},
        "zero_stage": plan.zero_stage,
        "micro_batches": layout.micro_batches,
        "steps": plan.steps,
        "tokens": plan.steps * plan.tokens_per_step,
        "tokens_per_step": plan.tokens_per_step,
        "parameters": asdict(plan.parameters),
        "memory_per_rank_bytes": [asdict(stage) | {"total": stage.total} for stage in plan.memory],
        "checkpoint_bytes": plan.checkpoint,
        "checkpoint_copy_per_rank_bytes": plan.checkpoint_copy,
        "flops_per_token": asdict(plan.flops) | {"total": plan.flops.total},
        "flops_total": plan.flops.total * plan.steps * plan.tokens_per_step,
        "communication_per_step": [asdict(row) for row in plan.communication],
        "pipeline_bubble": layout.pipeline_bubble,
    }


def as_text(plan: Plan) -> str:
    """The same for people."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    layout, parameters, flops = plan.layout, plan.parameters, plan.flops
    yield (
        f"{plan.world_size} process(es): tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}, "
        f"ZeRO {plan.zero_stage}, {layout.micro_batches} micro-batch(es) a step on each data rank"
    )
    tokens = plan.steps * plan.tokens_per_step
    yield f"{plan.steps:,} steps of {plan.tokens_per_step:,} tokens: {tokens:,} tokens"
    yield f"pipeline bubble: {layout.pipeline_bubble:.1%} of a step"
    yield ""
    yield f"parameters: {parameters.total:,}"
    for name, size in asdict(parameters).items():
        if name not in ("total", "per_rank") and size:
            yield f"  {name.replace('_', ' '):20}{size:>18,}"
    yield f"  {'on a rank':20}{max(parameters.per_rank):>18,}" + (
        f"   (of {len(parameters.per_rank)} stages, the largest)" if layout.pipeline > 1 else ""
    )
    yield ""
    at_rest = "the first three, the teacher" if flops.teacher else "the first three"
    yield f"memory of a rank of each stage, MiB: the total is {at_rest} and the larger of passes and reduction"
    yield f"  {'stage':20}" + "".join(f"{stage.stage:12}" for stage in plan.memory)
    for part in PARTS if flops.teacher else [part for part in PARTS if part != "teacher"]:
        sizes = (getattr(stage, part) / 2**20 for stage in plan.memory)
        yield f"  {part.replace('_', ' '):20}" + "".join(f"{size:12,.1f}" for size in sizes)
    yield (
        f"checkpoint: {plan.checkpoint / 2**20:,.1f} MiB on the disk; while it is written a rank keeps a copy of "
        f"{plan.checkpoint_copy / 2**20:,.1f} MiB in the host's memory"
    )
    yield ""
    yield (
        f"FLOPs a token: {flops.total:.4g} (forward {flops.forward:.4g}, backward {flops.backward:.4g}, "
        f"recomputation {flops.recomputation:.4g}{f', teacher {flops.teacher:.4g}' if flops.teacher else ''}); "
        f"{flops.total * tokens:.4g} in all"
    )
    yield ""
    yield "communication of a rank in a step:" + ("" if plan.communication else " none")
    if plan.communication:
        yield "  stage  group     collective      calls             MiB"
    for row in plan.communication:
        mib = row.bytes / 2**20
        yield f"  {row.stage:5}  {row.group:8}  {row.collective:14}{row.count:7}{mib:16,.2f}"
