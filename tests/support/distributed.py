"""A runner for multi-process tests."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


def run_distributed(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 300) -> list[Any]:
    """Calls `function(*arguments)` on `world_size` new processes with a rank's environment; returns results by rank.

    `function` must be importable (at the top of a module).

    Raises:
        AssertionError: the traceback of the first rank that raised; the others are ended.
    """
    context = mp.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    queue = context.Queue()
    shared = {"queue": queue, "world_size": world_size, "port": port, "function": function, "arguments": arguments}
    processes = [
        context.Process(target=_call, kwargs=shared | {"rank": rank}, daemon=True) for rank in range(world_size)
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


def _call(*, queue: Any, rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple) -> None:
    """Puts (rank, traceback or None, result or None) into the queue."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        queue.put((rank, None, function(*arguments)))
    except BaseException:
        queue.put((rank, traceback.format_exc(), None))
