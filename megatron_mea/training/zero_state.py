"""Where DeepSpeed keeps a parameter, its master weight and its optimizer state, and what its pipeline knows of ours.

DeepSpeed 0.19.8 does not promise to keep the attributes that this takes: no other module of ours names one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_mea.checkpoint.tensors import Fragment
from megatron_mea.config.parallel_dims import ParallelDims
from megatron_mea.errors import RunError
from megatron_mea.model.decoder import Decoder
from megatron_mea.optimizers import initial_state, optimizer_of, single_optimizer, state_tensor_name
from megatron_mea.parallel.grid import Grid
from megatron_mea.parallel.parameter import parameters_by_name


class ZeroState:
    """The float32 master weights and the optimizer state of this rank, under any ZeRO stage.

    The optimizer's state exists before the first update: DeepSpeed links its view of each parameter to it after the
    update of the first parameter group, when the others have none yet, and theirs would stay out of reach.

    Args:
        zero_optimizer: the optimizer that deepspeed.initialize returns.
        model: this rank's part, whose parameters it trains.
        dims: the layout.
    """

    def __init__(self, zero_optimizer: Any, *, model: Decoder, dims: ParallelDims) -> None:
        self._zero, self._parameters = zero_optimizer, parameters_by_name(model)
        self._shards_parameters = dims.shards_parameters
        self._optimizer: torch.optim.Optimizer = zero_optimizer.optimizer
        self._check_partitioning_groups(dims)

        if dims.shards_parameters:
            partitions = zero_optimizer.fp32_partitioned_groups_flat
        else:
            partitions = [partition for group in self._optimizer.param_groups for partition in group["params"]]

        optimizer = single_optimizer(self._parameters.values())
        fused = any(group.get("fused") for group in self._optimizer.param_groups)
        for partition in partitions:
            step_device = partition.device if fused else torch.device("cpu")
            self._optimizer.state[partition] = initial_state(optimizer, partition, step_device=step_device)

        if not dims.shards_parameters:
            zero_optimizer._lazy_init_hp_params_optimizer_state()

    def _check_partitioning_groups(self, dims: ParallelDims) -> None:
        """Raises a RunError unless ZeRO partitions over all ranks with the same parameters.

        Over fewer it trains wrong numbers, and says nothing.
        """
        if dims.shards_parameters:
            groups = [parameter.ds_process_group for parameter in self._parameters.values()]
        else:
            groups = self._zero.real_dp_process_group

        sizes = {dist.get_world_size(group) for group in groups}
        if sizes != {dims.dp_cp}:
            found = " and ".join(map(str, sorted(sizes)))
            raise RunError(f"DeepSpeed partitions over {found} ranks, and not over data x context = {dims.dp_cp}")

    @property
    def skipped_update(self) -> bool:
        """Whether DeepSpeed left out the last update, since a gradient was not finite; it says nothing."""
        return self._zero.overflow

    def fragments(self, *, optimizer_state: bool = True, owned: bool = False) -> Iterator[Fragment]:
        """Views of the master weights and the optimizer state that this rank holds; not collective.

        Args:
            optimizer_state: include it.
            owned: only those that this rank saves, so that all ranks together yield every element once.
        """
        for index, (name, parameter) in enumerate(self._parameters.items()):
            spec = parameter.spec
            # Tensor ranks take turns in saving replicated parameters; a tied matrix is saved by the first stage.
            is_saver = spec.shard_dim is not None or index % spec.tp.size == spec.tp.rank
            if owned and not (is_saver and not getattr(parameter, "ds_pipe_replicated", False)):
                continue

            for state in (None, *optimizer_of(spec).state) if optimizer_state else (None,):
                start, values = self._local_values(parameter, state)
                yield Fragment(
                    name=state_tensor_name(state, name) if state else name,
                    global_shape=spec.global_shape,
                    global_offset=spec.global_offset,
                    local_shape=spec.local_shape,
                    start=start,
                    values=values,
                )

    def sync_after_load(self, step: int) -> None:
        """After loading the `fragments` of a step: refreshes the weights, sets the count of steps; collective."""
        for parameter_state in self._optimizer.state.values():
            if "step" in parameter_state:
                parameter_state["step"].fill_(step)

        if not self._shards_parameters:
            self._zero.update_lp_params()
            return

        for parameter in self._parameters.values():
            _, master = self._local_values(parameter, None)
            parameter.ds_tensor.data.view(-1)[: len(master)].copy_(master)

        # ZeRO 3 leaves small parameters gathered between the steps.
        if persistent := self._zero.persistent_parameters:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def full_weight(self, name: str) -> torch.Tensor:
        """The full master weight of a parameter; collective over the stage's ranks."""
        from deepspeed.utils import safe_get_full_fp32_param

        parameter = self._parameters[name]
        return parameter.spec.full_tensor(safe_get_full_fp32_param(parameter))

    def _local_values(self, parameter: nn.Parameter, state: str | None) -> tuple[int, torch.Tensor]:
        """(index of the first element, values) of this rank's part of a flattened parameter; the values may be empty.

        Args:
            state: a name of the optimizer's state; None: the master weights.
        """
        if self._shards_parameters:
            values, _ = self._zero._get_fp32_opt_state_partition(
                parameter, release_swap_buffers=False, optim_state_key=state
            )
            start = parameter.ds_tensor.numel() * self._zero._get_param_partition_rank(parameter)
            # The last partitions are padded.
            return start, values.data[: max(0, parameter.ds_numel - start)]

        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, torch.empty(0, device=parameter.device)

        return mapping.lp_fragment_address.start, mapping.get_hp_fragment(state).data


def stored_shard(parameter: nn.Parameter) -> torch.Tensor:
    """What this rank keeps of a parameter between the passes: all of it, or with ZeRO 3 its partition."""
    return getattr(parameter, "ds_tensor", parameter)


def stored_start(parameter: nn.Parameter) -> int:
    """Index in this rank's flattened parameter of the first element of `stored_shard`."""
    partition = getattr(parameter, "ds_tensor", None)
    return 0 if partition is None else partition.numel() * parameter.ds_zero_partition_rank


def pipeline_module(
    stage: nn.Module, *, grid: Grid, loss: Callable[..., torch.Tensor], tied_weight: nn.Parameter | None
) -> nn.Module:
    """DeepSpeed's pipeline of which this rank runs `stage`.

    Args:
        loss: outputs of the last stage and targets -> scalar.
        tied_weight: this rank's copy of a matrix that the first and the last stage hold; None where it has none.
    """
    from deepspeed.pipe import PipelineModule

    # DeepSpeed takes the layers of all stages and picks those of this rank. Ours are built stage by stage, so it picks
    # one entry of this list and ignores the others.
    stages = [stage] * grid.dims.pp
    module = PipelineModule(stages, topology=grid.mpu.topology(), loss_fn=loss, partition_method="uniform")

    tied_weights = []
    if tied_weight is not None:
        tied_weights = [(tied_weight, grid.embedding_group)]
        # So that DeepSpeed's gradient norm counts the matrix once.
        tied_weight.ds_pipe_replicated = grid.is_last_stage

    # DeepSpeed ties layers; here a single matrix is tied.
    module.get_tied_weights_and_groups = lambda: tied_weights
    return module
