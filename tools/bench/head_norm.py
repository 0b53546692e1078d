"""Measures the head norm, forward and backward: ours, torch's operations, and what a compiler makes of those.

    OMP_NUM_THREADS=1 python tools/bench/head_norm.py [--device cuda] [--numbers 1024 2048 4096] [--out head_norm.json]

x lies in memory as fused attention writes it, (batch, seq, H, d). Medians over rounds in turn, of CPU time of one
thread, or of events on a GPU in bfloat16, whose queue is filled first so that launches are not measured. GB/s count
what must move: x read and y written; x and dy read, dx written. The error is beside the formula in float64, of y, dx
and the gain's gradient: the norm of the difference over the norm.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from common import BenchParser, device_name, in_turn, median_ratio, print_header, print_row, write_results

from megatron_mea.attention.head_norm import head_norm

SHAPES = {
    "cpu": [(2, 8, 256, 64), (1, 8, 256, 128)],
    "cuda": [(8, 32, 4096, 64), (4, 64, 4096, 128), (4, 32, 4096, 80), (2, 16, 4096, 256), (1, 8, 2048, 64)],
}
"""batch, H, seq, d"""
EPS = 1e-5
STEPS = 10
"""Forward and backward passes in a round."""

Norm = Callable[..., torch.Tensor]
"""x (batch, H, seq, d), the gain (d,), eps -> y (batch, seq, H d)"""
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""x (batch, H, seq, d), the gain (d,), dy (batch, seq, H d)"""


def torch_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """torch's RMSNorm of each head: (batch, H, seq, d) -> (batch, seq, H d)."""
    return F.rms_norm(x, x.shape[-1:], gain, eps).transpose(1, 2).flatten(2)


def random_inputs(shape: tuple[int, int, int, int], device: str) -> Inputs:
    """Inputs of this shape (batch, H, seq, d) from a fixed seed; x lies in memory as (batch, seq, H, d)."""
    batch, heads, seq, dim = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    x = torch.randn(batch, seq, heads, dim, device=device, dtype=dtype).transpose(1, 2)
    gain = torch.rand(dim, device=device, dtype=dtype) + 0.5
    dy = torch.randn(batch, seq, heads * dim, device=device, dtype=dtype)
    return x.requires_grad_(), gain.requires_grad_(), dy


@contextmanager
def tile_elements(elements: int | None) -> Iterator[None]:
    """Sets the elements that a program of our kernels takes; None leaves their default."""
    if elements is None:
        yield
        return

    from megatron_mea.attention import head_norm_kernels

    before, head_norm_kernels.TILE_ELEMENTS = head_norm_kernels.TILE_ELEMENTS, elements
    try:
        yield
    finally:
        head_norm_kernels.TILE_ELEMENTS = before


def pass_seconds(norm: Norm, inputs: Inputs) -> tuple[float, float]:
    """Seconds of a forward pass and of a backward pass, means over `STEPS`."""
    x, gain, dy = inputs
    if not x.is_cuda:
        forward = backward = 0.0
        for _ in range(STEPS):
            begin = time.process_time()
            y = norm(x, gain, eps=EPS)
            between = time.process_time()
            torch.autograd.grad(y, (x, gain), dy)
            forward += between - begin
            backward += time.process_time() - between

        return forward / STEPS, backward / STEPS

    events = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in range(STEPS)]
    torch.cuda.synchronize()
    # The device idles some 30 ms, and the host gets ahead of it.
    torch.cuda._sleep(50_000_000)
    for first, between, last in events:
        first.record()
        y = norm(x, gain, eps=EPS)
        between.record()
        torch.autograd.grad(y, (x, gain), dy)
        last.record()

    torch.cuda.synchronize()
    forward, backward = (statistics.fmean(e[i].elapsed_time(e[i + 1]) for e in events) / 1e3 for i in range(2))
    return forward, backward


def errors(norm: Norm, inputs: Inputs) -> list[float]:
    """Relative errors of y, dx and the gain's gradient against the formula in float64."""
    x, gain, dy = inputs
    y = norm(x, gain, eps=EPS)
    actual = y, *torch.autograd.grad(y, (x, gain), dy)
    x64, gain64 = x.detach().double().requires_grad_(), gain.detach().double().requires_grad_()
    y64 = (x64 * (x64.square().mean(-1, keepdim=True) + EPS).rsqrt() * gain64).transpose(1, 2).flatten(2)
    expected = y64, *torch.autograd.grad(y64, (x64, gain64), dy.double())
    return [float(((a.detach() - b).norm() / b.norm()).detach()) for a, b in zip(actual, expected, strict=True)]


def measure(*, shape: tuple[int, int, int, int], device: str, tile_sizes: list[int], rounds: int) -> list[dict]:
    """A row for every norm; `tile_sizes`: ours also with so many elements a program."""
    inputs = random_inputs(shape, device)
    norms: dict[str, tuple[Norm, int | None]] = {
        "torch": (torch_norm, None),
        "torch, compiled": (torch.compile(torch_norm, dynamic=False), None),
        "ours": (head_norm, None),
    }
    norms |= {f"ours, {size} elements a program": (head_norm, size) for size in tile_sizes}

    def timed(norm: Norm, size: int | None) -> tuple[float, float]:
        with tile_elements(size):
            return pass_seconds(norm, inputs)

    error = {}
    for name, (norm, size) in norms.items():
        # The first call compiles.
        timed(norm, size)
        with tile_elements(size):
            error[name] = errors(norm, inputs)

    times = in_turn({name: partial(timed, norm, size) for name, (norm, size) in norms.items()}, rounds)
    totals = {name: [sum(passes) for passes in times[name]] for name in norms}
    moved = inputs[0].numel() * inputs[0].element_size()
    rows = []
    for name, passes in times.items():
        forward, backward = (statistics.median(values) for values in zip(*passes, strict=True))
        ratio = median_ratio(totals[name], totals["torch"])
        row = {"shape": shape, "norm": name, "forward": forward, "backward": backward, "ratio": ratio}
        rates = {"forward_gb_s": 2 * moved / forward / 1e9, "backward_gb_s": 3 * moved / backward / 1e9}
        rows.append(row | rates | {"error": error[name], "seconds": passes})

    return rows


def main() -> None:
    parser = BenchParser(__doc__)
    parser.add_argument("--elements", type=int, nargs="*", default=[], help="also with so many elements a program")
    arguments = parser.parse(devices=SHAPES, rounds=10)
    columns = ["batch x H x seq x d", "norm", "forward, us", "GB/s", "backward, us", "GB/s", "time"]
    print_header([*columns, "error of y, dx, dgain"])
    rows = []
    for shape in SHAPES[arguments.device]:
        for row in measure(
            shape=shape, device=arguments.device, tile_sizes=arguments.elements, rounds=arguments.rounds
        ):
            rows.append(row)
            cells = [" x ".join(map(str, shape)), row["norm"]]
            for direction in ("forward", "backward"):
                cells += [f"{1e6 * row[direction]:.0f}", f"{row[f'{direction}_gb_s']:.0f}"]
            print_row([*cells, f"{row['ratio']:.2f}", ", ".join(f"{error:.1e}" for error in row["error"])])

    write_results(arguments.out, {"device": device_name(arguments.device), "rows": rows})


if __name__ == "__main__":
    main()
