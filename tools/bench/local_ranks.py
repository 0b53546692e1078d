"""What the benches share: a configuration, random batches, an engine, and processes on this machine."""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from megatron_mea.config import Config
from megatron_mea.config.load import parse_config, parse_model
from megatron_mea.data.corpora import Batch
from megatron_mea.huggingface.convert import to_hf_config
from megatron_mea.huggingface.modeling_mea import MEAForCausalLM


def make_config(model: dict, training: dict, parallel: dict, seq_length: int) -> Config:
    """A configuration whose data is never read."""
    return parse_config(
        {
            "model": {"max_position_embeddings": max(seq_length, 128)} | model,
            "data": {
                "tokenizer": "none",
                "train": [{"path": "none"}],
                "seq_length": seq_length,
                "document_mask": False,
            },
            "training": {"steps": 100, "precision": "fp32"} | training,
            "schedule": {"warmup_steps": 2},
            "parallel": parallel,
            "run": {"dir": "none"},
        }
    )


def facts() -> dict[str, Any]:
    """What a measurement was made with."""
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


def random_teacher(model: dict, folder: str | Path) -> dict:
    """Writes a Hugging Face folder with random weights, for `training.distillation`."""
    MEAForCausalLM(to_hf_config(parse_model({"max_position_embeddings": 1024} | model))).save_pretrained(folder)
    return {"teacher": str(folder), "temperature": 2.0}


def new_engine(config: Config) -> Any:
    """The engine that `train` would make on this rank."""
    from megatron_mea.training.build import build_engine
    from megatron_mea.training.teacher import open_teacher

    return build_engine(config, torch.device("cpu"), teacher=open_teacher(config))


def random_batches(config: Config, engine: Any) -> list[Batch]:
    """This rank's micro-batches of a step."""
    size, seq = config.training.micro_batch_size, config.data.seq_length
    generator = torch.Generator().manual_seed(engine.grid.data_rank)
    tokens = torch.randint(config.model.vocab_size, (engine.accumulation, size, seq + 1), generator=generator).numpy()
    positions = torch.arange(seq).expand(size, seq).numpy()
    return [Batch(micro[:, :-1], positions, micro[:, 1:]) for micro in tokens]


def launch(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """`function(*arguments)` on `world_size` fresh processes that have joined; the result of each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    started = mp.spawn(_rank, (world_size, port, queue, function, arguments), world_size, join=False)
    results = {}
    while not started.join(timeout=1):
        while not queue.empty():
            rank, result = queue.get()
            results[rank] = result
    while not queue.empty():
        rank, result = queue.get()
        results[rank] = result
    return [results[rank] for rank in range(world_size)]


def _rank(rank: int, world: int, port: int, queue: Any, function: Callable[..., Any], arguments: tuple) -> None:
    from megatron_mea.training.processes import start_distributed, stop_distributed
    from megatron_mea.training.ranks import Ranks

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    start_distributed(Ranks.from_environment())
    queue.put((rank, function(*arguments)))
    sys.stdout.flush()
    stop_distributed()
