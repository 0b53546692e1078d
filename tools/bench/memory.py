"""Measures the peak memory of a rank over two real training steps, and compares it with `plan`.

    OMP_NUM_THREADS=1 python tools/bench/memory.py [NAME ...]

Two measurements from before the model is made: bytes of live tensors, from the allocator's events, and the resident
set, to which libraries add theirs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from local_ranks import launch, make_config, new_engine, random_batches, random_teacher
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mea.cluster.plan import make_plan
from megatron_mea.config import Config

MODEL = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}

CHUNKED = {
    "model": {"vocab_size": 32768, "num_hidden_layers": 2},
    "micro_batch_size": 8,
    "global_batch_size": 16,
}
"""More than 64 MiB of logits on a rank, and a loss that takes more than the update."""


def case(tensor: int = 1, pipeline: int = 1, zero: int = 1, sequence: bool = False, **training: Any) -> Config:
    parallel = {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "zero_stage": zero,
        "sequence_parallel": sequence,
    }
    model = training.pop("model", {})
    seq_length = training.pop("seq_length", 512)
    training = {"global_batch_size": 4, "micro_batch_size": 2} | training
    return make_config(MODEL | model, training, parallel, seq_length)


CASES: dict[str, tuple[int, Config]] = {
    "1 rank, ZeRO 1": (1, case()),
    "1 rank, recomputed": (1, case(activation_checkpointing="full")),
    "1 rank, one micro-batch": (1, case(global_batch_size=4, micro_batch_size=4)),
    "dp2, ZeRO 1": (2, case(global_batch_size=8)),
    "dp2, ZeRO 2": (2, case(zero=2, global_batch_size=8)),
    "dp2, ZeRO 3": (2, case(zero=3, global_batch_size=8)),
    "tp2": (2, case(tensor=2)),
    "tp2, sequence parallel": (2, case(tensor=2, sequence=True)),
    "pp2": (2, case(pipeline=2)),
    "pp2, recomputed": (2, case(pipeline=2, activation_checkpointing="full")),
    "1 rank, loss in chunks": (1, case(**CHUNKED)),
    "tp2, loss in chunks": (2, case(tensor=2, **CHUNKED)),
    "pp2, loss in chunks": (2, case(pipeline=2, **CHUNKED)),
    "dp2, ZeRO 1, bf16": (
        2,
        case(precision="bf16", seq_length=64, micro_batch_size=1, global_batch_size=4, model={"num_hidden_layers": 4}),
    ),
}


class LiveTensors(TorchDispatchMode):
    """Bytes of live tensors at most while it is entered, over what was there before: `peak`, from the allocator.

    The profiler does not see what gloo's threads give back. So every collective is waited for until they have let go.
    """

    def __enter__(self) -> LiveTensors:
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return super().__enter__()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace == "c10d" and isinstance(result, tuple):
            dist.Work.unbox(result[-1]).wait()
            time.sleep(0.001)
        return result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._profile.__exit__(*error)
        live: dict[int, int] = {}
        total = self.peak = 0
        # By address: what was there before and is given back counts for nothing.
        events = self._profile.profiler.kineto_results.experimental_event_tree()
        for _, address, size in sorted(_allocations(events)):
            total += max(size, 0) - live.pop(address, 0)
            if size > 0:
                live[address] = size
            self.peak = max(self.peak, total)


def peak(config: Config) -> tuple[int, int]:
    """(live tensor bytes, resident bytes) at most, over what was there before."""
    before = _status("VmRSS")
    # Sets the high-water mark back to the present.
    Path("/proc/self/clear_refs").write_text("5")
    with LiveTensors() as live:
        engine = new_engine(config)
        batches = random_batches(config, engine)
        for _ in range(2):
            engine.train_step(batches, config.tokens_per_step, 1e-3)
        resident = _status("VmHWM") - before
    return live.peak, resident


def _allocations(events: Any) -> Iterator[tuple[int, int, int]]:
    """(time, address, bytes), negative where they are given back.

    Without what a collective takes for itself: gloo scatters a copy of all it is given, which NCCL does not.
    """
    for event in events:
        if event.name == "[memory]":
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        if not event.name.startswith("c10d::"):
            yield from _allocations(event.children)


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="cases (default: all)")
    names = parser.parse_args().names
    with tempfile.TemporaryDirectory() as folder:
        taught = {"distillation": random_teacher(MODEL | {"num_hidden_layers": 4}, folder)}
        print_table(CASES | {"1 rank, distilled": (1, case(**taught)), "tp2, distilled": (2, case(2, **taught))}, names)


def print_table(cases: dict[str, tuple[int, Config]], names: list[str]) -> None:
    """Measures the cases of these names; none: all."""
    print("| case | stage | tensors, measured MB | planned | ratio | resident, measured MB |")
    print("|---|---|---|---|---|---|")
    for name in names or cases:
        world_size, config = cases[name]
        ranks = launch(peak, world_size, config)
        plan = make_plan(config, world_size, device="cpu")
        for memory in plan.memory:
            live, resident = ranks[memory.stage * world_size // plan.layout.pipeline]
            numbers = f"{live / 1e6:.0f} | {memory.total / 1e6:.0f} | {memory.total / live:.3f}"
            print(f"| {name} | {memory.stage} | {numbers} | {resident / 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    main()
