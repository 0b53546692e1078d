"""Counts what every collective of a real training step carries, and compares it with `plan`.

    OMP_NUM_THREADS=1 python tools/bench/communication.py [--profiler]

Every collective of torch passes its dispatcher, whoever calls it, and is counted there.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from local_ranks import launch, make_config, new_engine, random_batches
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mea.cluster.plan import make_plan
from megatron_mea.config import Config

MODEL = {
    "vocab_size": 1536,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
STEPS_BEFORE = 2
"""ZeRO 3 follows its own plan of fetches from the third pass on."""
SCALARS = 3
"""Calls with so few numbers carry norms, losses and flags: `plan` leaves them out, and so does the table."""


def layout(tensor: int = 1, pipeline: int = 1, zero: int = 1, sequence: bool = False) -> dict:
    return {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "zero_stage": zero,
        "sequence_parallel": sequence,
    }


def case(parallel: dict, model: dict | None = None, seq_length: int = 96, **training: Any) -> Config:
    return make_config(
        MODEL | (model or {}), {"global_batch_size": 16, "micro_batch_size": 2} | training, parallel, seq_length
    )


CASES: dict[int, dict[str, Config]] = {
    2: {
        "dp2, ZeRO 0": case(layout(zero=0)),
        "dp2, ZeRO 1": case(layout(zero=1)),
        "dp2, ZeRO 2": case(layout(zero=2)),
        "dp2, ZeRO 3": case(layout(zero=3)),
        "dp2, ZeRO 1, bf16": case(layout(zero=1), seq_length=32, global_batch_size=4, precision="bf16"),
        "tp2, combined": case(layout(2)),
        "tp2, folded": case(layout(2), seq_length=160),
        "tp2, folded, recomputed": case(layout(2), seq_length=160, activation_checkpointing="full"),
        "tp2, sequence parallel, combined": case(layout(2, sequence=True)),
        "tp2, sequence parallel, folded, recomputed": case(
            layout(2, sequence=True), {"qk_norm": True}, 160, activation_checkpointing="full"
        ),
        "pp2": case(layout(1, 2)),
        "pp2, tied": case(layout(1, 2), {"tie_word_embeddings": True}),
    },
    4: {
        "tp2 x dp2, ZeRO 1": case(layout(2)),
        "tp2 x dp2, ZeRO 3": case(layout(2, zero=3)),
        "tp2 x pp2, tied": case(layout(2, 2), {"tie_word_embeddings": True}),
        "tp2 x pp2, sequence parallel": case(layout(2, 2, sequence=True)),
        "tp4 on 2 composite heads, folded": case(
            layout(4), {"num_key_value_heads": 2, "attention_bias": True}, seq_length=160
        ),
    },
}

Counts = dict[tuple[str, str], tuple[int, int]]
"""(group, collective): calls, bytes."""


class CollectiveCounter(TorchDispatchMode):
    """Counts calls and payload bytes by collective and by `classify` of the group's ranks; None leaves a call out."""

    # Name of the operation, of the collective, and which argument is the whole.
    OPERATIONS: ClassVar[dict[str, tuple[str, int]]] = {
        "allreduce_": ("all_reduce", 0),
        "_allgather_base_": ("all_gather", 0),
        "allgather_": ("all_gather", 0),
        "_reduce_scatter_base_": ("reduce_scatter", 1),
        "reduce_scatter_": ("reduce_scatter", 1),
        "allgather_into_tensor_coalesced_": ("all_gather", 0),
        "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
        "broadcast_": ("broadcast", 0),
        "reduce_": ("reduce", 0),
        "send": ("send", 0),
    }
    IGNORED = ("recv_", "barrier", "monitored_barrier_")

    def __init__(self, classify: Callable[[list[int]], str | None]) -> None:
        super().__init__()
        self.classify = classify
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.all_calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function.namespace == "c10d":
            self._count(function._schema.name.removeprefix("c10d::"), args)
        return function(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        if name in self.IGNORED:
            return
        collective, whole = self.OPERATIONS[name]
        group = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
        ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
        key = (self.classify(ranks) if collective != "send" else "pipeline", collective)
        tensors = _flat(args[whole])
        self.all_calls += 1
        if key[0] is not None and sum(tensor.numel() for tensor in tensors) > SCALARS:
            self.calls[key] += 1
            self.bytes[key] += sum(tensor.nbytes for tensor in tensors)


def _flat(tensors: Any) -> list[torch.Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else [each for part in tensors for each in _flat(part)]


def group_of(engine: Any, ranks: list[int]) -> str | None:
    """tensor, data or pipeline: by what distinguishes the ranks; world where several things do; None of one rank."""
    if len(ranks) == 1:
        return None
    tensor, data = engine.grid.tensor.size, engine.grid.data_size
    places = [(rank % tensor, rank // tensor % data, rank // (tensor * data)) for rank in ranks]
    differ = [len(set(axis)) > 1 for axis in zip(*places, strict=True)]
    return ("tensor", "data", "pipeline")[differ.index(True)] if sum(differ) == 1 else "world"


def count_step(config: Config, profiler: bool = False) -> Counts:
    """What this rank's third step sent."""
    engine = new_engine(config)
    batches = random_batches(config, engine)
    for _ in range(STEPS_BEFORE):
        engine.train_step(batches, config.tokens_per_step, 1e-3)
    with CollectiveCounter(lambda ranks: group_of(engine, ranks)) as counter:
        engine.train_step(batches, config.tokens_per_step, 1e-3)
    if profiler:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            engine.train_step(batches, config.tokens_per_step, 1e-3)
        seen = Counter(event.name for event in profile.events() if event.name.startswith("c10d::"))
        others = sum(number for name, number in seen.items() if not name.endswith(("recv_", "barrier")))
        assert others == counter.all_calls, (seen, counter.all_calls)
    return {key: (counter.calls[key], counter.bytes[key]) for key in counter.calls}


def count_cases(cases: dict[str, Config], profiler: bool = False) -> list[Counts]:
    """Of every case, one after the other, on this rank."""
    return [count_step(config, profiler) for config in cases.values()]


def compare(config: Config, ranks: list[Counts]) -> list[tuple[int, str, str, int, int, int, int]]:
    """(stage, group, collective, calls counted, planned, bytes counted, planned) of tensor and data rank 0."""
    plan = make_plan(config, len(ranks))
    planned = {(row.stage, row.group, row.collective): row for row in plan.communication}
    per_stage = len(ranks) // plan.layout.pipeline
    rows = []
    for stage in range(plan.layout.pipeline):
        counts = ranks[stage * per_stage]
        for group, collective in sorted(counts.keys() | {key[1:] for key in planned if key[0] == stage}):
            row = planned.get((stage, group, collective))
            calls, size = counts.get((group, collective), (0, 0))
            rows.append((stage, group, collective, calls, row.count if row else 0, size, row.bytes if row else 0))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiler", action="store_true", help="compare the number of calls with torch's profiler")
    arguments = parser.parse_args()
    print("| layout | stage | group | collective | calls, counted | planned | MB, counted | planned | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for world_size, cases in CASES.items():
        ranks = launch(count_cases, world_size, cases, arguments.profiler)
        for index, (name, config) in enumerate(cases.items()):
            for stage, group, collective, calls, planned_calls, size, planned in compare(
                config, [counts[index] for counts in ranks]
            ):
                ratio = f"{planned / size:.3f}" if size else "-"
                numbers = f"{calls} | {planned_calls} | {size / 1e6:.3f} | {planned / 1e6:.3f} | {ratio}"
                print(f"| {name} | {stage} | {group} | {collective} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
