"""Counts calls and bytes of collectives: all of torch's pass its dispatcher, whoever calls them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

SCALARS = 3
"""Calls with so few elements carry norms, losses and flags: `plan` leaves them out, and so does the counter.

Float64 carries the counts of routers beside them.
"""

Counts = dict[tuple[str, str], tuple[int, int]]
"""(group, collective): calls, bytes."""


class CollectiveCounter(TorchDispatchMode):
    """Counts calls and payload bytes by (group, collective); `classify` names a process group, None leaves it out.

    Payload is the tensor given to all_reduce and send, the output of all_gather, the input of reduce_scatter.
    """

    # Operation: name of the collective, and index of the argument that is the full tensor.
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

    def __init__(self, classify: Callable[[dist.ProcessGroup], str | None]) -> None:
        super().__init__()
        self.classify = classify
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.all_calls = 0

    @property
    def counts(self) -> Counts:
        """Calls and bytes so far."""
        return {key: (self.calls[key], self.bytes[key]) for key in self.calls}

    def __torch_dispatch__(  # noqa: PLR0917 - torch passes by position
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function.namespace == "c10d":
            self._count(function._schema.name.removeprefix("c10d::"), args)
        return function(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        if name in self.IGNORED:
            return

        collective, position = self.OPERATIONS[name]
        group = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
        group_name = "pipeline" if collective == "send" else self.classify(dist.ProcessGroup.unbox(group))
        tensors = _flatten(args[position])
        self.all_calls += 1

        is_statistics = sum(tensor.numel() for tensor in tensors) <= SCALARS or tensors[0].dtype == torch.float64
        if group_name is not None and not is_statistics:
            key = (group_name, collective)
            self.calls[key] += 1
            self.bytes[key] += sum(tensor.nbytes for tensor in tensors)


def _flatten(tensors: Any) -> list[torch.Tensor]:
    """The tensors of a tensor, or of nested sequences of tensors."""
    if isinstance(tensors, torch.Tensor):
        return [tensors]
    return [tensor for part in tensors for tensor in _flatten(part)]


def classify_group(engine: Any, group: dist.ProcessGroup) -> str | None:
    """tensor, data or pipeline: the coordinate in which the ranks differ; world if several, None for a single rank.

    Context ranks are data ranks to all groups but the context group, which may have the same ranks as the data group.
    """
    if group == engine.grid.cp.group:
        return "context"
    ranks = dist.get_process_group_ranks(group)
    if len(ranks) == 1:
        return None

    tensor, data = engine.grid.dims.tp, engine.grid.dims.dp_cp
    coordinates = [(rank % tensor, rank // tensor % data, rank // (tensor * data)) for rank in ranks]
    differ = [len(set(axis)) > 1 for axis in zip(*coordinates, strict=True)]
    return ("tensor", "data", "pipeline")[differ.index(True)] if sum(differ) == 1 else "world"
