"""Parameters that several ranks hold alike must stay alike, bit for bit: a check that stops a run which drifts."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_mea.config.schema import Config
from megatron_mea.errors import RunError
from megatron_mea.model.decoder import Decoder
from megatron_mea.parallel.grid import Grid
from megatron_mea.parallel.parameter import named_specs


class ReplicaError(RunError):
    """Ranks hold different values of what should be one parameter."""


@torch.no_grad()
def check_replicas(model: Decoder, grid: Grid, config: Config) -> None:
    """Compares checksums of the parameters' bits over the ranks that hold the same; collective.

    These are tensor ranks, data ranks but for ZeRO 3, which partitions parameters, and of tied embeddings the first and
    the last pipeline stage.

    Raises:
        ReplicaError: on every rank; names the parameters where this rank takes part in the difference.
    """
    named = named_specs(model)
    sums = torch.stack([_checksum(getattr(parameter, "ds_tensor", parameter)) for parameter in named.values()])
    whole = torch.tensor([parameter.spec.shard_dim is None for parameter in named.values()], device=sums.device)
    differs = torch.zeros(len(named), dtype=torch.bool, device=sums.device)
    if config.parallel.zero_stage < 3:
        differs |= _differ(sums, grid.mpu.get_data_parallel_group())
    if grid.tensor.size > 1:
        differs |= _differ(sums, grid.tensor.group) & whole
    if grid.ends is not None and config.model.tie_word_embeddings:
        tied = list(named).index("model.embed_tokens.weight")
        differs[tied] |= _differ(sums[tied : tied + 1], grid.ends)[0]
    anywhere = differs.any().to(torch.int64)
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    if anywhere:
        names = [name for name, bad in zip(named, differs.tolist(), strict=True) if bad]
        found = f"differ between ranks: {', '.join(names)}" if names else "differ between other ranks"
        raise ReplicaError(f"replicated parameters {found}; the newest checkpoint may hold the drift already")


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Two sums over the bits of a tensor, one weighted by position."""
    bits = tensor.detach().flatten().view(torch.int16 if tensor.element_size() == 2 else torch.int32).to(torch.int64)
    position = torch.arange(bits.numel(), device=bits.device) % 65521 + 1
    return torch.stack([bits.sum(), (bits * position).sum()])


def _differ(sums: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(parameters,) whether the checksums (parameters, 2) are not the same on all ranks of a group."""
    lowest, highest = sums.clone(), sums.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    return (lowest != highest).any(1)
