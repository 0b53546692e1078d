"""The tables of docs/scaling.md: memory, step time and communication by `plan` for four models on 8 to 4,096 GPUs.

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

from megatron_mea.cluster.plan import Plan, make_plan
from megatron_mea.config import Config
from megatron_mea.config.load import parse_config
from megatron_mea.errors import UserError

NODE = 8
LIMIT = 65 * 2**30
"""Bytes of 80 GiB: what fragmentation, NCCL and CUDA need is not planned."""
SEQ, BATCH = 8192, 2048
"""16,777,216 tokens a step: Llama 3's largest batch, and a power of two, which every number of data ranks divides."""
GPUS = [2**power for power in range(3, 13)]

LLAMA = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "max_position_embeddings": SEQ,
    "attention_variant": "mea",
}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
MODELS = {
    # Shapes of Llama 3.2 1B, Llama 3 8B, Qwen3 32B and Llama 3 70B.
    "1B": (2048, 8192, 16, 32, 64),
    "8B": (4096, 14336, 32, 32, 128),
    "32B": (5120, 25600, 64, 64, 128),
    "70B": (8192, 28672, 80, 64, 128),
}
KINDS = ("data, ZeRO 1", "data, ZeRO 2", "data, ZeRO 3", "tensor", "pipeline", "tensor x pipeline")


@dataclass(frozen=True)
class Machine:
    """What is assumed of the hardware.

    Args:
        speed: FLOP/s of a GPU: 40 % of an H100's 989e12.
        nvlink, card: bytes/s that a GPU sends to its node, and that each of the node's 8 InfiniBand cards sends.
        call: seconds of a collective beside its bytes.
    """

    speed: float = 0.4 * 989e12
    nvlink: float = 300e9
    card: float = 40e9
    call: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """A layout with its plan, and the seconds of a step: computing, waiting in the pipeline, and in each group."""

    config: Config
    plan: Plan
    compute: float
    idle: float
    traffic: dict[str, float]

    @property
    def seconds(self) -> float:
        return self.compute + self.idle + sum(self.traffic.values())

    @property
    def memory(self) -> int:
        return max(stage.total for stage in self.plan.memory)

    @property
    def rate(self) -> float:
        """Tokens a second and GPU."""
        return self.plan.tokens_per_step / self.seconds / self.plan.world_size

    @property
    def recomputed(self) -> str:
        return self.config.training.activation_checkpointing

    @property
    def kind(self) -> str:
        tensor, pipeline = self.plan.layout.tensor > 1, self.plan.layout.pipeline > 1
        if tensor or pipeline:
            return " x ".join(["tensor"] * tensor + ["pipeline"] * pipeline)
        return f"data, ZeRO {self.plan.zero_stage}"


def candidates(model: str, gpus: int, batch: int) -> Iterator[Config]:
    """Layouts inside the rules of thumb: tensor ranks in a node, ZeRO 2 and 3 without a pipeline."""
    sizes = itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 3), ("none", "selective", "full"))
    for tensor, pipeline, zero, recomputation in sizes:
        if (zero > 1 and pipeline > 1) or tensor * pipeline > gpus:
            continue
        yield parse_config(
            {
                "model": LLAMA | dict(zip(SIZES, MODELS[model], strict=True)),
                "data": {"tokenizer": "none", "train": [{"path": "none"}], "seq_length": SEQ},
                "parallel": {
                    "tensor_model_parallel_size": tensor,
                    "pipeline_model_parallel_size": pipeline,
                    "sequence_parallel": tensor > 1,
                    "zero_stage": zero,
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


def pipeline_seconds(stages: list[float], micro_batches: int) -> tuple[float, float]:
    """A rank's own work and its wait in a step, from the seconds of a micro-batch on every stage.

    The first micro-batch passes all stages, then the slowest gives the beat. Of equal stages that is the bubble.
    """
    work = micro_batches * sum(stages) / len(stages)
    return work, sum(stages) + (micro_batches - 1) * max(stages) - work


def group_seconds(plan: Plan, group: str, machine: Machine) -> float:
    """Of the stage that exchanges most. Ranks are dealt tensor first, then data, then pipeline."""
    layout = plan.layout
    size, reach = {
        "tensor": (layout.tensor, layout.tensor),
        "data": (layout.data, layout.tensor * layout.data),
        "pipeline": (layout.pipeline, plan.world_size),
    }[group]
    # A data group has NODE / t members in a node, each beside a card.
    cards = min(NODE // layout.tensor, size) if group == "data" else 1
    bandwidth = machine.nvlink if reach <= NODE else min(machine.nvlink, machine.card * cards)
    stages = dict.fromkeys(range(layout.pipeline), 0.0)
    for row in plan.communication:
        if row.group == group:
            rounds = 1.0 if group == "pipeline" else (2 if row.collective == "all_reduce" else 1) * (size - 1) / size
            stages[row.stage] += rounds * row.bytes / bandwidth + row.count * machine.call
    return max(stages.values())


def estimate(config: Config, gpus: int, machine: Machine) -> Estimate | None:
    """None where the layout cannot work."""
    try:
        plan = make_plan(config, gpus)
    except UserError:
        return None
    layout = plan.layout
    tokens = plan.tokens_per_step / layout.data / layout.micro_batches
    stages = [tokens * flops / layout.tensor / machine.speed for flops in plan.stage_flops]
    compute, idle = pipeline_seconds(stages, layout.micro_batches)
    traffic = {group: group_seconds(plan, group, machine) for group in ("tensor", "data", "pipeline")}
    return Estimate(config, plan, compute, idle, traffic)


@cache
def estimates(model: str, gpus: int, batch: int, machine: Machine) -> tuple[Estimate, ...]:
    """Of all candidates that can work, the fastest first."""
    found = (estimate(config, gpus, machine) for config in candidates(model, gpus, batch))
    return tuple(sorted((each for each in found if each is not None), key=lambda each: each.seconds))


def fitting(found: Iterable[Estimate]) -> list[Estimate]:
    return [each for each in found if each.memory <= LIMIT]


def table(names: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    names = list(names)
    print(f"| {' | '.join(names)} |\n|{' --- |' * len(names)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
    print()


def short(each: Estimate) -> str:
    """Seconds of a step, tensor x pipeline, ZeRO beside tensor ranks, and recomputation."""
    layout, zero = each.plan.layout, each.plan.zero_stage
    parts = [f"{each.seconds:.2f}"]
    if layout.tensor * layout.pipeline > 1:
        parts.append(f"{layout.tensor} x {layout.pipeline}")
        parts += [f"Z{zero}"] * (zero > 1)
    if each.recomputed != "none":
        parts.append(each.recomputed[0])
    return " ".join(parts)


def fastest(models: list[str], gpus: list[int], batch: int, machine: Machine) -> None:
    """The fastest layout of each model and number of GPUs; efficiency beside the model's best rate."""
    names = ["model", "GPUs", "tensor x pipeline x data", "ZeRO", "recomputed", "GiB", "s a step", "compute", "idle"]
    names += ["tensor", "data", "pipeline", "GB a rank", "tokens/s/GPU", "efficiency"]

    def rows() -> Iterator[list[str]]:
        for model in models:
            best = 0.0
            for count in gpus:
                found = estimates(model, count, batch, machine)
                if not (fits := fitting(found)):
                    smallest = min(each.memory for each in found) / 2**30
                    yield [model, f"{count:,}", f"none fits: {smallest:.0f} GiB at least", *[""] * (len(names) - 3)]
                    continue
                each = fits[0]
                best = max(best, each.rate)
                layout = each.plan.layout
                sent = max(
                    sum(row.bytes for row in each.plan.communication if row.stage == stage)
                    for stage in range(layout.pipeline)
                )
                cells = [model, f"{count:,}", f"{layout.tensor} x {layout.pipeline} x {layout.data}"]
                cells += [str(each.plan.zero_stage), each.recomputed, f"{each.memory / 2**30:.1f}"]
                cells += [f"{each.seconds:.2f}", f"{each.compute:.2f}", f"{each.idle:.2f}"]
                cells += [f"{each.traffic[group]:.2f}" for group in ("tensor", "data", "pipeline")]
                yield [*cells, f"{sent / 1e9:.1f}", f"{each.rate:,.0f}", f"{each.rate / best:.0%}"]

    table(names, rows())


def kinds(models: list[str], gpus: list[int], batch: int, machine: Machine) -> None:
    """The fastest layout of each kind; s, f: recomputed, Z: ZeRO 2 or 3 beside tensor parallelism."""

    def rows() -> Iterator[list[str]]:
        for model, count in itertools.product(models, gpus):
            fits = fitting(estimates(model, count, batch, machine))
            best = {kind: next((each for each in fits if each.kind == kind), None) for kind in KINDS}
            marked = [short(each) if each else "-" for each in best.values()]
            first = fits[0].kind if fits else None
            yield [
                model,
                f"{count:,}",
                *(f"**{cell}**" if kind == first else cell for kind, cell in zip(KINDS, marked, strict=True)),
            ]

    table(["model", "GPUs", *KINDS], rows())


def batches(models: list[str], gpus: list[int], batch: int, machine: Machine) -> None:
    """Tokens a second of all GPUs, by the size of the batch: from an eighth of it to twice as many."""
    sizes = [batch // 8, batch // 4, batch // 2, batch, batch * 2]

    def rows() -> Iterator[list[str]]:
        for model, count in itertools.product(models, gpus):
            cells = []
            for size in sizes:
                fits = fitting(estimates(model, count, size, machine))
                cells.append(f"{fits[0].rate * count / 1e6:.2f} ({short(fits[0])})" if fits else "-")
            yield [model, f"{count:,}", *cells]

    table(["model", "GPUs", *(f"{size * SEQ / 1e6:.1f} M tokens" for size in sizes)], rows())


TABLES: dict[str, Callable[[list[str], list[int], int, Machine], None]] = {
    "fastest": fastest,
    "kinds": kinds,
    "batches": batches,
}


def main() -> None:
    assumed = Machine()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--gpus", nargs="+", type=int, default=GPUS)
    parser.add_argument("--batch", type=int, default=BATCH, help=f"sequences of {SEQ} tokens (default: {BATCH})")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=["fastest", "kinds"])
    parser.add_argument("--speed", type=float, default=assumed.speed, help="FLOP/s of a GPU")
    parser.add_argument("--nvlink", type=float, default=assumed.nvlink, help="bytes/s of a GPU inside its node")
    parser.add_argument("--card", type=float, default=assumed.card, help="bytes/s of an InfiniBand card")
    parser.add_argument("--call", type=float, default=assumed.call, help="seconds of a collective beside its bytes")
    arguments = parser.parse_args()
    machine = Machine(arguments.speed, arguments.nvlink, arguments.card, arguments.call)
    for name in arguments.tables:
        TABLES[name](arguments.models, arguments.gpus, arguments.batch, machine)


if __name__ == "__main__":
    main()
