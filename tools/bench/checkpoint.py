"""Measures what a save costs the training, how large a checkpoint is, and how long saving and loading take.

    OMP_NUM_THREADS=1 python tools/bench/checkpoint.py [--rounds 5] [--only stall size] [--out checkpoint.json]

The stall compares, in turn in one run, blocks of steps without a save, with one behind the training and with one that
training waits for. Sizes and times are of a larger model, by layout; reading finds the files in the page cache.
"""

from __future__ import annotations

import argparse
import json
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
from local_ranks import facts, launch, make_config, new_engine, random_batches

from megatron_mea.checkpoint.folder import Meta, checkpoints_of, damage
from megatron_mea.checkpoint.saver import Saver
from megatron_mea.checkpoint.tensors import read_fragments, tensor_shapes
from megatron_mea.config import Config
from megatron_mea.config.load import load_config
from megatron_mea.config.schema import Checkpoint
from megatron_mea.training.processes import writers_group

ROOT = Path(__file__).parents[2]
BLOCK = 20
"""Steps, of which the first begins with a save."""
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
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "1 process": (1, {}),
    "dp 2, ZeRO 1": (2, {}),
    "dp 2, ZeRO 3": (2, {"zero_stage": 3}),
    "tp 2": (2, {"tensor_model_parallel_size": 2}),
    "pp 2": (2, {"pipeline_model_parallel_size": 2}),
    "tp 2 x pp 2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}


def new_saver(run_dir: Path, **settings: Any) -> Saver:
    tokenizer = run_dir / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    return Saver(run_dir, Checkpoint(keep=1, **settings), tokenizer, writers_group(), None, lambda line: None)


def described(step: int) -> Meta:
    return Meta(step, 0, 0, {}, [], {}, {}, None)


def timed(work: Callable[[], Any]) -> float:
    dist.barrier()
    begin = time.monotonic()
    work()
    dist.barrier()
    return time.monotonic() - begin


def stall(config: Config, root: Path, rounds: int) -> list[dict[str, float]]:
    """Seconds of a block of steps by kind of save, and of the call of `save` alone."""
    engine = new_engine(config)
    batches = random_batches(config, engine)
    targets = config.training.global_batch_size * config.data.seq_length
    savers = {"behind": new_saver(root / "behind"), "blocking": new_saver(root / "blocking", async_save=False)}
    step = 0

    def block(kind: str) -> None:
        nonlocal step
        if kind in savers:
            begin = time.monotonic()
            savers[kind].save(described(step), engine.fragments(owned=True))
            seconds[f"{kind}, the call"] = time.monotonic() - begin
        for _ in range(BLOCK):
            step += 1
            engine.train_step(batches, targets, 1e-3)

    found = []
    for round_ in range(rounds + 1):
        seconds: dict[str, float] = {}
        for kind in ("none", "behind", "blocking"):
            seconds[kind] = timed(lambda kind=kind: block(kind))
            if kind == "behind":
                # What is not written by now would be missing in the figures.
                seconds["late"] = timed(savers[kind].wait)
        # The first round warms up.
        if round_:
            found.append(seconds)
    return found


def bench_stall(root: Path, rounds: int) -> list[dict[str, float]]:
    config = load_config(ROOT / "configs/quickstart.yaml", ["data.document_mask=false"])
    found = launch(stall, 2, config, root, rounds)[0]
    middle = {kind: statistics.median(one[kind] for one in found) for kind in found[0]}
    step = middle["none"] / BLOCK
    print(f"quickstart model, 2 processes, a step takes {step:.3f} s; medians of {rounds} rounds of {BLOCK} steps")
    print(f"late at the end of the block: {middle['late']:.3f} s at the median\n")
    print("| save | the call | lost in all | in steps |\n| --- | --- | --- | --- |")
    for kind in ("behind", "blocking"):
        lost = statistics.median(one[kind] - one["none"] for one in found)
        print(f"| {kind} | {middle[f'{kind}, the call']:.3f} s | {lost:.3f} s | {lost / step:.2f} |")
    print()
    return found


def save_and_load(config: Config, root: Path) -> dict[str, float]:
    """Seconds of copying, of the whole save, and of verifying and loading."""
    engine = new_engine(config)
    saver = new_saver(root)
    saver.save(described(1), engine.fragments(owned=True))
    saver.wait()
    dist.barrier()
    began = time.monotonic()
    copying = timed(lambda: saver.save(described(2), engine.fragments(owned=True)))
    saver.wait()
    dist.barrier()
    saving = time.monotonic() - began
    folder = checkpoints_of(root)[-1][1]

    def load() -> None:
        assert damage(folder, dist.get_rank(), dist.get_world_size()) is None
        read_fragments(folder, engine.fragments())
        engine.loaded(2)

    return {"copying": copying, "saving": saving, "loading": timed(load)}


def bench_size(root: Path) -> list[dict[str, Any]]:
    rows = []
    print("| layout | parameters | bytes | of 12 a parameter | copied in | saved in | verified and loaded in |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, (world, parallel) in LAYOUTS.items():
        config = make_config(LARGE, {"global_batch_size": 4, "micro_batch_size": 1}, parallel, 64)
        place = root / name.replace(" ", "-")
        seconds = launch(save_and_load, world, config, place)[0]
        folder = checkpoints_of(place)[-1][1]
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        numbers = sum(map(prod, tensor_shapes(folder).values()))
        rows.append({"layout": name, "parameters": numbers // 3, "bytes": size, "seconds": seconds})
        times = " | ".join(f"{each:.2f} s" for each in seconds.values())
        print(f"| {name} | {numbers // 3:,} | {size:,} | {size / (4 * numbers):.4f} | {times} |", flush=True)
        shutil.rmtree(place)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=("stall", "size"), default=("stall", "size"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        if "stall" in arguments.only:
            results["stall"] = {"steps": BLOCK, "seconds": bench_stall(Path(name), arguments.rounds)}
        if "size" in arguments.only:
            results["size"] = {"model": LARGE, "layouts": bench_size(Path(name))}
    if arguments.out:
        arguments.out.write_text(json.dumps(facts() | results, indent=1) + "\n")


if __name__ == "__main__":
    main()
