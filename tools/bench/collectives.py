"""Counts what every collective carries: each of torch's passes its dispatcher, whoever calls it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

SCALARS = 3
"""Calls with so few numbers carry norms, losses and flags: `plan` leaves them out, and so does the counter."""

Counts = dict[tuple[str, str], tuple[int, int]]
"""(group, collective): calls, bytes."""


class CollectiveCounter(TorchDispatchMode):
    """Counts calls and payload bytes by (group, collective); `classify` names a group by its ranks, None leaves it out.

    Payload is the tensor given to all_reduce and send, the output of all_gather, the input of reduce_scatter.
    """

    # Name of the operation, of the collective, and which argument is the whole.
    OPERATIONS: ClassVar[dict[str, tuple[str, int]]] = {
        "allreduce_": ("all_reduce", 0),
        "_allgather_base_": ("all_gather", 0),
        "allgather_": ("all_gather", 0),
        "_reduce_scatter_base_": ("reduce_scatter", 1),
        "reduce_scatter_": ("reduce_scatter", 1),
        "allgather_into_tensor_coalesced_": ("all_gather", 0),
        "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
        "broadcast_": ("broadcast", 0),
        "reduce_": ("reduce", 0),
        "send": ("send", 0),
    }
    IGNORED = ("recv_", "barrier", "monitored_barrier_")

    def __init__(self, classify: Callable[[list[int]], str | None]) -> None:
        super().__init__()
        self.classify = classify
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.all_calls = 0

    @property
    def counts(self) -> Counts:
        return {key: (self.calls[key], self.bytes[key]) for key in self.calls}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function.namespace == "c10d":
            self._count(function._schema.name.removeprefix("c10d::"), args)
        return function(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        if name in self.IGNORED:
            return
        collective, whole = self.OPERATIONS[name]
        group = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
        ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
        key = (self.classify(ranks) if collective != "send" else "pipeline", collective)
        tensors = _flat(args[whole])
        self.all_calls += 1
        if key[0] is not None and sum(tensor.numel() for tensor in tensors) > SCALARS:
            self.calls[key] += 1
            self.bytes[key] += sum(tensor.nbytes for tensor in tensors)


def _flat(tensors: Any) -> list[torch.Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else [each for part in tensors for each in _flat(part)]


def group_of(engine: Any, ranks: list[int]) -> str | None:
    """tensor, data or pipeline: by what distinguishes the ranks; world where several things do; None of one rank."""
    if len(ranks) == 1:
        return None
    tensor, data = engine.grid.tensor.size, engine.grid.data_size
    places = [(rank % tensor, rank // tensor % data, rank // (tensor * data)) for rank in ranks]
    differ = [len(set(axis)) > 1 for axis in zip(*places, strict=True)]
    return ("tensor", "data", "pipeline")[differ.index(True)] if sum(differ) == 1 else "world"
