"""From a configuration to the engine of this rank: the grid, the layers it holds, and how they are trained."""

from __future__ import annotations

import torch

from megatron_mea.config import Config
from megatron_mea.huggingface.model_folder import StoredTensors
from megatron_mea.model.decoder import Decoder
from megatron_mea.model.moe import RouterLosses
from megatron_mea.model.stages import pipeline_stages
from megatron_mea.parallel.grid import Grid
from megatron_mea.parallel.parameter import init_parameters
from megatron_mea.training.distributed import build_grid
from megatron_mea.training.engine import Engine
from megatron_mea.training.pipeline import PipelineEngine
from megatron_mea.training.teacher import make_teacher


def router_losses(config: Config, grid: Grid) -> RouterLosses:
    """The auxiliary losses of a run's routers.

    Their gradients are averaged over data and context ranks and summed over micro-batches, whatever the loss is scaled
    by.
    """
    training = config.training
    return RouterLosses(
        balance=training.balance,
        balance_coef=0.0 if training.balance == "none" else config.model.router_aux_loss_coef,
        z_coef=training.router_z_loss_coef,
        gradient_scale=grid.dims.dp_cp / training.global_batch_size,
    )


def build_engine(
    config: Config, device: torch.device, *, initialized: bool = True, teacher: StoredTensors | None = None
) -> Engine:
    """The engine of this rank; collective.

    Args:
        initialized: fill the parameters from the seed; not needed where a checkpoint follows.
        teacher: as `open_teacher` opened it.
    """
    grid = build_grid(config)
    stage = pipeline_stages(config.model, grid.dims.pp, seq_length=config.data.seq_length)[grid.pipeline_rank]
    model = Decoder(
        config=config.model,
        tp=grid.tp,
        cp=grid.cp,
        stage=stage,
        document_mask=config.data.document_mask,
        activation_checkpointing=config.training.activation_checkpointing,
        compile_blocks=config.training.compile,
        fold_outside=grid.dims.folds_outside,
        router_losses=router_losses(config, grid),
    )
    if initialized:
        init_parameters(model, config.training.seed)

    make = PipelineEngine if grid.dims.pp > 1 else Engine
    return make(
        config=config,
        model=model,
        device=device,
        grid=grid,
        teacher=teacher and make_teacher(stored=teacher, config=config, grid=grid, device=device),
    )
