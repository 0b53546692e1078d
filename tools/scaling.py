"""The tables of docs/scaling.md: for each model and number of GPUs the layout that `plan` makes the fastest.

    python tools/scaling.py [--models 1B 8B 32B 70B] [--gpus 8 64 512 4096] > tables.md

Arithmetic, with the assumptions of docs/cluster-settings.md: 40 % of 989 TFLOP/s; rings over 300 GB/s of NVLink inside
nodes of 8, and 40 GB/s for each of a node's InfiniBand cards; nothing is hidden behind computation.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_mea.cluster.plan import Plan, make_plan
from megatron_mea.config import Config
from megatron_mea.config.load import parse_config
from megatron_mea.errors import UserError

NODE, NVLINK, CARD, SPEED = 8, 300e9, 40e9, 0.4 * 989e12
LIMIT = 65 * 2**30
"""Bytes of 80 GiB: what fragmentation, NCCL and CUDA need is not planned."""
SEQ, BATCH = 8192, 2560

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


@dataclass(frozen=True)
class Estimate:
    """A layout with its plan, and the seconds of a step by the assumptions above."""

    config: Config
    plan: Plan
    compute: float
    bubble: float
    traffic: dict[str, float]

    @property
    def seconds(self) -> float:
        return self.compute + self.bubble + sum(self.traffic.values())

    @property
    def memory(self) -> int:
        return max(stage.total for stage in self.plan.memory)


def candidates(model: str, gpus: int) -> Iterator[Config]:
    """Layouts inside the rules of thumb: tensor ranks in a node, ZeRO 1 or 3, recomputation or none."""
    sizes = itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 3), ("none", "full"))
    for tensor, pipeline, zero, recomputation in sizes:
        if (zero == 3 and (pipeline > 1 or tensor > 1)) or tensor * pipeline > gpus:
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
                    "global_batch_size": max(BATCH, gpus // (tensor * pipeline)),
                    "micro_batch_size": 1,
                    "precision": "bf16",
                    "activation_checkpointing": recomputation,
                },
                "run": {"dir": "none"},
            }
        )


def estimate(config: Config, gpus: int) -> Estimate | None:
    """None where the layout cannot work."""
    try:
        plan = make_plan(config, gpus)
    except UserError:
        return None
    layout = plan.layout
    compute = plan.flops.total * plan.tokens_per_step / gpus / SPEED
    bubble = compute * layout.pipeline_bubble / (1 - layout.pipeline_bubble)
    sizes = {"tensor": layout.tensor, "data": layout.data, "pipeline": layout.pipeline}
    # Ranks are dealt tensor first, then data, then pipeline.
    reach = {"tensor": layout.tensor, "data": layout.tensor * layout.data, "pipeline": gpus}
    traffic = {}
    for group, size in sizes.items():
        by_stage: dict[int, float] = {}
        for row in plan.communication:
            if row.group == group:
                share = 1.0 if group == "pipeline" else (2 if row.collective == "all_reduce" else 1) * (size - 1) / size
                by_stage[row.stage] = by_stage.get(row.stage, 0.0) + share * row.bytes
        inside = reach[group] <= NODE
        cards = min(NODE // layout.tensor, size) if group == "data" else 1
        bandwidth = NVLINK if inside else min(NVLINK, CARD * cards)
        traffic[group] = max(by_stage.values(), default=0.0) / bandwidth
    return Estimate(config, plan, compute, bubble, traffic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 64, 512, 4096])
    arguments = parser.parse_args()
    names = ["model", "GPUs", "tensor x pipeline x data", "ZeRO", "recomputed", "GiB", "s a step", "compute", "bubble"]
    names += ["tensor", "data", "pipeline", "tokens/s/GPU", "efficiency"]
    print(f"| {' | '.join(names)} |\n|{' --- |' * len(names)}")
    for model in arguments.models:
        rate = 0.0
        for gpus in arguments.gpus:
            found = [each for config in candidates(model, gpus) if (each := estimate(config, gpus)) is not None]
            fitting = [each for each in found if each.memory <= LIMIT]
            print(f"{model} on {gpus}: {len(fitting)} of {len(found)} layouts fit", file=sys.stderr)
            if not fitting:
                smallest = min(found, key=lambda each: each.memory).memory / 2**30
                print(f"| {model} | {gpus} | none fits: {smallest:.0f} GiB at least |{' |' * (len(names) - 3)}")
                continue
            best = min(fitting, key=lambda each: each.seconds)
            layout, training = best.plan.layout, best.config.training
            own = best.plan.tokens_per_step / best.seconds / gpus
            rate = max(rate, own)
            cells = [model, f"{gpus:,}", f"{layout.tensor} x {layout.pipeline} x {layout.data}"]
            cells += [str(best.plan.zero_stage), training.activation_checkpointing, f"{best.memory / 2**30:.1f}"]
            cells += [f"{best.seconds:.2f}", f"{best.compute:.2f}", f"{best.bubble:.2f}"]
            cells += [f"{best.traffic[group]:.2f}" for group in ("tensor", "data", "pipeline")]
            cells += [f"{own:,.0f}", f"{own / rate:.0%}"]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
