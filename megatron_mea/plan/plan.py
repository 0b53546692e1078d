"""The `plan` verb: memory, FLOPs and communication of a run, computed before anything is allocated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_mea.config.layout import TEACHER_KEY, check_layout, check_teacher
from megatron_mea.config.parallel_dims import ParallelDims
from megatron_mea.config.schema import Config, Model
from megatron_mea.huggingface.model_folder import ModelFolder
from megatron_mea.parallel.parameter import Component
from megatron_mea.plan.balance import AttentionBalance
from megatron_mea.plan.communication import Traffic, communication_per_step
from megatron_mea.plan.flops import Flops, flops_per_token, stage_flops
from megatron_mea.plan.memory import Memory, cache_bytes_per_token, stage_memory
from megatron_mea.plan.workload import Device, LocalParameter, Workload

MEMORY_COLUMNS = {
    "weights": "weights",
    "gradients": "gradients",
    "master_and_moments": "master_and_moments",
    "teacher": "teacher",
    "activations": "activations",
    "logits": "logits",
    "buffers": "buffers",
    "passes": "peak_forward_backward",
    "reduction": "peak_update",
    "total": "total",
}
"""Name in the command's output -> field of `Memory`; the output keeps the names that it has always had."""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Elements of the model's parameters, a tied matrix counted once; `per_rank`: on a rank of each pipeline stage.

    `active` are those that a token uses: all but the experts that it does not choose.
    """

    total: int
    active: int
    embedding: int
    head: int
    attention: int
    head_combination: int
    feed_forward: int
    router: int
    experts: int
    norms: int
    per_rank: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Needs of a run; memory and communication are those of the rank of each pipeline stage that holds most.

    Args:
        zero_stage: the configured one; `dims.zero_stage` is the one that runs.
        checkpoint_bytes: of a checkpoint on the disk.
        checkpoint_copy_bytes: of host memory in which a rank keeps its part of a checkpoint while it is written, and
            for the next.
        cache_bytes: of a token in the cache of the exported model, in bfloat16, and `composite_cache_bytes` those of
            composite heads.
        stage_flops: FLOPs a token on each stage, its tensor and context ranks together.
        worst_case_memory: that of a rank on whose experts as many choices fall as can.
    """

    world_size: int
    dims: ParallelDims
    zero_stage: int
    steps: int
    tokens_per_step: int
    parameters: Parameters
    memory: tuple[Memory, ...]
    worst_case_memory: tuple[Memory, ...]
    checkpoint_bytes: int
    checkpoint_copy_bytes: int
    cache_bytes: int
    composite_cache_bytes: int
    flops: Flops
    stage_flops: tuple[float, ...]
    communication: tuple[Traffic, ...]


def make_plan(config: Config, *, world_size: int | None = None, device: Device = "cuda") -> Plan:
    """The plan of a run on `world_size` processes; by default as many as hold one copy of the model.

    Raises:
        UserError: the layout cannot work, or a teacher is missing or cannot teach this model on it.
    """
    dims = check_layout(config, world_size)
    teacher = _teacher_workload(config=config, dims=dims, device=device)
    workload = Workload(config=config, dims=dims, device=device, teacher=teacher)
    worst_case = replace(workload, expert_load="worst")
    return Plan(
        world_size=dims.world_size,
        dims=dims,
        zero_stage=config.parallel.zero_stage,
        steps=config.steps,
        tokens_per_step=config.tokens_per_step,
        parameters=count_parameters(workload),
        memory=tuple(stage_memory(workload, stage) for stage in workload.stages),
        worst_case_memory=tuple(stage_memory(worst_case, stage) for stage in workload.stages),
        checkpoint_bytes=sum(p.global_numel * p.state_bytes for p in _unique_parameters(workload)),
        checkpoint_copy_bytes=max(stage.state_bytes for stage in workload.stages) // dims.dp_cp,
        cache_bytes=cache_bytes_per_token(config.model),
        composite_cache_bytes=cache_bytes_per_token(_with_composite_cache(config.model)),
        flops=flops_per_token(workload),
        stage_flops=stage_flops(workload),
        communication=tuple(communication_per_step(workload)),
    )


def _with_composite_cache(model: Model) -> Model:
    return model.model_copy(update={"num_component_heads": None, "hlc_form": "head"})


def _teacher_workload(*, config: Config, dims: ParallelDims, device: Device) -> Workload | None:
    """The workload of the teacher, None where there is none; reads its settings and not its weights."""
    if config.training.distillation is None:
        return None

    model = ModelFolder.locate(config.training.distillation.teacher, TEACHER_KEY).settings()
    check_teacher(config, model)
    return Workload(config=config.model_copy(update={"model": model}), dims=dims, device=device, trains=False)


def count_parameters(workload: Workload) -> Parameters:
    """Elements by part of the model, from the specifications that the decoder's parameters carry."""
    numels: Counter[Component] = Counter()
    for parameter in _unique_parameters(workload):
        numels[parameter.component] += parameter.global_numel

    num_experts, num_chosen = max(workload.model.num_experts, 1), workload.model.num_experts_per_tok
    return Parameters(
        total=numels.total(),
        active=numels.total() - numels["experts"] + numels["experts"] // num_experts * num_chosen,
        embedding=numels["embedding"],
        head=numels["lm_head"],
        attention=numels["attention"],
        head_combination=numels["hlc"],
        feed_forward=numels["mlp"],
        router=numels["router"],
        experts=numels["experts"],
        norms=numels["norm"],
        per_rank=tuple(stage.local_numel for stage in workload.stages),
    )


def _unique_parameters(workload: Workload) -> Iterable[LocalParameter]:
    """Every parameter of the model once: a tied matrix is on two stages."""
    return {parameter.name: parameter for stage in workload.stages for parameter in stage.parameters}.values()


def as_json(plan: Plan, balance: AttentionBalance | None = None) -> dict[str, Any]:
    """The plan for `--json`: sizes in bytes, FLOPs of one token, memory and communication of one rank in one step."""
    dims = plan.dims
    return {
        "world_size": plan.world_size,
        "layout": {"tensor": dims.tp, "pipeline": dims.pp, "context": dims.cp, "data": dims.dp},
        "zero_stage": plan.zero_stage,
        "micro_batches": dims.num_micro_batches,
        "steps": plan.steps,
        "tokens": plan.steps * plan.tokens_per_step,
        "tokens_per_step": plan.tokens_per_step,
        "parameters": asdict(plan.parameters),
        "memory_per_rank_bytes": [_memory_as_json(stage) for stage in plan.memory],
        "memory_per_rank_worst_case_bytes": [_memory_as_json(stage) for stage in plan.worst_case_memory],
        "checkpoint_bytes": plan.checkpoint_bytes,
        "checkpoint_copy_per_rank_bytes": plan.checkpoint_copy_bytes,
        "cache_bytes_per_token": plan.cache_bytes,
        "flops_per_token": asdict(plan.flops) | {"total": plan.flops.total},
        "flops_total": plan.flops.total * plan.steps * plan.tokens_per_step,
        "communication_per_step": [asdict(row) for row in plan.communication],
        "pipeline_bubble": dims.pipeline_bubble,
        "attention_balance": balance and asdict(balance),
    }


def _memory_as_json(memory: Memory) -> dict[str, int]:
    names = {field: name for name, field in MEMORY_COLUMNS.items()}
    return {names.get(field, field): size for field, size in asdict(memory).items()} | {"total": memory.total}


def as_text(plan: Plan, balance: AttentionBalance | None = None) -> str:
    """The plan as the command prints it."""
    return "\n".join(_text_lines(plan, balance))


def _text_lines(plan: Plan, balance: AttentionBalance | None) -> Iterator[str]:
    dims, parameters, flops = plan.dims, plan.parameters, plan.flops
    yield (
        f"{plan.world_size} process(es): {dims}, ZeRO {plan.zero_stage}, "
        f"{dims.num_micro_batches} micro-batch(es) a step on each data rank"
    )

    tokens = plan.steps * plan.tokens_per_step
    yield f"{plan.steps:,} steps of {plan.tokens_per_step:,} tokens: {tokens:,} tokens"
    yield f"pipeline bubble: {dims.pipeline_bubble:.1%} of a step"
    yield ""

    yield f"parameters: {parameters.total:,}"
    if parameters.active < parameters.total:
        yield f"  {'active for a token':20}{parameters.active:>18,}"
    for name, numel in asdict(parameters).items():
        if name not in ("total", "active", "per_rank") and numel:
            yield f"  {name.replace('_', ' '):20}{numel:>18,}"

    yield f"  {'on a rank':20}{max(parameters.per_rank):>18,}" + (
        f"   (of {len(parameters.per_rank)} stages, the largest)" if dims.pp > 1 else ""
    )
    yield ""

    at_rest = "the first three, the teacher" if flops.teacher else "the first three"
    yield f"memory of a rank of each stage, MiB: the total is {at_rest} and the larger of passes and reduction"
    yield f"  {'stage':20}" + "".join(f"{stage.stage:12}" for stage in plan.memory)
    for name, field in MEMORY_COLUMNS.items():
        if name == "teacher" and not flops.teacher:
            continue
        mebibytes = (getattr(stage, field) / 2**20 for stage in plan.memory)
        yield f"  {name.replace('_', ' '):20}" + "".join(f"{size:12,.1f}" for size in mebibytes)

    if plan.worst_case_memory != plan.memory:
        yield "where as many choices of experts as can fall on one rank:"
        for name in ("activations", "total"):
            mebibytes = (getattr(stage, MEMORY_COLUMNS[name]) / 2**20 for stage in plan.worst_case_memory)
            yield f"  {name:20}" + "".join(f"{size:12,.1f}" for size in mebibytes)

    yield (
        f"checkpoint: {plan.checkpoint_bytes / 2**20:,.1f} MiB on the disk; while it is written a rank keeps a copy of "
        f"{plan.checkpoint_copy_bytes / 2**20:,.1f} MiB in the host's memory"
    )
    yield ""

    yield (
        f"cache of the exported model: {plan.cache_bytes:,} bytes a token in bfloat16, "
        f"{plan.cache_bytes / plan.composite_cache_bytes:.1%} of that of all key/value heads"
    )
    yield (
        f"FLOPs a token: {flops.total:.4g} (forward {flops.forward:.4g}, backward {flops.backward:.4g}, "
        f"recomputation {flops.recomputation:.4g}{f', teacher {flops.teacher:.4g}' if flops.teacher else ''}); "
        f"{flops.total * tokens:.4g} in all"
    )
    if balance is not None:
        ratio = "unknown" if balance.busiest_over_mean is None else f"{balance.busiest_over_mean:.2f}"
        yield f"balance of attention work: {ratio}, the busiest context rank over the mean ({balance.basis})"
    yield ""

    yield "communication of a rank in a step:" + ("" if plan.communication else " none")
    if plan.communication:
        labels = {"data": "data x context"} if dims.cp > 1 else {}
        width = max(len("pipeline"), *map(len, labels.values()), 0)
        yield f"  stage  {'group':{width}}  collective      calls             MiB"
    for row in plan.communication:
        mib, label = row.bytes / 2**20, labels.get(row.group, row.group)
        yield f"  {row.stage:5}  {label:{width}}  {row.collective:14}{row.count:7}{mib:16,.2f}"
