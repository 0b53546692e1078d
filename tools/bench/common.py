"""Shared by the benches: options, rounds and medians, timers, tables, and facts about the machine.

Imports nothing but the standard library: two benches measure the memory of processes that import this file.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "launch/quickstart"
"""The text that ships with the project, as .jsonl.gz."""
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 FLOPs a second by a part of the GPU's name, from the vendor's data sheet."""

T = TypeVar("T")


class BenchParser(argparse.ArgumentParser):
    """Shows a bench's docstring as it is written, and adds the options that benches share."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse(
        self, *, devices: Iterable[str] = (), rounds: int | None = None, parts: Sequence[str] = ()
    ) -> argparse.Namespace:
        """Adds `--out`, and the following options where they have a value, behind the bench's own; parses sys.argv.

        Args:
            devices: choices of `--device`, whose default is cpu.
            rounds: default of `--rounds`.
            parts: choices of `--only`, whose default is all of them.
        """
        if devices:
            self.add_argument("--device", choices=devices, default="cpu")
        if rounds is not None:
            self.add_argument("--rounds", type=int, default=rounds)
        if parts:
            self.add_argument("--only", nargs="+", choices=parts, default=parts)
        self.add_argument("--out", type=Path)
        return self.parse_args()


def facts() -> dict[str, Any]:
    """Command, versions, processor and date of a measurement."""
    import importlib.metadata
    import os
    import shlex

    import torch

    models = (line.split(":")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "torch": torch.__version__,
        "deepspeed": importlib.metadata.version("deepspeed"),
        "processor": next(models, "").strip(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "date": time.strftime("%Y-%m-%d"),
    }


def write_results(out: Path | None, results: dict[str, Any]) -> None:
    """Writes facts and results as JSON, unless `out` is None."""
    if out:
        out.write_text(json.dumps(facts() | results, indent=1) + "\n")


def device_name(device: str) -> str:
    """The name of the GPU, or cpu."""
    import torch

    return torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 FLOPs a second of a GPU by its name; None where they are not known."""
    return next((value for key, value in PEAK_FLOPS.items() if key in device_name), None)


def in_turn(works: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each work returned in every round; in a round all run once, so that other users cost all of them alike."""
    results: dict[str, list[T]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            results[name].append(work())

    return results


def median_ratio(values: Iterable[float], base: Iterable[float]) -> float:
    """Median over the rounds of a value to the base of the same round."""
    return statistics.median(a / b for a, b in zip(values, base, strict=True))


def seconds(work: Callable[[], object], device: str) -> float:
    """Seconds of one call: on a CPU, CPU time of all threads; on a GPU, time between two events of its stream."""
    if not device.startswith("cuda"):
        begin = time.process_time()
        work()
        return time.process_time() - begin

    import torch

    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    work()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


def print_header(columns: Sequence[str], *, rule: str = " --- ") -> None:
    """The first two lines of a Markdown table."""
    print(f"| {' | '.join(columns)} |\n|{f'{rule}|' * len(columns)}", flush=True)


def print_row(cells: Iterable[str]) -> None:
    """A line of a Markdown table, shown at once."""
    print(f"| {' | '.join(cells)} |", flush=True)


def print_table(columns: Sequence[str], rows: Iterable[Iterable[str]]) -> None:
    """A Markdown table between two blank lines."""
    print()
    print_header(columns)
    for row in rows:
        print_row(row)
    print(flush=True)


def process_status(pid: int | str = "self") -> dict[str, str]:
    """The fields of /proc/PID/status.

    Raises:
        OSError: there is no such process.
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def status_bytes(key: str) -> int:
    """Bytes of this process's memory by a field of its status: `VmRSS`, `VmHWM`, `RssAnon`."""
    return int(process_status()[key].split()[0]) * 1024


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
