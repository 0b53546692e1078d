"""Trains a small model on every layout that runs on a few processes of this machine, and compares each with `plan`.

    OMP_NUM_THREADS=1 python tools/bench/layouts.py [--processes 1 2 4] [--names PART] [--profiler] [--out layouts.json]

Of every rank: what its third step hands to collectives, the peak of live tensors from before the model is made until
the second step is over, and CPU seconds of a later step: its own thread's, which are planned by FLOPs at the speed of
one process, and those of the threads that send and receive.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from collectives import CollectiveCounter, Counts, group_of
from local_ranks import facts, launch, make_config, new_engine, random_batches
from memory import LiveTensors

from megatron_mea.cluster.plan import Plan, make_plan
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
STEPS_TIMED = 3
ALONE = "1 rank"
FOLDED = 160
"""Sequence length with which a micro-batch of two samples has more tokens than `hidden_size`."""


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


def all_layouts(processes: int) -> Iterator[tuple[str, Config]]:
    """Every layout of so many processes by name, with and without recomputation; ZeRO 0 runs as 1."""
    for tensor, pipeline in itertools.product(range(1, processes + 1), repeat=2):
        if processes % (tensor * pipeline):
            continue
        data = processes // (tensor * pipeline)
        sizes = {"tp": tensor, "pp": pipeline, "dp": data}
        name = " x ".join(f"{kind}{size}" for kind, size in sizes.items() if size > 1) or ALONE
        zero_stages = (1, 2, 3) if data > 1 and pipeline == 1 else (1,)
        for zero, sequence, again in itertools.product(zero_stages, (False, True), ("none", "full")):
            if sequence and tensor == 1:
                continue
            marks = (
                [f"ZeRO {zero}"] * (data > 1) + ["sequence parallel"] * sequence + ["recomputed"] * (again == "full")
            )
            parallel = layout(tensor, pipeline, zero, sequence)
            yield ", ".join([name, *marks]), case(parallel, None, FOLDED, activation_checkpointing=again)


CASES: dict[int, dict[str, Config]] = {processes: dict(all_layouts(processes)) for processes in (1, 2, 4)}
LARGE = {"vocab_size": 32768}
"""Ids of which a rank has more than 64 MiB of logits."""
TIED = {"tie_word_embeddings": True}
CASES[2] |= {
    "dp2, ZeRO 0": case(layout(zero=0), None, FOLDED),
    "dp2, ZeRO 1, bf16": case(layout(), None, 32, global_batch_size=4, precision="bf16"),
    "tp2, short samples": case(layout(2)),
    "tp2, sequence parallel, short samples": case(layout(2, sequence=True)),
    "tp2, sequence parallel, qk_norm, recomputed": case(
        layout(2, sequence=True), {"qk_norm": True}, FOLDED, activation_checkpointing="full"
    ),
    "pp2, tied": case(layout(1, 2), TIED),
    "tp2, loss in chunks": case(layout(2), LARGE, FOLDED, micro_batch_size=8),
    "tp2, sequence parallel, loss in chunks": case(layout(2, sequence=True), LARGE, FOLDED, micro_batch_size=8),
    "pp2, loss in chunks": case(layout(1, 2), LARGE, FOLDED, micro_batch_size=8),
}
CASES[4] |= {
    "tp2 x pp2, tied": case(layout(2, 2), TIED),
    "tp4 on 2 composite heads": case(layout(4), {"num_key_value_heads": 2, "attention_bias": True}, FOLDED),
}


@dataclass(frozen=True)
class Measured:
    """Of one rank: what a step sent, bytes of live tensors at most, CPU seconds of a step computing and sending."""

    counts: Counts
    peak: int
    computing: float
    sending: float


class Compared(NamedTuple):
    """A collective of tensor and data rank 0 of a stage, counted and planned."""

    stage: int
    group: str
    collective: str
    calls: int
    planned_calls: int
    bytes: int
    planned_bytes: int


def count_step(config: Config, engine: Any, profiler: bool = False) -> Counts:
    """What a step of this rank sends; `profiler`: with as many calls as torch's profiler sees in the next one."""
    batches = random_batches(config, engine)
    with CollectiveCounter(lambda ranks: group_of(engine, ranks)) as counter:
        engine.train_step(batches, config.tokens_per_step, 1e-3)
    if profiler:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            engine.train_step(batches, config.tokens_per_step, 1e-3)
        seen = Counter(event.name for event in profile.events() if event.name.startswith("c10d::"))
        others = sum(number for name, number in seen.items() if not name.endswith(("recv_", "barrier")))
        assert others == counter.all_calls, (seen, counter.all_calls)
    return counter.counts


def measure(config: Config, profiler: bool = False) -> Measured:
    """Of this rank."""
    gc.collect()
    with LiveTensors() as live:
        engine = new_engine(config)
        batches = random_batches(config, engine)
        for _ in range(STEPS_BEFORE):
            engine.train_step(batches, config.tokens_per_step, 1e-3)
    counts = count_step(config, engine, profiler)
    own, all_threads = [], []
    for _ in range(STEPS_TIMED):
        begin = time.thread_time(), time.process_time()
        engine.train_step(batches, config.tokens_per_step, 1e-3)
        own.append(time.thread_time() - begin[0])
        all_threads.append(time.process_time() - begin[1])
    computing = statistics.median(own)
    return Measured(counts, live.peak, computing, statistics.median(all_threads) - computing)


def measure_cases(cases: dict[str, Config], profiler: bool = False) -> list[Measured]:
    """Of every case, one after the other, on this rank."""
    return [measure(config, profiler) for config in cases.values()]


def compare(plan: Plan, ranks: list[Counts]) -> list[Compared]:
    """Every collective that was counted or planned."""
    planned = {(row.stage, row.group, row.collective): row for row in plan.communication}
    per_stage = len(ranks) // plan.layout.pipeline
    rows = []
    for stage in range(plan.layout.pipeline):
        counts = ranks[stage * per_stage]
        for group, collective in sorted(counts.keys() | {key[1:] for key in planned if key[0] == stage}):
            row = planned.get((stage, group, collective))
            calls, size = counts.get((group, collective), (0, 0))
            sizes = (row.count, size, row.bytes) if row else (0, size, 0)
            rows.append(Compared(stage, group, collective, calls, *sizes))
    return rows


def result(name: str, config: Config, ranks: list[Measured]) -> dict[str, Any]:
    """One case, measured beside planned, for JSON; memory and bytes of rank 0 of each stage, time of all ranks."""
    plan = make_plan(config, len(ranks), device="cpu")
    per_stage = len(ranks) // plan.layout.pipeline
    return {
        "case": name,
        "processes": len(ranks),
        "peak_bytes": [ranks[stage * per_stage].peak for stage in range(plan.layout.pipeline)],
        "planned_peak_bytes": [memory.total for memory in plan.memory],
        "cpu_seconds_computing": sum(rank.computing for rank in ranks),
        "cpu_seconds_sending": sum(rank.sending for rank in ranks),
        "planned_flops": plan.flops.total * plan.tokens_per_step,
        "collectives": [row._asdict() for row in compare(plan, [rank.counts for rank in ranks])],
    }


def lines(result: dict[str, Any], speed: float | None) -> Iterator[str]:
    """A line of the table for every stage; `speed` in FLOPs a CPU second."""
    for stage, (peak, planned) in enumerate(zip(result["peak_bytes"], result["planned_peak_bytes"], strict=True)):
        rows = [row for row in result["collectives"] if row["stage"] == stage]
        cells = [result["case"] if stage == 0 else "", str(stage)]
        for group in ("tensor", "data", "pipeline"):
            own = [row for row in rows if row["group"] == group]
            size, calls = (sum(row[key] for row in own) for key in ("bytes", "calls"))
            cells.append(f"{size / 1e6:.3f} ({calls})" if own else "-")
        cells.append(agreement(rows))
        cells += [f"{peak / 1e6:.1f}", f"{planned / 1e6:.1f}", f"{planned / peak:.3f}"]
        if stage == 0:
            seconds = result["cpu_seconds_computing"]
            by_flops = result["planned_flops"] / speed if speed else None
            cells += [f"{seconds:.2f}", *([f"{by_flops:.2f}", f"{by_flops / seconds:.2f}"] if by_flops else ["", ""])]
            cells.append(f"{result['cpu_seconds_sending']:.2f}")
        else:
            cells += [""] * 4
        yield f"| {' | '.join(cells)} |"


def agreement(rows: list[dict[str, Any]]) -> str:
    """Planned over counted bytes of the collective that is most off; "=" where bytes and calls are all the same."""
    if not rows:
        return "-"
    if all(row["bytes"] == row["planned_bytes"] and row["calls"] == row["planned_calls"] for row in rows):
        return "="
    ratios = [row["planned_bytes"] / row["bytes"] if row["bytes"] else float("inf") for row in rows]
    return f"{max(ratios, key=lambda ratio: abs(ratio - 1)):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", nargs="+", type=int, choices=CASES, default=list(CASES))
    parser.add_argument("--names", default="", metavar="PART", help="only cases whose name has this part")
    parser.add_argument("--profiler", action="store_true", help="compare the number of calls with torch's profiler")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    names = ["layout", "stage", "tensor, MB (calls)", "data", "pipeline", "planned", "tensors, MB", "planned", "ratio"]
    names += ["CPU s of all ranks", "by FLOPs", "ratio", "sending"]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}", flush=True)
    results: list[dict[str, Any]] = []
    speed = None
    for processes in arguments.processes:
        cases = {name: config for name, config in CASES[processes].items() if arguments.names in name}
        if not cases:
            continue
        ranks = launch(measure_cases, processes, cases, arguments.profiler)
        for index, (name, config) in enumerate(cases.items()):
            results.append(found := result(name, config, [measured[index] for measured in ranks]))
            if name == ALONE:
                speed = found["planned_flops"] / found["cpu_seconds_computing"]
            print("\n".join(lines(found, speed)), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(facts() | {"model": MODEL, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
