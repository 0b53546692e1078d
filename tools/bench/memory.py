"""Measures the peak memory of a rank over two real training steps, and compares it with `plan`.

    OMP_NUM_THREADS=1 python tools/bench/memory.py [NAME ...]

Two measurements from before the model is made: bytes of live tensors, from the allocator's events, and the resident
set, to which libraries add theirs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import BenchParser, print_header, print_row, status_bytes
from local_ranks import launch, layout, make_config, new_engine, random_step, random_teacher
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mea.config import Config
from megatron_mea.plan.plan import make_plan

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
LONG = {"seq_length": 4096, "micro_batch_size": 1, "global_batch_size": 2, "model": {"num_hidden_layers": 4}}
HALF = {"model": {"num_hidden_layers": 4, "num_component_heads": 2}}
"""One long sequence, of which each of two context ranks has 2,048 tokens; of `HALF` component heads are gathered."""


def case(parallel: dict | None = None, *, model: dict | None = None, seq_length: int = 512, **training: Any) -> Config:
    """A configuration of `MODEL`, of which `model` replaces keys, with steps of four samples."""
    return make_config(
        model=MODEL | (model or {}),
        training={"global_batch_size": 4, "micro_batch_size": 2} | training,
        parallel=parallel or {},
        seq_length=seq_length,
    )


EXPERTS = {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 352, "num_hidden_layers": 4}
"""As many active parameters as the dense feed-forward's."""
EIGHT = EXPERTS | {"num_experts": 8}
"""Few enough that activations take more than the update."""

CASES: dict[str, tuple[int, Config]] = {
    "1 rank, ZeRO 1": (1, case()),
    "1 rank, recomputed": (1, case(activation_checkpointing="full")),
    "1 rank, one micro-batch": (1, case(global_batch_size=4, micro_batch_size=4)),
    "dp2, ZeRO 1": (2, case(global_batch_size=8)),
    "dp2, ZeRO 2": (2, case(parallel=layout(zero=2), global_batch_size=8)),
    "dp2, ZeRO 3": (2, case(parallel=layout(zero=3), global_batch_size=8)),
    "tp2": (2, case(parallel=layout(tensor=2))),
    "tp2, sequence parallel": (2, case(parallel=layout(tensor=2, sequence=True))),
    "pp2": (2, case(parallel=layout(pipeline=2))),
    "pp2, recomputed": (2, case(parallel=layout(pipeline=2), activation_checkpointing="full")),
    "1 rank, loss in chunks": (1, case(**CHUNKED)),
    "tp2, loss in chunks": (2, case(parallel=layout(tensor=2), **CHUNKED)),
    "pp2, loss in chunks": (2, case(parallel=layout(pipeline=2), **CHUNKED)),
    "dp2, ZeRO 1, bf16": (
        2,
        case(precision="bf16", seq_length=64, micro_batch_size=1, global_batch_size=4, model={"num_hidden_layers": 4}),
    ),
    "cp2": (2, case(parallel=layout(context=2), **LONG)),
    "cp2, h' = h / 2": (2, case(parallel=layout(context=2), **LONG | HALF)),
    "cp2, h' = h / 2, selective": (
        2,
        case(parallel=layout(context=2), **LONG | HALF, activation_checkpointing="selective"),
    ),
    "cp2, h' = h / 2, recomputed": (
        2,
        case(parallel=layout(context=2), **LONG | HALF, activation_checkpointing="full"),
    ),
    "1 rank, experts": (1, case(model=EXPERTS)),
    "1 rank, 8 experts, one micro-batch": (1, case(model=EIGHT, global_batch_size=8, micro_batch_size=8)),
    "1 rank, 8 experts, one micro-batch, selective": (
        1,
        case(model=EIGHT, global_batch_size=8, micro_batch_size=8, activation_checkpointing="selective"),
    ),
    "tp2, 8 experts, one micro-batch": (
        2,
        case(parallel=layout(tensor=2), model=EIGHT, global_batch_size=8, micro_batch_size=8),
    ),
    "tp2, experts": (2, case(parallel=layout(tensor=2), model=EXPERTS)),
    "pp2, experts": (2, case(parallel=layout(pipeline=2), model=EXPERTS)),
    "dp2, experts, ZeRO 3": (2, case(parallel=layout(zero=3), model=EXPERTS, global_batch_size=8)),
}


class LiveTensors(TorchDispatchMode):
    """While entered, records allocations; afterwards `peak` is the most bytes of live tensors, beyond those before.

    The profiler does not see what gloo's threads free, so each collective is waited for until they have let go.
    """

    def __enter__(self) -> LiveTensors:
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return super().__enter__()

    def __torch_dispatch__(  # noqa: PLR0917 - torch passes by position
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
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
        # By address: freeing what was allocated before counts for nothing.
        events = self._profile.profiler.kineto_results.experimental_event_tree()
        for _, address, size in sorted(_allocations(events)):
            total += max(size, 0) - live.pop(address, 0)
            if size > 0:
                live[address] = size
            self.peak = max(self.peak, total)


def peak_memory(config: Config) -> tuple[int, int]:
    """Peaks of this rank over two steps: bytes of live tensors, and resident bytes, both beyond those before."""
    before = status_bytes("VmRSS")
    # Sets the high-water mark back to the present.
    Path("/proc/self/clear_refs").write_text("5")
    with LiveTensors() as live:
        engine = new_engine(config)
        train_step = random_step(config, engine)
        for _ in range(2):
            train_step()

        resident = status_bytes("VmHWM") - before

    return live.peak, resident


def _allocations(events: Any) -> Iterator[tuple[int, int, int]]:
    """(time, address, bytes) of allocations, negative where memory is freed.

    Without those inside of a collective: gloo scatters a copy of its input, which NCCL does not.
    """
    for event in events:
        if event.name == "[memory]":
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        if not event.name.startswith("c10d::"):
            yield from _allocations(event.children)


def print_cases(cases: dict[str, tuple[int, Config]], names: list[str]) -> None:
    """Measures the cases of these names, or all if there are none, and prints a row for every stage."""
    print_header(["case", "stage", "tensors, measured MB", "planned", "ratio", "resident, measured MB"], rule="---")
    for name in names or cases:
        world_size, config = cases[name]
        ranks = launch(peak_memory, world_size, config)
        plan = make_plan(config=config, world_size=world_size, device="cpu")
        for memory in plan.memory:
            live, resident = ranks[memory.stage * world_size // plan.dims.pp]
            cells = [name, str(memory.stage), f"{live / 1e6:.0f}", f"{memory.total / 1e6:.0f}"]
            print_row([*cells, f"{memory.total / live:.3f}", f"{resident / 1e6:.0f}"])


def main() -> None:
    parser = BenchParser(__doc__)
    parser.add_argument("names", nargs="*", help="cases (default: all)")
    names = parser.parse_args().names
    with tempfile.TemporaryDirectory() as folder:
        distillation = random_teacher(MODEL | {"num_hidden_layers": 4}, folder)
        distilled = {
            "1 rank, distilled": (1, case(distillation=distillation)),
            "tp2, distilled": (2, case(parallel=layout(tensor=2), distillation=distillation)),
        }
        print_cases(CASES | distilled, names)


if __name__ == "__main__":
    main()
