"""Measures what a save costs the training, how large a checkpoint is, and how long saving and loading take.

    OMP_NUM_THREADS=1 python tools/bench/checkpoint.py [--rounds 5] [--only stall size] [--out checkpoint.json]

The stall compares, in turn in one run, blocks of steps without a save, with one behind the training and with one that
training waits for. Sizes and times are of a larger model, by layout; reading finds the files in the page cache.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import ROOT, BenchParser, print_header, print_row, write_results
from local_ranks import launch, layout, make_config, new_engine, random_step

from megatron_mea.checkpoint.folder import CheckpointMetadata, complete_checkpoints, find_corruption
from megatron_mea.checkpoint.saver import Saver
from megatron_mea.checkpoint.tensors import read_fragments, tensor_shapes
from megatron_mea.config import Config
from megatron_mea.config.load import load_config
from megatron_mea.config.schema import Checkpoint
from megatron_mea.training.distributed import writers_group

BLOCK = 20
"""Steps in a block; a save, if any, comes before the first."""
LARGE = {
    "vocab_size": 16384,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "num_component_heads": 3,
    "head_dim": 64,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 process": (1, layout()),
    "dp 2, ZeRO 1": (2, layout()),
    "dp 2, ZeRO 3": (2, layout(zero=3)),
    "tp 2": (2, layout(tensor=2)),
    "pp 2": (2, layout(pipeline=2)),
    "tp 2 x pp 2": (4, layout(tensor=2, pipeline=2)),
}
"""Processes, and the section `parallel` of their configuration."""


def new_saver(run_dir: Path, **settings: Any) -> Saver:
    """A silent saver into `run_dir` that keeps one checkpoint."""
    tokenizer = run_dir / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    return Saver(
        run_dir=run_dir,
        settings=Checkpoint(keep=1, **settings),
        tokenizer=tokenizer,
        group=writers_group(),
        lease=None,
        log=lambda line: None,
    )


def metadata(step: int) -> CheckpointMetadata:
    """Metadata of a checkpoint of this step, with nothing else in it."""
    return CheckpointMetadata(
        step=step, samples=0, tokens=0, config={}, data=[], layout={}, versions={}, validation_loss=None
    )


def wall_seconds(work: Callable[[], Any]) -> float:
    """Seconds from when all ranks begin until all are done."""
    dist.barrier()
    begin = time.monotonic()
    work()
    dist.barrier()
    return time.monotonic() - begin


def measure_stall(config: Config, root: Path, rounds: int) -> list[dict[str, float]]:
    """Seconds in every round: of a block by kind of save, of the call of `save` alone, of a late end of writing."""
    engine = new_engine(config)
    train_step = random_step(config, engine)
    savers = {"behind": new_saver(root / "behind"), "blocking": new_saver(root / "blocking", async_save=False)}
    step = 0

    def block(kind: str) -> None:
        nonlocal step
        if kind in savers:
            begin = time.monotonic()
            savers[kind].save(metadata(step), engine.state.fragments(owned=True))
            seconds[f"{kind}, the call"] = time.monotonic() - begin

        for _ in range(BLOCK):
            step += 1
            train_step()

    results = []
    for round_ in range(rounds + 1):
        seconds: dict[str, float] = {}
        for kind in ("none", "behind", "blocking"):
            seconds[kind] = wall_seconds(lambda kind=kind: block(kind))
            if kind == "behind":
                # What is not written by now would be missing in the figures.
                seconds["late"] = wall_seconds(savers[kind].wait)

        # The first round warms up.
        if round_:
            results.append(seconds)

    return results


def bench_stall(root: Path, rounds: int) -> list[dict[str, float]]:
    """Prints the table of what a save costs; returns rank 0's seconds of every round."""
    config = load_config(ROOT / "configs/quickstart.yaml", ["data.document_mask=false"])
    results = launch(measure_stall, 2, config, root, rounds)[0]
    medians = {kind: statistics.median(seconds[kind] for seconds in results) for kind in results[0]}
    step = medians["none"] / BLOCK
    print(f"quickstart model, 2 processes, a step takes {step:.3f} s; medians of {rounds} rounds of {BLOCK} steps")
    print(f"late at the end of the block: {medians['late']:.3f} s at the median\n")
    print_header(["save", "the call", "lost in all", "in steps"])
    for kind in ("behind", "blocking"):
        lost = statistics.median(seconds[kind] - seconds["none"] for seconds in results)
        print_row([kind, f"{medians[f'{kind}, the call']:.3f} s", f"{lost:.3f} s", f"{lost / step:.2f}"])

    print()
    return results


def save_and_load(config: Config, root: Path) -> dict[str, float]:
    """Seconds of copying, of the full save, and of verifying and loading."""
    engine = new_engine(config)
    saver = new_saver(root)
    saver.save(metadata(1), engine.state.fragments(owned=True))
    saver.wait()
    dist.barrier()

    begin = time.monotonic()
    copying = wall_seconds(lambda: saver.save(metadata(2), engine.state.fragments(owned=True)))
    saver.wait()
    dist.barrier()
    saving = time.monotonic() - begin
    folder = complete_checkpoints(root)[-1][1]

    def load() -> None:
        assert find_corruption(folder=folder, rank=dist.get_rank(), world_size=dist.get_world_size()) is None
        read_fragments(folder, engine.state.fragments())
        engine.state.sync_after_load(2)

    return {"copying": copying, "saving": saving, "loading": wall_seconds(load)}


def bench_size(root: Path) -> list[dict[str, Any]]:
    """Prints and returns size and times of a checkpoint by layout."""
    rows = []
    columns = ["layout", "parameters", "bytes", "of 12 a parameter", "copied in", "saved in", "verified and loaded in"]
    print_header(columns)
    for name, (world_size, parallel) in LAYOUTS.items():
        config = make_config(
            model=LARGE, training={"global_batch_size": 4, "micro_batch_size": 1}, parallel=parallel, seq_length=64
        )
        run_dir = root / name.replace(" ", "-")
        seconds = launch(save_and_load, world_size, config, run_dir)[0]
        folder = complete_checkpoints(run_dir)[-1][1]
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        # Each parameter has its master weight and two moments, in float32.
        elements = sum(map(prod, tensor_shapes(folder).values()))
        parameters = elements // 3
        rows.append({"layout": name, "parameters": parameters, "bytes": size, "seconds": seconds})

        times = [f"{value:.2f} s" for value in seconds.values()]
        print_row([name, f"{parameters:,}", f"{size:,}", f"{size / (4 * elements):.4f}", *times])
        shutil.rmtree(run_dir)

    return rows


def main() -> None:
    arguments = BenchParser(__doc__).parse(rounds=5, parts=("stall", "size"))
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if "stall" in arguments.only:
            results["stall"] = {"steps": BLOCK, "seconds": bench_stall(Path(folder), arguments.rounds)}
        if "size" in arguments.only:
            results["size"] = {"model": LARGE, "layouts": bench_size(Path(folder))}

    write_results(arguments.out, results)


if __name__ == "__main__":
    main()
