"""Measures the head norm, forward and backward: ours, torch's operations, and what a compiler makes of those.

    OMP_NUM_THREADS=1 python tools/bench/head_norm.py [--device cuda] [--numbers 1024 2048 4096] [--out head_norm.json]

x lies in memory as fused attention writes it, (batch, seq, H, d). Medians over rounds in turn, of CPU time of one
thread, or of events on a GPU in bfloat16, whose queue is filled first so that launches are not measured. GB/s count
what must move: x read and y written; x and dy read, dx written. The error is beside the formula in float64, of y, dx
and the gain's gradient: the norm of the difference over the norm.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from local_ranks import facts

from megatron_mea.attention.head_norm import head_norm

SHAPES = {
    "cpu": [(2, 8, 256, 64), (1, 8, 256, 128)],
    "cuda": [(8, 32, 4096, 64), (4, 64, 4096, 128), (4, 32, 4096, 80), (2, 16, 4096, 256), (1, 8, 2048, 64)],
}
"""batch, H, seq, d"""
EPS = 1e-5
STEPS = 10
"""Of a round."""

Norm = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""x (batch, H, seq, d), the gain (d,), dy (batch, seq, H d)"""


def torchs(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps).transpose(1, 2).flatten(2)


def given(shape: tuple[int, int, int, int], device: str) -> Given:
    batch, heads, seq, dim = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    x = torch.randn(batch, seq, heads, dim, device=device, dtype=dtype).transpose(1, 2)
    weight = torch.rand(dim, device=device, dtype=dtype) + 0.5
    dy = torch.randn(batch, seq, heads * dim, device=device, dtype=dtype)
    return x.requires_grad_(), weight.requires_grad_(), dy


@contextmanager
def numbers_a_program(numbers: int | None) -> Iterator[None]:
    if numbers is None:
        yield
        return
    from megatron_mea.attention import head_norm_kernels

    before, head_norm_kernels.NUMBERS = head_norm_kernels.NUMBERS, numbers
    try:
        yield
    finally:
        head_norm_kernels.NUMBERS = before


def seconds(norm: Norm, x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor) -> tuple[float, float]:
    """A forward pass and a backward pass, each the mean of a round's."""
    if not x.is_cuda:
        times = [0.0, 0.0]
        for _ in range(STEPS):
            begin = time.process_time()
            y = norm(x, weight, EPS)
            between = time.process_time()
            torch.autograd.grad(y, (x, weight), dy)
            times[0] += between - begin
            times[1] += time.process_time() - between
        return times[0] / STEPS, times[1] / STEPS
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in range(STEPS)]
    torch.cuda.synchronize()
    # The device idles some 30 ms, and the host gets ahead of it.
    torch.cuda._sleep(50_000_000)
    for first, between, last in events:
        first.record()
        y = norm(x, weight, EPS)
        between.record()
        torch.autograd.grad(y, (x, weight), dy)
        last.record()
    torch.cuda.synchronize()
    forward, backward = (statistics.fmean(e[i].elapsed_time(e[i + 1]) for e in events) / 1e3 for i in range(2))
    return forward, backward


def errors(norm: Norm, x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor) -> list[float]:
    y = norm(x, weight, EPS)
    found = y, *torch.autograd.grad(y, (x, weight), dy)
    wide, gain = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    y = (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * gain).transpose(1, 2).flatten(2)
    expected = y, *torch.autograd.grad(y, (wide, gain), dy.double())
    return [float(((a.detach() - b).norm() / b.norm()).detach()) for a, b in zip(found, expected, strict=True)]


def measure(shape: tuple[int, int, int, int], device: str, numbers: list[int], rounds: int) -> list[dict]:
    tensors = given(shape, device)
    ways: dict[str, tuple[Norm, int | None]] = {"torch": (torchs, None)}
    ways["torch, compiled"] = (torch.compile(torchs, dynamic=False), None)
    ways["ours"] = (head_norm, None)
    ways |= {f"ours, {each} numbers a program": (head_norm, each) for each in numbers}
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    wrong = {}
    for turn in range(rounds + 1):
        for way, (norm, size) in ways.items():
            with numbers_a_program(size):
                if turn:
                    times[way].append(seconds(norm, *tensors))
                else:
                    # Whatever is compiled, is now.
                    seconds(norm, *tensors)
                    wrong[way] = errors(norm, *tensors)
    moved = tensors[0].numel() * tensors[0].element_size()
    rows = []
    for way, mine in times.items():
        forward, backward = (statistics.median(each) for each in zip(*mine, strict=True))
        ratio = statistics.median(sum(a) / sum(b) for a, b in zip(mine, times["torch"], strict=True))
        row = {"shape": shape, "norm": way, "forward": forward, "backward": backward, "ratio": ratio}
        rates = {"forward_gb_s": 2 * moved / forward / 1e9, "backward_gb_s": 3 * moved / backward / 1e9}
        rows.append(row | rates | {"error": wrong[way], "seconds": mine})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--numbers", type=int, nargs="*", default=[], help="also with so many numbers a program")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    print("| batch x H x seq x d | norm | forward, us | GB/s | backward, us | GB/s | time | error of y, dx, dgain |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for shape in SHAPES[arguments.device]:
        for row in measure(shape, arguments.device, arguments.numbers, arguments.rounds):
            rows.append(row)
            cells = [" x ".join(map(str, shape)), row["norm"]]
            for way in ("forward", "backward"):
                cells += [f"{1e6 * row[way]:.0f}", f"{row[f'{way}_gb_s']:.0f}"]
            cells += [f"{row['ratio']:.2f}", ", ".join(f"{each:.1e}" for each in row["error"])]
            print(f"| {' | '.join(cells)} |", flush=True)
    if arguments.out:
        name = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
        arguments.out.write_text(json.dumps(facts() | {"device": name, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
