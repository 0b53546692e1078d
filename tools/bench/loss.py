"""Measures projection and cross-entropy, forward and backward: in one piece, in chunks, and torch's own chunked one.

    OMP_NUM_THREADS=1 python tools/bench/loss.py [--device cuda] [--out loss.json]

CPU time of one thread, in turn, medians of ratios to the first of the same round; the peak is that of live tensors
beside the inputs and the two gradients, by the allocator's events (on a GPU max_memory_allocated, events of the
device, bfloat16).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from common import BenchParser, device_name, in_turn, median_ratio, print_header, print_row, seconds, write_results
from torch.profiler import ProfilerActivity, profile

from megatron_mea.parallel.cross_entropy import chunk_size, linear_cross_entropy_sum
from megatron_mea.parallel.grid import NO_TP

SHAPES = {
    "cpu": [(512, 256, 16384), (256, 64, 128256), (512, 512, 128256)],
    "cuda": [(8192, 2048, 128256), (8192, 4096, 128256)],
}
"""Tokens, hidden size, vocabulary."""

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Hidden states (tokens, hidden), the projection's weight (vocabulary, hidden), targets (tokens,)."""
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Sum of the cross-entropies of `Inputs`, in nats."""


def loss_in_one_piece(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of all logits at once."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def loss_in_chunks(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, size: int) -> torch.Tensor:
    """Ours, with the logits of `size` tokens at a time."""
    return linear_cross_entropy_sum(hidden, weight, targets, offset=0, tp=NO_TP, chunk=size)


def torch_chunked_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """torch's own chunked cross-entropy."""
    options = torch.nn.LinearCrossEntropyOptions(chunking_method="auto")
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


def random_inputs(*, tokens: int, hidden: int, vocabulary: int, device: str) -> Inputs:
    """Inputs from a fixed seed; hidden states and weight take gradients."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(size, hidden, generator=generator).to(device, dtype).mul_(hidden**-0.25).requires_grad_()
        for size in (tokens, vocabulary)
    )
    return x, weight, torch.randint(0, vocabulary, (tokens,), generator=generator).to(device)


def step(loss: Loss, inputs: Inputs) -> None:
    """A forward and a backward pass."""
    hidden, weight, targets = inputs
    hidden.grad = weight.grad = None
    loss(hidden, weight, targets).backward()


def peak_bytes(loss: Loss, inputs: Inputs) -> int:
    """Peak memory of a step in bytes beyond the inputs and their two gradients."""
    hidden, weight, _ = inputs
    hidden.grad = weight.grad = None
    gradients = hidden.nbytes + weight.nbytes
    if hidden.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(loss, inputs)
        return torch.cuda.max_memory_allocated() - before - gradients

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(loss, inputs)

    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)

    return peak - gradients


def measure(*, shape: tuple[int, int, int], device: str, rounds: int) -> list[dict]:
    """A row for every loss, with the seconds of every round and the peak in bytes."""
    tokens, hidden, vocabulary = shape
    inputs = random_inputs(tokens=tokens, hidden=hidden, vocabulary=vocabulary, device=device)
    chunk = chunk_size(tokens, vocabulary)
    losses: dict[str, Loss] = {"one piece": loss_in_one_piece}
    losses |= {f"chunks of {size}": partial(loss_in_chunks, size=size) for size in (4 * chunk, chunk)}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        losses["torch, chunked"] = torch_chunked_loss

    steps = {name: partial(step, loss, inputs) for name, loss in losses.items()}
    for warm_up in steps.values():
        warm_up()

    times = in_turn({name: partial(seconds, work, device) for name, work in steps.items()}, rounds)
    return [
        {"shape": list(shape), "loss": name, "seconds": times[name], "peak": peak_bytes(loss, inputs)}
        for name, loss in losses.items()
    ]


def main() -> None:
    arguments = BenchParser(__doc__).parse(devices=SHAPES, rounds=5)
    print_header(["tokens x hidden x vocabulary", "loss", "ms", "time", "peak, MiB", "peak"])
    results = []
    for shape in SHAPES[arguments.device]:
        rows = measure(shape=shape, device=arguments.device, rounds=arguments.rounds)
        results += rows
        for row in rows:
            cells = [" x ".join(map(str, shape)), row["loss"], f"{1e3 * statistics.median(row['seconds']):.0f}"]
            cells += [f"{median_ratio(row['seconds'], rows[0]['seconds']):.2f}", f"{row['peak'] / 2**20:.0f}"]
            print_row([*cells, f"{row['peak'] / rows[0]['peak']:.2f}"])

    write_results(arguments.out, {"device": device_name(arguments.device), "rows": results})


if __name__ == "__main__":
    main()
