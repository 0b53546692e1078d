"""Trains a small model on every layout that runs on a few processes of this machine, and compares each with `plan`.

    OMP_NUM_THREADS=1 python tools/bench/layouts.py [--processes 1 2 4] [--names PART] [--profiler] [--out layouts.json]

Measures on every rank the collectives of its third step, the peak of live tensors from before the model is built until
the second step is over, and CPU seconds of a later step: of the training thread, which are planned by FLOPs at the
speed of one process, and of the threads that send and receive.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from collectives import CollectiveCounter, Counts, classify_group
from common import BenchParser, print_header, write_results
from local_ranks import launch, layout, make_config, new_engine, random_step
from memory import LiveTensors

from megatron_mea.config import Config
from megatron_mea.plan.plan import Plan, make_plan

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
SINGLE_RANK = "1 rank"
GROUPS = ("tensor", "context", "data", "pipeline")
FOLDED = 160
"""Sequence length with which a micro-batch of two samples has more tokens than `hidden_size`."""


def case(parallel: dict, *, model: dict | None = None, seq_length: int = 96, **training: Any) -> Config:
    """A configuration of `MODEL`, of which `model` replaces keys, with steps of 16 samples."""
    return make_config(
        model=MODEL | (model or {}),
        training={"global_batch_size": 16, "micro_batch_size": 2} | training,
        parallel=parallel,
        seq_length=seq_length,
    )


def all_layouts(processes: int) -> Iterator[tuple[str, Config]]:
    """Every layout of so many processes by name, with and without recomputation; ZeRO 0 runs as 1."""
    for tensor, pipeline, context in itertools.product(range(1, processes + 1), repeat=3):
        if processes % (tensor * pipeline * context):
            continue

        data = processes // (tensor * pipeline * context)
        sizes = {"tp": tensor, "cp": context, "pp": pipeline, "dp": data}
        name = " x ".join(f"{kind}{size}" for kind, size in sizes.items() if size > 1) or SINGLE_RANK
        replicas = data * context
        zero_stages = (1, 2, 3) if replicas > 1 and pipeline == 1 else (1,)
        for zero, sequence, recomputation in itertools.product(zero_stages, (False, True), ("none", "full")):
            if sequence and tensor == 1:
                continue

            marks = [f"ZeRO {zero}"] * (replicas > 1) + ["sequence parallel"] * sequence
            marks += ["recomputed"] * (recomputation == "full")
            parallel = layout(tensor=tensor, pipeline=pipeline, context=context, zero=zero, sequence=sequence)
            config = case(parallel=parallel, seq_length=FOLDED, activation_checkpointing=recomputation)
            yield ", ".join([name, *marks]), config


CASES: dict[int, dict[str, Config]] = {processes: dict(all_layouts(processes)) for processes in (1, 2, 4)}
LARGE = {"vocab_size": 32768}
"""With this vocabulary a rank has more than 64 MiB of logits."""
TIED = {"tie_word_embeddings": True}
CASES[2] |= {
    "dp2, ZeRO 0": case(parallel=layout(zero=0), seq_length=FOLDED),
    "dp2, ZeRO 1, bf16": case(parallel=layout(), seq_length=32, global_batch_size=4, precision="bf16"),
    "tp2, short samples": case(layout(tensor=2)),
    "tp2, sequence parallel, short samples": case(layout(tensor=2, sequence=True)),
    "tp2, sequence parallel, qk_norm, recomputed": case(
        parallel=layout(tensor=2, sequence=True),
        model={"qk_norm": True},
        seq_length=FOLDED,
        activation_checkpointing="full",
    ),
    "pp2, tied": case(layout(pipeline=2), model=TIED),
    "tp2, loss in chunks": case(parallel=layout(tensor=2), model=LARGE, seq_length=FOLDED, micro_batch_size=8),
    "tp2, sequence parallel, loss in chunks": case(
        parallel=layout(tensor=2, sequence=True), model=LARGE, seq_length=FOLDED, micro_batch_size=8
    ),
    "pp2, loss in chunks": case(parallel=layout(pipeline=2), model=LARGE, seq_length=FOLDED, micro_batch_size=8),
}
CASES[4] |= {
    "tp2 x pp2, tied": case(layout(tensor=2, pipeline=2), model=TIED),
    "tp4 on 2 composite heads": case(
        parallel=layout(tensor=4), model={"num_key_value_heads": 2, "attention_bias": True}, seq_length=FOLDED
    ),
}


@dataclass(frozen=True, kw_only=True)
class RankMeasurement:
    """A rank's collectives in a step, its peak of live tensors in bytes, and CPU seconds of a step by thread.

    Args:
        computing: of the thread that trains.
        sending: of all others.
    """

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


def count_step(engine: Any, train_step: Callable[[], Any], *, profiler: bool) -> Counts:
    """Counts this rank's collectives in a step.

    Args:
        profiler: take another step, and compare the number of calls with those that torch's profiler sees in it.
    """
    with CollectiveCounter(partial(classify_group, engine)) as counter:
        train_step()

    if profiler:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            train_step()

        names = Counter(event.name for event in profile.events() if event.name.startswith("c10d::"))
        calls = sum(number for name, number in names.items() if not name.endswith(("recv_", "barrier")))
        assert calls == counter.all_calls, (names, counter.all_calls)

    return counter.counts


def measure(config: Config, *, profiler: bool) -> RankMeasurement:
    """Trains some steps on this rank; collective."""
    gc.collect()
    with LiveTensors() as live:
        engine = new_engine(config)
        train_step = random_step(config, engine)
        for _ in range(STEPS_BEFORE):
            train_step()

    counts = count_step(engine=engine, train_step=train_step, profiler=profiler)
    this_thread, all_threads = [], []
    for _ in range(STEPS_TIMED):
        begin = time.thread_time(), time.process_time()
        train_step()
        this_thread.append(time.thread_time() - begin[0])
        all_threads.append(time.process_time() - begin[1])

    computing = statistics.median(this_thread)
    sending = statistics.median(all_threads) - computing
    return RankMeasurement(counts=counts, peak=live.peak, computing=computing, sending=sending)


def measure_cases(cases: dict[str, Config], *, profiler: bool = False) -> list[RankMeasurement]:
    """Measures every case on this rank, one after the other; collective."""
    return [measure(config, profiler=profiler) for config in cases.values()]


def compare(plan: Plan, ranks: list[Counts]) -> list[Compared]:
    """Every collective that was counted or planned; `ranks`: the counts of every rank."""
    planned = {(row.stage, row.group, row.collective): row for row in plan.communication}
    per_stage = len(ranks) // plan.dims.pp
    rows = []
    for stage in range(plan.dims.pp):
        counts = ranks[stage * per_stage]
        for group, collective in sorted(counts.keys() | {key[1:] for key in planned if key[0] == stage}):
            row = planned.get((stage, group, collective))
            calls, size = counts.get((group, collective), (0, 0))
            rows.append(
                Compared(
                    stage=stage,
                    group=group,
                    collective=collective,
                    calls=calls,
                    planned_calls=row.count if row else 0,
                    bytes=size,
                    planned_bytes=row.bytes if row else 0,
                )
            )

    return rows


def result(*, name: str, config: Config, ranks: list[RankMeasurement]) -> dict[str, Any]:
    """A case, measured beside planned, for JSON; memory and bytes of rank 0 of each stage, time of all ranks."""
    plan = make_plan(config=config, world_size=len(ranks), device="cpu")
    per_stage = len(ranks) // plan.dims.pp
    return {
        "case": name,
        "processes": len(ranks),
        "peak_bytes": [ranks[stage * per_stage].peak for stage in range(plan.dims.pp)],
        "planned_peak_bytes": [memory.total for memory in plan.memory],
        "cpu_seconds_computing": sum(rank.computing for rank in ranks),
        "cpu_seconds_sending": sum(rank.sending for rank in ranks),
        "planned_flops": plan.flops.total * plan.tokens_per_step,
        "collectives": [row._asdict() for row in compare(plan, [rank.counts for rank in ranks])],
    }


def lines(result: dict[str, Any], speed: float | None) -> Iterator[str]:
    """A line of the table for every stage.

    Args:
        speed: FLOPs a CPU second of a process by itself; None where that is not known.
    """
    for stage, (peak, planned) in enumerate(zip(result["peak_bytes"], result["planned_peak_bytes"], strict=True)):
        rows = [row for row in result["collectives"] if row["stage"] == stage]
        cells = [result["case"] if stage == 0 else "", str(stage)]
        for group in GROUPS:
            group_rows = [row for row in rows if row["group"] == group]
            size, calls = (sum(row[key] for row in group_rows) for key in ("bytes", "calls"))
            cells.append(f"{size / 1e6:.3f} ({calls})" if group_rows else "-")

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
    parser = BenchParser(__doc__)
    parser.add_argument("--processes", nargs="+", type=int, choices=CASES, default=list(CASES))
    parser.add_argument("--names", default="", metavar="PART", help="only cases whose name has this part")
    parser.add_argument("--profiler", action="store_true", help="compare the number of calls with torch's profiler")
    arguments = parser.parse()
    columns = ["layout", "stage", f"{GROUPS[0]}, MB (calls)", *GROUPS[1:], "planned"]
    columns += ["tensors, MB", "planned", "ratio", "CPU s of all ranks", "by FLOPs", "ratio", "sending"]
    print_header(columns, rule="---")
    results: list[dict[str, Any]] = []
    speed = None
    for processes in arguments.processes:
        cases = {name: config for name, config in CASES[processes].items() if arguments.names in name}
        if not cases:
            continue

        ranks = launch(partial(measure_cases, profiler=arguments.profiler), processes, cases)
        for index, (name, config) in enumerate(cases.items()):
            row = result(name=name, config=config, ranks=[measurements[index] for measurements in ranks])
            results.append(row)
            if name == SINGLE_RANK:
                speed = row["planned_flops"] / row["cpu_seconds_computing"]
            print("\n".join(lines(row, speed)), flush=True)

    write_results(arguments.out, {"model": MODEL, "results": results})


if __name__ == "__main__":
    main()
