"""Training on processes of this machine: a configuration, random batches, an engine, and the processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from common import free_port

from megatron_mea.config import Config
from megatron_mea.config.load import parse_config, parse_model
from megatron_mea.data.corpora import Batch
from megatron_mea.exported.modeling_mea import MEAForCausalLM
from megatron_mea.huggingface.hf_config import to_hf_config


def layout(
    *, tensor: int = 1, pipeline: int = 1, context: int = 1, zero: int = 1, sequence: bool = False
) -> dict[str, Any]:
    """The section `parallel` of a configuration; `sequence`: with sequence parallelism."""
    return {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "context_parallel_size": context,
        "zero_stage": zero,
        "sequence_parallel": sequence,
    }


def make_config(*, model: dict, training: dict, parallel: dict, seq_length: int) -> Config:
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


def random_teacher(model: dict, folder: str | Path) -> dict:
    """Writes a Hugging Face folder with random weights and returns the section `training.distillation` that uses it."""
    MEAForCausalLM(to_hf_config(parse_model({"max_position_embeddings": 1024} | model))).save_pretrained(folder)
    return {"teacher": str(folder), "temperature": 2.0}


def new_engine(config: Config) -> Any:
    """The engine that `train` would make on this rank."""
    from megatron_mea.training.build import build_engine
    from megatron_mea.training.teacher import open_teacher

    return build_engine(config=config, device=torch.device("cpu"), teacher=open_teacher(config))


def random_batches(config: Config, engine: Any) -> list[Batch]:
    """This rank's micro-batches of a step, the same for all ranks of a data rank."""
    size, seq = config.training.micro_batch_size, config.data.seq_length
    generator = torch.Generator().manual_seed(engine.grid.data_rank)
    tokens = torch.randint(
        config.model.vocab_size, (engine.grid.dims.num_micro_batches, size, seq + 1), generator=generator
    ).numpy()

    positions = torch.arange(seq).expand(size, seq).numpy()
    return [Batch(input_ids=micro[:, :-1], position_ids=positions, targets=micro[:, 1:]) for micro in tokens]


def random_step(config: Config, engine: Any) -> Callable[[], Any]:
    """A training step of `engine` on random micro-batches, the same ones with every call; returns its StepResult."""
    batches = random_batches(config, engine)
    return partial(engine.train_step, batches, num_targets=config.tokens_per_step, lr=1e-3)


def launch(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Calls `function(*arguments)` on `world_size` fresh processes that have joined; the result of each rank."""
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    processes = mp.spawn(_rank, (world_size, free_port(), queue, function, arguments), world_size, join=False)
    results: dict[int, Any] = {}
    while not processes.join(timeout=1):
        _drain(queue, results)

    _drain(queue, results)
    return [results[rank] for rank in range(world_size)]


def _drain(queue: Any, results: dict[int, Any]) -> None:
    while not queue.empty():
        rank, result = queue.get()
        results[rank] = result


def _rank(  # noqa: PLR0917 - torch passes by position
    rank: int, world_size: int, port: int, queue: Any, function: Callable[..., Any], arguments: tuple
) -> None:
    """The body of a process of `launch`; torch passes the arguments by position."""
    from megatron_mea.training.distributed import start_distributed, stop_distributed
    from megatron_mea.training.rank_env import RankEnv

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    start_distributed(RankEnv.from_environment())
    queue.put((rank, function(*arguments)))
    sys.stdout.flush()
    stop_distributed()
