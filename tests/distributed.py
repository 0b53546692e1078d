"""A one-line runner for multi-process tests: `run_distributed(function, world_size, *arguments)`."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


def run_distributed(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 300) -> list[Any]:
    """Calls `function(*arguments)` on `world_size` fresh processes with a rank's environment; returns each result.

    `function` must be importable (at the top of a module). What it raises on any rank is raised here, with that
    rank's traceback, and ends the others.
    """
    context = mp.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = context.Queue()
    processes = [
        context.Process(target=_call, args=(queue, rank, world_size, port, function, arguments), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: list[Any] = [None] * world_size
    try:
        for _ in range(world_size):
            rank, failure, result = queue.get(timeout=timeout)
            if failure:
                raise AssertionError(f"rank {rank}:\n{failure}")
            results[rank] = result
        for process in processes:
            process.join(timeout=60)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    return results


def _call(queue: Any, rank: int, world: int, port: int, function: Callable[..., Any], arguments: tuple) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        queue.put((rank, None, function(*arguments)))
    except BaseException:
        queue.put((rank, traceback.format_exc(), None))
