"""Floating-point operations of training, from those of a layer's forward pass (model/flops.py)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mea.config.schema import Side
from megatron_mea.model.flops import block_flops_without_kv, head_flops, kv_flops
from megatron_mea.plan.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs a token of the full model, all ranks together.

    Work that all ranks of a tensor or context group repeat counts once. `recomputation` is a second forward pass of the
    blocks, or of their attention, with activation checkpointing; `teacher` the forward pass of another model.
    """

    forward: float
    backward: float
    recomputation: float
    teacher: float = 0.0

    @property
    def total(self) -> float:
        """FLOPs a token of everything that a training step does."""
        return self.forward + self.backward + self.recomputation + self.teacher


def flops_per_token(workload: Workload) -> Flops:
    """Forward 2 x matrix parameters + attention + head combination; backward twice that (Kaplan, arXiv 2001.08361).

    Of experts a token uses those that it chooses.
    """
    layers = range(workload.model.num_hidden_layers)
    blocks = sum(block_flops(workload, layer) for layer in layers)
    forward = blocks + head_flops(workload.model)
    teacher = flops_per_token(workload.teacher).forward if workload.teacher else 0.0

    return Flops(
        forward=forward,
        backward=2 * forward,
        recomputation=sum(_recomputed_flops(workload, layer) for layer in layers),
        teacher=teacher,
    )


def _recomputed_flops(workload: Workload, layer: int) -> float:
    """FLOPs a token that one block repeats in its backward pass."""
    if workload.selective_recompute:
        return attention_flops(workload) + sum(
            combination_flops(workload=workload, layer=layer, side=side)
            for side in ("k", "v")
            if workload.kv_projection(layer, side).form == "components"
        )
    if not workload.full_recompute:
        return 0.0

    # Recomputation ends with the last tensor that is needed: the input of down_proj, or an expert's output, which is
    # needed for the gradient of its weight.
    is_routed = workload.model.is_routed(layer)
    down_proj = 0 if is_routed else 2 * workload.model.hidden_size * workload.model.intermediate_size
    folds = (
        sum(fold_flops(workload=workload, layer=layer, side=side) for side in ("k", "v"))
        if workload.folds_outside_recompute
        else 0.0
    )
    return block_flops(workload, layer) - folds - down_proj


def stage_flops(workload: Workload) -> tuple[float, ...]:
    """FLOPs a token of every pipeline stage, its tensor and context ranks together, without a teacher's."""
    head = 3 * head_flops(workload.model)
    return tuple(
        sum(3 * block_flops(workload, layer) + _recomputed_flops(workload, layer) for layer in stage.blocks)
        + head * stage.has_head
        for stage in workload.stages
    )


def block_flops(workload: Workload, layer: int) -> float:
    """FLOPs a token of one block's forward pass."""
    seq_length = workload.config.data.seq_length
    keys_and_values = sum(kv_projection_flops(workload=workload, layer=layer, side=side) for side in ("k", "v"))
    return block_flops_without_kv(workload.model, layer, seq_length=seq_length) + keys_and_values


def attention_flops(workload: Workload) -> float:
    """FLOPs a token of one layer's scores and weighted values."""
    return workload.core_attention.flops_per_token(workload.model, workload.config.data.seq_length)


def kv_projection_flops(*, workload: Workload, layer: int, side: Side) -> float:
    """FLOPs a token of one layer's keys or values: a projection, and its head combination in the form that runs.

    Folded (paper eq. 18) h h' d (hidden + bias) multiplications a micro-batch, or a step, and a projection to h heads;
    combined (eq. 10) a projection to h' heads and h h' d multiplications a token.
    """
    combines = workload.kv_projection(layer, side).form in ("combined", "components")
    projection = kv_flops(workload.model, layer, side=side, mixes=combines)
    return projection + fold_flops(workload=workload, layer=layer, side=side)


def combination_flops(*, workload: Workload, layer: int, side: Side) -> float:
    """FLOPs a token of combining one layer's component heads of keys or values, where they are not folded."""
    return 2 * workload.kv_projection(layer, side).combination_products


def fold_flops(*, workload: Workload, layer: int, side: Side) -> float:
    """FLOPs a token of folding one layer's keys or values; 0 where they are not folded."""
    model, projection = workload.model, workload.kv_projection(layer, side)
    if projection.form != "folded":
        return 0.0

    columns = model.hidden_size + (1 if model.attention_bias else 0)
    tokens = workload.tokens * (workload.dims.num_micro_batches if workload.folds_once_per_step else 1)
    return 2 * projection.combination_products * columns / tokens
