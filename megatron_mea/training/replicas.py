"""A check that replicated parameters stay equal on all ranks, bit for bit; it stops a run that drifts."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_mea.config.schema import Config
from megatron_mea.errors import RunError
from megatron_mea.model.decoder import Decoder
from megatron_mea.parallel.grid import Grid
from megatron_mea.parallel.parameter import parameters_by_name
from megatron_mea.training.callbacks import Callback, TrainedStep
from megatron_mea.training.zero_state import stored_shard


class ReplicaError(RunError):
    """Ranks hold different values of what should be one parameter."""


class ReplicaCheck(Callback):
    """Checks every `interval` steps, before the weights are validated or saved; an interval of None: never."""

    def __init__(self, *, model: Decoder, grid: Grid, config: Config) -> None:
        self._arguments = {"model": model, "grid": grid, "config": config}
        self._interval = config.training.replica_check_interval

    def on_update(self, trained: TrainedStep) -> None:
        if self._interval and trained.step % self._interval == 0:
            check_replicas(**self._arguments)


@torch.no_grad()
def check_replicas(*, model: Decoder, grid: Grid, config: Config) -> None:
    """Compares checksums of the parameters' bits between the ranks that replicate them; collective.

    Replicas are on tensor ranks, on data ranks except with ZeRO 3, which shards parameters, and for tied embeddings on
    the first and the last pipeline stage.

    Raises:
        ReplicaError: on every rank; names the parameters where this rank takes part in the difference.
    """
    named = parameters_by_name(model)
    sums = torch.stack([_checksum(stored_shard(parameter)) for parameter in named.values()])
    is_replicated = torch.tensor([parameter.spec.shard_dim is None for parameter in named.values()], device=sums.device)

    differs = torch.zeros(len(named), dtype=torch.bool, device=sums.device)
    if not grid.dims.shards_parameters:
        differs |= _differ(sums, grid.mpu.get_data_parallel_group())
    if grid.tp.size > 1:
        differs |= _differ(sums, grid.tp.group) & is_replicated
    if grid.embedding_group is not None and config.model.tie_word_embeddings:
        tied = list(named).index("model.embed_tokens.weight")
        differs[tied] |= _differ(sums[tied : tied + 1], grid.embedding_group)[0]

    anywhere = differs.any().to(torch.int64)
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    if anywhere:
        names = [name for name, has_drifted in zip(named, differs.tolist(), strict=True) if has_drifted]
        problem = f"differ between ranks: {', '.join(names)}" if names else "differ between other ranks"
        raise ReplicaError(f"replicated parameters {problem}; the newest checkpoint may hold the drift already")


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    """(2,) int64: sums over the bits of a tensor, plain and weighted by position."""
    bits = tensor.detach().flatten().view(torch.int16 if tensor.element_size() == 2 else torch.int32).to(torch.int64)
    position = torch.arange(bits.numel(), device=bits.device) % 65521 + 1
    return torch.stack([bits.sum(), (bits * position).sum()])


def _differ(sums: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(parameters,) bool: whether checksums (parameters, 2) differ between the ranks of a group; collective."""
    lowest, highest = sums.clone(), sums.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    return (lowest != highest).any(1)
