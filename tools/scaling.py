"""The tables of docs/scaling.md: memory, step time and communication by `plan` for five models on 8 to 4,096 GPUs.

    python tools/scaling.py [--models 1B 8B] [--gpus 8 64 512 4096] [--batch 2048] [--tables fastest kinds batches]

Arithmetic, not measurements: every GPU computes at a fixed speed, ranks exchange in rings over NVLink inside nodes of 8
and over InfiniBand between them, and nothing is hidden behind computation. A pipeline waits for its slowest stage.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_mea.config import Config
from megatron_mea.config.load import parse_config
from megatron_mea.errors import UserError
from megatron_mea.plan.plan import Plan, make_plan

GPUS_PER_NODE = 8
MEMORY_LIMIT = 65 * 2**30
"""Bytes of a GPU's 80 GiB that a plan may use: `plan` does not count fragmentation, NCCL and CUDA."""
SEQ, BATCH = 8192, 2048
"""16,777,216 tokens a step: Llama 3's largest batch, and a power of two, which every number of data ranks divides."""
GPU_COUNTS = [2**power for power in range(3, 13)]

LLAMA = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "max_position_embeddings": SEQ,
    "attention_variant": "mea",
}
MODEL_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
SHAPES = {
    # Of Llama 3.2 1B, Llama 3 8B, Qwen3 32B, Llama 3 70B and Qwen3-30B-A3B.
    "1B": (2048, 8192, 16, 32, 64),
    "8B": (4096, 14336, 32, 32, 128),
    "32B": (5120, 25600, 64, 64, 128),
    "70B": (8192, 28672, 80, 64, 128),
    "30B-A3B": (2048, 6144, 48, 32, 128),
}
MODELS: dict[str, dict[str, Any]] = {
    name: LLAMA | dict(zip(MODEL_FIELDS, shape, strict=True)) for name, shape in SHAPES.items()
}
MODELS["30B-A3B"] |= {
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
KINDS = ("data, ZeRO 1", "data, ZeRO 2", "data, ZeRO 3", "tensor", "pipeline", "tensor x pipeline")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Assumed speeds of the hardware.

    Args:
        speed: FLOP/s of a GPU: 40 % of an H100's 989e12.
        nvlink: bytes/s that a GPU sends inside its node.
        card: bytes/s that each of the node's 8 InfiniBand cards sends.
        call: latency of a collective in seconds.
    """

    speed: float = 0.4 * 989e12
    nvlink: float = 300e9
    card: float = 40e9
    call: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A layout with its plan, and the seconds of a step: computing, waiting in the pipeline, and by process group."""

    config: Config
    plan: Plan
    compute: float
    idle: float
    traffic: dict[str, float]

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.compute + self.idle + sum(self.traffic.values())

    @property
    def memory(self) -> int:
        """Bytes of the rank that holds most."""
        return max(stage.total for stage in self.plan.memory)

    @property
    def rate(self) -> float:
        """Tokens a second and GPU."""
        return self.plan.tokens_per_step / self.seconds / self.plan.world_size

    @property
    def recomputation(self) -> str:
        """none, selective or full."""
        return self.config.training.activation_checkpointing

    @property
    def kind(self) -> str:
        """Kind of parallelism, one of KINDS."""
        tensor, pipeline = self.plan.dims.tp > 1, self.plan.dims.pp > 1
        if tensor or pipeline:
            return " x ".join(["tensor"] * tensor + ["pipeline"] * pipeline)
        return f"data, ZeRO {self.plan.zero_stage}"


def candidates(*, model: str, gpus: int, batch: int) -> Iterator[Config]:
    """Layouts inside the rules of thumb: tensor ranks in a node, ZeRO 2 and 3 without a pipeline."""
    sizes = itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 3), ("none", "selective", "full"))
    for tensor, pipeline, zero_stage, recomputation in sizes:
        if (zero_stage > 1 and pipeline > 1) or tensor * pipeline > gpus:
            continue

        yield parse_config(
            {
                "model": MODELS[model],
                "data": {"tokenizer": "none", "train": [{"path": "none"}], "seq_length": SEQ},
                "parallel": {
                    "tensor_model_parallel_size": tensor,
                    "pipeline_model_parallel_size": pipeline,
                    "sequence_parallel": tensor > 1,
                    "zero_stage": zero_stage,
                },
                "schedule": {"warmup_steps": 1},
                "training": {
                    "steps": 2,
                    "global_batch_size": batch,
                    "micro_batch_size": 1,
                    "precision": "bf16",
                    "activation_checkpointing": recomputation,
                },
                "run": {"dir": "none"},
            }
        )


def pipeline_seconds(stage_seconds: list[float], micro_batches: int) -> tuple[float, float]:
    """Seconds of a step that a rank computes and that it waits, from the seconds of a micro-batch on every stage.

    The first micro-batch passes all stages, then the slowest sets the pace. For equal stages the wait is the bubble.
    """
    compute = micro_batches * sum(stage_seconds) / len(stage_seconds)
    return compute, sum(stage_seconds) + (micro_batches - 1) * max(stage_seconds) - compute


def group_seconds(*, plan: Plan, group: str, machine: Machine) -> float:
    """Seconds of a step that a process group communicates, on the pipeline stage where that takes longest.

    Consecutive ranks share a tensor group first, then a context group, a data group and a pipeline. Context ranks are
    members of the data group too.
    """
    dims = plan.dims
    # Members of a group, and ranks from its first member to its last.
    size, reach = {
        "tensor": (dims.tp, dims.tp),
        "context": (dims.cp, dims.tp * dims.cp),
        "data": (dims.dp_cp, dims.tp * dims.dp_cp),
        "pipeline": (dims.pp, plan.world_size),
    }[group]
    # A data or context group has up to GPUS_PER_NODE / t members in a node, each beside a card.
    cards = min(GPUS_PER_NODE // dims.tp, size) if group in ("data", "context") else 1
    bandwidth = machine.nvlink if reach <= GPUS_PER_NODE else min(machine.nvlink, machine.card * cards)

    stage_seconds = dict.fromkeys(range(dims.pp), 0.0)
    for row in plan.communication:
        if row.group == group:
            rounds = 1.0 if group == "pipeline" else (2 if row.collective == "all_reduce" else 1) * (size - 1) / size
            stage_seconds[row.stage] += rounds * row.bytes / bandwidth + row.count * machine.call

    return max(stage_seconds.values())


def estimate(*, config: Config, gpus: int, machine: Machine) -> Estimate | None:
    """Estimate of a step on `gpus` GPUs, None where the layout cannot work."""
    try:
        plan = make_plan(config, world_size=gpus)
    except UserError:
        return None

    dims = plan.dims
    tokens = plan.tokens_per_step / dims.dp_cp / dims.num_micro_batches
    stage_seconds = [tokens * flops / dims.tp / machine.speed for flops in plan.stage_flops]
    compute, idle = pipeline_seconds(stage_seconds, dims.num_micro_batches)
    groups = ("tensor", "context", "data", "pipeline")
    traffic = {group: group_seconds(plan=plan, group=group, machine=machine) for group in groups}
    return Estimate(config=config, plan=plan, compute=compute, idle=idle, traffic=traffic)


@cache
def estimates(*, model: str, gpus: int, batch: int, machine: Machine) -> tuple[Estimate, ...]:
    """Estimates of all candidates that can work, the fastest first."""
    possible = (
        estimate(config=config, gpus=gpus, machine=machine)
        for config in candidates(model=model, gpus=gpus, batch=batch)
    )
    working = [choice for choice in possible if choice is not None]
    return tuple(sorted(working, key=lambda choice: choice.seconds))


def fitting(choices: Iterable[Estimate]) -> list[Estimate]:
    """Those estimates whose memory fits a GPU, in the same order."""
    return [choice for choice in choices if choice.memory <= MEMORY_LIMIT]


def print_table(names: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Prints a Markdown table with a row as soon as it is computed."""
    names = list(names)
    print(f"| {' | '.join(names)} |\n|{' --- |' * len(names)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
    print()


def summary(choice: Estimate) -> str:
    """Seconds of a step, tensor x pipeline, ZeRO beside tensor ranks, and the initial of the recomputation."""
    dims, zero_stage = choice.plan.dims, choice.plan.zero_stage
    parts = [f"{choice.seconds:.2f}"]
    if dims.tp * dims.pp > 1:
        parts.append(f"{dims.tp} x {dims.pp}")
        parts += [f"Z{zero_stage}"] * (zero_stage > 1)
    if choice.recomputation != "none":
        parts.append(choice.recomputation[0])

    return " ".join(parts)


def fastest(*, models: list[str], gpu_counts: list[int], batch: int, machine: Machine) -> None:
    """Prints the fastest layout of each model and number of GPUs; efficiency compares with the model's best rate."""
    names = ["model", "GPUs", "tensor x pipeline x data", "ZeRO", "recomputed", "GiB", "s a step", "compute", "idle"]
    names += ["tensor", "data", "pipeline", "GB a rank", "tokens/s/GPU", "efficiency"]

    def rows() -> Iterator[list[str]]:
        for model in models:
            best_rate = 0.0
            for gpus in gpu_counts:
                choices = estimates(model=model, gpus=gpus, batch=batch, machine=machine)
                if not (fits := fitting(choices)):
                    smallest = min(choice.memory for choice in choices) / 2**30
                    yield [model, f"{gpus:,}", f"none fits: {smallest:.0f} GiB at least", *[""] * (len(names) - 3)]
                    continue

                choice = fits[0]
                best_rate = max(best_rate, choice.rate)
                dims = choice.plan.dims
                sent_bytes = max(
                    sum(row.bytes for row in choice.plan.communication if row.stage == stage)
                    for stage in range(dims.pp)
                )

                cells = [model, f"{gpus:,}", f"{dims.tp} x {dims.pp} x {dims.dp}"]
                cells += [str(choice.plan.zero_stage), choice.recomputation, f"{choice.memory / 2**30:.1f}"]
                cells += [f"{choice.seconds:.2f}", f"{choice.compute:.2f}", f"{choice.idle:.2f}"]
                cells += [f"{choice.traffic[group]:.2f}" for group in ("tensor", "data", "pipeline")]
                cells += [f"{sent_bytes / 1e9:.1f}", f"{choice.rate:,.0f}", f"{choice.rate / best_rate:.0%}"]
                yield cells

    print_table(names, rows())


def kinds(*, models: list[str], gpu_counts: list[int], batch: int, machine: Machine) -> None:
    """Prints the fastest layout of each kind; s, f: recomputed, Z: ZeRO 2 or 3 beside tensor parallelism."""

    def rows() -> Iterator[list[str]]:
        for model, gpus in itertools.product(models, gpu_counts):
            fits = fitting(estimates(model=model, gpus=gpus, batch=batch, machine=machine))
            fastest_kind = fits[0].kind if fits else None

            cells = [model, f"{gpus:,}"]
            for kind in KINDS:
                choice = next((choice for choice in fits if choice.kind == kind), None)
                cell = summary(choice) if choice else "-"
                cells.append(f"**{cell}**" if kind == fastest_kind else cell)
            yield cells

    print_table(["model", "GPUs", *KINDS], rows())


def batches(*, models: list[str], gpu_counts: list[int], batch: int, machine: Machine) -> None:
    """Prints tokens a second of all GPUs by the size of the batch: from an eighth of it to twice as many."""
    batch_sizes = [batch // 8, batch // 4, batch // 2, batch, batch * 2]

    def rows() -> Iterator[list[str]]:
        for model, gpus in itertools.product(models, gpu_counts):
            cells = []
            for batch_size in batch_sizes:
                fits = fitting(estimates(model=model, gpus=gpus, batch=batch_size, machine=machine))
                cells.append(f"{fits[0].rate * gpus / 1e6:.2f} ({summary(fits[0])})" if fits else "-")
            yield [model, f"{gpus:,}", *cells]

    columns = (f"{batch_size * SEQ / 1e6:.1f} M tokens" for batch_size in batch_sizes)
    print_table(["model", "GPUs", *columns], rows())


TABLES: dict[str, Callable[..., None]] = {
    "fastest": fastest,
    "kinds": kinds,
    "batches": batches,
}


def main() -> None:
    default = Machine()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--gpus", nargs="+", type=int, default=GPU_COUNTS)
    parser.add_argument("--batch", type=int, default=BATCH, help=f"sequences of {SEQ} tokens (default: {BATCH})")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=["fastest", "kinds"])
    parser.add_argument("--speed", type=float, default=default.speed, help="FLOP/s of a GPU")
    parser.add_argument("--nvlink", type=float, default=default.nvlink, help="bytes/s of a GPU inside its node")
    parser.add_argument("--card", type=float, default=default.card, help="bytes/s of an InfiniBand card")
    parser.add_argument("--call", type=float, default=default.call, help="seconds of a collective beside its bytes")
    arguments = parser.parse_args()

    machine = Machine(speed=arguments.speed, nvlink=arguments.nvlink, card=arguments.card, call=arguments.call)
    for name in arguments.tables:
        TABLES[name](models=arguments.models, gpu_counts=arguments.gpus, batch=arguments.batch, machine=machine)


if __name__ == "__main__":
    main()
