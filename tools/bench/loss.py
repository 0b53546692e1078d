"""Measures projection and cross-entropy, forward and backward: in one piece, in chunks, and torch's own chunked one.

    OMP_NUM_THREADS=1 python tools/bench/loss.py [--device cuda] [--out loss.json]

CPU time of one thread, in turn, medians of ratios to the first of the same round; the peak is that of live tensors
beside what is given and the two gradients, by the allocator's events (on a GPU max_memory_allocated, events of the
device, bfloat16).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from local_ranks import facts
from torch.profiler import ProfilerActivity, profile

from megatron_mea.parallel.cross_entropy import chunk_size, linear_cross_entropy_sum
from megatron_mea.parallel.grid import ALONE

SHAPES = {
    "cpu": [(512, 256, 16384), (256, 64, 128256), (512, 512, 128256)],
    "cuda": [(8192, 2048, 128256), (8192, 4096, 128256)],
}
"""Tokens, hidden size, vocabulary."""

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def in_one_piece(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")


def in_chunks(size: int, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return linear_cross_entropy_sum(x, weight, targets, 0, ALONE, size)


def torchs(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    options = torch.nn.LinearCrossEntropyOptions(chunking_method="auto")
    return F.linear_cross_entropy(x, weight, targets, reduction="sum", options=options)


def step(loss: Loss, given: tuple[torch.Tensor, ...]) -> None:
    given[0].grad = given[1].grad = None
    loss(*given).backward()


def seconds(loss: Loss, given: tuple[torch.Tensor, ...]) -> float:
    if given[0].is_cuda:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        step(loss, given)
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3
    begin = time.process_time()
    step(loss, given)
    return time.process_time() - begin


def peak(loss: Loss, given: tuple[torch.Tensor, ...]) -> int:
    """Bytes beyond the arguments and their two gradients."""
    given[0].grad = given[1].grad = None
    gradients = sum(each.numel() * each.element_size() for each in given[:2])
    if given[0].is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(loss, given)
        return torch.cuda.max_memory_allocated() - before - gradients
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step(loss, given)
    live = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most - gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    rows = []
    print(
        "| tokens x hidden x vocabulary | loss | ms | time | peak, MiB | peak |\n| --- | --- | --- | --- | --- | --- |"
    )
    for tokens, hidden, vocabulary in SHAPES[arguments.device]:
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(size, hidden, generator=generator) for size in (tokens, vocabulary))
        given = [each.to(arguments.device, dtype).mul_(hidden**-0.25).requires_grad_() for each in (x, weight)]
        given.append(torch.randint(0, vocabulary, (tokens,), generator=generator).to(arguments.device))
        chosen = chunk_size(tokens, vocabulary)
        losses: dict[str, Loss] = {"one piece": in_one_piece}
        losses |= {f"chunks of {size}": partial(in_chunks, size) for size in (4 * chosen, chosen)}
        if hasattr(torch.nn, "LinearCrossEntropyOptions"):
            losses["torch, chunked"] = torchs
        for loss in losses.values():
            step(loss, tuple(given))
        times: dict[str, list[float]] = {name: [] for name in losses}
        for _ in range(arguments.rounds):
            for name, loss in losses.items():
                times[name].append(seconds(loss, tuple(given)))
        peaks = {name: peak(loss, tuple(given)) for name, loss in losses.items()}
        for name, mine in times.items():
            ratio = statistics.median(a / b for a, b in zip(mine, times["one piece"], strict=True))
            share, median = peaks[name] / peaks["one piece"], 1e3 * statistics.median(mine)
            rows.append({"shape": [tokens, hidden, vocabulary], "loss": name, "seconds": mine, "peak": peaks[name]})
            cells = [f"{tokens} x {hidden} x {vocabulary}", name, f"{median:.0f}", f"{ratio:.2f}"]
            print(f"| {' | '.join(cells)} | {peaks[name] / 2**20:.0f} | {share:.2f} |", flush=True)
    if arguments.out:
        name = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
        arguments.out.write_text(json.dumps(facts() | {"device": name, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
